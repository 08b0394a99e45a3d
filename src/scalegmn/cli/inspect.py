"""`scalegmn inspect FACTORY --input_shape SHAPE`: how a module is read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from scalegmn.cli.arguments import Arguments
from scalegmn.interop.torch_modules import FACTORY, ExampleInput, module_of_factory, read


def run(words: Sequence[str]) -> None:
    """Prints the layers of a module, and which neurons are free, tied or pinned."""
    parser = Arguments("scalegmn inspect", "Show how a module is read: its layers, and which of their neurons move.")
    parser.add_argument("factory", metavar="FACTORY", help="your code that makes the module, package.module:factory")
    parser.add_example_input(required=True)
    values = parser.read(words)
    if not re.fullmatch(FACTORY, values.factory):
        raise ValueError(f"FACTORY: found {values.factory}, expected package.module:factory")
    example = ExampleInput.parse(values.input_shape, values.words)
    module = module_of_factory(values.factory)
    try:
        print(read(module, example.draw()))
    except ValueError as error:
        raise ValueError(example.advised(error)) from None
