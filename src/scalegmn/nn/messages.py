"""Messages and updates on the blocks of a parameter graph: edges [B, receivers, senders, d]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalegmn.nn.invariant import BuildInvariant, Rows
from scalegmn.nn.mlp import BuildMLP


class EquivariantMessage(nn.Module):
    """MSG((A x_j) * (B e_ji), p) (ScaleGMN, eq. 15).

    The product is multiplied by q_i under rescaling, since x_j is by q_j and e_ji by q_i / q_j. A is applied per node.

    Args:
        dim: width d of node and edge features.
        net: MSG, an equivariant net d -> d.
    """

    def __init__(self, dim: int, net: nn.Module) -> None:
        super().__init__()
        self.node_linear = nn.Linear(dim, dim, bias=False)
        self.edge_linear = nn.Linear(dim, dim, bias=False)
        self.net = net

    def forward(self, rows: Rows, senders: Tensor, edges: Tensor, *extras: Tensor) -> Tensor:
        """senders [B, S, d], edges [B, R, S, d], extras broadcasting to [R, S, d] -> messages [B, R, S, d].

        `rows` are the receivers.
        """
        return self.net(rows, self.node_linear(senders)[:, None] * self.edge_linear(edges), *extras)


class ConcatMessage(nn.Module):
    """MLP([e_ji, x_j]): the message of a permutation-equivariant GMN, all rows alike.

    Args:
        dim: width d of node and edge features.
        mlp: builds the MLP, 2d -> d.
    """

    def __init__(self, dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.mlp = mlp(2 * dim, dim)

    def forward(self, rows: Rows, senders: Tensor, edges: Tensor) -> Tensor:
        """senders [B, S, d], edges [B, R, S, d] -> messages [B, R, S, d]; the same for all `rows`."""
        return self.mlp(edges, senders[:, None])


class EquivariantEdgeUpdate(nn.Module):
    """e_ji' = (C e_ji) * phi([inv(x_j), inv(x_i)]), one inv for both ends, applied per node.

    Args:
        dim: width d of node and edge features.
        out_dim: width of the new edge features.
        invariant: builds inv from d.
        mlp: builds phi, 2d -> out_dim.
    """

    def __init__(self, dim: int, out_dim: int, invariant: BuildInvariant, mlp: BuildMLP) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim, bias=False)
        self.invariant = invariant(dim)
        self.phi = mlp(2 * dim, out_dim)

    def ends(self, rows: Rows, nodes: Tensor) -> Tensor:
        """What the update reads of nodes [B, n, d]: inv(x), computed once for the edges on both sides."""
        return self.invariant(rows, nodes)

    def forward(self, edges: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """edges [B, R, S, d], `ends` of senders [B, S, d] and receivers [B, R, d] -> [B, R, S, out_dim]."""
        return self.linear(edges) * self.phi(senders[:, None], receivers[:, :, None])


class ConcatEdgeUpdate(nn.Module):
    """e_ji' = phi([e_ji, x_j, x_i]), permutation-equivariant.

    Args:
        dim: width d of node and edge features.
        out_dim: width of the new edge features.
        mlp: builds phi, 3d -> out_dim.
    """

    def __init__(self, dim: int, out_dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.phi = mlp(3 * dim, out_dim)

    def ends(self, rows: Rows, nodes: Tensor) -> Tensor:
        """What the update reads of nodes [B, n, d]: all of x."""
        return nodes

    def forward(self, edges: Tensor, senders: Tensor, receivers: Tensor) -> Tensor:
        """edges [B, R, S, d], senders [B, S, d], receivers [B, R, d] -> [B, R, S, out_dim]."""
        return self.phi(edges, senders[:, None], receivers[:, :, None])


def reciprocal(edges: Tensor) -> Tensor:
    """w -> w / ||w||^2 per edge, zero where w is zero: 1/w for a single weight, finite for padded kernels.

    Multiplied by q_j / q_i when w is by q_i / q_j, as a message against the edge needs. The largest component is taken
    out first, so that no square under- or overflows.

    Args:
        edges: raw edge features [..., K].
    """
    largest = edges.abs().amax(-1, keepdim=True)
    unit = edges / torch.where(largest > 0, largest, 1)
    norm = unit.square().sum(-1, keepdim=True) * largest
    return unit / torch.where(largest > 0, norm, 1)
