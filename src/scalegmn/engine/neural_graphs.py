"""Fast forms of neural graphs: features of `NeuralGraphFeatures` in dense blocks, or as rows sorted by receiver.

Consecutive Linears without anything between them are joined. Chains of one architecture are dense blocks, where
gathering is broadcasting; other networks are the components of one graph, output nodes first.

Shape letters: B networks, N nodes, E edges, R receivers, S senders, d and d_e widths of nodes and edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, starmap
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalegmn.engine.memory import kept_bytes, tensor_bytes
from scalegmn.graphs.edge_values import EdgeValues
from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.graphs.probes import probe_features
from scalegmn.networks import HETERO, NetParams, NetSpec
from scalegmn.networks.parameter_indices import ROLES
from scalegmn.nn.fourier import Encoder, FourierFeatures
from scalegmn.nn.mlp import MLP
from scalegmn.nn.neural_graph import NeuralGraphFeatures, middle_of

_CHUNK = 8
"""Features that are encoded at once fill so many tensors that make full use of a device: fewer are not worth the second
pass that chunks need."""


class LayerEdges(NamedTuple):
    """The edges between two node layers in one direction: of weights between all nodes, of a residual connection
    between the first nodes of both layers, one by one."""

    receivers: slice
    """The nodes that they go to, R of them."""

    senders: slice
    """The nodes that they come from, S of them; as many as receivers, each of which has one, if `residual`."""

    features: Tensor
    """[B, R, S, D]; [B, R, 1, D] if `residual`."""

    residual: bool = False

    def ends(self, to: Tensor, sent: Tensor) -> Tensor:
        """Features of edges' receivers plus those of their senders, [B, N, D] each -> [B, R, S, D]; [B, R, 1, D] if
        `residual`."""
        return to[:, self.receivers, None] + sent[:, self.senders].unsqueeze(2 if self.residual else 1)


class SortedEdges(NamedTuple):
    """All edges, of weights and of connections without weights, to consecutive nodes, sorted by receiver."""

    receivers: slice
    """The nodes that they go to, R of them."""

    index: Tensor  # type: ignore[assignment]  # not the method of tuples
    """[2, E] long, rows sender and receiver."""

    degrees: Tensor
    """[R] long: how many go to each."""

    features: Tensor
    """[1, E, D]."""

    def ends(self, to: Tensor, sent: Tensor) -> Tensor:
        """Features of edges' receivers plus those of their senders, [1, N, D] each -> [1, E, D]."""
        return to.index_select(1, self.index[1]) + sent.index_select(1, self.index[0])


class BlockGraph(NamedTuple):
    """Neural graphs: of B chains of one architecture, or of any networks as the components of one graph."""

    x: Tensor
    """Nodes, [B, N, d], layer by layer; [1, N, d] of all networks, all output nodes first, then the others."""

    edges: Sequence[LayerEdges | SortedEdges]
    """To each of `nodes`."""

    none: Tensor
    """[d_e], the features of a pair without an edge."""

    nodes: Sequence[slice]
    """Layers 0..L, or the output nodes and the others."""

    outputs: slice
    """That of the output nodes."""

    num_networks: int
    """B."""

    network: Tensor | None = None
    """[N] long, the network of a node of one graph; networks are in order among output nodes and among the others."""


class NeuralGraphNetwork(Protocol):
    """What the engine reads of a model; see `scalegmn.models.neural_graph.NeuralGraphModel`."""

    graph: NeuralGraphFeatures
    layers: nn.ModuleList
    readout: MLP | None
    node_readout: MLP
    edge_readout: MLP

    @property
    def pooling(self) -> str:
        """How nodes are pooled, as in the configuration."""
        ...

    @property
    def reads_all(self) -> bool:
        """Whether the result is read from all nodes, not from output nodes alone."""
        ...

    def normalized(self, params: NetParams) -> NetParams:
        """Networks as the model reads them."""
        ...

    def read_out(self, pooled: Tensor) -> Tensor:
        """The readout of pooled nodes."""
        ...

    def changes(self, params: NetParams, weights: Sequence[Tensor], biases: Tensor) -> NetParams:
        """Changes of parameters from the outputs of both readouts."""
        ...


def node_slices(spec: NetSpec) -> list[slice]:
    """Per node layer 0..L, its nodes among all N."""
    ends = list(accumulate(spec.layout, initial=0))
    return list(starmap(slice, pairwise(ends)))


def joined(outer: nn.Linear, inner: nn.Linear | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of outer(inner(x)); of `outer` where there is no inner one."""
    if inner is None:
        return outer.weight, outer.bias
    return outer.weight @ inner.weight, outer(inner.bias)


def encode_then_linear(encoder: Encoder, after: nn.Linear, v: Tensor) -> Tensor:
    """after(encoder(v)), [..., k] -> [..., out]: the Linear that follows is joined to the encoder's last one.

    What a backward pass cannot keep is encoded in chunks, again in the backward pass.
    """
    first, rest = encoding(encoder, after)

    def encode(v: Tensor) -> Tensor:
        return rest(nn.functional.linear(v, first))

    num_bytes = 4 * v.shape[:-1].numel() * len(first) * v.element_size()  # of what goes in, cosines, sines, and both
    if torch.compiler.is_compiling() or num_bytes <= kept_bytes(v.device):
        return encode(v)
    size = tensor_bytes(v.device) // (2 * len(first) * v.element_size())
    chunks = v.reshape(-1, v.shape[-1]).split(size)
    encoded = torch.cat([checkpoint(encode, chunk, use_reentrant=False) for chunk in chunks])
    return encoded.reshape(*v.shape[:-1], -1)


def encoding(encoder: Encoder, after: nn.Linear) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """after(encoder(v)) = rest(first v): the matrix `first` [m, k], which may act on some components of v at a time,
    and `rest`, [..., m] -> [..., out]."""
    *inner, last = (cast("nn.Linear", layer) for layer in encoder.linears)
    linears = [*((layer.weight, layer.bias) for layer in inner), (after.weight @ last.weight, after(last.bias))]
    fourier = encoder.fourier if isinstance(encoder.fourier, FourierFeatures) else None

    def rest(x: Tensor) -> Tensor:
        if fourier is not None:
            x = nn.functional.linear(torch.cat([x.cos(), x.sin()], dim=-1), *linears[0])
        else:
            x = x + linears[0][1]
        for weight, bias in linears[1:]:
            x = nn.functional.linear(nn.functional.silu(x), weight, bias)
        return x

    return linears[0][0] if fourier is None else 2 * math.pi * fourier.frequencies, rest


def block_graph(model: NeuralGraphNetwork, nets: Sequence[NetParams]) -> BlockGraph:
    """The neural graphs of networks: in dense blocks, if they are chains of one architecture."""
    read = [model.normalized(params) for params in nets]
    if len(nets) == 1 and nets[0].spec.is_chain:
        return chain_graph(model.graph, read[0], nets[0])
    return component_graph(model.graph, read, nets)


def chain_graph(features: NeuralGraphFeatures, params: NetParams, stored: NetParams) -> BlockGraph:
    """The graph of chains, in dense blocks.

    Args:
        features: the module.
        params: the networks as the model reads them.
        stored: the networks as they are, for probes.
    """
    x, nodes = chain_nodes(features, params, stored), node_slices(params.spec)
    return BlockGraph(x, _chain_edges(features, params), _none(features, x), nodes, nodes[-1], len(params))


def chain_nodes(features: NeuralGraphFeatures, params: NetParams, stored: NetParams) -> Tensor:
    """Features of the nodes of chains, [B, N, d]; arguments as in `chain_graph`."""
    inputs = params.biases[0].new_zeros(len(params), params.spec.layout[0])
    raw = torch.cat([inputs, *params.biases], dim=1)
    activations = None if features.activations is None else _activations(features, params)
    types = _types(params.spec, features.max_hidden_layers).to(raw.device)
    return encoded_nodes(features, raw, types, activations, probes_of(features, stored))


def component_graph(
    features: NeuralGraphFeatures, nets: Sequence[NetParams], stored: Sequence[NetParams]
) -> BlockGraph:
    """The graph of networks of any architectures, as components of one; arguments as in `chain_graph`."""
    graph = ParameterGraph.from_params(nets, features.kernel, features.max_hidden_layers)
    raw = graph.nodes[:, 0].masked_fill(graph.role == ROLES.index("input"), 0)
    is_output = graph.role == ROLES.index("output")
    order = is_output.argsort(descending=True, stable=True)
    num_outputs = graph.num_networks * nets[0].spec.layout[-1]
    nodes = [slice(0, num_outputs), slice(num_outputs, len(order))]
    probes = None
    if features.points is not None:
        of_nets = [probes_of(features, params) for params in stored]
        probes = torch.cat([rows.flatten(0, 1) for rows in of_nets if rows is not None])[None, order]
    activations = features.rows_of(graph.activations, raw.device)[graph.activation[order]]
    x = encoded_nodes(features, raw[None, order], graph.node_type[order], activations[None], probes)
    edges = _sorted_edges(features, graph, order.argsort(), nodes)
    return BlockGraph(x, edges, _none(features, raw), nodes, nodes[0], graph.num_networks, graph.network[order])


def probes_of(features: NeuralGraphFeatures, stored: NetParams) -> Tensor | None:
    """The probe features of networks as they are, [B, N, d]; None: the model has none."""
    return None if features.points is None else features.probes(probe_features(stored, features.points))


def pool(nodes: Tensor, graph: BlockGraph, pooling: str, from_all: bool) -> Tensor:
    """The readout's input for B networks: [B, n d], or [B, d] where nodes are pooled.

    Args:
        nodes: the nodes that are read, [B, n, d]; of components of one graph, all of them one after the other, [.., d].
        graph: theirs.
        pooling: as in the configuration.
        from_all: whether these are all nodes, not output nodes alone.
    """
    dim = nodes.shape[-1]
    if graph.network is not None and from_all:
        way = "amax" if pooling == "max" else "mean"
        none, places = nodes.new_zeros(graph.num_networks, dim), graph.network[:, None].expand(-1, dim)
        return none.scatter_reduce(0, places, nodes.reshape(-1, dim), way, include_self=False)
    return pooled(nodes.reshape(graph.num_networks, -1, dim), pooling)


def pooled(nodes: Tensor, pooling: str) -> Tensor:
    """`pool` of the nodes of each network, [B, n, d]."""
    if pooling == "outputs":
        return nodes.flatten(1)
    return nodes.amax(1) if pooling == "max" else nodes.mean(1)  # of one node, itself


def encoded_nodes(
    features: NeuralGraphFeatures, raw: Tensor, types: Tensor, activations: Tensor | None, probes: Tensor | None
) -> Tensor:
    """`NeuralGraphFeatures.nodes` of biases [B, N], types [N], activations [B or 1, N], probes [B, N, d]: [B, N, d]."""
    x = encode_then_linear(features.bias_encoder, features.node_linear, raw[..., None])
    if probes is not None:
        x = x + nn.functional.linear(probes, features.node_linear.weight)
    if features.node_positions is not None:
        x = x + features.node_positions.index_select(0, types)
    if features.activations is not None and activations is not None:
        rows = torch.cat([features.activations, torch.zeros_like(features.activations[:1])])
        x = x + rows[activations]
    return x


def _none(features: NeuralGraphFeatures, like: Tensor) -> Tensor:
    """[d_e], the features of a pair without an edge."""
    raw = like.new_zeros(features.raw_dim)
    return encode_then_linear(features.weight_encoder, features.edge_linear, raw)


def _chain_edges(features: NeuralGraphFeatures, params: NetParams) -> list[LayerEdges]:
    """One block per weight matrix or residual connection, and direction."""
    nodes, blocks = node_slices(params.spec), []
    for lower, upper, layer, weight in zip(nodes[:-1], nodes[1:], params.spec.layers, params.weights, strict=True):
        if layer.kernel is None and features.linear_encoder is not None:
            encoded = encode_then_linear(features.linear_encoder, features.edge_linear, weight[..., None])
            blocks.append(LayerEdges(upper, lower, encoded))
        else:
            blocks += _in_directions(features, LayerEdges(upper, lower, padded(weight, features.kernel)))
    for source, receiver, channels in params.spec.residuals:
        starts = [nodes[layer + 1].start for layer in (source, receiver)]
        lower, upper = (slice(start, start + channels) for start in starts)
        raw = padded(params.biases[0].new_ones(len(params), channels, 1), features.kernel)
        blocks += _in_directions(features, LayerEdges(upper, lower, raw, residual=True))
    return blocks


def _in_directions(features: NeuralGraphFeatures, raw: LayerEdges) -> list[LayerEdges]:
    """The edges of raw features, and those against them."""

    def encoded(values: Tensor) -> Tensor:
        return encode_then_linear(features.weight_encoder, features.edge_linear, values)

    w = raw.features
    if not features.reverse_edges:
        return [raw._replace(features=encoded(w))]
    none = torch.zeros_like(w)
    forward, reverse = torch.cat([w, none, w], dim=3), torch.cat([none, w, w], dim=3)
    if not raw.residual:
        reverse = reverse.transpose(1, 2)
    return [
        raw._replace(features=encoded(forward)),
        LayerEdges(raw.senders, raw.receivers, encoded(reverse), raw.residual),
    ]


def padded(weight: Tensor, largest: tuple[int, int]) -> Tensor:
    """[B, n_l, n_{l-1}(, kh, kw)] -> [B, n_l, n_{l-1}, K]: kernels, or single weights, in the middle of zeros."""
    kernel = weight if weight.ndim == 5 else weight[..., None, None]
    (top, bottom), (left, right) = (
        ((most - size) // 2, most - size - (most - size) // 2)
        for most, size in zip(largest, kernel.shape[3:], strict=True)
    )
    return nn.functional.pad(kernel, (left, right, top, bottom)).flatten(3)


def _sorted_edges(
    features: NeuralGraphFeatures, graph: ParameterGraph, places: Tensor, nodes: Sequence[slice]
) -> list[SortedEdges]:
    """All edges to each of some consecutive nodes; `places` [N] is where the nodes of the graph are."""
    unweighted = torch.cat([graph.residuals, graph.attention], dim=1)
    index = torch.cat([graph.edge_index, unweighted], dim=1)
    index = places[torch.cat([index, index.flip(0)], dim=1) if features.reverse_edges else index]
    order = index[1].argsort(stable=True)
    middle = int(middle_of(features.kernel, graph.nodes).argmax())
    weights = graph.edges.moved(0, middle)
    edges = EdgeValues.joined([weights, EdgeValues.ones(unweighted.shape[1], middle, like=weights)])
    if features.reverse_edges:
        edges = EdgeValues.joined([edges.repeated((0, 2), 3), edges.repeated((1, 2), 3)])
    encoded = _encoded(features, edges, order)
    if features.linear_encoder is not None:
        linear = order.argsort()[: len(graph.linear)][graph.linear]
        values = graph.edges.linear(torch.eye(1, graph.edges.width).to(graph.nodes))[graph.linear]
        encoded = encoded.index_copy(
            0, linear, encode_then_linear(features.linear_encoder, features.edge_linear, values)
        )
    degrees = torch.split(index[1].bincount(minlength=len(places)), [part.stop - part.start for part in nodes])
    sizes = [int(of_nodes.sum()) for of_nodes in degrees]
    parts = zip(
        nodes,
        torch.split(index[:, order], sizes, dim=1),
        degrees,
        torch.split(encoded[None], sizes, dim=1),
        strict=True,
    )
    return list(starmap(SortedEdges, parts))


def _encoded(features: NeuralGraphFeatures, edges: EdgeValues, order: Tensor) -> Tensor:
    """`NeuralGraphFeatures.edges` of raw features [E, R] in another order, [E, d_e].

    Large graphs are encoded in chunks, again in the backward pass.
    """
    first, rest = encoding(features.weight_encoder, features.edge_linear)

    def encode(chunk: EdgeValues) -> Tensor:
        places = chunk.places.to(first.device)
        if len(places) <= len(first):  # a table of raw features is no larger than what the map makes of it
            return rest(nn.functional.linear(chunk.at(places), first[:, places]))
        return rest(chunk.linear(first))

    size = _CHUNK * tensor_bytes(first.device) // (2 * len(first) * first.element_size())
    chunks = edges.split(order, [len(part) for part in order.split(size)])
    if len(chunks) == 1:
        return encode(chunks[0])
    return torch.cat([checkpoint(encode, chunk, use_reentrant=False) for chunk in chunks])


def _activations(features: NeuralGraphFeatures, params: NetParams) -> Tensor:
    """[B or 1, N] long, the row of each node's activation in the table; -1 of input and output nodes."""
    first, *hidden, last = params.spec.layout
    device = params.biases[0].device
    rows = [torch.full((1, first), -1, device=device)]
    for layer, size in zip(params.spec.layers, hidden, strict=False):
        if layer.activation == HETERO:
            assert params.activation is not None
            of_layer = features.rows_of(params.spec.activations, device)[params.activation]
        else:
            of_layer = features.rows_of([layer.activation], device)[:1]
        rows.append(of_layer[:, None].expand(-1, size))
    rows.append(torch.full((1, last), -1, device=device))
    num = 1 if params.activation is None else len(params)
    return torch.cat([row.expand(num, -1) for row in rows], dim=1)


def _types(spec: NetSpec, max_hidden: int) -> Tensor:
    """[N] long, row of each node among n_0 inputs, `max_hidden` hidden layers and n_L outputs."""
    first, *hidden, last = spec.layout
    layers = [torch.full((n,), first + index) for index, n in enumerate(hidden)]
    return torch.cat([torch.arange(first), *layers, first + max_hidden + torch.arange(last)])
