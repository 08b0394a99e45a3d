"""Sets of nodes and blocks of edges between them, as the engine runs the layers of ScaleGMN.

A set of nodes is a layer of the input networks where all networks have one architecture and large layers, and else a
role (input, hidden, output). Scalar groups are something else: `ScalarGroup`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scalegmn.engine.edges import EdgeIndex, Edges, sum_rows
from scalegmn.engine.rows import Rows
from scalegmn.graphs.edge_values import EdgeValues
from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.networks import NetSpec
from scalegmn.nn.context import ROLES, EdgeContext, NodeContext
from scalegmn.nn.message_passing import NeededParts

Ends = tuple[tuple[int, ...], int]
"""The sets of nodes that send along a block of edges, and the set that receives."""


@dataclass(frozen=True)
class Layout:
    """Sets of nodes 0.., whose rows are one tensor each, and blocks 1.. of edges between them.

    Attributes:
        roles: the role of each set of nodes.
        along: per block, the ends of its edges.
        against: per block, the ends of messages against edges.
        kinds: where the sets are the layers of equal networks, [B, n_l, ...], a number for each that is the same where
            scalar groups are; None where they are the roles of networks of any architectures, [n, ...], sorted by
            scalar group.
    """

    roles: tuple[str, ...]
    along: tuple[Ends, ...]
    against: tuple[Ends, ...]
    kinds: tuple[int, ...] | None = None

    @classmethod
    def by_layer(cls, spec: NetSpec, kinds: tuple[int, ...]) -> Layout:
        """The node layers of equal networks, with a block of edges for each layer of weights."""
        along = tuple(((sender,), receiver) for sender, receiver in spec.node_layers)
        against = tuple(((receiver,), sender) for sender, receiver in spec.node_layers)
        return cls(spec.roles, along, against, kinds)

    def together(self, node_sets: Sequence[int]) -> list[list[int]]:
        """The sets of nodes, in lists whose rows one call of a module can read together."""
        lists: dict[int, list[int]] = {}
        for node_set in node_sets:
            lists.setdefault(node_set if self.kinds is None else self.kinds[node_set], []).append(node_set)
        return list(lists.values())

    def needed(self, by_role: NeededParts) -> NeededParts:
        """What is read of the sets and blocks, if `by_role` is of those of `BY_ROLE`."""
        roles = [ROLES.index(role) for role in self.roles]
        blocks = range(1, len(self.along) + 1)
        return NeededParts(
            tuple(node_set for node_set, role in enumerate(roles) if role in by_role.nodes),
            tuple(k for k in blocks if roles[self.along[k - 1][1]] in by_role.edges),
            tuple(k for k in blocks if roles[self.against[k - 1][1]] + 1 in by_role.backward_edges),
        )


BY_ROLE = Layout(ROLES, (((0, 1), 1), ((0, 1), 2)), (((1, 2), 0), ((1, 2), 1)))
"""The roles of networks of any architectures."""


class Direction(NamedTuple):
    """All edges of a sparse graph, sorted by the nodes that receive messages along them, or against them."""

    order: Tensor
    """[E] long, the place in the graph of each sorted edge."""

    parts: list[tuple[EdgeIndex, ...]]
    """Senders and receivers in each block of `BY_ROLE`, in parts of kernels of about one size; rows are numbered within
    their sets of nodes."""

    @property
    def all_parts(self) -> list[EdgeIndex]:
        """Those of all blocks."""
        return [part for block in self.parts for part in block]

    def by_block(self, parts: Sequence[Edges]) -> list[Sequence[Edges] | None]:
        """What belongs to the parts of all blocks -> per block."""
        remaining = iter(parts)
        return [[next(remaining) for _ in block] for block in self.parts]

    def split(self, edges: Tensor) -> tuple[Tensor, ...]:
        """Values per edge in the graph's order, [E, ...] -> sorted, per part."""
        return edges.index_select(0, self.order).split([part.num_edges for part in self.all_parts])

    def split_values(self, edges: EdgeValues) -> list[EdgeValues]:
        """The same of raw features."""
        return edges.split(self.order, [part.num_edges for part in self.all_parts])


class RoleRows:
    """A sparse graph sorted by role, and within a role by scalar group; edges by receiver.

    Args:
        graph: the graph.
        context: role, scalar group and network of its nodes.
        typed: whether edges of different types differ.
        with_ends: whether a module in its plain form needs the contexts of edges' ends.
    """

    def __init__(self, graph: ParameterGraph, context: NodeContext, typed: bool, with_ends: bool) -> None:
        self.graph, self.typed, self.with_ends, self.groups = graph, typed, with_ends, context.groups
        num_groups = len(context.groups)
        self.kind = num_groups * graph.role + context.group  # [N], ascending in the new order
        self.order = self.kind.argsort(stable=True)
        """[N] long, the place in the graph of each sorted node."""
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
        """Values per node in the graph's order, [N, ...] -> sorted, per role [n, ...]."""
        return list(nodes.index_select(0, self.order).split(self.sizes))

    def direction(self, against: bool, kinds: Tensor | None = None) -> Direction:
        """The edges by receiver or, for messages against them, by sender; `kinds` [E] long, ascending from 0, tells
        which are in one part."""
        graph = self.graph
        sender, receiver = graph.edge_index.flip(0) if against else graph.edge_index
        kinds = torch.zeros_like(receiver) if kinds is None else kinds
        num_kinds = int(kinds.max()) + 1
        part = num_kinds * graph.role[receiver] + kinds
        order = (part * len(self.rank) + self.rank[receiver]).argsort()
        sender, receiver = sender[order], receiver[order]
        types = graph.edge_type[order] if self.typed else torch.zeros_like(order)
        starts = [0, self.sizes[0], self.sizes[0] + self.sizes[1]]
        first_sender = starts[1] if against else starts[0]
        sizes = part.bincount(minlength=num_kinds * len(ROLES)).tolist()
        blocks: list[tuple[EdgeIndex, ...]] = []
        start = 0
        for role in (0, 1) if against else (1, 2):
            parts = []
            of_role = sizes[num_kinds * role : num_kinds * (role + 1)]
            for size in [size for size in of_role if size] or [0]:
                edges, start = slice(start, start + size), start + size
                ends = self.rank[sender[edges]] - first_sender, self.rank[receiver[edges]] - starts[role]
                rows = self._rows(ROLES[role], self._counts(self.kind[receiver[edges]])[role], None)
                contexts = None
                if self.with_ends:
                    contexts = EdgeContext(self.context[receiver[edges]], self.context[sender[edges]])
                parts.append(EdgeIndex(*ends, types[edges], self.sizes[role], rows, contexts))
            blocks.append(tuple(parts))
        return Direction(order, blocks)

    def residuals(self, against: bool) -> dict[int, Tensor]:
        """Residual connections, or the same reversed: role of the receivers -> [2, C] long, senders numbered among all
        rows, receivers among those of their role. Roles that receive none are left out."""
        senders, receivers = self.graph.residuals.flip(0) if against else self.graph.residuals
        ends, start = {}, 0
        for role, size in enumerate(self.sizes):
            chosen = self.graph.role[receivers] == role
            if chosen.any():
                ends[role] = torch.stack([self.rank[senders[chosen]], self.rank[receivers[chosen]] - start])
            start += size
        return ends

    def by_network(self, role: int, rows: Tensor) -> Tensor:
        """Rows of all input nodes, or of all output nodes, [n, ...] -> per network, [G, n_0 or n_L, ...]; without the
        constant inputs."""
        start, graph = sum(self.sizes[:role]), self.graph
        is_constant = (graph.role == 0) & (graph.node_type >= graph.num_inputs)
        chosen = self.rank[(graph.role == role) & ~is_constant] - start
        return rows.index_select(0, chosen).unflatten(0, (self.graph.num_networks, -1))

    def sum_hidden(self, rows: Tensor) -> Tensor:
        """The sum over each network's hidden nodes, [n, D] -> [G, D]."""
        return sum_rows(rows, self.networks[1], self.graph.num_networks)


def inverse(order: Tensor) -> Tensor:
    """[n] long, the place of each number in `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def join(rows: Sequence[Tensor] | Mapping[int, Tensor], node_sets: Sequence[int]) -> Tensor:
    """The rows of some sets of nodes, one after the other."""
    parts = [rows[node_set] for node_set in node_sets]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
