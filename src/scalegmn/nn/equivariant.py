"""Equivariant layers: features that are multiplied by q in, features that are multiplied by q out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from scalegmn.nn.context import ROLES, NodeContext, select_branches
from scalegmn.nn.mlp import BuildMLP


class ByRole(nn.Module):
    """One module per node role; rows of a role go through its module alone.

    Only the modules of `roles` are kept: a role that never occurs has no parameters, and its rows are zero.

    Args:
        modules: role -> module; roles may share one module.
        roles: the roles that occur.
    """

    def __init__(self, modules: Mapping[str, nn.Module], roles: Collection[str]) -> None:
        super().__init__()
        distinct = {id(modules[role]): modules[role] for role in ROLES if role in roles}
        self.branches = nn.ModuleList(distinct.values())
        self.index = {role: list(distinct).index(id(modules[role])) for role in ROLES if role in roles}

    def forward(self, context: NodeContext, *inputs: Tensor) -> Tensor:
        """Inputs [n, D] -> [n, out]."""
        masks = [torch.zeros_like(context.role, dtype=torch.bool) for _ in self.branches]
        for role, index in self.index.items():
            masks[index] |= context.role == ROLES.index(role)
        return select_branches(list(zip(masks, self.branches, strict=True)), context, inputs)


class MLPLayer(nn.Module):
    """MLP([x, p]): for rows of input and output nodes, which have no symmetry to respect.

    Args:
        in_dim: width of [x, p].
        out_dim: width of the output.
        mlp: builds the MLP.
    """

    def __init__(self, in_dim: int, out_dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.mlp = mlp(in_dim, out_dim)

    def forward(self, context: NodeContext, x: Tensor, *extras: Tensor) -> Tensor:
        """x [n, d], extras [n, extra_dim] -> [n, out_dim]."""
        new: Tensor = self.mlp(x, *extras)
        return new


class EquivariantLayer(nn.Module):
    """(W x) * g(x, p), W without bias: multiplied by q when x is (ScaleGMN, eq. 13).

    Args:
        in_dim: width of x.
        out_dim: width of the output.
        factor: g, called as factor(context, x, *extras); invariant on hidden rows.
    """

    def __init__(self, in_dim: int, out_dim: int, factor: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim, bias=False)
        self.factor = factor

    def forward(self, context: NodeContext, x: Tensor, *extras: Tensor) -> Tensor:
        """x [n, in_dim], extras [n, extra_dim] -> [n, out_dim]."""
        new: Tensor = self.linear(x) * self.factor(context, x, *extras)
        return new


class EquivariantNet(nn.Module):
    """Equivariant layers in a row, each with the residual W_s x if `skips` are given.

    Args:
        layers: called as layer(context, x, *extras).
        skips: none, or one Linear without bias per layer.
    """

    def __init__(self, layers: Sequence[nn.Module], skips: Sequence[nn.Linear] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.skips: Sequence[nn.Linear] = nn.ModuleList(skips)  # type: ignore[assignment]  # ModuleList has no item type

    def forward(self, context: NodeContext, x: Tensor, *extras: Tensor) -> Tensor:
        """x [n, in_dim], extras [n, extra_dim] -> [n, out_dim]."""
        for index, layer in enumerate(self.layers):
            new: Tensor = layer(context, x, *extras)
            x = new + self.skips[index](x) if self.skips else new
        return x


class SineUpdate(nn.Module):
    """UPD = sin(30 W [x, m...]) or, summed, sin(30 W (W_0 x + W_1 m + ...)); odd, since no Linear has a bias.

    30 is the frequency of the sine layers of SIREN (Sitzmann et al., 2020) and of the published ScaleGMN code.

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

    def forward(self, context: NodeContext, x: Tensor) -> Tensor:
        """`[x, m...]` of shape `[n, num_parts * dim]` -> [n, out_dim], the same for all roles."""
        if self.parts:
            parts = [x[:, start : start + self.dim] for start in range(0, x.shape[1], self.dim)]
            x = torch.stack([linear(part) for linear, part in zip(self.parts, parts, strict=True)]).sum(0)
        return torch.sin(30 * self.linear(x))
