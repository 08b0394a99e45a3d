"""The values of a traced network: which neuron, parameter or input each element of a tensor stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Elements:
    """Elements of a parameter or buffer."""

    name: str
    """The name of the parameter or buffer."""

    index: Tensor
    """The position of each element in the flattened parameter, in any shape."""

    is_buffer: bool = False

    scale: float = 1.0
    """What the module multiplies the elements by before it uses them."""

    counted: Tensor | None = None
    """The numbers 0, 1, ... of which `index` is a view, if it is one: then the elements are a view
    of the parameter, with the same strides."""

    computed: Tensor | None = None
    """The weights that a module computes from the parameter, in its shape, if it does (`ComputedWeights`)."""

    @property
    def is_view(self) -> bool:
        """Whether the elements are a view of the parameter."""
        if self.counted is None:
            return False
        return self.index.untyped_storage().data_ptr() == self.counted.untyped_storage().data_ptr()

    def of(self, tensor: Tensor) -> Tensor:
        """The elements of a parameter (without the scale), or what another tensor [its numbers] has in their places; a
        view where they are one."""
        flat = tensor.reshape(-1)
        if self.is_view:
            flat = flat.contiguous()  # every second number of another tensor is flat, too
            start = flat.storage_offset() + self.index.storage_offset()
            return flat.as_strided(self.index.shape, self.index.stride(), start)
        return flat[self.index.to(flat.device)]

    def mark(self, flat: Tensor) -> None:
        """Sets the places of the elements in [numbers of the parameter] to true."""
        self.put(flat, torch.ones((), dtype=torch.bool))

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Sets the places of the elements in [numbers of the parameter] to values of the shape of the index."""
        if self.is_view and _is_injective(self.index):
            self.of(flat).copy_(values)
        else:
            flat[self.index.reshape(-1)] = values.expand(self.index.shape).reshape(-1)

    @property
    def is_once(self) -> bool:
        """Whether each element occurs once."""
        if self.is_view and _is_injective(self.index):
            return True
        used = torch.zeros(self._end, dtype=torch.bool)
        self.mark(used)
        return int(used.sum()) == self.index.numel()

    @property
    def _end(self) -> int:
        """A position behind all elements."""
        if not self.index.numel():
            return 0
        if self.is_view:
            steps = zip(self.index.stride(), self.index.shape, strict=True)
            return int(self.index.storage_offset()) + sum(stride * (size - 1) for stride, size in steps) + 1
        return int(self.index.max()) + 1

    def shares(self, other: Elements) -> bool:
        """Whether elements are those of another one, too."""
        if self.name != other.name:
            return False
        used = torch.zeros(max(self._end, other._end), dtype=torch.bool)
        self.mark(used)
        return bool(other.of(used).any())


@dataclass(frozen=True)
class Joined:
    """Elements of several parameters side by side, such as of experts that are one layer."""

    parts: tuple[Elements, ...]
    """Of equal sizes."""

    axis: int

    @property
    def scale(self) -> float:
        """That of all parts."""
        return self.parts[0].scale


def _is_injective(view: Tensor) -> bool:
    """Whether no two places of a view have the same memory, as far as sizes and strides tell."""
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


@dataclass(frozen=True)
class Neurons:
    """Outputs of neurons."""

    ids: Tensor
    """The number of the neuron that each element belongs to, in the shape of the tensor."""

    versions: dict[int, int]
    """Layer -> how many activations and additions it had when this value was computed."""

    factor: float = 1.0
    """A number by which the outputs are multiplied. Whoever reads the value settles it (`Trace.settled`) or refuses."""

    is_output: bool = False
    """Whether a softmax or an offset has been applied, after which no layer may read the value."""

    is_uniform: bool = False
    """Whether what has been applied to an output is the same for all channels."""

    value: Tensor | None = None
    """The outputs of the neurons, without the factor, for the parameters and the input of the check."""


@dataclass(frozen=True)
class NetworkInput:
    """The network's input, whose elements no layer has read yet."""

    index: Tensor
    """A number for each element of the input, or of what is computed from it without parameters, in any shape."""

    value: Tensor | None = None
    """The elements, for the input of the check."""

    is_prepared: bool = False
    """Whether it has been computed from the input, such as a mask, positions of words, or sines and cosines."""

    parts: tuple[int, tuple[Any, ...]] | None = None
    """An axis, counted from the end, and what lies side by side along it: inputs, and zeros, the state before a first
    step."""


@dataclass(frozen=True)
class Scores:
    """Attention scores: products of the queries and keys of each head, and what a softmax makes of them."""

    queries: Tensor
    keys: Tensor
    """[heads, channels] numbers of neurons."""

    order: Tensor
    """[n] the head of each place along the axes of batch and heads, in a row."""

    is_softmaxed: bool = False

    rotary: tuple[int, ...] = ()
    """As of `LayerSpec`."""

    biases: tuple[Tensor, ...] = ()
    """[heads] numbers of neurons that meet the scores of each."""


@dataclass(frozen=True)
class Turned:
    """Sums of neurons with constant factors, which differ by position and channel, such as in rotary embeddings."""

    terms: tuple[tuple[Tensor, Tensor], ...]
    """Numbers of neurons and factors, in the shape of the value."""


@dataclass(frozen=True)
class OfHeads:
    """What is computed from the channels of each head of a layer, alike for all heads."""

    labels: Tensor
    """The head that each element is computed from, in the shape of the value."""

    heads: Tensor
    """[heads, channels] numbers of neurons."""

    channels: Tensor | None = None
    """The channel of its head that each element is computed from, alike for all, and -1 where all channels are read in
    any order; None where channels are computed in different ways."""


@dataclass(frozen=True)
class Opaque:
    """What an operation computes that no layer describes, from the input, constants, pinned neurons and pinned
    parameters: no symmetry moves it."""

    value: Any = None
    """What the module computes, for the input of the check."""


@dataclass(frozen=True)
class ComputedParameters:
    """What is computed from parameters alone, element by element, such as exp(a) or 1 + a."""

    parts: tuple[Elements, ...]
    """The elements of each parameter, in the shape of the value."""


@dataclass(frozen=True)
class ComputedWeights:
    """What is computed from parameters alone in another way, such as standardised weights, or masked ones."""

    parts: tuple[Elements, ...]
    """The parameters, in any shape."""


PREPARED = NetworkInput(torch.empty(0))
"""In place of what is computed from the input without parameters, until it is known."""

TRACED = (Elements, Neurons, NetworkInput, Scores, Turned, OfHeads, Opaque, ComputedParameters, ComputedWeights)


def is_traced(value: Any) -> bool:
    """Whether a value depends on parameters or on the input."""
    return isinstance(value, TRACED)


PREPARING = ("linear", "matmul", "mm", "bmm", "add", "sub", "mul", "div", "rsub", "pow", "where")
"""Operations that prepare the input where all else that they read is fixed."""


FILLS = (
    *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "empty_like", "new_empty"),
    *("rand_like", "randn_like", "randint_like"),
)
"""Operations that read nothing but shapes."""


def is_prepared_by(name: str, values: Sequence[Any]) -> bool:
    """Whether an operation computes something from the input and from buffers alone, such as Fourier features."""
    are_fixed = all(isinstance(value, NetworkInput) or getattr(value, "is_buffer", False) for value in values)
    return name in PREPARING and are_fixed and any(isinstance(value, NetworkInput) for value in values)


def is_constant(value: Any) -> bool:
    """Whether a value is a number, a constant tensor or a buffer."""
    return isinstance(value, int | float | Tensor) or (isinstance(value, Elements) and value.is_buffer)


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
    return bool((compact(ids) == compact(ids).narrow(axis, 0, 1)).all())


def compact(ids: Tensor) -> Tensor:
    """The first element only along each axis that is broadcast."""
    for axis, stride in enumerate(ids.stride()):
        if stride == 0:
            ids = ids.narrow(axis, 0, 1)
    return ids


def unique_columns(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`unique` of the columns of whole numbers [rows, n], with inverse and counts: of a number for each column, which
    is much faster."""
    number, size = torch.zeros_like(table[0]), 1
    for row in table:
        low, high = (int(limit) for limit in row.aminmax())
        if size * (high - low + 1) > torch.iinfo(torch.long).max:
            number = number.unique(return_inverse=True)[1]
            size = table.shape[1]
        number = number * (high - low + 1) + (row - low)
        size *= high - low + 1
    different, inverse, counts = number.unique(return_inverse=True, return_counts=True)
    place = torch.empty_like(different).scatter_(0, inverse, torch.arange(len(number)))
    return table[:, place], inverse, counts
