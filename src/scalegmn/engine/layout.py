"""Groups of nodes and blocks of edges, as the layers of ScaleGMN work through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scalegmn.engine.edges import EdgeIndex, sum_rows
from scalegmn.engine.rows import Rows
from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.nn.context import ROLES, EdgeContext, NodeContext


@dataclass(frozen=True)
class LayerReads:
    """What one message passing layer must compute, because something later reads it.

    Attributes:
        nodes: groups of nodes of a `Layout`, ascending.
        edges: blocks 1.. of forward edge features, ascending.
        backward_edges: blocks 1.. of backward edge features, ascending.
    """

    nodes: tuple[int, ...]
    edges: tuple[int, ...]
    backward_edges: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Groups of nodes, whose rows are one tensor each, and blocks of edges between them.

    Edges of block k = 1.. go to group k; messages against the edges of block k go to group k - 1.

    Attributes:
        roles: of each group.
        lower: per block, the groups that its edges come from.
        upper: per block, the groups that messages against its edges come from.
        chain: whether groups are the layers of equal chains, [B, n_l, ...]; else they are rows of any networks,
            [n, ...], sorted by scalar group.
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
    """A sparse graph sorted by role, and within a role by scalar group; edges by receiver.

    Args:
        graph: the graph.
        context: what its nodes belong to.
        typed: whether edges of different types differ.
        with_ends: whether a module in its plain form needs the contexts of edges' ends.
    """

    def __init__(self, graph: ParameterGraph, context: NodeContext, typed: bool, with_ends: bool) -> None:
        self.graph, self.typed, self.with_ends, self.groups = graph, typed, with_ends, context.groups
        num_groups = len(context.groups)
        self.kind = num_groups * graph.role + context.group  # [N], ascending in the new order
        self.order = self.kind.argsort(stable=True)
        """[N] long, the graph's nodes."""
        self.rank = inverse(self.order)
        """[N] long, the row of each of the graph's nodes among all rows."""
        self.context = context
        counts = self._counts(self.kind)
        self.sizes = [sum(of_groups) for of_groups in counts]
        """Rows of each role."""
        self.networks = self.split(graph.network)
        """The network of each row, per role."""
        self.rows = [self._rows(*parts) for parts in zip(ROLES, counts, self.networks, strict=True)]

    def _counts(self, kind: Tensor) -> list[tuple[int, ...]]:
        """Per role, how many rows of these kinds belong to each scalar group."""
        num_groups = len(self.groups)
        counts = kind.bincount(minlength=num_groups * len(ROLES)).tolist()
        return [tuple(counts[start : start + num_groups]) for start in range(0, len(counts), num_groups)]

    def _rows(self, role: str, counts: tuple[int, ...], network: Tensor | None) -> Rows:
        return Rows(role, self.groups, counts if len(counts) > 1 else None, network)

    def split(self, nodes: Tensor) -> list[Tensor]:
        """What the graph's nodes have, [N, ...] -> per role [n, ...]."""
        return list(nodes.index_select(0, self.order).split(self.sizes))

    def direction(self, against: bool) -> Direction:
        """The edges by receiver or, for messages against them, by sender."""
        graph = self.graph
        sender, receiver = graph.edge_index.flip(0) if against else graph.edge_index
        order = self.rank[receiver].argsort()
        sender, receiver = sender[order], receiver[order]
        types = graph.edge_type[order] if self.typed else torch.zeros_like(order)
        counts = self._counts(self.kind[receiver])
        starts = [0, self.sizes[0], self.sizes[0] + self.sizes[1]]
        first_sender = starts[1] if against else starts[0]
        blocks, start = [], 0
        for role in (0, 1) if against else (1, 2):
            stop = start + sum(counts[role])
            edges, start = slice(start, stop), stop
            ends = self.rank[sender[edges]] - first_sender, self.rank[receiver[edges]] - starts[role]
            rows = self._rows(ROLES[role], counts[role], None)
            contexts = None
            if self.with_ends:
                contexts = EdgeContext(self.context[receiver[edges]], self.context[sender[edges]])
            blocks.append(EdgeIndex(*ends, types[edges], self.sizes[role], rows, contexts))
        return Direction(order, blocks)

    def residuals(self, against: bool) -> dict[int, Tensor]:
        """Residual connections, or those against them, by the receiver's group: [2, C] long, senders among all rows and
        receivers among the group's; groups without any are left out."""
        senders, receivers = self.graph.residuals.flip(0) if against else self.graph.residuals
        ends, start = {}, 0
        for group, size in enumerate(self.sizes):
            chosen = self.graph.role[receivers] == group
            if chosen.any():
                ends[group] = torch.stack([self.rank[senders[chosen]], self.rank[receivers[chosen]] - start])
            start += size
        return ends

    def by_network(self, group: int, rows: Tensor) -> Tensor:
        """Rows of the networks' own inputs, or outputs, -> [G, n, ...]."""
        start, graph = sum(self.sizes[:group]), self.graph
        is_constant = (graph.role == 0) & (graph.node_type >= graph.num_inputs)
        chosen = self.rank[(graph.role == group) & ~is_constant] - start
        return rows.index_select(0, chosen).unflatten(0, (self.graph.num_networks, -1))

    def sum_hidden(self, rows: Tensor) -> Tensor:
        """The sum over each network's hidden nodes, [n, D] -> [G, D]."""
        return sum_rows(rows, self.networks[1], self.graph.num_networks)


def inverse(order: Tensor) -> Tensor:
    """[n] long, the place of each number in `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def join(groups: Sequence[Tensor] | Mapping[int, Tensor], chosen: Sequence[int]) -> Tensor:
    """The rows of some groups, one after the other."""
    parts = [groups[group] for group in chosen]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
