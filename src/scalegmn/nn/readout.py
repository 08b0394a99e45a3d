"""Readouts: from node features to one vector per network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scalegmn.nn.invariant import NodeContext
from scalegmn.nn.mlp import BuildMLP

Total = Callable[[Tensor], Tensor]
"""Rows of hidden nodes, [B, n, D] or [n, D] of all networks -> their sum in each network, [B, D]."""


def total_of_layers(rows: Tensor) -> Tensor:
    """`Total` of hidden nodes [B, n, D]."""
    return rows.sum(1)


class OutputReadout(nn.Module):
    """MLP(concatenated output nodes), which are fixed points of the group. For forward models.

    Args:
        dim: width d of node features.
        num_outputs: n_L.
        out_dim: width of the result.
        mlp: builds the MLP.
    """

    def __init__(self, dim: int, num_outputs: int, out_dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.mlp = mlp(num_outputs * dim, out_dim)

    def forward(self, nodes: Sequence[Tensor], odd: int | Tensor, total: Total = total_of_layers) -> Tensor:
        """nodes per layer [B, n_l, d], or hidden ones [n, d] -> [B, out_dim]; `odd` as in `NodeContext`."""
        return self.mlp(nodes[-1].flatten(1))


class EndsReadout(nn.Module):
    """MLP([project(output nodes), project(input nodes)]), each concatenated. For bidirectional models.

    Args:
        dim: width d of node features and of both projections.
        num_inputs: n_0.
        num_outputs: n_L.
        out_dim: width of the result.
        project: builds the projections: a Linear, or an MLP.
        mlp: builds the MLP, 2d -> out_dim.
    """

    def __init__(
        self,
        dim: int,
        num_inputs: int,
        num_outputs: int,
        out_dim: int,
        project: Callable[[int, int], nn.Module],
        mlp: BuildMLP,
    ) -> None:
        super().__init__()
        self.output_projection = project(num_outputs * dim, dim)
        self.input_projection = project(num_inputs * dim, dim)
        self.mlp = mlp(2 * dim, out_dim)

    def forward(self, nodes: Sequence[Tensor], odd: int | Tensor, total: Total = total_of_layers) -> Tensor:
        """nodes per layer [B, n_l, d], or hidden ones [n, d] -> [B, out_dim]; `odd` as in `NodeContext`."""
        return self.mlp(self.output_projection(nodes[-1].flatten(1)), self.input_projection(nodes[0].flatten(1)))


class GraphReadout(nn.Module):
    """MLP([sum over hidden nodes of g(x), input nodes, output nodes]), g an invariant layer (ScaleGMN, eq. 17).

    Args:
        dim: width d of node features.
        num_ends: n_0 + n_L.
        invariant_layer: g, d -> readout_dim, called as g(rows, x).
        readout_dim: width of g(x).
        out_dim: width of the result.
        mlp: builds the MLP.
    """

    def __init__(
        self,
        dim: int,
        num_ends: int,
        invariant_layer: nn.Module,
        readout_dim: int,
        out_dim: int,
        mlp: BuildMLP,
    ) -> None:
        super().__init__()
        self.invariant_layer = invariant_layer
        self.mlp = mlp(readout_dim + num_ends * dim, out_dim)

    def forward(self, nodes: Sequence[Tensor], odd: int | Tensor, total: Total = total_of_layers) -> Tensor:
        """nodes per layer [B, n_l, d], or hidden ones [n, d] -> [B, out_dim]; `odd` as in `NodeContext`."""
        pooled = total(self.invariant_layer(NodeContext("hidden", odd), torch.cat(nodes[1:-1], dim=-2)))
        return self.mlp(pooled, nodes[0].flatten(1), nodes[-1].flatten(1))


class DeepSetReadout(nn.Module):
    """MLP(sum over all nodes of MLP(x)), permutation-invariant (Zaheer et al., 2017).

    Args:
        dim: width d of node features.
        readout_dim: width of the sum.
        out_dim: width of the result.
        mlp: builds both MLPs.
    """

    def __init__(self, dim: int, readout_dim: int, out_dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.local_mlp = mlp(dim, readout_dim)
        self.global_mlp = mlp(readout_dim, out_dim)

    def forward(self, nodes: Sequence[Tensor], odd: int | Tensor, total: Total = total_of_layers) -> Tensor:
        """nodes per layer [B, n_l, d], or hidden ones [n, d] -> [B, out_dim]; `odd` as in `NodeContext`."""
        inputs, outputs = (self.local_mlp(nodes[end]).sum(1) for end in (0, -1))
        return self.global_mlp(inputs + total(self.local_mlp(torch.cat(nodes[1:-1], dim=-2))) + outputs)
