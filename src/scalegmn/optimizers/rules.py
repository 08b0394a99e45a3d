"""From the outputs of a network, two numbers per parameter, to the change of the parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.optimizers.features import ADAM_BETAS
from scalegmn.registry import Registry

_EPSILON = 1e-8
"""Added to Adam's root, as in PyTorch."""


class Moments(NamedTuple):
    """What rules read beside the outputs."""

    first: Tensor
    """[B, P], the mean of gradients."""

    second: Tensor
    """[B, P], that of their squares."""

    steps: Tensor
    """[B], from 1 at the first step."""

    def adam(self) -> Tensor:
        """Adam's direction, m / (sqrt(v) + epsilon) without bias, [B, P]."""
        first, second = (1 - beta ** self.steps[:, None] for beta in ADAM_BETAS)
        return (self.first / first) / ((self.second / second).sqrt() + _EPSILON)


class UpdateRule(nn.Module):
    """Outputs (o_1, o_2) -> change of the parameters. o_1 changes its sign with the parameter, o_2 stays, where the
    network that gives them knows signs."""

    def forward(self, outputs: Tensor, moments: Moments) -> Tensor:
        """Outputs [B, P, 2] -> [B, P]."""
        raise NotImplementedError


class ExponentialRule(UpdateRule):
    """p <- p + lambda o_1 exp(lambda o_2).

    Args:
        size: lambda; .01 in Neural Graphs, .001 in MLPLOpt (Metz et al., 2022, https://arxiv.org/abs/2203.11860).
    """

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, outputs: Tensor, moments: Moments) -> Tensor:
        """As in `UpdateRule`."""
        direction, magnitude = outputs.unbind(-1)
        return self.size * direction * torch.exp(self.size * magnitude)


class MomentumRule(UpdateRule):
    """p <- p - alpha (m + beta o_1), m the mean of gradients with decay .9, alpha and beta learned (UNF)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(0.1).log())
        self.log_share = nn.Parameter(torch.tensor(1e-3).log())

    def forward(self, outputs: Tensor, moments: Moments) -> Tensor:
        """As in `UpdateRule`."""
        return -self.log_rate.exp() * (moments.first + self.log_share.exp() * outputs[..., 0])


class AdamRelativeRule(UpdateRule):
    """p <- p - eta (a exp(s c_2 o_2) + s c_1 o_1), a Adam's direction, s = 2^(-t / half_life); eta and c are learned,
    c starts at 0: untrained, it is Adam, and with a half-life it becomes Adam after many steps.

    Args:
        rate: eta at the start.
        half_life: of what the network adds to Adam, in steps t.
    """

    def __init__(self, rate: float, half_life: float = math.inf) -> None:
        super().__init__()
        self.half_life = half_life
        self.log_rate = nn.Parameter(torch.tensor(rate).log())
        self.gains = nn.Parameter(torch.zeros(2))

    def share(self, steps: Tensor) -> Tensor:
        """s, [B]."""
        return torch.exp2(-steps / self.half_life)

    def forward(self, outputs: Tensor, moments: Moments) -> Tensor:
        """As in `UpdateRule`."""
        direction, magnitude = (outputs * self.gains * self.share(moments.steps)[:, None, None]).unbind(-1)
        return -self.log_rate.exp() * (moments.adam() * magnitude.clamp(-5, 5).exp() + direction)


RULES: Registry[Callable[[float, float], UpdateRule]] = Registry("update rule")
"""Name -> what builds a rule of a learning rate at the start and a half-life, which `adam` alone has."""

RULES.register("ng", lambda rate, half_life: ExponentialRule(0.01))
RULES.register("mlp_lopt", lambda rate, half_life: ExponentialRule(0.001))
RULES.register("unf", lambda rate, half_life: MomentumRule())
RULES.register("adam", AdamRelativeRule)
