"""Normalisation of the input networks' parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    def fit(self, batches: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        """Sets the scalars to the root mean square of each tensor over all batches (1 where it is zero).

        Args:
            batches: weights and biases per layer, [B, ...] each.
        """
        sums, counts = 0, 0
        for weights, biases in batches:
            tensors = (*weights, *biases)
            sums = sums + torch.stack([tensor.double().square().sum() for tensor in tensors])
            counts = counts + torch.tensor([tensor.numel() for tensor in tensors], device=tensors[0].device)
        rms = (sums / counts).sqrt()
        rms = torch.where(rms > 0, rms, 1.0)
        self.weight_scales.copy_(rms[: len(self.weight_scales)])
        self.bias_scales.copy_(rms[len(self.weight_scales) :])

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """Normalised weights and biases, per layer, of the shapes given."""
        return (
            tuple(weight / scale for weight, scale in zip(weights, self.weight_scales, strict=True)),
            tuple(bias / scale for bias, scale in zip(biases, self.bias_scales, strict=True)),
        )
