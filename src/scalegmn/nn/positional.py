"""Positional embeddings of node and edge types."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from scalegmn.nn.invariant import NodeContext


class ByType(nn.Module):
    """One learned tensor per node or edge type.

    Args:
        types: per node layer or block, long tensors whose shapes broadcast to those of the features without D.
        table: the tensors at the start, [types, ...].
    """

    def __init__(self, types: Sequence[Tensor], table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.shapes = [tuple(block.shape) for block in types]
        self.register_buffer("types", torch.cat([block.flatten() for block in types]), persistent=False)

    def rows(self) -> list[Tensor]:
        """Per layer or block, table[types] of shape (*types.shape, ...)."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        rows = self.table[self.types].split(sizes)
        return [block.reshape(*shape, *block.shape[1:]) for block, shape in zip(rows, self.shapes, strict=True)]


class PositionalEmbedding(ByType):
    """A learned vector P[type] per node or edge type, standard normal at the start (ScaleGMN, section 4).

    Args:
        types: as in `ByType`.
        num_types: rows of the table.
        dim: D, width of a row.
    """

    def __init__(self, types: Sequence[Tensor], num_types: int, dim: int) -> None:
        super().__init__(types, torch.randn(num_types, dim))

    def forward(self) -> list[Tensor]:
        """Per layer or block, P[types] of shape (*types.shape, D)."""
        return self.rows()


class TypedLinear(ByType):
    """x -> M[type] x, a matrix without bias per node or edge type: multiplied by q when x is.

    Args:
        types: as in `ByType`.
        num_types: number of matrices.
        dim: D, width of x; each matrix starts like that of an `nn.Linear`.
    """

    def __init__(self, types: Sequence[Tensor], num_types: int, dim: int) -> None:
        super().__init__(types, (2 * torch.rand(num_types, dim, dim) - 1) / dim**0.5)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Per layer or block, [B, ..., D] -> [B, ..., D]."""
        return [torch.einsum("...d,...od->...o", x, m) for x, m in zip(features, self.rows(), strict=True)]


def embed_positions(
    features: Sequence[Tensor],
    positions: Sequence[Tensor],
    roles: Sequence[str],
    summed: Collection[str],
    net: nn.Module | None,
) -> list[Tensor]:
    """x + p on the rows of some roles; elsewhere net(x, p), or x * p without a net.

    Args:
        features: x per layer or block, [B, ..., D].
        positions: p per layer or block, broadcasting to the features without B.
        roles: per layer or block, the role of its nodes, or of the nodes that its edges go to.
        summed: the roles of rows that have no symmetry to respect.
        net: an equivariant net, called as net(rows, x, p).
    """

    def embed(x: Tensor, p: Tensor, role: str) -> Tensor:
        if role in summed:
            return x + p
        return x * p if net is None else net(NodeContext(role), x, p)

    return [embed(*rows) for rows in zip(features, positions, roles, strict=True)]
