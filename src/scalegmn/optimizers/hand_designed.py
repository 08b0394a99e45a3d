"""SGD with momentum and Adam on B networks at once, each with a learning rate of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scalegmn.optimizers.features import ADAM_BETAS
from scalegmn.optimizers.rules import Moments

MOMENTUM = 0.9
"""Of SGD."""


@dataclass(frozen=True)
class HandDesigned:
    """A hand-designed optimiser.

    Attributes:
        kind: `sgd`: m <- .9 m + g, p <- p - rate m, as in PyTorch; `adam`: Adam without weight decay.
        cosine: the rate falls to 0 over the horizon, by half a cosine.
    """

    kind: Literal["sgd", "adam"]
    cosine: bool = False

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """With which symmetries of networks it commutes."""
        return frozenset({"permutation", "sign"})

    def start(self, flat: Tensor) -> Moments:
        """The state before the first step."""
        return Moments(torch.zeros_like(flat), torch.zeros_like(flat), flat.new_zeros(len(flat)))

    def step(
        self, flat: Tensor, gradients: Tensor, state: Moments, rates: Tensor, horizon: int
    ) -> tuple[Tensor, Moments]:
        """New parameters [B, P] and state.

        Args:
            flat: parameters [B, P].
            gradients: [B, P].
            state: before the step.
            rates: [B], learning rates.
            horizon: steps in all, for `cosine`.
        """
        steps = state.steps + 1
        if self.kind == "sgd":
            state = Moments(state.first * MOMENTUM + gradients, state.second, steps)
            direction = state.first
        else:
            first, second = ADAM_BETAS
            state = Moments(
                state.first * first + gradients * (1 - first),
                state.second * second + gradients.square() * (1 - second),
                steps,
            )
            direction = state.adam()
        if self.cosine:
            rates = rates * (1 + torch.cos(math.pi * (steps - 1) / horizon)) / 2
        return flat - rates[:, None] * direction, state
