"""The message passing layers of ScaleGMN on dense blocks as one plan of row programs (`scalegmn.engine.plans`).

A layer is some ten programs: what messages read of their senders, the messages to each set of nodes, the new nodes,
what the edge update reads of nodes, the new edges of each block. Rows of all sets of nodes are one tensor, so that
sets next to each other go through a program together.

Shape letters: B networks, N nodes, R receivers, S senders, d width of nodes and edges.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.engine.edges import DenseEdges
from scalegmn.engine.layers import Blocks, LayerRun
from scalegmn.engine.layout import Ends, Layout
from scalegmn.engine.modules import roles_alike
from scalegmn.engine.plans import Plan, Region, plan_of
from scalegmn.engine.programs import (
    Unwritable,
    edge_ends_program,
    edge_update_program,
    linear_program,
    message_program,
    product_message_program,
    structure,
    update_program,
)
from scalegmn.engine.row_programs import RowProgram, available, multiplies_halves
from scalegmn.nn.message_passing import MessagePassingLayer, NeededParts
from scalegmn.nn.messages import ProductMessage, ScaleEdgeUpdate, ScaleMessage
from scalegmn.nn.mlp import Dropout

Name = tuple[Hashable, ...]
"""Of a tensor that is given."""


def run_as_plan(
    layers: Sequence[MessagePassingLayer],
    run: LayerRun,
    needed: Sequence[NeededParts],
    nodes: list[Tensor],
    edges: Blocks,
    backward_edges: Blocks,
) -> list[Tensor] | None:
    """`run.layer` of all layers, one after the other: the nodes at the end, as there; None: no plan can run them."""
    if not _can_plan(run, nodes):
        return None
    try:
        given, structures = _given(layers, run, needed, nodes, edges, backward_edges), [*map(_structure, layers)]
    except Unwritable:
        return None
    dtype = next(layers[0].parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        return None
    halves = multiplies_halves(dtype)
    shapes = tuple((name, x.shape) for name, x in given.items())
    key = (run.layout, tuple(needed), shapes, dtype, halves, *structures)
    plan = plan_of(layers[0], key, lambda: _Writer(Plan(dtype, halves), run.layout, nodes).write(layers, needed, given))
    if plan is None:
        return None
    (last,) = plan([x.to(dtype) for x in given.values()])
    kept = list(needed[-1].nodes)
    parts = last.squeeze(2).split([nodes[node_set].shape[1] for node_set in kept], dim=1)
    result = list(nodes)
    for node_set, part in zip(kept, parts, strict=True):
        result[node_set] = part
    return result


def _can_plan(run: LayerRun, nodes: Sequence[Tensor]) -> bool:
    """Whether sets of nodes are the layers of equal networks, which are in cache as a whole and keep their scalars."""
    return (
        run.chunks.num_edges is None
        and run.layout.kinds is not None
        and len(run.rows[0].groups) == 1
        and run.preserves_scalars
        and not any(run.residuals)
        and available(nodes[0])
    )


def _structure(layer: MessagePassingLayer) -> Hashable:
    """What a layer's part of a plan depends on."""
    return layer.aggregator, layer.message_positions, layer.update_positions, structure(layer)


def _given(
    layers: Sequence[MessagePassingLayer],
    run: LayerRun,
    needed: Sequence[NeededParts],
    nodes: Sequence[Tensor],
    edges: Blocks,
    backward_edges: Blocks,
) -> dict[Name, Tensor]:
    """The tensors that a plan reads."""
    if not all(isinstance(layer.forward_message, ScaleMessage | ProductMessage) for layer in layers):
        raise Unwritable
    given: dict[Name, Tensor] = {("nodes",): torch.cat([*nodes], dim=1)[:, :, None]}
    if any(layer.message_positions or layer.update_positions for layer in layers):
        assert run.positions is not None
        expanded = [p.expand(x.shape[1], -1) for p, x in zip(run.positions, nodes, strict=True)]
        given["positions",] = torch.cat(expanded)[:, None]
    for name, blocks in (("edges", edges), ("backward edges", backward_edges)):
        for k, parts in enumerate(blocks):
            assert parts is not None
            (block,) = parts
            assert isinstance(block, DenseEdges)
            if block.sender is not None or block.shift is not None or block.updates:
                raise Unwritable
            if block.matrix is None:
                given[name, k, "features"] = block.values
            elif block.matrix.shape[-1] == 1:
                given[name, k, "numbers"] = block.values
                given[name, k, "vector"] = block.matrix[..., 0]
            else:
                raise Unwritable
    given["zeros",] = nodes[0].new_zeros(nodes[0].shape[-1])
    return given | _dropout(layers, run.layout, needed, nodes)


def _dropout(
    layers: Sequence[MessagePassingLayer], layout: Layout, needed: Sequence[NeededParts], nodes: Sequence[Tensor]
) -> dict[Name, Tensor]:
    """By what new features of nodes are multiplied, [B, n, 1, d] for sets that are updated together; nothing where no
    layer drops any. All are drawn at once, in the order in which layers would draw them."""
    dropout = layers[0].dropout
    if any(type(layer.dropout) is not Dropout for layer in layers):
        raise Unwritable
    if any((layer.dropout.p, layer.dropout.training) != (dropout.p, dropout.training) for layer in layers):
        raise Unwritable
    if not dropout.p or not dropout.training:
        return {}
    names = [
        ("dropout", index, tuple(node_sets))
        for index, (layer, parts) in enumerate(zip(layers, needed, strict=True))
        for node_sets in together(layer, layout, parts)
    ]
    batch, _, width = nodes[0].shape
    shapes = [(batch, sum(nodes[k].shape[1] for k in node_sets), 1, width) for *_, node_sets in names]
    kept = dropout(nodes[0].new_ones(sum(map(prod, shapes)))).split(list(map(prod, shapes)))
    return {name: part.view(shape) for name, part, shape in zip(names, kept, shapes, strict=True)}


def together(layer: MessagePassingLayer, layout: Layout, needed: NeededParts) -> Iterator[list[int]]:
    """The sets of nodes that go through the same branch of the update."""
    for roles in roles_alike(layer.update):
        yield from layout.together([k for k in needed.nodes if layout.roles[k] in roles])


@dataclass(frozen=True)
class _Nodes:
    """Rows [B, N, 1, D] of sets of nodes, one after the other."""

    rows: Region
    sizes: dict[int, int]

    def of(self, *node_sets: int) -> Region:
        """Those of sets next to each other."""
        ordered = list(self.sizes)
        first = ordered.index(node_sets[0])
        assert ordered[first : first + len(node_sets)] == list(node_sets)
        start = sum(self.sizes[k] for k in ordered[:first])
        return self.rows.receivers(start, start + sum(self.sizes[k] for k in node_sets))

    def part(self, node_sets: Collection[int]) -> dict[int, int]:
        """The sizes of some sets, in order."""
        return {node_set: self.sizes[node_set] for node_set in sorted(node_sets)}

    def runs(self, node_sets: Collection[int]) -> list[list[int]]:
        """Sets, in lists of those next to each other."""
        place = {node_set: index for index, node_set in enumerate(self.sizes)}
        runs: list[list[int]] = []
        for node_set in sorted(node_sets):
            if runs and place[node_set] == place[runs[-1][-1]] + 1:
                runs[-1].append(node_set)
            else:
                runs.append([node_set])
        return runs


class _Writer:
    """Writes a plan.

    Args:
        plan: it.
        layout: of the networks.
        nodes: per set [B, n_l, d].
    """

    def __init__(self, plan: Plan, layout: Layout, nodes: Sequence[Tensor]) -> None:
        self.plan, self.layout, self.like = plan, layout, nodes[0]
        self.batch, _, self.width = nodes[0].shape
        self.sizes = {node_set: x.shape[1] for node_set, x in enumerate(nodes)}
        self.given: dict[Name, Region] = {}

    def write(
        self, layers: Sequence[MessagePassingLayer], needed: Sequence[NeededParts], given: dict[Name, Tensor]
    ) -> Plan:
        """The plan, whose output is the last layer's new nodes [B, N, 1, d]."""
        self.given = {name: self.plan.given(x.shape) for name, x in given.items()}
        nodes = _Nodes(self.given["nodes",], self.sizes)
        edges, backward_edges = (
            [self._edges(name, k) for k in range(len(self.layout.along))] for name in ("edges", "backward edges")
        )
        for index, (layer, parts) in enumerate(zip(layers, needed, strict=True)):
            messages: dict[int, list[Region]] = {node_set: [] for node_set in parts.nodes}
            self._receive(layer, layer.forward_message, self.layout.along, nodes, edges, messages)
            if layer.backward_message is not None:
                self._receive(layer, layer.backward_message, self.layout.against, nodes, backward_edges, messages)
            new = self._update_nodes(index, layer, parts, nodes, messages)
            if layer.edge_update is not None:
                self._update_edges(layer.edge_update, edges, self.layout.along, parts.edges, nodes)
            if layer.backward_edge_update is not None:
                against = self.layout.against, parts.backward_edges
                self._update_edges(layer.backward_edge_update, backward_edges, *against, nodes)
            nodes = new
        self.plan.outputs = [nodes.rows]
        return self.plan

    def _edges(self, name: str, k: int) -> _Edges:
        """What is given of a block."""
        if (name, k, "features") in self.given:
            return _Edges(self.given[name, k, "features"])
        return _Edges(*(self.given.get((name, k, part)) for part in ("numbers", "vector")))

    def _run(
        self, program: RowProgram | None, inputs: Sequence[Region], result: Region | None = None, halves: bool = True
    ) -> Region:
        """The result of a program on the block to which inputs broadcast."""
        if program is None:
            raise Unwritable
        b, r, s = (max(sizes) for sizes in zip(*(x.shape for x in inputs), strict=True))
        return self.plan.run(program, (b, r, s), inputs, result, halves)

    def _extras(self, program: RowProgram | None, positions: Region | None) -> list[Region]:
        """What the Linears of a program make of positional embeddings."""
        if positions is None or program is None:
            return []
        linears = [linear() for linear in program.extras]
        extra = [linear_program(linear, self.like, positions.width) for linear in linears if linear is not None]
        return [self._run(of_linear, [positions], halves=False) for of_linear in extra]

    def _receive(
        self,
        layer: MessagePassingLayer,
        message: nn.Module,
        ends: Sequence[Ends],
        nodes: _Nodes,
        edges: Sequence[_Edges],
        messages: dict[int, list[Region]],
    ) -> None:
        """Appends what each set of nodes receives in one direction to its messages."""
        if type(message) not in (ScaleMessage, ProductMessage) or layer.aggregator != "add":
            raise Unwritable
        assert isinstance(message, ScaleMessage | ProductMessage)
        blocks = [k for k, (_, receiver) in enumerate(ends) if receiver in messages]
        if any(len(senders) != 1 for senders, _ in ends) or len({ends[k][1] for k in blocks}) < len(blocks):
            raise Unwritable
        sending = nodes.part({ends[k][0][0] for k in blocks})
        sent = _Nodes(self.plan.rows((self.batch, sum(sending.values()), 1), self.width), sending)
        program = linear_program(message.node_linear, self.like)
        for node_sets in nodes.runs(sending):
            self._run(program, [nodes.of(*node_sets)], sent.of(*node_sets))
        for k in blocks:
            (sender,), receiver = ends[k]
            of_edges = edges[k].inputs(self, message.edge_linear)
            inputs = [*of_edges[:1], sent.of(sender).turned(), *of_edges[1:]]
            positions = None
            if layer.message_positions and isinstance(message, ScaleMessage):
                of_nodes = _Nodes(self.given["positions",], self.sizes)
                positions = of_nodes.of(sender).turned() if layer.bidirectional else of_nodes.of(receiver)
            if isinstance(message, ScaleMessage):
                width, role = 0 if positions is None else positions.width, self.layout.roles[receiver]
                of_block = message_program(message, role, self.like, edges[k].form, width)
            else:
                of_block = product_message_program(message, self.like, edges[k].form)
            messages[receiver].append(self._run(of_block, [*inputs, *self._extras(of_block, positions)]))
        for node_set, received in messages.items():
            if node_set not in {ends[k][1] for k in blocks}:
                received.append(self.given["zeros",])

    def _update_nodes(
        self,
        index: int,
        layer: MessagePassingLayer,
        needed: NeededParts,
        nodes: _Nodes,
        messages: dict[int, list[Region]],
    ) -> _Nodes:
        """UPD, once for all sets next to each other that go through the same branch."""
        sizes = nodes.part(needed.nodes)
        new = _Nodes(self.plan.rows((self.batch, sum(sizes.values()), 1), self.width), sizes)
        for node_sets in together(layer, self.layout, needed):
            kept = self.given.get(("dropout", index, tuple(node_sets)))
            masks = None if kept is None else _Nodes(kept, nodes.part(node_sets))
            num_parts = 1 + len(messages[node_sets[0]])
            role, extra = self.layout.roles[node_sets[0]], self.width if layer.update_positions else 0
            program = update_program(layer, role, num_parts, self.like, extra, masks is not None)
            for k in node_sets:
                x = nodes.of(k)
                positions = _Nodes(self.given["positions",], self.sizes).of(k) if extra else None
                inputs = [x, *messages[k], *self._extras(program, positions)]
                inputs += [] if layer.skip is None else [x]
                inputs += [] if masks is None else [masks.of(k)]
                self._run(program, inputs, new.of(k))
        return new

    def _update_edges(
        self,
        update: nn.Module,
        edges: list[_Edges],
        ends: Sequence[Ends],
        chosen: Sequence[int],
        nodes: _Nodes,
    ) -> None:
        """Puts the updated edges of the chosen blocks in the place of the blocks'."""
        if type(update) is not ScaleEdgeUpdate:
            raise Unwritable
        assert isinstance(update, ScaleEdgeUpdate)
        width, chosen_ends = update.phi.linears[0].out_features, [ends[k - 1] for k in chosen]
        sizes = nodes.part({k for (sender,), receiver in chosen_ends for k in (sender, receiver)})
        of_nodes = _Nodes(self.plan.rows((self.batch, sum(sizes.values()), 1), 2 * width), sizes)
        program = edge_ends_program(update, self.like)
        for node_sets in nodes.runs(sizes):
            self._run(program, [nodes.of(*node_sets)], of_nodes.of(*node_sets))
        for k, ((sender,), receiver) in zip(chosen, chosen_ends, strict=True):
            both = of_nodes.of(sender).columns(0, width).turned(), of_nodes.of(receiver).columns(width, 2 * width)
            block = edges[k - 1]
            inputs = [*both, *block.inputs(self, update.linear)]
            edges[k - 1] = _Edges(self._run(edge_update_program(update, self.like, block.form), inputs))


class _Edges(NamedTuple):
    """A block of edges: features [B, R, S, d]; with a vector [1, R or 1, S or 1, d], numbers [B, R, S, 1] times it."""

    rows: Region | None
    vector: Region | None = None

    @property
    def form(self) -> str:
        """As in `scalegmn.engine.programs`."""
        return "features" if self.vector is None else "scaled"

    def inputs(self, writer: _Writer, linear: nn.Linear) -> list[Region]:
        """Those of programs that read W e: features or, of a vector v, W v and the numbers."""
        assert self.rows is not None
        if self.vector is None:
            return [self.rows]
        return [writer._run(linear_program(linear, writer.like), [self.vector], halves=False), self.rows]
