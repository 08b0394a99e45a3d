"""The values of a traced network: which neuron, parameter or input each element of a tensor stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Elements:
    """Elements of a parameter or buffer."""

    name: str
    """The name of the parameter or buffer."""

    index: Tensor
    """The position of each element in the flattened parameter, in any shape."""

    is_buffer: bool = False


@dataclass(frozen=True)
class Neurons:
    """Outputs of neurons."""

    ids: Tensor
    """The number of the neuron that each element belongs to, in the shape of the tensor."""

    versions: dict[int, int]
    """Layer -> how many activations and additions it had when this value was computed."""

    factor: float = 1.0
    """A number by which the outputs are multiplied."""

    is_output: bool = False
    """Whether a softmax or an offset has been applied, after which no layer may read the value."""


@dataclass(frozen=True)
class NetworkInput:
    """The network's input, whose elements no layer has read yet."""

    index: Tensor
    """The position of each element in the flattened input, in any shape."""


@dataclass(frozen=True)
class Scores:
    """Attention scores: products of the queries and keys of each head."""

    queries: Tensor
    keys: Tensor
    """[heads, channels] numbers of neurons."""


TRACED = (Elements, Neurons, NetworkInput, Scores)


def is_traced(value: Any) -> bool:
    """Whether a value depends on parameters or on the input."""
    return isinstance(value, TRACED)


def is_number(value: Any) -> bool:
    """Whether a value is a single number."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def size_along(tensor: Tensor, axis: int) -> int:
    """The size along an axis counted from the end; 1 where the tensor has no such axis."""
    return tensor.shape[axis] if -axis <= tensor.ndim else 1


def is_constant_along(ids: Tensor, axis: int) -> bool:
    """Whether the neurons are the same at all places along an axis."""
    if ids.shape[axis] == 1 or ids.stride(axis) == 0:
        return True
    return bool((_compact(ids) == _compact(ids).narrow(axis, 0, 1)).all())


def _compact(ids: Tensor) -> Tensor:
    """The first element only along each axis that is broadcast."""
    for axis, stride in enumerate(ids.stride()):
        if stride == 0:
            ids = ids.narrow(axis, 0, 1)
    return ids
