"""Fast form of message passing on neural graphs, with the parameters of the modules in `scalegmn.nn.pna`.

M, S and D act once per node, not per edge; the maps of an edge's features that are read by messages and by the edge
update are one product, joined to the last Linear of the edge update before; the last layer computes only the nodes that
are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from scalegmn.engine.modules import after_first_linear
from scalegmn.engine.neural_graphs import (
    BlockGraph,
    LayerEdges,
    NeuralGraphNetwork,
    SortedEdges,
    block_graph,
    joined,
    pool,
)
from scalegmn.networks import NetParams
from scalegmn.nn.mlp import Dropout
from scalegmn.nn.pna import LEAST_VARIANCE, NUM_AGGREGATORS, Aggregate, EdgeUpdate, GraphNorm, Message, PNALayer

AnyEdges = LayerEdges | SortedEdges


class Reduced(NamedTuple):
    """Messages, joined per receiver, R of them; zeros where there are none."""

    degree: Tensor
    """Their number, [R, 1]; 1 where there are none."""

    total: Tensor
    """[.., R, d]."""

    squares: Tensor
    """The sum of their squares, [.., R, d]."""

    least: Tensor
    """[.., R, d]."""

    most: Tensor
    """[.., R, d]."""

    @classmethod
    def of_block(cls, messages: Tensor) -> Reduced:
        """[B, R, S, d]: S messages each."""
        degree = messages.new_full((messages.shape[1], 1), messages.shape[2])
        return cls(degree, *_Statistics.apply(messages))  # type: ignore[no-untyped-call]

    @classmethod
    def of_rows(cls, messages: Tensor, degrees: Tensor) -> Reduced:
        """[1, E, d], those to each receiver in a row: degrees [R] of them."""
        rows, without = messages[0], (degrees == 0)[:, None]

        def per_receiver(rows: Tensor, way: str) -> Tensor:
            """[1, R, d]."""
            return torch.segment_reduce(rows, way, lengths=degrees, axis=0).masked_fill(without, 0)[None]

        degree = degrees.clamp_min(1)[:, None].to(rows.dtype)
        return cls(
            degree,
            per_receiver(rows, "sum"),
            per_receiver(rows.square(), "sum"),
            per_receiver(rows, "min"),
            per_receiver(rows, "max"),
        )

    @classmethod
    def of(cls, edges: AnyEdges, messages: Tensor) -> Reduced:
        """Messages along edges."""
        if isinstance(edges, SortedEdges):
            return cls.of_rows(messages, edges.degrees)
        return cls.of_block(messages)


class _Statistics(torch.autograd.Function):
    """Sum, sum of squares, minimum and maximum over senders of messages m [B, R, S, d], [B, R, d] each.

    In few passes over m backward: sum's gradient + 2 m squares' gradient + that of extrema, shared among equal ones.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(messages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four."""
        return messages.sum(2), messages.square().sum(2), messages.amin(2), messages.amax(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Keeps messages and extrema."""
        ctx.save_for_backward(*inputs, *output[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient of messages; it has derivatives itself."""
        messages, *extrema = ctx.saved_tensors
        of_sum, of_squares, *of_extrema = (gradient.unsqueeze(2) for gradient in gradients)
        result = torch.addcmul(of_sum, messages, 2 * of_squares)
        for extremum, gradient in zip(extrema, of_extrema, strict=True):
            equal = messages.detach().clone().eq_(extremum.unsqueeze(2))  # numbers, 1 or 0: faster than bool
            result = torch.addcmul(result, equal, gradient / equal.sum(2, keepdim=True))
        return result


class PNANetwork(NeuralGraphNetwork, Protocol):
    """What the engine reads of NG-GNN; see `scalegmn.models.ng_gnn.NGGNN`."""

    norms: nn.ModuleList
    edge_updates: nn.ModuleList
    dropout: Dropout


def run_network(model: PNANetwork, nets: Sequence[NetParams]) -> Tensor | NetParams:
    """The fast form of `model.plain(nets)`."""
    graph = block_graph(model, nets)
    read = graph.nodes if model.reads_all else [graph.outputs]
    layers = cast("Sequence[PNALayer]", model.layers)
    norms, updates = cast("Sequence[GraphNorm]", model.norms), cast("Sequence[EdgeUpdate]", model.edge_updates)
    x, edges, inner = pass_messages(layers, norms, updates, model.dropout, graph, read)
    if model.readout is not None:
        return model.read_out(pool(x, graph, model.pooling, model.reads_all))
    forward = [block for block in edges if isinstance(block, LayerEdges) and not block.residual]
    forward = [block for block in forward if block.senders.start < block.receivers.start]
    (to_readout,) = map_edges(forward, [joined(model.edge_readout.linears[0], inner)])
    changes = [after_first_linear(model.edge_readout, block.features) for block in to_readout]
    return model.changes(nets[0], changes, model.node_readout(x[:, nets[0].spec.layout[0] :]))


def pass_messages(
    layers: Sequence[PNALayer],
    norms: Sequence[GraphNorm],
    updates: Sequence[EdgeUpdate],
    dropout: Callable[[Tensor], Tensor],
    graph: BlockGraph,
    read: Sequence[slice],
) -> tuple[Tensor, Sequence[AnyEdges], nn.Linear | None]:
    """All layers of NG-GNN.

    Args:
        layers, norms, updates: T, T - 1 and T - 1 modules.
        dropout: after every layer but the last.
        graph: initial features.
        read: the nodes that are read of the last layer.

    Returns:
        The nodes that are read [B, n, d], hidden features of edges, and the Linear, still to be applied, that makes
        edge features of them (None: they are edge features).
    """
    x, edges = graph.x, graph.edges
    inner: nn.Linear | None = None
    *before, last = layers
    for index, (layer, norm, update) in enumerate(zip(before, norms, updates, strict=True)):
        to_messages, to_edges = map_edges(edges, [edge_map(layer.message, inner), joined(update.edge_linear, inner)])
        x = graph_norm(norm, run_layer(layer, x, to_messages, graph.nodes), graph.network, graph.num_networks)
        x = dropout(silu(x))
        to, sent = update.receiver_linear(x), update.sender_linear(x)
        needed = {nodes.start for nodes in (read if index == len(before) - 1 else graph.nodes)}
        edges = [
            block._replace(features=silu(block.features + block.ends(to, sent)))
            for block in to_edges
            if block.receivers.start in needed
        ]
        inner = update.last
    (to_messages,) = map_edges(edges, [edge_map(last.message, inner)])
    return run_layer(last, x, to_messages, read), edges, inner


def map_edges(edges: Sequence[AnyEdges], maps: Sequence[tuple[Tensor, Tensor]]) -> list[list[AnyEdges]]:
    """Edges with the features that each map (weight, bias) makes of theirs, all in one product per block."""
    weight, bias = (torch.cat(parts) for parts in zip(*maps, strict=True))
    sizes = [len(rows) for rows, _ in maps]
    mapped = [torch.split(linear(block.features, weight, bias), sizes, dim=-1) for block in edges]
    return [
        [block._replace(features=parts[index]) for block, parts in zip(edges, mapped, strict=True)]
        for index in range(len(maps))
    ]


def run_layer(layer: PNALayer, x: Tensor, edges: Sequence[AnyEdges], receivers: Sequence[slice]) -> Tensor:
    """New features of some of `BlockGraph.nodes`.

    Args:
        layer: the module.
        x: [B, N, d].
        edges: blocks of the features that `edge_map` makes of edges.
        receivers: these nodes.

    Returns:
        [B, their number, d].
    """
    message = layer.message
    to_weight, from_weight = message.linear.weight[:, : 2 * message.dim].chunk(2, dim=1)
    to, sent = linear(x, to_weight, message.linear.bias), linear(x, from_weight)
    rows = []
    for nodes in receivers:
        messages = [
            Reduced.of(block, modulated(message, block.features, block.ends(to, sent)))
            for block in edges
            if block.receivers.start == nodes.start  # residual connections go to the first nodes
        ]
        rows.append(torch.cat([x[:, nodes], aggregate_blocks(layer.aggregate, messages, x[:, nodes])], dim=-1))
    return linear(torch.cat(rows, dim=1), *joined(layer.last, layer.update))


def aggregate_blocks(module: Aggregate, messages: Sequence[Reduced], like: Tensor) -> Tensor:
    """Messages in blocks, to the first r of R nodes each -> [B, R, scalers 4 d]; `like` is [B, R, d]."""
    if not messages:
        return like.new_zeros(*like.shape[:2], len(module.scalers) * NUM_AGGREGATORS * like.shape[2])

    def to_all(rows: Tensor, value: float = 0.0) -> Tensor:
        """[.., r, d] -> [.., R, d], `value` where a block has no messages."""
        missing = like.shape[1] - rows.shape[-2]
        return nn.functional.pad(rows, (0, 0, 0, missing), value=value) if missing else rows

    degree = torch.stack([to_all(block.degree) for block in messages]).sum(0)  # [R, 1]
    mean = _sum(to_all(block.total) for block in messages) / degree
    variance = _sum(to_all(block.squares) for block in messages) / degree - mean.square()
    deviation = torch.where(variance > LEAST_VARIANCE, variance.clamp_min(LEAST_VARIANCE).sqrt(), 0)
    least = torch.stack([to_all(block.least, torch.inf) for block in messages]).amin(0)
    most = torch.stack([to_all(block.most, -torch.inf) for block in messages]).amax(0)
    return module.scaled(torch.cat([mean, least, most, deviation], dim=-1), degree)


def graph_norm(norm: GraphNorm, x: Tensor, network: Tensor | None, num_networks: int) -> Tensor:
    """`GraphNorm` of x [B, N, d] of B networks or, with the network of each node [N], of x [1, N, d] of all."""
    if network is None:
        variance, mean = torch.var_mean(x, dim=(1, 2), correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + norm.epsilon) * norm.weight + norm.bias

    def mean_of(rows: Tensor) -> Tensor:
        """[N, d] -> [N, 1], over all nodes and features of a node's network."""
        none = rows.new_zeros(num_networks)
        return none.scatter_reduce(0, network, rows.mean(1), "mean", include_self=False)[network, None]

    x = x - mean_of(x[0])
    return x / (mean_of(x[0].square()).sqrt() + norm.epsilon) * norm.weight + norm.bias


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Of tensors that broadcast, one after the other."""
    first, *others = tensors
    for tensor in others:
        first = first + tensor
    return first


def edge_map(message: Message, inner: nn.Linear | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the edge's part in messages along edges `inner(h)`, as a map of h."""
    weight, bias = joined(message.edge_linear, inner)
    if message.modulation != "concat":
        return weight, bias
    columns = message.linear.weight[:, 2 * message.dim :]
    return columns @ weight, columns @ bias


def modulated(message: Message, edge: Tensor, ends: Tensor) -> Tensor:
    """`Message` from the edges' part (`edge_map`) [.., d or 2 d] and both ends' parts of M together, [.., d]."""
    if message.modulation == "film":
        gamma, beta = edge.chunk(2, dim=-1)
        return torch.addcmul(beta, gamma, ends)
    return edge.sigmoid() * ends if message.modulation == "gate" else edge + ends
