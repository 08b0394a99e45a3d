"""Statistics of a network's weights and biases (Unterthiner et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_STATISTICS = 7
"""Of a tensor: mean, variance and five quantiles."""


def statistics(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """[B, 14 L]: of W_1, b_1, W_2, .., each [B, ...], mean, variance (unbiased; 0 of a single value) and the quantiles
    0, 1/4, 1/2, 3/4, 1, linear between values."""
    pairs = zip(weights, biases, strict=True)
    return torch.cat([_statistics(tensor.flatten(1)) for pair in pairs for tensor in pair], dim=1)


def _statistics(x: Tensor) -> Tensor:
    """[B, n] -> [B, 7]."""
    variance = x.var(1, keepdim=True) if x.shape[1] > 1 else torch.zeros_like(x)
    places = torch.linspace(0, x.shape[1] - 1, 5, dtype=x.dtype, device=x.device)
    below = places.floor()
    ordered = x.sort(dim=1).values
    quantiles = torch.lerp(ordered[:, below.long()], ordered[:, places.ceil().long()], places - below)
    return torch.cat([x.mean(1, keepdim=True), variance, quantiles], dim=1)
