"""Networks from the user's own code, for commands."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.interop.torch_modules.convert import from_module
from scalegmn.networks import NetParams

FACTORY = r"[\w.]+:\w+"
"""How a command names code that makes networks, `package.module:factory`."""


@dataclass(frozen=True)
class ExampleInput:
    """What the options `--input_shape` and `--words` say about an input of a user's networks.

    Attributes:
        shape: with the batch; None: not given.
        words: it consists of whole numbers below this; None: of real numbers.
    """

    shape: tuple[int, ...] | None = None
    words: int | None = None

    @classmethod
    def parse(cls, shape: str | None, words: int | None = None) -> ExampleInput:
        """From the options as a user wrote them, such as `1,1,28,28`; raises ValueError."""
        if shape is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", shape):
            raise ValueError(f"--input_shape: found {shape}, expected numbers such as 1,1,28,28")
        if words is not None and words < 1:
            raise ValueError(f"--words: found {words}, expected at least 1")
        return cls(None if shape is None else tuple(map(int, shape.split(","))), words)

    def draw(self) -> Tensor:
        """A random input, the same each time; its shape must be given."""
        assert self.shape is not None
        generator = torch.Generator().manual_seed(0)
        if self.words is None:
            return torch.randn(self.shape, generator=generator)
        return torch.randint(self.words, self.shape, generator=generator)

    def advised(self, error: Exception) -> str:
        """The message of a network that cannot read this input, with what to change if `words` is missing or too
        large."""
        if self.words is None and "indices" in str(error) and "Long" in str(error):
            return f"{error}; for an input of whole numbers below N set --words N"
        if self.words is not None and "index out of range" in str(error):
            return f"--words: found {self.words}, more than an embedding has"
        return str(error)


def from_factory(name: str, example: ExampleInput) -> NetParams:
    """The network that the user's own code makes; this runs that code.

    Args:
        name: `package.module:factory`, a function without arguments that returns an `nn.Module`, or such a module.
        example: an input of the network.

    Raises:
        ValueError: the code fails, or the network cannot be read; the message starts with the name.
    """
    if example.shape is None:
        raise ValueError(f"{name}: set --input_shape to that of an input, such as 1,1,28,28")
    module = module_of_factory(name)
    try:
        return from_module(module, example.draw())
    except Exception as error:  # whatever the user's code leads to
        raise ValueError(f"{name}: {type(error).__name__}: {example.advised(error)}") from None


def module_of_factory(name: str) -> nn.Module:
    """The module that the user's own code makes, as it evaluates; arguments and errors as of `from_factory`."""
    place, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(place), attribute)
        module: nn.Module = factory if isinstance(factory, nn.Module) else factory()
        return module.eval()
    except Exception as error:  # whatever the user's code leads to
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from None
