"""Groups of nodes and blocks of edges, as the layers of ScaleGMN work through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scalegmn.engine.edges import EdgeIndex, sum_rows
from scalegmn.graphs.parameter_graph import ROLES, ParameterGraph
from scalegmn.networks.scalar_groups import SCALES
from scalegmn.nn.invariant import NodeContext


@dataclass(frozen=True)
class Layout:
    """Groups of nodes, whose rows are one tensor each, and blocks of edges between them.

    Edges of block k = 1.. go to group k; messages against the edges of block k go to group k - 1.

    Attributes:
        roles: of each group.
        lower: per block, the groups that its edges come from.
        upper: per block, the groups that messages against its edges come from.
        chain: whether groups are the layers of equal chains, [B, n_l, ...]; else they are rows of any networks,
            [n, ...], odd ones first.
    """

    roles: tuple[str, ...]
    lower: tuple[tuple[int, ...], ...]
    upper: tuple[tuple[int, ...], ...]
    chain: bool

    @classmethod
    def by_layer(cls, roles: tuple[str, ...]) -> Layout:
        """A group per layer of nodes, each read by the next."""
        blocks = range(1, len(roles))
        return cls(roles, tuple((k - 1,) for k in blocks), tuple((k,) for k in blocks), chain=True)

    def together(self, groups: Sequence[int]) -> list[Sequence[int]]:
        """Groups in parts whose rows may pass through a module in one call."""
        return [groups] * bool(groups) if self.chain else [[group] for group in groups]


BY_ROLE = Layout(ROLES, ((0, 1), (0, 1)), ((1, 2), (1, 2)), chain=False)
"""A group per role, of all networks."""


class Direction(NamedTuple):
    """All edges, by where messages along them, or against them, go to."""

    order: Tensor
    """[E] long, the graph's edges."""

    blocks: list[EdgeIndex]
    """Of the blocks of `BY_ROLE`, rows counted within their groups."""

    def split(self, edges: Tensor) -> tuple[Tensor, ...]:
        """What the graph's edges have, [E, ...] -> per block."""
        return edges.index_select(0, self.order).split([block.num_edges for block in self.blocks])


class RoleRows:
    """A sparse graph sorted by role, and within a role odd nodes first; edges by receiver.

    Args:
        graph: the graph.
        mixed: whether odd nodes differ from others.
        typed: whether edges of different types differ.
    """

    def __init__(self, graph: ParameterGraph, mixed: bool, typed: bool) -> None:
        self.graph, self.typed = graph, typed
        scaled = torch.tensor([group == SCALES for group in graph.scalar_groups], device=graph.role.device)
        self.kind = 2 * graph.role + (scaled[graph.scalar_group] if mixed else 0)  # [N], ascending in the new order
        self.order = self.kind.argsort(stable=True)
        """[N] long, the graph's nodes."""
        self.rank = inverse(self.order)
        """[N] long, the row of each of the graph's nodes among all rows."""
        counts = self.kind.bincount(minlength=2 * len(ROLES)).tolist()
        self.sizes = [odd + other for odd, other in zip(counts[::2], counts[1::2], strict=True)]
        """Rows of each group."""
        self.rows = [NodeContext(role, num_odd) for role, num_odd in zip(ROLES, counts[::2], strict=True)]

    def split(self, nodes: Tensor) -> list[Tensor]:
        """What the graph's nodes have, [N, ...] -> per group [n, ...]."""
        return list(nodes.index_select(0, self.order).split(self.sizes))

    def direction(self, against: bool) -> Direction:
        """The edges by receiver or, for messages against them, by sender."""
        graph = self.graph
        sender, receiver = graph.edge_index.flip(0) if against else graph.edge_index
        order = self.rank[receiver].argsort()
        sender, receiver = sender[order], receiver[order]
        types = graph.edge_type[order] if self.typed else torch.zeros_like(order)
        counts = self.kind[receiver].bincount(minlength=2 * len(ROLES)).tolist()
        starts = [0, self.sizes[0], self.sizes[0] + self.sizes[1]]
        first_sender = starts[1] if against else starts[0]
        blocks, start = [], 0
        for group in (0, 1) if against else (1, 2):
            odd, stop = counts[2 * group], start + sum(counts[2 * group : 2 * group + 2])
            edges, start = slice(start, stop), stop
            ends = self.rank[sender[edges]] - first_sender, self.rank[receiver[edges]] - starts[group]
            blocks.append(EdgeIndex(*ends, types[edges], self.sizes[group], odd))
        return Direction(order, blocks)

    def residuals(self, against: bool) -> dict[int, Tensor]:
        """Residual connections, or those against them, by the receiver's group: [2, C] long, senders among all rows and
        receivers among the group's; groups without any are left out."""
        senders, receivers = self.graph.residuals.flip(0) if against else self.graph.residuals
        found, start = {}, 0
        for group, size in enumerate(self.sizes):
            own = self.graph.role[receivers] == group
            if own.any():
                found[group] = torch.stack([self.rank[senders[own]], self.rank[receivers[own]] - start])
            start += size
        return found

    def by_network(self, group: int, rows: Tensor) -> Tensor:
        """Rows of the networks' own inputs, or outputs, -> [G, n, ...]."""
        start, graph = sum(self.sizes[:group]), self.graph
        is_constant = (graph.role == 0) & (graph.node_type >= graph.num_inputs)
        own = self.rank[(graph.role == group) & ~is_constant] - start
        return rows.index_select(0, own).unflatten(0, (self.graph.num_networks, -1))

    def sum_hidden(self, rows: Tensor) -> Tensor:
        """The sum over each network's hidden nodes, [n, D] -> [G, D]."""
        return sum_rows(rows, self.split(self.graph.network)[1], self.graph.num_networks)


def inverse(order: Tensor) -> Tensor:
    """[n] long, the place of each number in `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def join(groups: Sequence[Tensor | None], chosen: Sequence[int]) -> Tensor:
    """The rows of some groups, one after the other."""
    parts = [groups[group] for group in chosen]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
