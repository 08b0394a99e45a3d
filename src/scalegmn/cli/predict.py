"""`scalegmn predict --checkpoint RUN NET...`: a trained model applied to networks in files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalegmn.cli.arguments import Arguments
from scalegmn.cli.zoo.export import refuse_zoos
from scalegmn.experiments.predict import input_options, notes_of, predict, table
from scalegmn.experiments.trained import load
from scalegmn.interop.network_files import KINDS, find_sources
from scalegmn.interop.torch_modules import ExampleInput
from scalegmn.networks import ACTIVATIONS
from scalegmn.reporting.files import write_atomic
from scalegmn.reporting.words import counted


def run(words: Sequence[str]) -> None:
    """Prints or writes the results; a network that cannot be read is named in a line on stderr, and the exit code is 2
    after the others' results."""
    values = _parser().read(words)
    model, out = load(values.checkpoint), values.out
    editing = model.task_class.output == "parameters"
    if editing and out is None:
        raise ValueError("--out: missing; name the folder for the edited networks")
    if not editing and out is not None and out.exists():
        raise ValueError(f"--out: {out} exists already; choose another")
    refuse_zoos(values.nets)
    # modules of the run are imported now, so that activations of the user's own are known
    if values.activation is not None and (values.activation == "identity" or values.activation not in ACTIVATIONS):
        raise ValueError(f"--activation: found {values.activation}, expected one of {', '.join(_activations())}")
    layers = None if values.layers is None else tuple(values.layers.split(","))
    options = input_options(model, values.activation, ExampleInput.parse(values.input_shape, values.words), layers)
    sources, passed_over = find_sources(values.nets)
    rows, problems = predict(model, sources, options, out)
    text = table(rows) if values.format == "table" else json.dumps(rows, indent=2) + "\n"
    if out is None or editing:
        print(text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text)
        print(f"{out}: {counted(len(rows), 'network')}")
    _finish(rows, problems, passed_over)


def _finish(rows: Sequence[dict[str, Any]], problems: Sequence[str], passed_over: Sequence[str]) -> None:
    """Prints notes, warnings and errors, and ends the process."""
    for note in (*passed_over, *notes_of(rows)):
        print(f"note: {note}", file=sys.stderr)
    for row in rows:
        for warning in row["warnings"]:
            print(f"warning: {row['network']}: {warning}; the answer may be far off", file=sys.stderr)
    for problem in problems:
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    sys.exit(2 if problems else 0)


def _activations() -> list[str]:
    """The names of activations that state dicts may have."""
    return [name for name in ACTIVATIONS if name != "identity"]


def _parser() -> Arguments:
    parser = Arguments("scalegmn predict", "Apply a trained model to networks in files.")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="the folder of a finished run, or a bundle")
    parser.add_argument(
        "nets",
        nargs="+",
        metavar="NET",
        help=f"a file {KINDS}, a folder of them, or package.module:factory, which is run",
    )
    parser.add_argument(
        "--activation",
        metavar="NAME",
        help=f"activation of state dicts: {', '.join(_activations())}; default: that of the training networks",
    )
    parser.add_argument(
        "--layers", help="the layers of state dicts in their order, where the file does not tell: a,b,c"
    )
    parser.add_example_input()
    parser.add_argument("--format", choices=("table", "json"), default="table", help="of the results (table)")
    parser.add_argument(
        "--out", type=Path, help="the folder of edited networks; for other tasks a file for the results (stdout)"
    )
    return parser
