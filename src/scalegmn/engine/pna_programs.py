"""NG-GNN on chains as row programs (`scalegmn.engine.row_programs`): edges one after the other, with nodes by index.

Messages are never in memory: a program makes them of edges and nodes, and ends with their statistics per node. What the
backward pass needs of them is computed again.

Shape letters: B networks, N nodes, E edges, d width of nodes and edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from scalegmn.engine.graph_norms import silu_of_norm
from scalegmn.engine.modules import after_first_linear
from scalegmn.engine.neural_graphs import chain_nodes, encode_then_linear, joined, node_slices, padded, pooled
from scalegmn.engine.pna import PNANetwork, edge_map
from scalegmn.engine.programs import program_of, weight_of
from scalegmn.engine.row_programs import (
    LANES,
    NUM_STATISTICS,
    WIDEST,
    IndexedRows,
    Nodes,
    RowProgram,
    Value,
    Vector,
    available,
)
from scalegmn.engine.tables import lookup
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.neural_graph import NeuralGraphFeatures, middle_of
from scalegmn.nn.pna import LEAST_VARIANCE, NUM_AGGREGATORS, EdgeUpdate, GraphNorm, Message, PNALayer


class IndexedEdges(NamedTuple):
    """Edges one after the other."""

    sender: Tensor
    """[E] long."""

    receiver: Tensor
    """[E] long."""

    degree: Tensor
    """[N, 1] long: how many go to each node."""

    features: Tensor
    """[B, E, d] or, with a table, [B, E, 2], as in `tables.Lookup`."""

    table: Tensor | None = None
    """[rows, d]."""

    def to(self, nodes: slice) -> IndexedEdges:
        """The edges to some nodes, among which receivers are numbered."""
        rows = ((self.receiver >= nodes.start) & (self.receiver < nodes.stop)).nonzero()[:, 0]
        receiver, features = self.receiver[rows] - nodes.start, self.features.index_select(1, rows)
        return IndexedEdges(self.sender[rows], receiver, self.degree[nodes], features, self.table)

    def statistics(self, message: Message, inner: nn.Linear | None, to: Tensor, sent: Tensor) -> Tensor:
        """Of the messages to each node, [B, N, 6, d], see `RowProgram.statistics`.

        Args:
            message: the module.
            inner: makes edge features of `features`; None: these are edge features.
            to: what M makes of receivers, with its bias, [B, N, d].
            sent: what M makes of senders, [B, nodes, d].
        """
        table = self._through(lambda: edge_map(message, None))
        program = _message_program(message, inner, to, None if table is None else table.shape[0])
        return self._run(program, table, to, sent, Nodes(self.receiver, to.shape[1]))

    def updated(self, update: EdgeUpdate, inner: nn.Linear | None, to: Tensor, sent: Tensor) -> IndexedEdges:
        """With the features that go into the update's last Linear; arguments as in `statistics`, of D and S."""
        table = self._through(lambda: joined(update.edge_linear, None))
        program = _update_program(update, inner, to, None if table is None else table.shape[0])
        features = self._run(program, table, to, sent, None).squeeze(2)
        return self._replace(features=features, table=None)

    def _through(self, linear_map: Callable[[], tuple[Tensor, Tensor]]) -> Tensor | None:
        """What a weight and a bias make of the table, in its precision."""
        with torch.autocast("cpu", enabled=False):
            return None if self.table is None else linear(self.table, *linear_map())

    def _run(
        self, program: RowProgram | None, table: Tensor | None, to: Tensor, sent: Tensor, nodes: Nodes | None
    ) -> Tensor:
        assert program is not None  # see `runs_as_programs`
        shape = (len(self.features), len(self.sender), 1)
        ends = IndexedRows(to, self.receiver), IndexedRows(sent, self.sender)
        return program(shape, [self.features[:, :, None], *ends], [] if table is None else [table], nodes=nodes)


def runs_as_programs(model: PNANetwork, params: NetParams) -> bool:
    """Whether `run_chains` can run these networks."""
    message = cast("Sequence[PNALayer]", model.layers)[0].message
    width, like = message.edge_linear.out_features, message.linear.weight
    return (
        params.spec.is_chain
        and model.graph.linear_encoder is None
        and like.dtype in (torch.float32, torch.float64)
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16)
        and message.dim % LANES == 0
        and width <= WIDEST
        and available(like)
    )


def run_chains(model: PNANetwork, params: NetParams) -> Tensor | NetParams:
    """The fast form of `model.plain([params])` for networks that are a chain."""
    read, spec = model.normalized(params), params.spec
    layers, norms = cast("Sequence[PNALayer]", model.layers), cast("Sequence[GraphNorm]", model.norms)
    updates = [*cast("Sequence[EdgeUpdate]", model.edge_updates), None]
    edges, inner = _edges(model.graph, read, tabulates=len(layers) > 1), None
    x, nodes = chain_nodes(model.graph, read, params), node_slices(spec)
    to, sent = _maps(x, _of_ends(layers[0].message))
    read_nodes = slice(0, nodes[-1].stop) if model.reads_all else nodes[-1]
    for layer, update, following, norm in zip(layers, updates, layers[1:], norms, strict=False):
        assert update is not None
        x = model.dropout(
            silu_of_norm(norm, _new_nodes(layer, x, edges, edges.statistics(layer.message, inner, to, sent)))
        )
        receiver, sender, to, sent = _maps(x, [*_of_update(update), *_of_ends(following.message)])
        if following is layers[-1] and not model.reads_all:
            edges, receiver = edges.to(read_nodes), receiver[:, read_nodes]
        edges, inner = edges.updated(update, inner, receiver, sender), update.last
    if len(layers) == 1 and not model.reads_all:
        edges = edges.to(read_nodes)
    x = _new_nodes(
        layers[-1], x[:, read_nodes], edges, edges.statistics(layers[-1].message, inner, to[:, read_nodes], sent)
    )
    if model.readout is not None:
        return model.read_out(pooled(x, model.pooling))
    program = _edge_program(model.edge_readout.linears[0], inner, x)
    assert program is not None  # see `runs_as_programs`
    of_weights = edges.features[:, : spec.num_edges, None]
    hidden = program(of_weights.shape[:3], [of_weights]).squeeze(2)
    changes = after_first_linear(model.edge_readout, hidden)
    sizes = [layer.in_dim * layer.out_dim for layer in spec.layers]
    return model.changes(params, changes.split(sizes, dim=1), model.node_readout(x[:, spec.layout[0] :]))


def _of_ends(message: Message) -> list[tuple[Tensor, Tensor]]:
    """M of receivers, with its bias, and of senders: weight and bias."""
    to, sent = message.linear.weight[:, : 2 * message.dim].chunk(2, dim=1)
    return [(to, message.linear.bias), (sent, torch.zeros_like(message.linear.bias))]


def _of_update(update: EdgeUpdate) -> list[tuple[Tensor, Tensor]]:
    """D of receivers and S of senders."""
    return [(module.weight, module.bias) for module in (update.receiver_linear, update.sender_linear)]


def _maps(x: Tensor, maps: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """What each map, of one size, makes of x."""
    weight, bias = (torch.cat(parts) for parts in zip(*maps, strict=True))
    return linear(x, weight, bias).chunk(len(maps), dim=-1)


def _new_nodes(layer: PNALayer, x: Tensor, edges: IndexedEdges, statistics: Tensor) -> Tensor:
    """New features of nodes x [B, n, d], from the statistics of the messages along edges to them."""
    program = _node_program(layer, x)
    assert program is not None  # see `runs_as_programs`
    degree = edges.degree.to(statistics.dtype)[None]
    factors = layer.aggregate.scaled(torch.ones_like(degree), degree)
    shares = [degree.clamp_min(1).reciprocal(), *factors.unbind(-1)]
    inputs = [x, statistics.flatten(2), *(share.view(1, -1, 1) for share in shares)]
    return program((*x.shape[:2], 1), [rows.unsqueeze(2) for rows in inputs]).squeeze(2)


def _edges(features: NeuralGraphFeatures, params: NetParams, tabulates: bool) -> IndexedEdges:
    """Edges of weights in the order of parameters, then residual connections; with reverse edges, those against all of
    them follow in the same order. With `tabulates`, from a table where one pays."""
    sender, receiver, degree = _ends(params.spec, features.reverse_edges)
    ones = params.biases[0].new_ones(len(params), sum(channels for *_, channels in params.spec.residuals))
    directions = torch.eye(1) if not features.reverse_edges else torch.tensor([[1.0, 0, 1], [0, 1, 1]])
    if tabulates and features.kernel == (1, 1):
        values = torch.cat([*(weight.flatten(1) for weight in params.weights), ones], dim=1)
        found = lookup(features.weight_encoder, features.edge_linear, values, directions)
        if found is not None:
            return IndexedEdges(sender, receiver, degree, *found)
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
    return IndexedEdges(sender, receiver, degree, torch.cat(encoded, dim=1))


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
