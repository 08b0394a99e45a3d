"""Steps of networks under a learned optimiser that reads each parameter by itself, by `coordinate_steps.h`.

Shape letters: B networks, P parameters, M momenta, T steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class CoordinateOptimizer:
    """A learned optimiser that reads each parameter by itself, in T steps of B networks: moments x <- d x + w g (of the
    second g^2), then p <- p + rule(MLP(encoding)).

    Attributes:
        decays: (d, w) of each momentum, then of the two moments.
        sizes: of the networks' tensors, one after the other.
        encoding: of parameter, gradient and new momenta.
        layers: weights and biases of the MLP with relu: weights [d_l, d_{l-1}] of all networks or [B, d_l, d_{l-1}],
            biases [d_l], [B, d_l] or [T, B, d_l].
        rule: from the two outputs to the change.
        constants: [T, B, c], of the rule.
    """

    decays: Sequence[tuple[float, float]]
    sizes: Sequence[int]
    encoding: Encoding
    layers: Sequence[tuple[Tensor, Tensor]]
    rule: Rule
    constants: Tensor

    def words(self, state: State) -> tuple[list[int], list[object]]:
        """Those of `Optimizer` in coordinate_steps.h, and what they point to.

        Raises:
            ValueError: the MLP or the state does not fit.
        """
        num_momenta, (num_steps, num_networks) = len(self.decays) - 2, self.constants.shape[:2]
        shape = (num_networks, sum(self.sizes))
        found, expected = [tensor.shape for tensor in state], [shape, (*shape, num_momenta), shape, shape]
        if found != expected:
            raise ValueError(f"found a state of shapes {found}, expected {expected}")
        first = (2 + num_momenta) * (1 if self.encoding == Encoding.UNITS else 2)
        widths = [first, *(bias.shape[-1] for _, bias in self.layers)]
        expected_widths = [(m, n) for n, m in pairwise(widths)]
        if [weight.shape[-2:] for weight, _ in self.layers] != expected_widths or widths[1:][-1:] != [2]:
            raise ValueError(f"found an MLP of widths {widths}, expected weights of these, and 2 outputs")
        tensors, numbers = [], []
        for weight, bias in self.layers:
            weight, bias = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (weight, bias))
            weight = weight.expand(num_networks, *weight.shape[-2:])
            bias = bias.expand(num_steps, num_networks, -1)
            tensors += [weight, bias]
            numbers += [*weight.shape[1:], weight.stride(1), weight.stride(0), bias.stride(1), bias.stride(0)]
            numbers += [weight.data_ptr(), bias.data_ptr()]
        of_layers, of_sizes = native.words(numbers), native.words(self.sizes)
        decays, constants = self.constants.new_tensor(self.decays), self.constants.contiguous()
        words = [self.encoding, self.rule, *shape, len(self.sizes), num_momenta, len(self.layers), constants.shape[-1]]
        words += [decays.data_ptr(), constants.data_ptr(), ctypes.addressof(of_sizes), ctypes.addressof(of_layers)]
        return words, [*tensors, of_layers, of_sizes, decays, constants]


def step(optimizer: CoordinateOptimizer, state: State, gradients: Tensor) -> State:
    """The state after one step.

    Args:
        optimizer: of T = 1 step.
        state: before the step, which is used up: momenta and moments after it take its place in memory.
        gradients: [B, P].

    Raises:
        ValueError: shapes do not fit.
    """
    library = native.library()
    assert library is not None
    words, _kept = optimizer.words(state)
    if gradients.shape != state.parameters.shape:
        raise ValueError(f"found gradients of shape {[*gradients.shape]}, expected {[*state.parameters.shape]}")
    before = in_rows(state)
    after = before._replace(parameters=torch.empty_like(before.parameters))
    tensors = [*before, *after, gradients.contiguous()]
    library.coordinate_steps(
        native.words([*words, *(tensor.data_ptr() for tensor in tensors), torch.get_num_threads()])
    )
    return after._replace(momenta=after.momenta.mT)


def in_rows(state: State) -> State:
    """As compiled code reads it: contiguous, with momenta [B, M, P]."""
    return State(*(tensor.contiguous() for tensor in state._replace(momenta=state.momenta.mT)))
