"""`scalegmn explain --checkpoint RUN NET`: which neurons and weights a prediction rests on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.cli.zoo.export import refuse_zoos
from scalegmn.experiments.predict import input_options, with_frequencies
from scalegmn.experiments.trained import load
from scalegmn.explore.attribution import METHODS
from scalegmn.explore.explain import default_method, explain, open_reference, require_answers
from scalegmn.interop.network_files import KINDS, find_sources, read_source
from scalegmn.interop.torch_modules import ExampleInput
from scalegmn.reporting.figures import explanation


def run(words: Sequence[str]) -> None:
    """Prints the table or JSON; draws the figure if one is asked for."""
    values = _parser().read(words)
    model = load(values.checkpoint)
    require_answers(model)
    if values.figure is not None and values.figure.suffix != ".png":
        raise ValueError(f"--figure: found {values.figure}, expected a file .png")
    if values.figure is not None and values.figure.exists():
        raise ValueError(f"--figure: {values.figure} exists already; choose another")
    refuse_zoos([values.net])
    layers = None if values.layers is None else tuple(values.layers.split(","))
    options = input_options(model, values.activation, ExampleInput.parse(values.input_shape, values.words), layers)
    sources, passed_over = find_sources([values.net])
    if len(sources) != 1:
        raise ValueError(f"NET: {values.net} holds {len(sources)} networks, expected one; name its file")
    params, assumed = read_source(sources[0].name, options)
    for note in (*passed_over, *(f"{sources[0].name}: {sentence}" for sentence in assumed)):
        print(f"note: {note}", file=sys.stderr)
    if sources[0].is_state_dict:
        params = with_frequencies(params, model)
    method = values.method or ("integrated" if values.reference else default_method(model))
    zoo = open_reference(model, values.reference) if method == "integrated" else None
    try:
        result = explain(model, params, zoo, values.output)
    except ValueError:
        trained = input_options(model).activation
        if trained is None or values.activation in (None, trained):
            raise
        found = f"--activation: found {values.activation}, expected {trained}"
        raise ValueError(f"{found} as in the networks that {values.checkpoint} was trained on; leave it out") from None
    if values.format == "json":
        print(json.dumps({"network": sources[0].name, **result.content()}, indent=2))
    else:
        print(result.table())
    if values.figure is not None:
        values.figure.parent.mkdir(parents=True, exist_ok=True)
        explanation(
            values.figure,
            [neurons[0].numpy() for neurons in result.attribution.neurons()[:-1]],
            result.curve.numpy(),
            result.random.numpy(),
            result.meaning,
        )


def _parser() -> Arguments:
    parser = Arguments("scalegmn explain", "Show which neurons and weights of a network a prediction rests on.")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="the folder of a finished run, or a bundle")
    parser.add_argument("net", metavar="NET", help=f"a file {KINDS}, or package.module:factory, which is run")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="gradients integrated from the mean canonical network (the default for classes), or gradient x weight "
        "(the default for accuracies)",
    )
    parser.add_argument("--output", type=int, metavar="N", help="explain output N, from 0; default: the largest")
    parser.add_argument("--reference", type=Path, metavar="ZOO", help="whose mean is meant; default: the run's zoo")
    parser.add_argument("--activation", metavar="NAME", help="of a state dict; default: that of the training networks")
    parser.add_argument("--layers", help="the layers of a state dict in their order: a,b,c")
    parser.add_example_input()
    parser.add_argument("--format", choices=("table", "json"), default="table", help="of the result (table)")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw contributions and deletion curves there")
    return parser
