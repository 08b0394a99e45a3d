"""NG-GNN on large networks: one network at a time, layer by layer, in chunks of edges.

No features of all edges are kept: those of a chunk are computed from weights and from the features of nodes wherever
they are read, again in the backward pass.

Shape letters: N nodes, R receivers, S senders, E edges without weights, d width of nodes and edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from scalegmn.engine.chunks import ChunkPlan, EdgeInputs
from scalegmn.engine.edges import DenseEdges, EdgeIndex, Edges, EdgeUpdate, SparseEdges
from scalegmn.engine.model import turned
from scalegmn.engine.neural_graphs import encoded_nodes, encoding, joined, node_slices, pooled, probes_of
from scalegmn.engine.pna import PNANetwork, Reduced, aggregate_blocks, edge_map, graph_norm, modulated
from scalegmn.engine.rows import GatheredRows, Rows
from scalegmn.graphs.parameter_graph import node_activations, node_types
from scalegmn.networks import HETERO, NetParams
from scalegmn.networks.parameter_indices import senders_by_group
from scalegmn.nn.fourier import Encoder
from scalegmn.nn.neural_graph import NeuralGraphFeatures, middle_of
from scalegmn.nn.pna import EdgeUpdate as PNAEdgeUpdate
from scalegmn.nn.pna import GraphNorm, Message, PNALayer

_ROWS = Rows("hidden", ())
"""What the engine's edges know of their ends; nothing here reads it."""


class ChunkedPNANetwork(PNANetwork, Protocol):
    """What is read of NG-GNN; see `scalegmn.models.ng_gnn.NGGNN`."""

    graph: NeuralGraphFeatures


class Block(NamedTuple):
    """Edges to a layer of nodes."""

    edges: Edges
    """Of weights [1, R, S, k]; of connections without weights [E, k], between any nodes."""

    receivers: slice
    """The nodes that they go to, R of them; all N of connections."""

    senders: slice
    """The nodes that they come from, S of them; all N of connections."""

    def ends(self, to: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of receivers and of senders, of all nodes [N, D] each: what the edges read of them."""
        to, sent = to[self.receivers], sent[self.senders]
        return (to[None], sent[None]) if isinstance(self.edges, DenseEdges) else (to, sent)

    def updated(self, update: EdgeUpdate, chunks: ChunkPlan) -> Block:
        """With an update more."""
        edges = self.edges.updated(update)
        return self._replace(edges=edges.holding(chunks.features(edges)) if chunks.materialize else edges)


def run_large_network(model: ChunkedPNANetwork, params: NetParams, chunks: ChunkPlan) -> Tensor | NetParams:
    """`model.plain` of one network."""
    spec, read = params.spec, model.normalized(params)
    nodes = node_slices(spec)
    x = _nodes(model.graph, read, params)
    blocks = list(_blocks(model.graph, read))
    *between, last = cast("Sequence[PNALayer]", model.layers)
    norms, updates = cast("Sequence[GraphNorm]", model.norms), cast("Sequence[PNAEdgeUpdate]", model.edge_updates)
    for layer, norm, update in zip(between, norms, updates, strict=True):
        x = graph_norm(norm, _run_layer(layer, x, blocks, nodes, chunks)[None], None, 1)
        x = model.dropout(silu(x))[0]
        to, sent = update.receiver_linear(x), update.sender_linear(x)
        for index, block in enumerate(blocks):
            receivers, senders = block.ends(to, sent)
            blocks[index] = block.updated(EdgeUpdate(update, _update_edges, senders, receivers), chunks)
    x = _run_layer(last, x, blocks, nodes if model.reads_all else nodes[-1:], chunks)
    if model.readout is not None:
        return model.read_out(pooled(x[None], model.pooling))
    directions = 2 if model.graph.reverse_edges else 1
    changes = []
    for block in blocks[: spec.num_layers * directions : directions]:
        receivers, senders = block.ends(x[:, :0], x[:, :0])
        update_to_read = EdgeUpdate(model.edge_readout, _read_edges, senders, receivers)
        changes.append(chunks.features(block.edges.updated(update_to_read)))
    return model.changes(params, changes, model.node_readout(x[None, spec.layout[0] :]))


def _nodes(features: NeuralGraphFeatures, read: NetParams, stored: NetParams) -> Tensor:
    """Features of nodes, [N, d]; networks as the model reads them, and as they are."""
    spec, device = read.spec, read.biases[0].device
    layers = zip(read.node_features(), spec.roles, strict=True)
    raw = torch.cat([x[..., 0] if role != "input" else torch.zeros_like(x[..., 0]) for x, role in layers], dim=1)
    hetero = HETERO if read.activation is None else spec.activations[int(read.activation)]
    names = sorted({hetero, *(layer.activation for layer in spec.layers)})
    rows = features.rows_of(names, device)[node_activations(spec, hetero, names).to(device)]
    types = node_types(spec, features.max_hidden_layers).to(device)
    return encoded_nodes(features, raw, types, rows[None], probes_of(features, stored))[0]


def _blocks(features: NeuralGraphFeatures, params: NetParams) -> Iterator[Block]:
    """Edges of weights, layer by layer, then those without weights; with reverse edges, each block before the edges
    against it."""
    spec, nodes, size = params.spec, node_slices(params.spec), features.kernel[0] * features.kernel[1]
    middle = int(middle_of(features.kernel, params.biases[0]).argmax())
    slabs = ((0, 2), (1, 2)) if features.reverse_edges else ((0,),)
    kernels = params.kernels(features.kernel)
    for layer, (values, places), (lower, upper) in zip(spec.layers, kernels, spec.node_layers, strict=True):
        own_encoder = layer.kernel is None and features.linear_encoder is not None
        if layer.kernel is None and not own_encoder:
            places = torch.tensor([middle])
        sender = senders_by_group(layer).to(values.device) if layer.groups > 1 else None
        block = DenseEdges(values, receivers=_ROWS, senders=_ROWS, sender=sender)
        blocks = [Block(block, nodes[upper], nodes[lower])]
        if features.reverse_edges:
            blocks.append(Block(turned(block, layer), nodes[lower], nodes[upper]))
        for block_of, of_slabs in zip(blocks, slabs, strict=True):
            yield _encoded(features, block_of, [slab * size + places for slab in of_slabs], own_encoder)
    ends = torch.cat([spec.residual_index, spec.attention_index], dim=1).to(params.biases[0].device)
    every = slice(0, spec.num_nodes)
    for index, of_slabs in zip((ends, ends.flip(0)), slabs, strict=False):
        sender, receiver = index[:, index[1].argsort(stable=True)]
        incidence = EdgeIndex(sender, receiver, torch.zeros_like(sender), spec.num_nodes, _ROWS)
        ones = params.biases[0].new_ones(len(sender), 1)
        block_of = Block(SparseEdges(ones, incidence=incidence), every, every)
        if len(sender):
            yield _encoded(features, block_of, [torch.tensor([slab * size + middle]) for slab in of_slabs], False)


def _encoded(features: NeuralGraphFeatures, block: Block, columns: Sequence[Tensor], own_encoder: bool) -> Block:
    """A block of raw values [.., k] that waits to be encoded; each value stands in one of several columns of raw
    features at once."""
    encoder = features.linear_encoder if own_encoder else features.weight_encoder
    assert encoder is not None
    device = features.edge_linear.weight.device
    nodes = features.edge_linear.weight.new_zeros(block.receivers.stop + block.senders.stop, 0)
    receivers, senders = block.ends(nodes, nodes)
    function = partial(_encode, [column.to(device) for column in columns])
    update = EdgeUpdate(nn.ModuleList([encoder, features.edge_linear]), function, senders, receivers)
    return block._replace(edges=block.edges.updated(update))


def _encode(columns: Sequence[Tensor], module: nn.Module, edges: Edges, senders: Tensor, receivers: Tensor) -> Tensor:
    """`NeuralGraphFeatures.edges` of raw values."""
    first, rest = encoding(*cast("tuple[Encoder, nn.Linear]", module))
    weight = torch.stack([first[:, places] for places in columns]).sum(0)
    return rest(linear(edges.values, weight))


def _update_edges(module: nn.Module, edges: Edges, senders: Tensor, receivers: Tensor) -> Tensor:
    """`EdgeUpdate` of edge features, from what its Linears make of both ends."""
    update = cast("PNAEdgeUpdate", module)
    ends = edges.at_receivers(receivers) + edges.at_senders(senders)
    new: Tensor = update.last(silu(update.edge_linear(edges.values) + ends))
    return new


def _read_edges(module: nn.Module, edges: Edges, senders: Tensor, receivers: Tensor) -> Tensor:
    """The readout of edge features."""
    new: Tensor = module(edges.values)
    return new


def _run_layer(
    layer: PNALayer, x: Tensor, blocks: Sequence[Block], nodes: Sequence[slice], chunks: ChunkPlan
) -> Tensor:
    """New features of the nodes of some layers, of all [N, d]."""
    message = layer.message
    to_weight, from_weight = message.linear.weight[:, : 2 * message.dim].chunk(2, dim=1)
    to, sent = linear(x, to_weight, message.linear.bias), linear(x, from_weight)
    function = partial(_statistics, message)
    received: dict[int, list[Reduced]] = {of_layer.start: [] for of_layer in nodes}
    for block in blocks:
        whole = isinstance(block.edges, SparseEdges)
        if not whole and block.receivers.start not in received:
            continue
        receivers, senders = block.ends(to, sent)
        inputs = EdgeInputs(block.edges, senders, receivers)
        statistics = chunks.messages(function, inputs, message.parameters())
        reduced = _unpacked(statistics.flatten(0, -2), block.edges.degree)
        for of_layer in nodes if whole else [block.receivers]:
            part = Reduced(*(rows[of_layer] for rows in reduced)) if whole else reduced
            received[of_layer.start].append(part)
    rows = []
    for of_layer in nodes:
        own = x[None, of_layer]
        messages = [_joined(received[of_layer.start])] if received[of_layer.start] else []
        rows.append(torch.cat([own, aggregate_blocks(layer.aggregate, messages, own)], dim=-1))
    return linear(torch.cat(rows, dim=1), *joined(layer.last, layer.update))[0]


def _statistics(
    message: Message,
    edges: Edges,
    senders: Tensor | None,
    receivers: Tensor | None,
    extra: Tensor | GatheredRows | None,
) -> Tensor:
    """Sum, sum of squares, minimum and maximum of the messages to each receiver of a chunk, [1, R, 4 d] or [R, 4 d]."""
    assert senders is not None
    assert receivers is not None
    ends = edges.at_receivers(receivers) + edges.at_senders(senders)
    messages = modulated(message, linear(edges.features(), *edge_map(message, None)), ends)
    if isinstance(edges, DenseEdges):
        return torch.cat(Reduced.of_block(messages)[1:], dim=-1)
    assert isinstance(edges, SparseEdges)
    return torch.cat(Reduced.of_rows(messages[None], edges.incidence.degree[:, 0])[1:], dim=-1)[0]


def _unpacked(statistics: Tensor, degree: int | Tensor) -> Reduced:
    """`_statistics` [R, 4 d], with neutral values where there are no messages."""
    total, squares, least, most = statistics.chunk(4, dim=-1)
    count = torch.as_tensor(degree, device=total.device).to(total.dtype).expand(len(total), 1)
    none = count == 0
    return Reduced(count, total, squares, least.masked_fill(none, torch.inf), most.masked_fill(none, -torch.inf))


def _joined(parts: Sequence[Reduced]) -> Reduced:
    """All messages to the nodes of a layer, [R, d] each, as `Reduced` has them: zeros where there are none."""
    degree, total, squares, least, most = (torch.stack(rows) for rows in zip(*parts, strict=True))
    degree = degree.sum(0)
    none = degree == 0
    least, most = (rows.masked_fill(none, 0)[None] for rows in (least.amin(0), most.amax(0)))
    return Reduced(degree.clamp_min(1), total.sum(0)[None], squares.sum(0)[None], least, most)
