"""Positional embeddings of node and edge types."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PositionalEmbedding(nn.Module):
    """A learned vector P[type] per node or edge type, standard normal at the start (ScaleGMN, section 4).

    Args:
        types: per node layer or block, long tensors whose shapes broadcast to those of the features without D.
        num_types: rows of the table.
        dim: D, width of a row.
    """

    def __init__(self, types: Sequence[Tensor], num_types: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_types, dim))
        self.shapes = [tuple(block.shape) for block in types]
        self.register_buffer("types", torch.cat([block.flatten() for block in types]), persistent=False)

    def forward(self) -> list[Tensor]:
        """Per layer or block, P[types] of shape (*types.shape, D)."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        rows = self.table[self.types].split(sizes)
        return [block.reshape(*shape, -1) for block, shape in zip(rows, self.shapes, strict=True)]
