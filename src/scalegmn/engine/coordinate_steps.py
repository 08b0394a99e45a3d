"""Steps of networks under a learned optimiser that reads each parameter by itself, by `coordinate_steps.cpp`.

Shape letters: B networks, P parameters, M momenta.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from scalegmn.engine import native


class Encoding(IntEnum):
    """What the MLP reads of parameter, gradient and momenta."""

    LOGARITHMS = 0
    """(log|x| / 10, sign x), or (-1, e^10 x) where |x| < e^-10: all signs, then all logarithms."""

    UNITS = 1
    """Each divided by its root mean square over the tensor, cut off at 10."""


class Rule(IntEnum):
    """How its outputs o, with constants c, change a parameter."""

    EXPONENTIAL = 0
    """c_0 o_1 exp(c_0 o_2)."""

    MOMENTUM = 1
    """c_0 (m + c_1 o_1), m the first moment."""

    ADAM = 2
    """c_0 (a exp(c_2 o_2) + c_1 o_1), a = (m / c_3) / (sqrt(v / c_4) + 1e-8), c_2 o_2 cut off at 5."""


class State(NamedTuple):
    """Networks and the optimiser's memory of them, in single precision."""

    parameters: Tensor
    """[B, P]."""

    momenta: Tensor
    """[B, P, M]."""

    first: Tensor
    """[B, P], the mean of gradients, and"""

    second: Tensor
    """[B, P], that of their squares."""


def is_compiled(tensors: Iterable[Tensor]) -> bool:
    """Whether there is a compiled form for these tensors."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and native.library() is not None


def step(
    state: State,
    gradients: Tensor,
    decays: Sequence[tuple[float, float]],
    sizes: Sequence[int],
    encoding: Encoding,
    layers: Sequence[tuple[Tensor, Tensor]],
    rule: Rule,
    constants: Tensor,
) -> State:
    """The state after a step: moments x <- d x + w g (of the second g^2), then p <- p + rule(MLP(encoding)).

    Args:
        state: before the step, which is used up: momenta and moments after it take its place in memory.
        gradients: [B, P].
        decays: (d, w) of each momentum, then of the moments.
        sizes: of the tensors, one after the other.
        encoding: of parameter, gradient and new momenta.
        layers: weights and biases of the MLP with relu, of all networks, [d_l, d_{l-1}] and [d_l], or of each, with B
            before it.
        rule: from the two outputs to the change.
        constants: [B, c], of the rule.

    Raises:
        ValueError: shapes do not fit.
    """
    library = native.library()
    assert library is not None
    num_networks, num_parameters = shape = gradients.shape
    num_momenta = len(decays) - 2
    found, expected = [tensor.shape for tensor in state], [shape, (*shape, num_momenta), shape, shape]
    if found != expected or sum(sizes) != num_parameters:
        raise ValueError(f"found a state of shapes {found} and {sum(sizes)} parameters, expected {expected}")
    widths = [(2 + num_momenta) * (1 if encoding == Encoding.UNITS else 2), *(bias.shape[-1] for _, bias in layers)]
    if [weight.shape[-2:] for weight, _ in layers] != [(m, n) for n, m in pairwise(widths)] or widths[1:][-1:] != [2]:
        raise ValueError(f"found an MLP of widths {widths}, expected weights of these, and 2 outputs")
    before = [tensor.contiguous() for tensor in state._replace(momenta=state.momenta.mT)]
    after = [torch.empty_like(before[0]), *before[1:]]
    tensors = [*before, *after, gradients.contiguous(), gradients.new_tensor(decays), constants.contiguous()]
    rows = [_with_rows(weight, bias, num_networks) for weight, bias in layers]
    of_layers = _words([number for weight, bias in rows for number in _layer(weight, bias)])
    of_sizes = _words(sizes)
    words = [encoding, rule, num_networks, num_parameters, len(sizes), num_momenta, len(layers)]
    words += [constants.shape[1], torch.get_num_threads(), *(tensor.data_ptr() for tensor in tensors)]
    library.coordinate_steps(_words([*words, ctypes.addressof(of_sizes), ctypes.addressof(of_layers)]))
    return State(after[0], after[1].mT, after[2], after[3])


def _with_rows(weight: Tensor, bias: Tensor, num_networks: int) -> tuple[Tensor, Tensor]:
    """Weights [B, d_l, d_{l-1}] and biases [B, d_l] whose rows are contiguous."""
    weight, bias = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (weight, bias))
    return weight.expand(num_networks, *weight.shape[-2:]), bias.expand(num_networks, -1)


def _layer(weight: Tensor, bias: Tensor) -> list[int]:
    """As in coordinate_steps.cpp."""
    sizes = [*weight.shape[1:], weight.stride(1), weight.stride(0), bias.stride(0)]
    return [*sizes, weight.data_ptr(), bias.data_ptr()]


def _words(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)
