"""Fast form of relational transformers, with the parameters of the modules in `scalegmn.nn.attention`.

Values of edges are joined over senders before they meet their Linear; W_0 W_o is one Linear; the last layer computes
only the nodes that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad

from scalegmn.engine.chunks import ChunkPlan, EdgeInputs
from scalegmn.engine.edges import DenseEdges, Edges
from scalegmn.engine.memory import tensor_bytes
from scalegmn.engine.neural_graphs import (
    BlockGraph,
    LayerEdges,
    NeuralGraphNetwork,
    SortedEdges,
    block_graph,
    node_slices,
    pool,
)
from scalegmn.engine.rows import GatheredRows, Rows
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.attention import RelationalAttention, RelationalEdgeUpdate, RelationalLayer

WHOLE = ChunkPlan()
"""All pairs at once."""

_ROWS = Rows("hidden", ())
"""What blocks know of their ends; nothing here reads it."""

_LEAST_SHARE = 0.85
"""Networks that pass together have at least so many of the largest one's nodes; less would compute more padding."""


class RelationalNetwork(NeuralGraphNetwork, Protocol):
    """What the engine reads of NG-T; see `scalegmn.models.ng_t.NGT`."""

    token: nn.Parameter | None

    @property
    def pair_bytes(self) -> int:
        """Bytes of one query, key or value of a pair of nodes."""
        ...

    def chunks(self, spec: NetSpec, device: torch.device) -> ChunkPlan:
        """How the pairs of nodes of a network are worked through."""
        ...


def run_network(model: RelationalNetwork, nets: Sequence[NetParams]) -> Tensor | NetParams:
    """The fast form of `model.plain(nets)`. Networks of about the same size run together, padded to the largest of
    them."""
    if len(nets) == 1 and nets[0].spec.is_chain:
        params = nets[0]
        chunks = model.chunks(params.spec, params.biases[0].device)
        if chunks.num_edges is None or len(params) == 1:
            return _run_chains(model, params, chunks)
        one_by_one = [_run_chains(model, params[row : row + 1], chunks) for row in range(len(params))]
        if model.readout is None:
            return NetParams.cat(cast("list[NetParams]", one_by_one))
        return torch.cat(cast("list[Tensor]", one_by_one))
    if len(nets) == 1:
        return _run_padded(model, nets)
    outputs = [torch.empty(0)] * len(nets)
    for places in _by_size(nets, tensor_bytes(nets[0].biases[0].device) // model.pair_bytes):
        alike = [nets[place] for place in places]
        output = _run_padded(model, alike) if len(alike) > 1 else run_network(model, alike)
        assert isinstance(output, Tensor)
        for place, rows in zip(places, torch.split(output, [len(params) for params in alike]), strict=True):
            outputs[place] = rows
    return torch.cat(outputs)


def _run_chains(model: RelationalNetwork, params: NetParams, chunks: ChunkPlan) -> Tensor | NetParams:
    """`run_network` for chains of one architecture, of which one alone may run in chunks of pairs."""
    graph = block_graph(model, [params])
    read = slice(0, graph.x.shape[1]) if model.reads_all else graph.outputs
    layers = cast("Sequence[RelationalLayer]", model.layers)
    x, e = run_layers(layers, model.token, graph.x, all_pairs(graph), read, None, model.readout is None, chunks)
    if model.readout is not None:
        return model.read_out(pool(x, graph, model.pooling, model.reads_all))
    nodes = node_slices(params.spec)
    changes = [model.edge_readout(e[:, i, j]).transpose(1, 2) for i, j in pairwise(nodes)]
    return model.changes(params, changes, model.node_readout(x[:, params.spec.layout[0] :]))


def _run_padded(model: RelationalNetwork, nets: Sequence[NetParams]) -> Tensor:
    """`run_network` for networks of any architectures, all at once."""
    graph = block_graph(model, nets)
    x, e, exists, places = padded(graph)
    read = slice(0, x.shape[1] if model.reads_all else nets[0].spec.layout[-1])
    x, _ = run_layers(cast("Sequence[RelationalLayer]", model.layers), model.token, x, e, read, exists)
    if model.reads_all:
        x = x.flatten(0, 1)[places]
    return model.read_out(pool(x, graph, model.pooling, model.reads_all))


def _by_size(nets: Sequence[NetParams], most_pairs: int) -> list[list[int]]:
    """Places of architectures that pass together, filled up to the largest of them: not much smaller ones, and no more
    than `most_pairs` pairs of nodes in all."""
    groups: list[list[int]] = []
    for place in sorted(range(len(nets)), key=lambda place: -nets[place].spec.num_nodes):
        size = nets[place].spec.num_nodes
        if groups:
            largest = nets[groups[-1][0]].spec.num_nodes
            num_networks = sum(len(nets[other]) for other in (*groups[-1], place))
        if not groups or size < _LEAST_SHARE * largest or num_networks * largest**2 > most_pairs:
            groups.append([])
        groups[-1].append(place)
    return groups


def run_layers(
    layers: Sequence[RelationalLayer],
    token: Tensor | None,
    x: Tensor,
    e: Tensor,
    read: slice,
    exists: Tensor | None = None,
    reads_edges: bool = False,
    chunks: ChunkPlan = WHOLE,
) -> tuple[Tensor, Tensor]:
    """New nodes and edges.

    Args:
        layers: the modules.
        token: a node beside the others, [d], which is read instead of `read`.
        x: nodes, [B, N, d].
        e: edges, [B, N, N, d_e], e_ij of sender i and receiver j.
        read: the nodes that the result is read from, R of them.
        exists: [B, N], which nodes are no padding, where networks differ in their number.
        reads_edges: whether the last edges are read, for changes of parameters.
        chunks: how pairs are worked through; in chunks only those of a single network.

    Returns:
        [B, R or 1, d] and, for changes of parameters, [B, N, N, d_e].
    """
    if token is not None:
        x = torch.cat([token.expand(len(x), 1, -1), x], dim=1)
        e = pad(e, (0, 0, 1, 0, 1, 0))
        exists = None if exists is None else pad(exists, (1, 0), value=True)
        read = slice(0, 1)
    whole, last = slice(0, x.shape[1]), len(layers) - 1
    for index, layer in enumerate(layers):
        rows = read if index == last else whole
        e = e[:, rows] if e.shape[1] == e.shape[2] else e
        x = _without_padding(run_nodes(layer, x, e, rows, exists, chunks), exists, rows)
        if layer.edge_update is not None:
            rows = read if index == last - 1 and not reads_edges else whole
            e = _without_padding(run_edges(layer.edge_update, x, e, rows, chunks), exists, rows)
    return x, e


def run_nodes(
    layer: RelationalLayer, x: Tensor, e: Tensor, rows: slice, exists: Tensor | None = None, chunks: ChunkPlan = WHOLE
) -> Tensor:
    """New features of some nodes, of x [B, N, d] and the edges that they send, [B, R, N, d_e] -> [B, R, d]; `exists`
    and `chunks` as in `run_layers`."""
    inner = layer.attention.last
    heads = run_attention(layer.attention, x, e, rows, exists, chunks)
    new = linear(heads, layer.linear.weight @ inner.weight, layer.linear(inner.bias))
    x = layer.first_norm(x[:, rows] + layer.dropout(new))
    result: Tensor = layer.second_norm(x + layer.dropout(layer.mlp_last(gelu(layer.mlp_first(x)))))
    return result


def run_attention(
    module: RelationalAttention, x: Tensor, e: Tensor, rows: slice, exists: Tensor | None, chunks: ChunkPlan
) -> Tensor:
    """[o^1, ..., o^H] of some nodes, of x [B, N, d] and e [B, R, N, d_e] -> [B, R, dim]."""
    q, k, v = torch.unflatten(linear(x, module.node_linear.weight), -1, (module.num_heads, 3, -1)).unbind(3)
    inputs = EdgeInputs(_pairs(e), torch.stack([k, v], 2), q[:, rows])  # [B, N, H, c] each
    return chunks.messages(partial(_attend, module, exists), inputs, [module.edge_linear.weight])


def _attend(
    module: RelationalAttention,
    exists: Tensor | None,
    edges: Edges,
    senders: Tensor | None,
    receivers: Tensor | None,
    extra: Tensor | GatheredRows | None,
) -> Tensor:
    """`run_attention` of a chunk: keys and values [B, N, 2, H, c], queries [B, R, H, c]."""
    assert senders is not None
    assert receivers is not None
    num, c, e = module.num_heads, module.head_dim, edges.values
    k, v = senders.unbind(2)
    qe, ke, ve, *ue = torch.unflatten(module.edge_linear.weight, 0, (num, -1, c)).unbind(1)  # [H, c, d_e] each
    parts = [torch.unflatten(linear(e, w.flatten(0, 1)), -1, (num, c)) for w in (qe, ke, *ue)]  # [B, R, N, H, c] each
    scores = ((parts[0] + receivers[:, :, None]) * (parts[1] + k[:, None])).sum(-1)  # [B, R, N, H]
    if exists is not None:
        scores = scores.masked_fill(~exists[:, None, :, None], -torch.inf)
    shares = (scores * module.scale).softmax(2)
    # what is the same for all components of a head is joined over senders before it meets W_edge
    joined = shares.transpose(2, 3) @ e  # [B, R, H, d_e]
    out = torch.einsum("brhe,hce->brhc", joined, ve)
    if ue:
        modulated: Tensor = out + (shares[..., None] * parts[2] * v[:, None]).sum(2)
        return modulated.flatten(2)
    summed: Tensor = out + torch.einsum("brnh,bnhc->brhc", shares, v)
    return summed.flatten(2)


def run_edges(module: RelationalEdgeUpdate, x: Tensor, e: Tensor, rows: slice, chunks: ChunkPlan = WHOLE) -> Tensor:
    """x [B, N, d], e [B, N, N, d_e] -> e of some senders, [B, R, N, d_e]."""
    bias = module.edge_linear.bias + module.sender_linear.bias
    sender = linear(x[:, rows], module.sender_linear.weight, bias)[:, :, None]
    against = e[:, :, rows].transpose(1, 2)
    inputs = EdgeInputs(_pairs(e[:, rows]), module.receiver_linear(x), against, sender[0] if len(x) == 1 else sender)
    return chunks.of_edges(partial(_update_pairs, module), inputs, module.parameters())


def _update_pairs(
    module: RelationalEdgeUpdate,
    edges: Edges,
    senders: Tensor | None,
    receivers: Tensor | None,
    extra: Tensor | GatheredRows | None,
) -> Tensor:
    """`run_edges` of a chunk: what it reads of the other node [B, N, h], e_ji [B, R, N, d_e], and what it reads of the
    node itself [R, 1, h] or [B, R, 1, h]."""
    assert senders is not None
    assert receivers is not None
    assert isinstance(extra, Tensor)
    e = edges.values
    z = linear(torch.cat([e, receivers], dim=-1), module.edge_linear.weight) + extra + senders[:, None]
    e = module.first_norm(e + module.dropout(module.last(gelu(z))))
    result: Tensor = module.second_norm(e + module.dropout(module.mlp_last(gelu(module.mlp_first(e)))))
    return result


def _pairs(e: Tensor) -> DenseEdges:
    """Pairs of nodes [B, R, N, d_e] as a block, of those that attend and those that they attend to."""
    return DenseEdges(e, receivers=_ROWS, senders=_ROWS)


def all_pairs(graph: BlockGraph) -> Tensor:
    """Edges of chains [B, N, N, d_e], e_ij of sender i and receiver j."""
    num_networks, num_nodes, _ = graph.x.shape
    e = graph.none.repeat(num_networks, num_nodes, num_nodes, 1)
    for block in graph.edges:
        assert isinstance(block, LayerEdges)
        if block.residual:
            index = torch.arange(num_nodes, device=e.device)
            e[:, index[block.senders], index[block.receivers]] = block.features[:, :, 0]
        else:
            e[:, block.senders, block.receivers] = block.features.transpose(1, 2)
    return e


def padded(graph: BlockGraph) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Networks of any architectures, each padded to the largest, output nodes first.

    Returns:
        Nodes [B, N, d], edges [B, N, N, d_e], which nodes are no padding [B, N], and the place of each node of the
        graph among all B N.
    """
    places, size = _places(graph)
    shape = (graph.num_networks, size)
    x = graph.x.new_zeros(shape[0] * size, graph.x.shape[2]).index_copy(0, places, graph.x[0]).view(*shape, -1)
    exists = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    exists.view(-1)[places] = True
    edges = [block for block in graph.edges if isinstance(block, SortedEdges)]
    senders, receivers = places[torch.cat([block.index for block in edges], dim=1)]
    features = torch.cat([block.features[0] for block in edges])
    pairs = senders * size + receivers % size  # edges that join the same pair add up
    e = graph.none.repeat(shape[0] * size * size, 1).index_add(0, pairs, features - graph.none)
    e = e.view(*shape, size, -1)
    return x, e, exists, places


def _without_padding(x: Tensor, exists: Tensor | None, rows: slice) -> Tensor:
    """Features of some nodes [B, R, d], or of pairs [B, R, N, d], zero where a node is padding."""
    if exists is None:
        return x
    there = exists[:, rows] if x.ndim == 3 else exists[:, rows, None] & exists[:, None]
    return x.masked_fill(~there[..., None], 0)


def _places(graph: BlockGraph) -> tuple[Tensor, int]:
    """Where nodes are among those of networks that are padded to the largest, [N] long, and its size: network by
    network, output nodes first."""
    assert graph.network is not None
    by_network = graph.network.argsort(stable=True)
    sizes = graph.network.bincount(minlength=graph.num_networks)
    size = int(sizes.max())
    holes = size * torch.arange(len(sizes), device=sizes.device) - sizes.cumsum(0) + sizes  # before each network
    places = torch.empty_like(by_network)
    places[by_network] = torch.arange(len(places), device=sizes.device) + holes.repeat_interleave(sizes)
    return places, size
