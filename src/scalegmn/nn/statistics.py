"""Statistics of a network's weights and biases (Unterthiner et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from scalegmn.symmetry.statistics import quantiles

NUM_STATISTICS = 7
"""Of a tensor: mean, variance and five quantiles."""


def statistics(nets: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[Tensor]:
    """Of networks of each architecture, weights and biases per layer, each [B, ...]: [B, 14 L], of W_1, b_1, W_2, ..
    mean, variance (unbiased; 0 of a single value) and the quantiles 0, 1/4, 1/2, 3/4, 1, linear between values.

    Tensors of equally many values, of whatever layer and architecture, go together.
    """
    rows = [tensor.flatten(1) for net in nets for pair in zip(*net, strict=True) for tensor in pair]
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.shape[1], []).append(place)
    found: dict[int, Tensor] = {}
    for same in places.values():
        together = _statistics(torch.cat([rows[place] for place in same]))
        found.update(zip(same, torch.split(together, [len(rows[place]) for place in same]), strict=True))
    by_place = iter([found[place] for place in range(len(rows))])
    return [torch.cat(list(islice(by_place, 2 * len(biases))), dim=1) for _, biases in nets]


def _statistics(x: Tensor) -> Tensor:
    """[B, n] -> [B, 7]."""
    variance = x.var(1, keepdim=True) if x.shape[1] > 1 else torch.zeros_like(x)
    return torch.cat([x.mean(1, keepdim=True), variance, quantiles(x)], dim=1)
