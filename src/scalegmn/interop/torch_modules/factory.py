"""Networks from the user's own code, for commands."""

from __future__ import annotations

import importlib
import re

import torch
from torch import Tensor, nn

from scalegmn.interop.torch_modules.convert import from_module
from scalegmn.networks import NetParams

FACTORY = r"[\w.]+:\w+"
"""How a command names code that makes networks, `package.module:factory`."""


def from_factory(name: str, input_shape: tuple[int, ...] | None, words: int | None = None) -> NetParams:
    """The network that the user's own code makes; this runs that code.

    Args:
        name: `package.module:factory`, a function without arguments that returns an `nn.Module`, or such a module.
        input_shape: the shape of an input of the network.
        words: as of `random_input`.

    Raises:
        ValueError: the code fails, or the network cannot be read; the message starts with the name.
    """
    if input_shape is None:
        raise ValueError(f"{name}: set --input_shape to that of an input, such as 1,1,28,28")
    module = module_of_factory(name)
    try:
        return from_module(module, random_input(input_shape, words))
    except Exception as error:  # whatever the user's code leads to
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from None


def random_input(shape: tuple[int, ...], words: int | None = None) -> Tensor:
    """An example input, the same each time: real numbers, or whole ones below `words`."""
    generator = torch.Generator().manual_seed(0)
    if words is None:
        return torch.randn(shape, generator=generator)
    return torch.randint(words, shape, generator=generator)


def with_advice(error: ValueError, words: int | None) -> ValueError:
    """The error of a network that cannot be read, with the option that it lacks if it reads whole numbers."""
    is_lacking = words is None and "indices" in str(error) and "Long" in str(error)
    return ValueError(f"{error}; for an input of whole numbers below N set --words N") if is_lacking else error


def check_words(words: int | None) -> None:
    """Raises ValueError unless the option `--words` is a number above 0, or is not given."""
    if words is not None and words < 1:
        raise ValueError(f"--words: found {words}, expected at least 1")


def module_of_factory(name: str) -> nn.Module:
    """The module that the user's own code makes, as it evaluates; arguments and errors as of `from_factory`."""
    place, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(place), attribute)
        module: nn.Module = factory if isinstance(factory, nn.Module) else factory()
        return module.eval()
    except Exception as error:  # whatever the user's code leads to
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from None


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """The option `--input_shape`, such as `1,1,28,28`, as numbers; raises ValueError."""
    if text is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"--input_shape: found {text}, expected numbers such as 1,1,28,28")
    return None if text is None else tuple(map(int, text.split(",")))
