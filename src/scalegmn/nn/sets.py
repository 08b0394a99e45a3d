"""Maps of sets: equivariant to the order of the elements.

Shape letters: B networks, n elements, a and b widths of input and output.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Reduction = Literal["max", "mean"]


def reduced(x: Tensor, axes: tuple[int, ...], reduction: Reduction) -> Tensor:
    """x without some of its axes, over which the maximum or mean is taken jointly."""
    if not axes:
        return x
    return x.amax(axes) if reduction == "max" else x.mean(axes)


def affine(in_dim: int, out_dim: int, num_linears: int = 1, bias: bool = True) -> nn.Sequential:
    """Linear(a -> b), then `num_linears` - 1 times ReLU, Linear(b -> b); [..., a] -> [..., b]."""
    layers: list[nn.Module] = [nn.Linear(in_dim, out_dim, bias)]
    for _ in range(num_linears - 1):
        layers += [nn.ReLU(), nn.Linear(out_dim, out_dim, bias)]
    return nn.Sequential(*layers)


class DeepSet(nn.Module):
    """Y = gamma(X) - lambda(reduced X), two affine maps, the second without bias (Zaheer et al., 2017).

    Args:
        in_dim: a.
        out_dim: b.
        num_linears: of each map.
        reduction: over the elements.
    """

    def __init__(self, in_dim: int, out_dim: int, num_linears: int, reduction: Reduction) -> None:
        super().__init__()
        self.own = affine(in_dim, out_dim, num_linears)
        self.all = affine(in_dim, out_dim, num_linears, bias=False)
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, a] -> [B, n, b]."""
        new: Tensor = self.own(x) - self.all(reduced(x, (1,), self.reduction))[:, None]
        return new


class SetAttention(nn.Module):
    """Y = O + ReLU(W O + c), O = Q + softmax(Q K^T / sqrt(b)) V per head: a set attention block without normalisation
    (Lee et al., 2019, section 3.1), for Q, K, V affine in X, cut into heads along their features.

    Args:
        in_dim: a.
        out_dim: b, a multiple of `num_heads`.
        num_heads: heads.
    """

    def __init__(self, in_dim: int, out_dim: int, num_heads: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(in_dim, 3 * out_dim)
        self.last = nn.Linear(out_dim, out_dim)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, a] -> [B, n, b]."""
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scale = self.last.in_features**-0.5  # of all heads together
        joined = q + nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)  # [B, heads, n, b / heads]
        joined = joined.transpose(1, 2).flatten(2)
        new: Tensor = joined + torch.relu(self.last(joined))
        return new
