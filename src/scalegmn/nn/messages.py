"""Messages and edge updates on the blocks of a parameter graph, dense or sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalegmn.engine.edges import Edges, GatheredRows, ScaledRows, linear, times
from scalegmn.nn.invariant import BuildInvariant, NodeContext
from scalegmn.nn.mlp import BuildMLP


class EquivariantMessage(nn.Module):
    """m_i = AGG_j MSG((A x_j) * (B e_ji), p) (ScaleGMN, eq. 15).

    The product is multiplied by q_i under rescaling, since x_j is by q_j and e_ji by q_i / q_j.

    Args:
        dim: width d of node and edge features.
        net: MSG, an equivariant net d -> d.
        aggregator: `add` or `mean`.
    """

    def __init__(self, dim: int, net: nn.Module, aggregator: str) -> None:
        super().__init__()
        self.node_linear = nn.Linear(dim, dim, bias=False)
        self.edge_linear = nn.Linear(dim, dim, bias=False)
        self.net = net
        self.aggregator = aggregator

    def send(self, nodes: Tensor) -> Tensor:
        """What messages read of their senders [B, S, d]: A x, once for all edges."""
        return self.node_linear(nodes)

    def forward(self, rows: NodeContext, edges: Edges, sent: Tensor, *extras: Tensor | GatheredRows) -> Tensor:
        """Edges [B, R, S, d], `send` of nodes [B, S, d], extras broadcasting to [R, S, d] -> [B, R, d]; of sparse
        blocks [E, d], [S, d], [E, d] -> [R, d].

        `rows` are the receivers, or, of sparse blocks, those of each edge.
        """
        x = edges.times_senders(edges.linear(self.edge_linear.weight), sent)
        messages = self.net(rows, x, *extras)
        return edges.sum(messages) if self.aggregator == "add" else edges.mean(messages)


class ConcatMessage(nn.Module):
    """m_i = AGG_j MLP([e_ji, x_j]): the messages of a permutation-equivariant GMN, all rows alike.

    The last Linear acts on the aggregate.

    Args:
        dim: width d of node and edge features.
        mlp: builds the MLP, 2d -> d.
        aggregator: `add` or `mean`.
    """

    def __init__(self, dim: int, mlp: BuildMLP, aggregator: str) -> None:
        super().__init__()
        self.mlp = mlp(2 * dim, dim)
        self.aggregator = aggregator

    def send(self, nodes: Tensor) -> Tensor:
        """What messages read of their senders [B, S, d]: their part of the first Linear."""
        return self.mlp.first(nodes)[1]

    def forward(self, rows: NodeContext, edges: Edges, sent: Tensor) -> Tensor:
        """Edges [B, R, S, d], `send` of nodes [B, S, d] -> [B, R, d], or [E, d], [S, d] -> [R, d]; the same for all
        `rows`."""
        dim = self.mlp.linears[0].in_features // 2
        hidden = self.mlp.hidden(edges.linear(self.mlp.linears[0].weight[:, :dim], edges.at_senders(sent)))
        last = self.mlp.linears[-1]
        if self.aggregator == "mean":
            return last(edges.mean(hidden))
        return linear(edges.sum(hidden), last.weight, edges.degree * last.bias)


class EquivariantEdgeUpdate(nn.Module):
    """e_ji' = (C e_ji) * phi([inv(x_j), inv(x_i)]), one inv for both ends.

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

    def ends(self, rows: NodeContext, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """What the update reads of nodes [B, n, d] as senders and as receivers: their parts of phi's first Linear."""
        first = self.phi.linears[0]
        weight = torch.cat(first.weight.chunk(2, dim=1))
        bias = torch.cat([torch.zeros_like(first.bias), first.bias])
        return self.invariant(rows, nodes, weight, bias).chunk(2, dim=-1)

    def forward(self, edges: Edges, senders: Tensor, receivers: Tensor) -> Tensor:
        """Edges [B, R, S, d], `ends` of senders [B, S, ...] and receivers [B, R, ...] -> [B, R, S, out_dim]; or
        [E, d], [S, ...], [R, ...] -> [E, out_dim]."""
        factor = self.phi.rest(edges.at_senders(senders) + edges.at_receivers(receivers))
        new = times(edges.linear(self.linear.weight), factor)
        return new.product() if isinstance(new, ScaledRows) else new


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

    def ends(self, rows: NodeContext, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """What the update reads of nodes [B, n, d] as senders and as receivers: their parts of phi's first Linear."""
        first = self.phi.linears[0]
        _, sender, receiver = first.weight.chunk(3, dim=1)
        return linear(nodes, sender), linear(nodes, receiver, first.bias)

    def forward(self, edges: Edges, senders: Tensor, receivers: Tensor) -> Tensor:
        """Edges [B, R, S, d], `ends` of senders [B, S, ...] and receivers [B, R, ...] -> [B, R, S, out_dim]; or
        [E, d], [S, ...], [R, ...] -> [E, out_dim]."""
        weight, _, _ = self.phi.linears[0].weight.chunk(3, dim=1)
        return self.phi.rest(edges.linear(weight, edges.at_senders(senders) + edges.at_receivers(receivers)))


def reciprocal(edges: Tensor, floor: Tensor) -> Tensor:
    """w -> w / max(||w||, floor)^2 per edge: 1/w for a single weight, zero at zero, finite for padded kernels.

    Multiplied by q_j / q_i when w is by q_i / q_j, as a message against the edge needs, if the floor is by |q_i / q_j|.

    Args:
        edges: raw edge features [..., K].
        floor: broadcasts to [..., 1]; it keeps the result continuous at zero and at most 1 / floor. Where it is zero,
            as for neurons without weights, the result is zero.
    """
    norm = torch.linalg.vector_norm(edges, dim=-1, keepdim=True)
    size = torch.where(floor > 0, torch.maximum(norm, floor), 1)
    return edges / size / size  # its square may underflow
