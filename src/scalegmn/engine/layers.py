"""The fast form of a message passing layer: on sets of nodes and blocks of edges, and only what is read later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from scalegmn.engine.chunks import ChunkPlan, EdgeInputs
from scalegmn.engine.edges import Edges, EdgeUpdate, sum_rows
from scalegmn.engine.layout import Layout, join
from scalegmn.engine.messages import edge_ends, receive, send, updated_edges
from scalegmn.engine.modules import roles_alike, run
from scalegmn.engine.rows import GatheredRows, Rows
from scalegmn.nn.message_passing import MessagePassingLayer, NeededParts
from scalegmn.nn.scalars import incoming_messages, outgoing_features

Blocks = list[Sequence[Edges] | None]
"""Per block, its edges in one or several parts; None: nothing reads them any more."""


@dataclass(frozen=True)
class LayerRun:
    """How the layers of a model are run on one batch.

    Attributes:
        layout: which sets of nodes the blocks of edges join.
        rows: of each set of nodes.
        positions: per set [n_l or 1, d] or [n, d]; None without positional embeddings.
        chunks: how blocks are worked through.
        residuals: along and against residual connections, set of nodes -> [2, C] long, senders among the rows of all
            sets and receivers among the set's.
    """

    layout: Layout
    rows: Sequence[Rows]
    positions: list[Tensor] | None
    chunks: ChunkPlan
    residuals: Sequence[Mapping[int, Tensor]] = ({}, {})

    def layer(
        self,
        layer: MessagePassingLayer,
        needed: NeededParts,
        nodes: list[Tensor],
        edges: Blocks,
        backward_edges: Blocks,
    ) -> tuple[list[Tensor], Blocks, Blocks]:
        """New nodes, edges and backward edges; sets of nodes that nothing reads stay as they were, such blocks are
        None.

        Args:
            layer: the plain layer.
            needed: what to compute.
            nodes: per set [B, n_l, d] or, by role, [n, d].
            edges: per block, from its lower to its upper end.
            backward_edges: per block, from its upper to its lower end; unused by forward models.
        """
        messages: dict[int, list[Tensor]] = {node_set: [] for node_set in needed.nodes}
        outgoing = self._outgoing(nodes)
        self._receive(layer, layer.forward_message, layer.forward_residual, False, nodes, outgoing, edges, messages)
        if layer.backward_message is not None:
            against = layer.backward_message, layer.backward_residual, True
            self._receive(layer, *against, nodes, outgoing, backward_edges, messages)
        new_nodes = self._update_nodes(layer, nodes, messages)
        if layer.edge_update is not None:
            edges = self._update_edges(layer.edge_update, edges, needed.edges, self.layout.along, nodes)
        if layer.backward_edge_update is not None:
            update, ends = layer.backward_edge_update, self.layout.against
            backward_edges = self._update_edges(update, backward_edges, needed.backward_edges, ends, nodes)
        return new_nodes, edges, backward_edges

    def _receive(
        self,
        layer: MessagePassingLayer,
        message: nn.Module,
        residual: nn.Linear | None,
        against: bool,
        nodes: list[Tensor],
        outgoing: list[Tensor],
        blocks: Blocks,
        messages: dict[int, list[Tensor]],
    ) -> None:
        """Appends what each set of nodes receives in one direction to its messages."""
        ends = self.layout.against if against else self.layout.along
        sources, targets = (nodes, outgoing) if against else (outgoing, nodes)
        connections = self.residuals[against]
        added = None if residual is None or not connections else residual(join(nodes, range(len(nodes))))
        blocks_to: dict[int, list[int]] = {node_set: [] for node_set in messages}
        for k, (_, node_set) in enumerate(ends):
            if node_set in blocks_to:
                blocks_to[node_set].append(k)
        sending = sorted({sender for some in blocks_to.values() for k in some for sender in ends[k][0]})
        sent = _split(send(message, join(sources, sending)), nodes, sending) if sending else {}
        for node_set, received in messages.items():
            receivers = None if message in receive else targets[node_set]
            function = partial(_messages, message, layer.aggregator)
            new: Tensor | None = None
            for k in blocks_to[node_set]:
                senders, parts = ends[k][0], blocks[k]
                assert parts is not None
                for part in parts:
                    positions = None
                    if layer.message_positions:
                        assert self.positions is not None
                        positions = (
                            part.of_senders(join(self.positions, senders))
                            if layer.bidirectional
                            else part.of_receivers(self.positions[node_set])
                        )
                    inputs = EdgeInputs(part, join(sent, senders), receivers, positions)
                    messages_of_part = self.chunks.messages(function, inputs, message.parameters())
                    new = messages_of_part if new is None else new + messages_of_part
            if new is None:
                new = torch.zeros_like(nodes[node_set])
            elif against:
                new = self._incoming(node_set, new, nodes[node_set])
            if added is not None and node_set in connections:
                others, places = connections[node_set]
                new = new + sum_rows(added.index_select(-2, others), places, nodes[node_set].shape[-2])
            received.append(new)

    def _outgoing(self, nodes: list[Tensor]) -> list[Tensor]:
        """`outgoing_features` of each set of nodes."""
        if self.preserves_scalars:
            return nodes
        return [
            outgoing_features(rows.context(x.shape[:-1], x.device), x.flatten(0, -2)).view_as(x)
            for rows, x in zip(self.rows, nodes, strict=True)
        ]

    def _incoming(self, node_set: int, messages: Tensor, x: Tensor) -> Tensor:
        """`incoming_messages` of a set of nodes."""
        if self.preserves_scalars:
            return messages
        context = self.rows[node_set].context(x.shape[:-1], x.device)
        return incoming_messages(context, messages.flatten(0, -2), x.flatten(0, -2)).view_as(messages)

    @property
    def preserves_scalars(self) -> bool:
        """Whether chi(q) = q in all scalar groups."""
        return all(group.preserves_scalars for group in self.rows[0].groups)

    def _update_nodes(
        self, layer: MessagePassingLayer, nodes: list[Tensor], messages: dict[int, list[Tensor]]
    ) -> list[Tensor]:
        """UPD, once for all rows that go through the same branch."""
        updated = list(nodes)
        for roles in roles_alike(layer.update):
            for node_sets in self.layout.together(
                [node_set for node_set in messages if self.layout.roles[node_set] in roles]
            ):
                x = join(nodes, node_sets)
                received = [
                    join(parts, range(len(node_sets))) for parts in zip(*(messages[k] for k in node_sets), strict=True)
                ]
                extras = []
                if layer.update_positions:
                    assert self.positions is not None
                    extras = [torch.cat([self.positions[k].expand(nodes[k].shape[-2], -1) for k in node_sets])]
                new = run(layer.update, self.rows[node_sets[0]], torch.cat([x, *received], dim=-1), *extras)
                if layer.skip is not None:
                    new = new + layer.skip(x)
                for node_set, part in _split(layer.dropout(new), nodes, node_sets).items():
                    updated[node_set] = part
        return updated

    def _update_edges(
        self,
        update: nn.Module,
        old: Blocks,
        chosen: Sequence[int],
        ends: Sequence[tuple[Sequence[int], int]],
        nodes: list[Tensor],
    ) -> Blocks:
        """Blocks with an update more; `ends` per block, sets of the senders and that of the receivers."""
        node_sets = sorted({node_set for k in chosen for node_set in (*ends[k - 1][0], ends[k - 1][1])})
        sent: dict[int, Tensor] = {}
        received: dict[int, Tensor] = {}
        for together in self.layout.together(node_sets):  # all roles alike
            as_ends = edge_ends(update, self.rows[together[0]]._replace(role="hidden"), join(nodes, together))
            for parts, rows in zip((sent, received), as_ends, strict=True):
                parts.update(_split(rows, nodes, together))
        new: Blocks = [None] * len(old)
        for k in chosen:
            block, (senders, receiver) = old[k - 1], ends[k - 1]
            assert block is not None
            pending = EdgeUpdate(update, updated_edges, join(sent, senders), received[receiver])
            updated = [part.updated(pending) for part in block]
            if self.chunks.materialize:
                updated = [part.holding(self.chunks.features(part)) for part in updated]
            new[k - 1] = updated
        return new


def _messages(
    message: nn.Module,
    aggregator: str,
    edges: Edges,
    senders: Tensor | None,
    receivers: Tensor | None,
    positions: Tensor | GatheredRows | None,
) -> Tensor:
    """What the receivers of a chunk of a block get, [B, R, d] or [R, d]."""
    return receive(message, aggregator, edges, senders, receivers, positions)


def _split(rows: Tensor, nodes: Sequence[Tensor], node_sets: Sequence[int]) -> dict[int, Tensor]:
    """Set of nodes -> its rows, of rows of several sets one after the other."""
    return dict(zip(node_sets, rows.split([nodes[node_set].shape[-2] for node_set in node_sets], dim=-2), strict=True))
