"""The operators that networks are made of, by the names of PyTorch's operations (aten)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.registry import Registry


@dataclass(frozen=True)
class Call:
    """One use of an operation in a module."""

    trace: Trace
    name: str
    """`conv2d` for aten.conv2d.default."""

    function: Callable[..., Any]
    """What the operation does to tensors."""

    result: Any
    """An example of what it returns: a tensor, or several. Only shapes count."""

    is_read_elsewhere: bool = False
    """Whether other operations read its first argument too."""

    recomputed: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor] | None = None
    """(an argument that is computed from parameters, parameters by name) -> what the argument is with these."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the result, or of the first of several."""
        result: torch.Tensor = self.result[0] if isinstance(self.result, list | tuple) else self.result
        return result.shape


Rule = Callable[..., Any]
"""(call, *arguments of the operation) -> the value that it returns; at least one argument is a traced value."""


@dataclass(frozen=True)
class Operator:
    """An operation that a network may contain.

    Args:
        family: what the documentation lists it under.
        rule: what it does to traced values.
        reads_input: whether the rule knows the network's input; else what the operation computes from the input and
            constants alone prepares the input.
    """

    family: str
    rule: Rule
    reads_input: bool


OPERATORS: Registry[Operator] = Registry("operator")


def operator(family: str, *names: str, reads_input: bool = True) -> Callable[[Rule], Rule]:
    """A decorator that registers a rule for operations of these names."""

    def register(rule: Rule) -> Rule:
        for name in names:
            OPERATORS.register(name, Operator(family, rule, reads_input))
        return rule

    return register
