"""Invariant maps: what of a feature does not change when its neuron is rescaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.engine.edges import GatheredRows, ScaledRows, each, gathered, linear, linear_of_both_signs
from scalegmn.nn.mlp import BuildMLP


class NodeContext(NamedTuple):
    """What the rows of a feature tensor [B, ...] belong to; on the sparse path, [rows, ...]."""

    role: str
    """The nodes' role: `input`, `hidden` or `output`."""

    odd: int | Tensor = 0
    """In a batch of mixed activations, the first so many networks (sparse: rows) are the odd ones, or have no scalars
    at all; the rest are homogeneous. Or, where shapes may not depend on the data (torch.compile), [B] bool."""


BuildInvariant = Callable[[int], nn.Module]
"""Width of x -> the invariant map of a symmetry.

It is called as map(rows, x, weight, bias) and gives weight inv(x) + bias: the Linear that follows is part of the call,
so that it can be joined to the map's own last Linear."""


class SignInvariant(nn.Module):
    """inv(x) = rho(x) + rho(-x), unchanged under x -> -x (ScaleGMN, section 4; Lim et al., 2023).

    The first Linear is applied once (W x and its negation), the last once, to the sum of the hidden activations.

    Args:
        dim: width of x and of inv(x).
        mlp: builds rho, dim -> dim.
    """

    def __init__(self, dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.rho = mlp(dim, dim)

    def forward(self, rows: NodeContext, x: Tensor | ScaledRows, weight: Tensor, bias: Tensor) -> Tensor:
        """x [..., dim] -> weight inv(x) + bias, [..., out]."""
        first, last = self.rho.linears[0], self.rho.linears[-1]
        plus, minus = linear_of_both_signs(x, first.weight, first.bias)
        both = self.rho.hidden(plus) + self.rho.hidden(minus)
        return linear(both, weight @ last.weight, bias + 2 * (weight @ last.bias))


class AbsoluteValue(nn.Module):
    """inv(x) = |x| componentwise, unchanged under x -> -x."""

    def forward(self, rows: NodeContext, x: Tensor | ScaledRows, weight: Tensor, bias: Tensor) -> Tensor:
        """x [..., dim] -> weight inv(x) + bias, [..., out]."""
        size = ScaledRows(each(x.values, torch.abs), x.scale.abs()) if isinstance(x, ScaledRows) else x.abs()
        return linear(size, weight, bias)


class ScaleInvariant(nn.Module):
    """inv(x) = x / (||x||_2 + epsilon), unchanged under x -> q x, q > 0 (ScaleGMN, section 4); x where that underflows.

    Args:
        epsilon: 0 is exact; the published 1e-10 is felt as soon as ||x|| is small.
    """

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, rows: NodeContext, x: Tensor | ScaledRows, weight: Tensor, bias: Tensor) -> Tensor:
        """x [..., dim] -> weight inv(x) + bias, [..., out]; the norm is over the last axis."""
        values, scale = (x.values, x.scale) if isinstance(x, ScaledRows) else (x, torch.ones_like(x[..., :1]))
        norms = each(values, lambda rows: torch.linalg.vector_norm(rows, dim=-1, keepdim=True))
        norm = gathered(norms) * scale.abs() + self.epsilon
        smallest = torch.finfo(norm.dtype).tiny ** 0.5  # the gradient holds 1 / norm^2
        return linear(ScaledRows(values, scale / torch.where(norm > smallest, norm, 1)), weight, bias)


class ByActivation(nn.Module):
    """Networks, or rows, with odd activations go through one module, those with homogeneous ones through another.

    Args:
        sign: the module of `rows.odd`.
        scale: the module of the others.
    """

    def __init__(self, sign: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.sign = sign
        self.scale = scale

    def forward(self, rows: NodeContext, x: Tensor | ScaledRows, *others: Tensor) -> Tensor:
        """x [B, ..., d] and what the modules take besides -> [B, ..., out]."""
        if isinstance(rows.odd, Tensor):
            sign, scale = (module(rows, x, *others) for module in (self.sign, self.scale))
            return torch.where(rows.odd.view(-1, *[1] * (sign.ndim - 1)), sign, scale)
        num = len(x.scale if isinstance(x, ScaledRows) else x)
        sizes = (rows.odd, num - rows.odd)
        parts = zip((self.sign, self.scale), x.split(sizes), sizes, strict=True)
        return torch.cat([module(rows, part, *others) for module, part, size in parts if size])


class InvariantLayer(nn.Module):
    """g(x, p) = phi([inv(x), p]) (ScaleGMN, eq. 12).

    Args:
        in_dim: width of x.
        extra_dim: width of the invariant extras p; 0: none are read.
        out_dim: width of the output.
        invariant: builds inv from the width of x.
        mlp: builds phi.
    """

    def __init__(self, in_dim: int, extra_dim: int, out_dim: int, invariant: BuildInvariant, mlp: BuildMLP) -> None:
        super().__init__()
        self.extra_dim = extra_dim
        self.invariant = invariant(in_dim)
        self.phi = mlp(in_dim + extra_dim, out_dim)

    def forward(self, rows: NodeContext, x: Tensor | ScaledRows, *extras: Tensor | GatheredRows) -> Tensor:
        """x [..., in_dim], extras broadcasting to [..., extra_dim] -> [..., out_dim]."""
        weight, bias = self.phi.first(*(extras if self.extra_dim else ()))
        return self.phi.rest(self.invariant(rows, x, weight, bias))
