"""Normalisation of the input networks' parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class InputNormalization(nn.Module):
    """Divides each layer's weights, and each layer's biases, by one scalar.

    The scalars rescale every network alike, so they commute with permutations and rescalings of neurons. They are
    buffers, 1 until `fit`, and travel with checkpoints.

    Args:
        num_layers: L.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.register_buffer("weight_scales", torch.ones(num_layers))
        self.register_buffer("bias_scales", torch.ones(num_layers))

    @torch.no_grad()
    def fit(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        """Sets the scalars to the root mean square of each tensor (1 where it is zero)."""
        for scales, tensors in ((self.weight_scales, weights), (self.bias_scales, biases)):
            rms = torch.stack([tensor.square().mean().sqrt() for tensor in tensors])
            scales.copy_(torch.where(rms > 0, rms, 1.0))

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """Normalised weights and biases, per layer, of the shapes given."""
        return (
            tuple(weight / scale for weight, scale in zip(weights, self.weight_scales, strict=True)),
            tuple(bias / scale for bias, scale in zip(biases, self.bias_scales, strict=True)),
        )
