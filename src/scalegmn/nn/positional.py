"""Positional embeddings of node and edge types."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from scalegmn.nn.context import ROLES, NodeContext


class PositionalEmbedding(nn.Module):
    """A learned vector P[type] per node or edge type, standard normal at the start (ScaleGMN, section 4).

    Args:
        num_types: rows of the table.
        dim: D, width of a row.
    """

    def __init__(self, num_types: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_types, dim))

    def forward(self, types: Tensor) -> Tensor:
        """types [n] long -> P[types], [n, D]."""
        return self.table[types]


class TypedLinear(nn.Module):
    """x -> M[type] x, a matrix without bias per node or edge type: multiplied by q when x is.

    Args:
        num_types: number of matrices; 1: the same for all types.
        dim: D, width of x; each matrix starts like that of an `nn.Linear`.
    """

    def __init__(self, num_types: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter((2 * torch.rand(num_types, dim, dim) - 1) / dim**0.5)

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        """x [n, D], types [n] long -> [n, D]."""
        if len(self.table) == 1:
            return x @ self.table[0].T
        new = torch.zeros_like(x)
        for index, matrix in enumerate(self.table):
            rows = types == index
            new[rows] = x[rows] @ matrix.T
        return new


def embed_positions(
    context: NodeContext, x: Tensor, p: Tensor, summed: Collection[str], net: nn.Module | None
) -> Tensor:
    """x + p on the rows of some roles; elsewhere net(x, p), or x * p without a net: [n, D].

    Args:
        context: of the rows; of edges, that of their receivers.
        x: features [n, D].
        p: positional embeddings [n, D].
        summed: the roles of rows that have no symmetry to respect.
        net: an equivariant net, called as net(context, x, p).
    """
    added = torch.zeros_like(context.role, dtype=torch.bool)
    for role in summed:
        added |= context.role == ROLES.index(role)
    return torch.where(added[:, None], x + p, x * p if net is None else net(context, x, p))
