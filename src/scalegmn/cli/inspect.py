"""`scalegmn inspect FACTORY --input_shape SHAPE`: how a module is read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from scalegmn.cli.arguments import Arguments
from scalegmn.interop.torch_modules import FACTORY, module_of_factory, parse_shape, read
from scalegmn.interop.torch_modules.factory import check_words, random_input, with_advice


def run(words: Sequence[str]) -> None:
    """Prints the layers of a module, and which neurons are free, tied or pinned."""
    parser = Arguments("scalegmn inspect", "Show how a module is read: its layers, and which of their neurons move.")
    parser.add_argument("factory", metavar="FACTORY", help="your code that makes the module, package.module:factory")
    parser.add_argument("--input_shape", required=True, metavar="SHAPE", help="of an input, such as 1,3,32,32")
    parser.add_argument("--words", type=int, metavar="N", help="the input consists of whole numbers below N")
    values = parser.read(words)
    if not re.fullmatch(FACTORY, values.factory):
        raise ValueError(f"FACTORY: found {values.factory}, expected package.module:factory")
    check_words(values.words)
    shape = parse_shape(values.input_shape)
    assert shape is not None, "it is required"
    try:
        print(read(module_of_factory(values.factory), random_input(shape, values.words)))
    except ValueError as error:
        raise with_advice(error, values.words) from None
