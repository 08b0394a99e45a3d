"""What learned optimisers read of each parameter: its value, its gradient and momenta, encoded.

Shape letters: B networks, P parameters, n numbers per parameter, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scalegmn.optimizers.coordinates import Coordinates
from scalegmn.registry import Registry

ADAM_BETAS = (0.9, 0.999)
"""Decays of the moments that rules read."""

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
"""tau of tanh(t / tau - 1)."""

_CLIP = 10.0
"""Numbers that are divided by their root mean square are cut off here."""


class OptimizerState(NamedTuple):
    """What an optimiser remembers of B networks."""

    momenta: Tensor
    """[B, P, M], one per decay of the features."""

    first: Tensor
    """[B, P], the mean of gradients, and"""

    second: Tensor
    """[B, P], that of their squares, with the decays `ADAM_BETAS`."""

    steps: Tensor
    """[B], how many steps each network has taken."""

    def reset(self, rows: Tensor) -> OptimizerState:
        """Without memory of the networks `rows`, [B] bool."""
        kept = (~rows).to(self.first)
        wide = kept[:, None]
        return OptimizerState(
            torch.where(rows[:, None, None], 0, self.momenta),
            torch.where(rows[:, None], 0, self.first),
            torch.where(wide == 0, 0, self.second),
            self.steps * kept,
        )

    def __getitem__(self, rows: slice | Tensor) -> OptimizerState:  # type: ignore[override]  # rows, not fields
        """The state of some networks."""
        return OptimizerState(self.momenta[rows], self.first[rows], self.second[rows], self.steps[rows])


@dataclass(frozen=True)
class FeatureSet:
    """Numbers and their encoding.

    Attributes:
        betas: decays of momenta.
        averages: m <- beta m + (1 - beta) g; else m <- beta m + g.
        num_odd: channels that change their sign with the parameter; they come first.
        num_even: channels that stay.
    """

    betas: tuple[float, ...]
    averages: bool
    num_odd: int
    num_even: int

    @property
    def num_channels(self) -> int:
        """C."""
        return self.num_odd + self.num_even

    @property
    def decays(self) -> list[tuple[float, float]]:
        """(beta, w) of each momentum, m <- beta m + w g."""
        return [(beta, 1 - beta if self.averages else 1.0) for beta in self.betas]

    def start(self, parameters: Tensor) -> OptimizerState:
        """The state before the first step."""
        zeros = torch.zeros_like(parameters)
        momenta = zeros[..., None].expand(*zeros.shape, len(self.betas)).clone()
        return OptimizerState(momenta, zeros, zeros.clone(), zeros.new_zeros(len(zeros)))

    def advanced(self, state: OptimizerState, gradient: Tensor) -> OptimizerState:
        """The state after a gradient [B, P]."""
        betas, weights = gradient.new_tensor(self.decays).unbind(1)
        first, second = ADAM_BETAS
        return OptimizerState(
            state.momenta * betas + gradient[..., None] * weights,
            state.first * first + gradient * (1 - first),
            state.second * second + gradient.square() * (1 - second),
            state.steps + 1,
        )

    def encode(self, numbers: Tensor, second: Tensor, steps: Tensor, coordinates: Coordinates) -> Tensor:
        """Channels [B, P, C], odd ones first.

        Args:
            numbers: parameter, gradient and momenta, [B, P, n].
            second: the mean of squared gradients, [B, P].
            steps: taken, [B].
            coordinates: of the parameters.
        """
        raise NotImplementedError


class LogarithmicFeatures(FeatureSet):
    """14 channels of Neural Graphs: (log|x| / 10, sign x) of each number if |x| >= e^-10, else (-1, e^10 x)
    (Andrychowicz et al., 2016, https://arxiv.org/abs/1606.04474, appendix A); signs are odd, logarithms even."""

    def __init__(self) -> None:
        super().__init__((0.5, 0.9, 0.99, 0.999, 0.9999), averages=False, num_odd=7, num_even=7)

    def encode(self, numbers: Tensor, second: Tensor, steps: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `FeatureSet`."""
        size = numbers.abs()
        large = size >= torch.e**-10
        logarithm = torch.where(large, size.clamp_min(torch.e**-10).log() / 10, -1.0)
        sign = torch.where(large, numbers.sign(), torch.e**10 * numbers)
        return torch.cat([sign, logarithm], dim=-1)


class NormalizedFeatures(FeatureSet):
    """19 channels of UNF (Zhou et al., 2024, https://arxiv.org/abs/2402.05232): parameter, gradient and six averages of
    gradients, each divided by its root mean square over the tensor and clipped, and tanh(t / tau - 1) for 11 tau."""

    def __init__(self) -> None:
        super().__init__((0.1, 0.5, 0.9, 0.99, 0.999, 0.9999), True, num_odd=8, num_even=len(TIME_SCALES))

    def encode(self, numbers: Tensor, second: Tensor, steps: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `FeatureSet`."""
        return torch.cat([_in_units(numbers, coordinates), _time(steps, numbers)], dim=-1)


class FactoredFeatures(FeatureSet):
    """29 channels after small_fc_lopt (Metz et al., 2022, https://arxiv.org/abs/2203.11860), its factored ones with one
    decay, .999, in place of three.

    Odd: p, g, momenta m with decays .9, .99, .999; m / sqrt(v), v the mean of squared gradients; g and m / sqrt(v'),
    v'_ij = row_i col_j / mean(row) for a weight, row and col the means of v over its rows and columns (and kernels),
    v' = v for a bias (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235). Even: v, row, col, and 1 / sqrt of
    each. All are divided by their root mean square over the tensor and clipped. And tanh(t / tau - 1) for 11 tau.
    """

    def __init__(self) -> None:
        super().__init__((0.9, 0.99, 0.999), True, num_odd=12, num_even=6 + len(TIME_SCALES))

    def encode(self, numbers: Tensor, second: Tensor, steps: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `FeatureSet`."""
        v = second[..., None]
        row, col, factored = coordinates.factored(v)
        smallest = torch.finfo(v.dtype).tiny ** 0.5
        by_v, by_row, by_col, by_factored = ((x + smallest).rsqrt() for x in (v, row, col, factored))
        odd = torch.cat([numbers, numbers[..., 2:] * by_v, numbers[..., 1:] * by_factored], dim=-1)
        even = torch.cat([v, by_v, row, by_row, col, by_col], dim=-1)
        channels = _in_units(torch.cat([odd, even], dim=-1), coordinates)
        return torch.cat([channels, _time(steps, numbers)], dim=-1)


def _in_units(values: Tensor, coordinates: Coordinates) -> Tensor:
    """[B, P, C], each divided by its root mean square over the tensor, and clipped."""
    sizes = coordinates.root_mean_squares(values)
    tiny = torch.finfo(values.dtype).tiny ** 0.5
    return (values / torch.where(sizes > tiny, sizes, 1)).clamp(-_CLIP, _CLIP)


def time_channels(steps: Tensor) -> Tensor:
    """tanh(t / tau - 1), [...] -> [..., 11]."""
    return torch.tanh(steps[..., None] / steps.new_tensor(TIME_SCALES) - 1)


def _time(steps: Tensor, like: Tensor) -> Tensor:
    """`time_channels` at all parameters, [B] -> [B, P, 11]."""
    return time_channels(steps)[:, None].expand(-1, like.shape[1], -1)


FEATURES: Registry[FeatureSet] = Registry("feature set")
"""Feature sets by name."""

FEATURES.register("ng", LogarithmicFeatures())
FEATURES.register("unf", NormalizedFeatures())
FEATURES.register("factored", FactoredFeatures())
