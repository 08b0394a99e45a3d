"""NG-GNN on chains as one plan of row programs (`scalegmn.engine.plans`), on a list of edges with nodes by index.

Messages are never in memory: a program makes them of edges and nodes, and ends with their statistics per node. What the
backward pass needs of them is computed again.

Shape letters: B networks, N nodes, E edges, d width of nodes and edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from scalegmn.engine.graph_norms import NormProgram
from scalegmn.engine.modules import after_first_linear
from scalegmn.engine.neural_graphs import chain_nodes, encode_then_linear, joined, node_slices, padded, pooled
from scalegmn.engine.plans import Plan, Region, plan_of
from scalegmn.engine.pna import PNANetwork, edge_map
from scalegmn.engine.programs import Unwritable, program_of, structure, weight_of
from scalegmn.engine.row_programs import (
    LANES,
    NUM_STATISTICS,
    WIDEST,
    Nodes,
    RowProgram,
    Value,
    Vector,
    available,
    multiplies_halves,
)
from scalegmn.engine.tables import lookup
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.neural_graph import NeuralGraphFeatures, middle_of
from scalegmn.nn.pna import LEAST_VARIANCE, NUM_AGGREGATORS, EdgeUpdate, GraphNorm, Message, PNALayer


def run_chains(model: PNANetwork, params: NetParams) -> Tensor | NetParams | None:
    """The fast form of `model.plain([params])` for networks that are a chain; None: no plan can run them."""
    if not _can_plan(model, params):
        return None
    read, spec, layers = model.normalized(params), params.spec, cast("Sequence[PNALayer]", model.layers)
    dtype = layers[0].last.weight.dtype
    try:
        of_edges = [model.edge_readout.linears[0]] if model.readout is None else []
        structures = [structure(part) for part in (model.layers, model.norms, model.edge_updates, *of_edges)]
    except Unwritable:
        return None
    given = {name: x.to(dtype) for name, x in _given(model, read, params).items()}
    shapes, halves = tuple((name, x.shape) for name, x in given.items()), multiplies_halves(dtype)
    key = (spec, model.reads_all, shapes, dtype, halves, *structures)
    plan = plan_of(layers[0], key, lambda: _Writer(model, Plan(dtype, halves), spec, given).write())
    if plan is None:
        return None
    x, *edges = (output.squeeze(2) for output in plan(list(given.values())))
    if model.readout is not None:
        return model.read_out(pooled(x, model.pooling))
    (hidden,) = edges
    changes = after_first_linear(model.edge_readout, hidden)
    sizes = [layer.in_dim * layer.out_dim for layer in spec.layers]
    return model.changes(params, changes.split(sizes, dim=1), model.node_readout(x[:, spec.layout[0] :]))


def _can_plan(model: PNANetwork, params: NetParams) -> bool:
    """Whether rows have widths and numbers that programs can run on."""
    message = cast("Sequence[PNALayer]", model.layers)[0].message
    like = message.linear.weight
    return (
        params.spec.is_chain
        and model.graph.linear_encoder is None
        and like.dtype in (torch.float32, torch.float64)
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16)
        and message.dim % LANES == 0
        and 2 * message.dim <= WIDEST
        and available(like)
    )


def _given(model: PNANetwork, read: NetParams, params: NetParams) -> dict[str, Tensor]:
    """The tensors that the plan reads."""
    layers, updates = cast("Sequence[PNALayer]", model.layers), cast("Sequence[EdgeUpdate]", model.edge_updates)
    dtype = layers[0].last.weight.dtype
    features, table = _edges(model.graph, read, tabulates=len(layers) > 1)
    given = {"nodes": chain_nodes(model.graph, read, params)[:, :, None], "edges": features[:, :, None]}
    if table is not None:
        with torch.autocast("cpu", enabled=False):
            given["message table"] = linear(table, *edge_map(layers[0].message, None))
            given["update table"] = linear(table, *joined(updates[0].edge_linear, None))
    degree = _ends(params.spec, model.graph.reverse_edges)[2].to(dtype)
    share = degree.clamp_min(1).reciprocal()
    given["share"] = share[None, :, :, None]
    for k, layer in enumerate(layers):
        factors = layer.aggregate.scaled(torch.ones_like(share), degree).unbind(-1)
        given |= {f"factor {k} {n}": factor[None, :, None, None] for n, factor in enumerate(factors)}
    if model.dropout.p and model.dropout.training:  # drawn at once, in the order in which layers would draw them
        shape = [len(updates), *given["nodes"].shape]
        kept = model.dropout(features.new_ones(shape, dtype=dtype))
        given |= {f"dropout {k}": part for k, part in enumerate(kept)}
    return given


@dataclass(frozen=True)
class _Edges:
    """Edges one after the other, from `sender` [E] to `receiver` [E]; rows [B, E, 1, d], with tables [B, E, 1, 2]."""

    sender: Tensor
    receiver: Tensor
    rows: Region
    inner: nn.Linear | None = None
    """Makes edge features of rows; None: these are edge features."""

    def to(self, nodes: slice) -> _Edges:
        """The edges to some nodes, among which receivers are numbered."""
        rows = ((self.receiver >= nodes.start) & (self.receiver < nodes.stop)).nonzero()[:, 0]
        if len(rows) == len(self.receiver):
            return self
        receiver = self.receiver[rows] - nodes.start
        return replace(self, sender=self.sender[rows], receiver=receiver, rows=self.rows.at(rows))


class _Writer:
    """Writes a plan.

    Args:
        model: whose.
        plan: it.
        spec: of the networks.
        given: the tensors that it reads.
    """

    def __init__(self, model: PNANetwork, plan: Plan, spec: NetSpec, given: dict[str, Tensor]) -> None:
        self.model, self.plan, self.spec, self.like = model, plan, spec, given["nodes"]
        self.given = {name: plan.given(x.shape) for name, x in given.items()}

    def write(self) -> Plan:
        """The plan, whose outputs are the nodes that are read, [B, n, 1, d], and what the readout of edges makes of
        weights first."""
        model, layers = self.model, cast("Sequence[PNALayer]", self.model.layers)
        norms, updates = cast("Sequence[GraphNorm]", model.norms), cast("Sequence[EdgeUpdate]", model.edge_updates)
        sender, receiver, _ = _ends(self.spec, model.graph.reverse_edges)
        edges, x, nodes = _Edges(sender, receiver, self.given["edges"]), self.given["nodes"], node_slices(self.spec)
        every, read = slice(0, nodes[-1].stop), nodes[-1]
        if model.reads_all:
            read = every
        to, sent = self._ends(_message_ends_program(layers[0].message, self.like), x)
        for k, (layer, update, following, norm) in enumerate(zip(layers, updates, layers[1:], norms, strict=False)):
            x = self._run(NormProgram(norm), [self._new_nodes(k, layer, x, edges, to, sent, every)], halves=False)
            if f"dropout {k}" in self.given:
                x = self._run(_product_program(norm, self.like), [x, self.given[f"dropout {k}"]])
            receivers, senders = self._ends(_update_ends_program(update, self.like), x)
            to, sent = self._ends(_message_ends_program(following.message, self.like), x)
            if following is layers[-1]:
                edges, receivers = edges.to(read), receivers.receivers(read.start, read.stop)
            edges = self._updated(edges, update, receivers, senders)
        if len(layers) == 1:
            edges = edges.to(read)
        x, to = (rows.receivers(read.start, read.stop) for rows in (x, to))
        self.plan.outputs = [self._new_nodes(len(layers) - 1, layers[-1], x, edges, to, sent, read)]
        if model.readout is None:
            program = _edge_program(model.edge_readout.linears[0], edges.inner, self.like)
            self.plan.outputs.append(self._run(program, [edges.rows.receivers(0, self.spec.num_edges)]))
        return self.plan

    def _run(self, program: RowProgram | NormProgram | None, inputs: Sequence[Region], **options: Any) -> Region:
        """The result of a program on the block of its first input; options as in `Plan.run`."""
        if program is None:
            raise Unwritable
        return self.plan.run(program, inputs[0].block, inputs, **options)

    def _ends(self, program: RowProgram | None, x: Region) -> tuple[Region, Region]:
        """What edges read of nodes as receivers and, beside it, as senders."""
        both, d = self._run(program, [x]), x.width
        return both.columns(0, d), both.columns(d, 2 * d)

    def _table(self, name: str) -> list[Region]:
        """That which the first layer reads, if there is one."""
        return [self.given[name]] if name in self.given else []

    def _new_nodes(
        self, k: int, layer: PNALayer, x: Region, edges: _Edges, to: Region, sent: Region, nodes: slice
    ) -> Region:
        """New features of those nodes, of layer k, from the statistics of the messages along edges to them."""
        table = self._table("message table") if k == 0 else []
        program = _message_program(layer.message, edges.inner, self.like, table[0].shape[2] if table else None)
        inputs, ends = [edges.rows, to.at(edges.receiver), sent.at(edges.sender)], Nodes(edges.receiver, x.shape[1])
        statistics = self._run(program, inputs, given=table, nodes=ends)
        names = ["share", *(f"factor {k} {n}" for n in range(len(layer.aggregate.scalers)))]
        shares = [self.given[name].receivers(nodes.start, nodes.stop) for name in names]
        return self._run(_node_program(layer, self.like), [x, statistics, *shares])

    def _updated(self, edges: _Edges, update: EdgeUpdate, to: Region, sent: Region) -> _Edges:
        """With the features that go into the update's last Linear."""
        table = self._table("update table") if edges.rows.tensor == self.given["edges"].tensor else []
        program = _update_program(update, edges.inner, self.like, table[0].shape[2] if table else None)
        inputs = [edges.rows, to.at(edges.receiver), sent.at(edges.sender)]
        return _Edges(edges.sender, edges.receiver, self._run(program, inputs, given=table), update.last)


def _edges(features: NeuralGraphFeatures, params: NetParams, tabulates: bool) -> tuple[Tensor, Tensor | None]:
    """Edges of weights in the order of parameters, then residual connections, [B, E, d]; with reverse edges, those
    against all of them follow in the same order. With `tabulates`, where one pays, places [B, E, 2] and a table
    [rows, d], as in `tables.Lookup`."""
    ones = params.biases[0].new_ones(len(params), sum(channels for *_, channels in params.spec.residuals))
    directions = torch.eye(1) if not features.reverse_edges else torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    if tabulates and features.kernel == (1, 1):
        values = torch.cat([*(weight.flatten(1) for weight in params.weights), ones], dim=1)
        found = lookup(features.weight_encoder, features.edge_linear, values, directions)
        if found is not None:
            return found.places, found.table
    kernels = [padded(weight, features.kernel).flatten(1, 2) for weight in params.weights]
    kernels.append(ones[:, :, None] * middle_of(features.kernel, ones))
    encoded = [
        encode_then_linear(
            features.weight_encoder,
            features.edge_linear,
            torch.cat([raw if part else torch.zeros_like(raw) for part in direction], dim=2),
        )
        for direction in directions.tolist()
        for raw in kernels
    ]
    return torch.cat(encoded, dim=1), None


@lru_cache(maxsize=64)
def _ends(spec: NetSpec, reverse_edges: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Senders and receivers [E] of all edges, and how many go to each node [N, 1]."""
    nodes, pairs = node_slices(spec), []
    for lower, upper in pairwise(nodes):
        sent, to = torch.arange(lower.start, lower.stop), torch.arange(upper.start, upper.stop)
        pairs.append(torch.stack([sent.repeat(len(to)), to.repeat_interleave(len(sent))]))
    for source, receiver, channels in spec.residuals:
        starts = torch.tensor([[nodes[layer + 1].start] for layer in (source, receiver)])
        pairs.append(starts + torch.arange(channels))
    index = torch.cat(pairs, dim=1)
    index = torch.cat([index, index.flip(0)], dim=1) if reverse_edges else index
    degree = index[1].bincount(minlength=nodes[-1].stop)[:, None]
    sender, to = index.unbind()
    return sender.contiguous(), to.contiguous(), degree


# Programs


def _message_ends_program(message: Message, x: Tensor) -> RowProgram | None:
    """M of receivers, with its bias, and of senders."""

    def writer(program: RowProgram) -> RowProgram:
        d, bias = message.dim, program.parameter(message.linear, "bias")
        to, sent = (weight_of(program, message.linear, start, start + d) for start in (0, d))
        no_bias = program.shifted(None, sent, bias, 0)
        weight, shift = program.stacked(to, sent), program.stacked(bias, no_bias)
        return program.store(program.linear(program.load(d), weight, shift))

    return program_of(message, "ends", x, writer, keeps=False)


def _update_ends_program(update: EdgeUpdate, x: Tensor) -> RowProgram | None:
    """D of receivers and S of senders."""

    def writer(program: RowProgram) -> RowProgram:
        ends = update.receiver_linear, update.sender_linear
        weight = program.stacked(*(weight_of(program, linear) for linear in ends))
        shift = program.stacked(*(program.parameter(linear, "bias") for linear in ends))
        return program.store(program.linear(program.load(ends[0].in_features), weight, shift))

    return program_of(update, "ends", x, writer, keeps=False)


def _product_program(norm: GraphNorm, x: Tensor) -> RowProgram | None:
    """Rows times others."""

    def writer(program: RowProgram) -> RowProgram:
        width = len(norm.weight)
        return program.store(program.multiply(program.load(width), program.load(width)))

    return program_of(norm, "product", x, writer)


def _node_program(layer: PNALayer, x: Tensor) -> RowProgram | None:
    """`PNALayer` from statistics of messages. Inputs: nodes, statistics, 1 / n of n messages, and the factor of each
    scaler."""

    def writer(program: RowProgram) -> RowProgram:
        dim, outer = layer.message.dim, program.parameter(layer.last, "weight")
        shift = program.shifted(
            program.parameter(layer.last, "bias"), outer, program.parameter(layer.update, "bias"), 1
        )

        def weight(start: int, width: int) -> Vector:
            return program.product(outer, program.parameter(layer.update, "weight", start, start + width))

        new = program.linear(program.load(dim), weight(0, dim), shift)
        joint = program.aggregate(program.load(NUM_STATISTICS * dim), program.load(1), LEAST_VARIANCE)
        width = NUM_AGGREGATORS * dim
        for index in range(len(layer.aggregate.scalers)):
            scaled = program.scale(program.linear(joint, weight(dim + index * width, width)), program.load(1))
            new = program.add(new, scaled)
        return program.store(new)

    return program_of(layer, "nodes", x, writer)


def _message_program(message: Message, inner: nn.Linear | None, x: Tensor, table: int | None) -> RowProgram | None:
    """Statistics of messages. Inputs: edges, M of receivers, M of senders; given is a table of so many rows."""

    def writer(program: RowProgram) -> RowProgram:
        edge = _write_edge(program, message.edge_linear, inner, table, message)
        ends = program.load_sum(message.dim)
        if message.modulation == "concat":
            return program.statistics(program.add(edge, ends))
        write = program.modulate if message.modulation == "film" else program.gate
        return program.statistics(write(edge, ends))

    return program_of(message, ("statistics", inner is None, table), x, writer, keeps=False)


def _update_program(update: EdgeUpdate, inner: nn.Linear | None, x: Tensor, table: int | None) -> RowProgram | None:
    """What goes into the last Linear. Inputs: edges, D of receivers, S of senders; given is a table of so many rows."""

    def writer(program: RowProgram) -> RowProgram:
        dim = update.last.in_features
        z = _write_edge(program, update.edge_linear, inner, table)
        return program.store(program.silu(program.add(z, program.load_sum(dim))), halves=True)

    return program_of(update, ("hidden", inner is None, table), x, writer, keeps=False)


def _edge_program(outer: nn.Linear, inner: nn.Linear | None, x: Tensor) -> RowProgram | None:
    """outer(inner(e)) of edges."""

    def writer(program: RowProgram) -> RowProgram:
        return program.store(_write_edge(program, outer, inner, None))

    return program_of(outer, inner is None, x, writer, keeps=False)


def _write_edge(
    program: RowProgram, outer: nn.Linear, inner: nn.Linear | None, table: int | None, message: Message | None = None
) -> Value:
    """outer(inner(e)) of the edges that are loaded, for `concat` times their columns of M; or what a given table, to
    whose rows these were applied, has at their places."""
    concat = message.linear if message is not None and message.modulation == "concat" else None
    if table is not None:
        width = (outer if concat is None else concat).out_features
        return program.interpolate(program.load(2), program.given((table, width)))
    edge = program.load(outer.in_features)
    weight, bias = weight_of(program, outer), program.parameter(outer, "bias")
    if inner is not None:
        shift = program.shifted(bias, weight, program.parameter(inner, "bias"), 1)
        weight, bias = program.product(weight, weight_of(program, inner)), shift
    if concat is not None:
        columns = weight_of(program, concat, 2 * concat.out_features, 3 * concat.out_features)
        weight, bias = program.product(columns, weight), program.shifted(None, columns, bias, 1)
    return program.linear(edge, weight, bias)
