"""Statistics of weights and biases as they are (Unterthiner et al., 2020, https://arxiv.org/abs/2002.11448).

Those that permutations, signs and scales of neurons leave as they are are in `scalegmn.symmetry.statistics`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from scalegmn.symmetry.statistics import quantiles

NUM_STATISTICS = 7
"""Numbers per tensor: mean, variance and five quantiles."""


def raw_statistics(nets: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[Tensor]:
    """The mean, the variance and five quantiles of every weight and bias tensor.

    The variance is unbiased, and 0 for a tensor with a single value. The quantiles are 0, 1/4, 1/2, 3/4 and 1, linearly
    interpolated. Tensors with equally many values, of any layer and architecture, are computed in one call.

    Args:
        nets: per architecture, the weights and the biases of B networks, per layer, each [B, ...].

    Returns:
        Per architecture [B, 14 L]: the seven numbers of W_1, then of b_1, W_2, b_2 and so on.
    """
    rows = [tensor.flatten(1) for net in nets for pair in zip(*net, strict=True) for tensor in pair]
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.shape[1], []).append(place)
    of_place: dict[int, Tensor] = {}
    for same in places.values():
        together = _statistics(torch.cat([rows[place] for place in same]))
        of_place.update(zip(same, torch.split(together, [len(rows[place]) for place in same]), strict=True))
    by_place = iter([of_place[place] for place in range(len(rows))])
    return [torch.cat(list(islice(by_place, 2 * len(biases))), dim=1) for _, biases in nets]


def _statistics(x: Tensor) -> Tensor:
    """[B, n] -> [B, 7]."""
    variance = x.var(1, keepdim=True) if x.shape[1] > 1 else torch.zeros_like(x)
    return torch.cat([x.mean(1, keepdim=True), variance, quantiles(x)], dim=1)
