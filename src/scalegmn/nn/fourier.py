"""Features of weights and biases: Fourier features and what a small MLP makes of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


class FourierFeatures(nn.Module):
    """F(v) = [cos(2 pi B v), sin(2 pi B v)], B fixed with entries N(0, scale^2) (Tancik et al., NeurIPS 2020,
    https://arxiv.org/abs/2006.10739).

    Args:
        in_dim: k, width of v.
        num_frequencies: m, rows of B.
        scale: standard deviation of the entries.
    """

    frequencies: Tensor

    def __init__(self, in_dim: int, num_frequencies: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(num_frequencies, in_dim))

    def forward(self, v: Tensor) -> Tensor:
        """v [..., k] -> [..., 2m]."""
        angle = linear(v, 2 * math.pi * self.frequencies)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Encoder(nn.Module):
    """[Fourier features], Linear, then SiLU, Linear for each layer after the first (Neural Graphs, section 3).

    Args:
        in_dim: k, width of the input.
        dim: width of the output.
        num_frequencies: of the Fourier features; 0: none.
        scale: of the Fourier features.
        num_layers: Linears.
    """

    def __init__(self, in_dim: int, dim: int, num_frequencies: int, scale: float, num_layers: int) -> None:
        super().__init__()
        self.fourier = FourierFeatures(in_dim, num_frequencies, scale) if num_frequencies else nn.Identity()
        first = 2 * num_frequencies or in_dim
        self.linears = nn.ModuleList(nn.Linear(dim if index else first, dim) for index in range(num_layers))

    def forward(self, v: Tensor) -> Tensor:
        """v [..., k] -> [..., dim]."""
        x = self.fourier(v)
        for index, layer in enumerate(self.linears):
            x = layer(silu(x) if index else x)
        result: Tensor = x
        return result
