"""Equivariant layers: q x in, q y out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from scalegmn.engine.edges import ScaledRows, linear, times
from scalegmn.nn.invariant import NodeContext
from scalegmn.nn.mlp import BuildMLP

ROLES = ("input", "hidden", "output")


class ByRole(nn.Module):
    """One module per node role; rows of a role go through its module alone.

    Only the modules of `roles` are kept: a role that never occurs has no parameters.

    Args:
        modules: role -> module; roles may share one module.
        roles: the roles that occur.
    """

    def __init__(self, modules: Mapping[str, nn.Module], roles: Collection[str]) -> None:
        super().__init__()
        distinct = {id(modules[role]): modules[role] for role in ROLES if role in roles}
        self.branches = nn.ModuleList(distinct.values())
        self.index = {role: list(distinct).index(id(modules[role])) for role in ROLES if role in roles}

    def forward(self, rows: NodeContext, *inputs: Tensor | ScaledRows) -> Tensor | ScaledRows:
        """The branch of the rows' role applied to `inputs`."""
        return self.branches[self.index[rows.role]](rows, *inputs)


class PlainLayer(nn.Module):
    """MLP([x, p]): for rows of input and output nodes, which have no symmetry to respect.

    Args:
        in_dim: width of [x, p].
        out_dim: width of the output.
        mlp: builds the MLP.
    """

    def __init__(self, in_dim: int, out_dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.mlp = mlp(in_dim, out_dim)

    def forward(self, rows: NodeContext, x: Tensor | ScaledRows, *extras: Tensor) -> Tensor:
        """x [..., d], extras broadcasting to [..., extra_dim] -> [..., out_dim]."""
        return self.mlp(x, *extras)


class EquivariantLayer(nn.Module):
    """(W x) * g(x, p), W without bias: multiplied by q when x is (ScaleGMN, eq. 13).

    Args:
        in_dim: width of x.
        out_dim: width of the output.
        factor: g, called as factor(rows, x, *extras); invariant on hidden rows.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim, bias=False)
        self.factor = factor

    def forward(self, rows: NodeContext, x: Tensor | ScaledRows, *extras: Tensor) -> Tensor | ScaledRows:
        """x [..., in_dim], extras broadcasting to [..., extra_dim] -> [..., out_dim]; `ScaledRows` if x is."""
        return times(linear(x, self.linear.weight), self.factor(rows, x, *extras))


class EquivariantNet(nn.Module):
    """Equivariant layers in a row, each with the residual W_s x if `skips` are given.

    Args:
        layers: called as layer(rows, x, *extras).
        skips: none, or one Linear without bias per layer.
    """

    def __init__(self, layers: Sequence[nn.Module], skips: Sequence[nn.Linear] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.skips = nn.ModuleList(skips)

    def forward(self, rows: NodeContext, x: Tensor | ScaledRows, *extras: Tensor) -> Tensor | ScaledRows:
        """x [..., in_dim], extras broadcasting to [..., extra_dim] -> [..., out_dim]; `ScaledRows` only if x is."""
        for index, layer in enumerate(self.layers):
            new = layer(rows, x, *extras)
            if self.skips:
                new = new.product() if isinstance(new, ScaledRows) else new
                new = linear(x, self.skips[index].weight, new)
            x = new
        return x


class SineUpdate(nn.Module):
    """UPD = sin(30 W [x, m...]) or, summed, sin(30 W (W_0 x + W_1 m + ...)); odd, since no Linear has a bias.

    Args:
        num_parts: how many of x, m... there are.
        dim: width of each.
        out_dim: width of the output.
        summed: add the parts, each through a Linear of its own, before W.
    """

    def __init__(self, num_parts: int, dim: int, out_dim: int, summed: bool) -> None:
        super().__init__()
        self.dim = dim
        self.parts = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(num_parts if summed else 0))
        self.linear = nn.Linear(dim if summed else num_parts * dim, out_dim, bias=False)

    def forward(self, rows: NodeContext, x: Tensor) -> Tensor:
        """`[x, m...]` of shape `[..., num_parts * dim]` -> [..., out_dim], the same for all `rows`."""
        if self.parts:
            x = sum(part(piece) for part, piece in zip(self.parts, x.split(self.dim, -1), strict=True))
        return torch.sin(30 * self.linear(x))
