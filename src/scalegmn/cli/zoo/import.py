"""`scalegmn zoo import NET... --labels FILE --out FOLDER`: a zoo of one's own networks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.cli.zoo.export import refuse_zoos
from scalegmn.experiments.imported_zoo import Table, import_zoo
from scalegmn.interop.network_files import KINDS, InputOptions, find_sources
from scalegmn.interop.torch_modules import ExampleInput
from scalegmn.networks import ACTIVATIONS
from scalegmn.reporting.words import counted

NOT_TOLD = {
    "sine": "the frequency of their sines: taken as 30; --w0 sets another",
    "leaky_relu": "the slope of their leaky relus: taken as 0.01; name another as the activation 'leaky_relu(0.2)'",
    "gelu": "whether their gelus are exact: taken as exact; the activation 'gelu(tanh)' is the approximation",
}
"""Activation of state dicts -> what they leave open about it, and what is assumed."""


def run(words: Sequence[str]) -> None:
    """Writes the zoo, and prints what was assumed, left out and made."""
    values = _parser().read(words)
    if not (values.val_fraction > 0 and values.test_fraction > 0 and values.val_fraction + values.test_fraction < 1):
        found = f"{values.val_fraction:g} and {values.test_fraction:g}"
        raise ValueError(f"--val_fraction, --test_fraction: found {found}, expected positive with a sum below 1")
    if values.activation is not None and values.activation not in ACTIVATIONS:
        raise ValueError(f"--activation: found {values.activation}, expected one of {', '.join(ACTIVATIONS)}")
    layers = None if values.layers is None else tuple(values.layers.split(","))
    w0 = 30.0 if values.w0 is None else values.w0
    options = InputOptions(values.activation, w0, ExampleInput.parse(values.input_shape, values.words), layers)
    refuse_zoos(values.nets)
    sources, notes = find_sources(values.nets)
    fractions = {"val": values.val_fraction, "test": values.test_fraction}
    zoo, assumed = import_zoo(sources, Table.read(values.labels), options, values.out, fractions, values.seed)
    activations = {layer.activation for params in zoo.nets for layer in params.spec.layers}
    if any(source.is_state_dict for source in sources):
        unsaid = activations - ({"sine"} if values.w0 is not None else set())
        assumed += [f"state dicts do not tell {what}" for name, what in NOT_TOLD.items() if name in unsaid]
    for note in (*notes, *assumed):
        print(f"note: {note}", file=sys.stderr)
    if zoo.classes is not None:
        print(f"note: classes, from 0: {', '.join(zoo.classes)}", file=sys.stderr)
    empty = [name for name, rows in zoo.splits.items() if not len(rows)]
    if empty:
        print(f"note: no networks for {', '.join(empty)}; training needs some of each split", file=sys.stderr)
    counts = ", ".join(f"{len(rows):,} {name}" for name, rows in zoo.splits.items())
    kinds = str(zoo.nets[0].spec) if len(zoo.nets) == 1 else f"{len(zoo.nets):,} architectures"
    print(f"{zoo.path}: {counted(len(zoo), 'network')} ({counts}), {kinds}")


def _parser() -> Arguments:
    parser = Arguments("scalegmn zoo import", "Write a zoo of networks in files, with their labels or scores.")
    parser.add_argument("nets", nargs="+", metavar="NET", help=f"a file {KINDS}, or a folder of them")
    parser.add_argument(
        "--labels",
        type=Path,
        required=True,
        metavar="FILE",
        help="CSV: name, label (a class) or score (from 0 to 1), and perhaps split (train, val, test), group (networks "
        "of one group, such as of one image, are in one split) and activation",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the zoo")
    parser.add_argument("--activation", metavar="NAME", help="activation of state dicts that the table does not tell")
    parser.add_argument("--w0", type=float, help="frequency of their sines, sin(w0 (W x + b)) (30)")
    parser.add_argument("--layers", help="the layers of state dicts in their order, where files do not tell: a,b,c")
    parser.add_example_input()
    parser.add_argument("--val_fraction", type=float, default=0.1, help="share for validation, without splits (0.1)")
    parser.add_argument("--test_fraction", type=float, default=0.2, help="share for testing, without splits (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their choice (0)")
    return parser
