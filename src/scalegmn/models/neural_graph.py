"""Neural Graphs (Kofinas et al., ICLR 2024): the graph of a network, as NG-GNN and NG-T read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, starmap
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.graphs.parameter_graph import ROLES, ParameterGraph
from scalegmn.graphs.probes import probe_features
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.networks import ACTIVATIONS, HETERO, NetParams, NetSpec
from scalegmn.nn.fourier import Encoder
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.pna import Reduced


@dataclass(frozen=True)
class NeuralGraphConfig(ModelConfig):
    """What NG-GNN and NG-T have in common: the graph, and what is read from it."""

    reverse_edges: bool = False
    """An edge against every weight; an edge then knows [w, 0, w], its reverse [0, w, w]."""

    num_frequencies: int = 128
    """Fourier features of each weight and bias, m cosines and m sines; 0: the numbers themselves."""

    frequency_scale: float = 1.0
    """Standard deviation of the frequencies."""

    encoder_layers: int = 1
    """Linears between these and node and edge features, with SiLU between them."""

    num_probes: int = 0
    """Learned inputs of the INRs, whose activations become features of their neurons; 0: none."""

    positions: bool = True
    """A learned vector per input node, hidden layer and output node."""

    max_hidden_layers: int | None = None
    """Hidden layers that have such a vector; null: as many as the networks have. More than they have: the model reads
    networks of different depths, if it has no num_probes and gives vectors."""

    linear_encoder: bool = False
    """In CNNs, the weights of linear layers have an encoder of their own; false: they stand in the middle of a
    kernel."""

    activation_embedding: bool = False
    """A learned vector per activation, added to the hidden neurons that have it. There is none for sines."""

    pooling: Literal["outputs", "outputs_mean", "mean", "max"] = "outputs"
    """For vectors, what is read: the output nodes, one after the other; their mean; the mean or the maximum of all."""

    denormalize: bool = False
    """For parameters: changes are multiplied by the standard deviation, plus the mean, of normalised inputs."""

    dropout: float = 0.2
    """Dropout on node features (and, in NG-T, edge features) after every update."""

    def problems(self, counts: Sequence[str]) -> list[str]:
        """What is wrong, also with the named counts of a model's own."""
        counts = ["encoder_layers", "out_dim", *counts]
        problems = self.wrong_choices() + self.wrong_numbers(counts, ["dropout"])
        for name, least in (("num_frequencies", 0), ("num_probes", 0), ("max_hidden_layers", 1)):
            found = getattr(self, name)
            if found is not None and found < least:
                problems.append(f"{name}: found {found}, expected at least {least}")
        if self.denormalize and self.normalize is False:
            problems.append("denormalize: needs normalize, found false")
        return problems

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations."""
        return frozenset({"permutation"})


class Edges(NamedTuple):
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
        """What edges read of nodes as receivers plus what they read of them as senders, [B, N, D] each -> [B, R, S, D];
        [B, R, 1, D] if `residual`."""
        return to[:, self.receivers, None] + sent[:, self.senders].unsqueeze(2 if self.residual else 1)

    def reduced(self, messages: Tensor) -> Reduced:
        """Messages [B, R, S, D], joined per receiver."""
        return Reduced.of_block(messages)


class IndexedEdges(NamedTuple):
    """All edges, of weights and residual connections, that go to nodes in a row, sorted by receiver."""

    receivers: slice
    """The nodes that they go to, R of them."""

    index: Tensor
    """[2, E] long, rows sender and receiver."""

    degrees: Tensor
    """[R] long: how many go to each."""

    features: Tensor
    """[1, E, D]."""

    def ends(self, to: Tensor, sent: Tensor) -> Tensor:
        """What edges read of nodes as receivers plus what they read of them as senders, [1, N, D] each -> [1, E, D]."""
        return to.index_select(1, self.index[1]) + sent.index_select(1, self.index[0])

    def reduced(self, messages: Tensor) -> Reduced:
        """Messages [1, E, D], joined per receiver."""
        return Reduced.of_rows(messages, self.degrees)


class Graph(NamedTuple):
    """Neural graphs: of B networks of one architecture in blocks, or of networks of several as the parts of one."""

    x: Tensor
    """Nodes, [B, N, d], layer by layer; [1, N, d] of all networks, all output nodes first, then the others."""

    edges: Sequence[Edges | IndexedEdges]
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
    """[N] long, the network of a node, where they are parts of one graph; networks are in order among output nodes and
    among the others."""


class NeuralGraph(nn.Module):
    """Parameters -> node features x [B, N, d], edge features per block, and those of pairs without an edge.

    x_i = V enc(b_i) + probe_i + P[type], e_ij = E enc(w_ij), nodes layer by layer. An edge of a residual connection is
    like that of the weight 1.

    Args:
        config: the hyper-parameters.
        spec: the input networks.
        node_dim, edge_dim: d and d_e.

    Raises:
        ValueError: options do not fit the networks.
    """

    def __init__(self, config: NeuralGraphConfig, spec: NetSpec, node_dim: int, edge_dim: int) -> None:
        super().__init__()
        if config.num_probes and spec.is_cnn:
            raise ValueError(f"{config.section}.num_probes: found {config.num_probes}, but CNNs have no probe features")
        if config.linear_encoder and (config.reverse_edges or not spec.is_cnn):
            raise ValueError(f"{config.section}.linear_encoder: only for CNNs without reverse_edges, found {spec}")
        if config.changes_parameters and spec.is_cnn:
            raise ValueError(
                f"{config.section}.output: found parameters, but changes of kernels need ScaleGMN, for {spec}"
            )
        self.config, self.kernel = config, spec.kernel
        self.ends = spec.layout[0], spec.layout[-1]
        self.max_hidden = config.max_hidden_layers or spec.num_hidden_layers
        options = (config.num_frequencies, config.frequency_scale, config.encoder_layers)
        self.bias_encoder = Encoder(1, node_dim, *options)
        self.raw_dim = spec.edge_dim * (3 if config.reverse_edges else 1)
        self.weight_encoder = Encoder(self.raw_dim, edge_dim, *options)
        self.linear_encoder = Encoder(1, edge_dim, *options) if config.linear_encoder else None
        self.node_linear = nn.Linear(node_dim, node_dim)
        self.edge_linear = nn.Linear(edge_dim, edge_dim)
        self.node_positions = self.activations = self.points = None
        if config.positions:
            self.node_positions = nn.Parameter(torch.randn(sum(self.ends) + self.max_hidden, node_dim))
        if config.activation_embedding:
            self.activations = nn.Parameter(torch.randn(len(_EMBEDDED), node_dim))
        if config.num_probes:
            self.points = nn.Parameter(2 * torch.rand(config.num_probes, spec.layout[0]) - 1)
            project = (nn.Linear(config.num_probes, node_dim) for _ in spec.layout)
            self.probe_linears = nn.ModuleList(project)
            self.probe_norms = nn.ModuleList(nn.LayerNorm(node_dim) for _ in spec.layout)

    def forward(self, params: NetParams, stored: NetParams) -> Graph:
        """In blocks.

        Args:
            params: the networks as the model reads them.
            stored: the networks as they are, for probes.
        """
        spec = params.spec
        inputs = params.biases[0].new_zeros(len(params), self.ends[0])
        raw = torch.cat([inputs, *params.biases], dim=1)
        activations = None if self.activations is None else _activations(params)
        x = self._nodes(raw, _types(spec, self.max_hidden).to(raw.device), activations, self._probes(stored))
        nodes = node_slices(spec)
        return Graph(x, self._edges(params), self._none(raw), nodes, nodes[-1], len(params))

    def indexed(self, nets: Sequence[NetParams], stored: Sequence[NetParams]) -> Graph:
        """As the parts of one graph.

        Args:
            nets: networks of any architectures, as the model reads them.
            stored: the networks as they are, for probes.
        """
        graph = ParameterGraph.from_params(nets, self.kernel, self.max_hidden)
        raw = graph.nodes[:, 0].masked_fill(graph.role == ROLES.index("input"), 0)
        order = (graph.role == ROLES.index("output")).argsort(descending=True, stable=True)
        num_outputs = graph.num_networks * self.ends[1]
        nodes = [slice(0, num_outputs), slice(num_outputs, len(order))]
        probes = None
        if self.points is not None:
            probes = torch.cat([self._probes(params).flatten(0, 1) for params in stored])[None, order]
        activations = _rows_of_activations(raw.device)[graph.activation[order]]
        x = self._nodes(raw[None, order], graph.node_type[order], activations[None], probes)
        edges = self._indexed_edges(graph, order.argsort(), nodes)
        return Graph(x, edges, self._none(raw), nodes, nodes[0], graph.num_networks, graph.network[order])

    def _nodes(self, raw: Tensor, types: Tensor, activations: Tensor | None, probes: Tensor | None) -> Tensor:
        """Features of nodes.

        Args:
            raw: biases, [B, N].
            types: rows of `node_positions`, [N].
            activations: rows of the table of embeddings, [B or 1, N]; -1: none.
            probes: [B, N, d].

        Returns:
            [B, N, d].
        """
        x = self.bias_encoder(raw[..., None], self.node_linear)
        if probes is not None:
            x = x + nn.functional.linear(probes, self.node_linear.weight)
        if self.node_positions is not None:
            x = x + self.node_positions.index_select(0, types)
        if self.activations is not None:
            rows = torch.cat([self.activations, torch.zeros_like(self.activations[:1])])
            x = x + rows[activations]
        return x

    def _probes(self, stored: NetParams) -> Tensor | None:
        """[B, N, d]."""
        if self.points is None:
            return None
        found = zip(probe_features(stored, self.points), self.probe_linears, self.probe_norms, strict=True)
        return torch.cat([norm(linear(values)) for values, linear, norm in found], dim=1)

    def _none(self, like: Tensor) -> Tensor:
        """[d_e], the features of a pair without an edge."""
        return self.weight_encoder(like.new_zeros(self.raw_dim), self.edge_linear)

    def _edges(self, params: NetParams) -> list[Edges]:
        """One block per weight matrix or residual connection, and direction."""
        nodes, found = node_slices(params.spec), []
        for lower, upper, layer, weight in zip(nodes[:-1], nodes[1:], params.spec.layers, params.weights, strict=True):
            if layer.kernel is None and self.linear_encoder is not None:
                found.append(Edges(upper, lower, self.linear_encoder(weight[..., None], self.edge_linear)))
            else:
                found += self._in_directions(Edges(upper, lower, self._padded(weight)))
        for source, receiver, channels in params.spec.residuals:
            lower, upper = (
                slice(start, start + channels) for start in (nodes[s + 1].start for s in (source, receiver))
            )
            raw = self._padded(params.biases[0].new_ones(len(params), channels, 1))
            found += self._in_directions(Edges(upper, lower, raw, residual=True))
        return found

    def _indexed_edges(self, graph: ParameterGraph, places: Tensor, nodes: Sequence[slice]) -> list[IndexedEdges]:
        """All edges to each of some nodes in a row; `places` [N] is where the nodes of the graph are."""
        height, width = self.kernel
        middle = (height - 1) // 2 * width + (width - 1) // 2
        one = nn.functional.one_hot(torch.tensor(middle, device=places.device), height * width).to(graph.edges.dtype)
        raw = torch.where(graph.linear[:, None], graph.edges[:, :1] * one, graph.edges)
        unweighted = torch.cat([graph.residuals, graph.attention], dim=1)
        raw = torch.cat([raw, one.expand(unweighted.shape[1], -1)])
        index = places[torch.cat([graph.edge_index, unweighted], dim=1)]
        if self.config.reverse_edges:
            none = torch.zeros_like(raw)
            raw = torch.cat([torch.cat([raw, none, raw], dim=1), torch.cat([none, raw, raw], dim=1)])
            index = torch.cat([index, index.flip(0)], dim=1)
        order = index[1].argsort(stable=True)
        features = self.weight_encoder(raw[order], self.edge_linear)
        if self.linear_encoder is not None:
            own = order.argsort()[: len(graph.linear)][graph.linear]
            features = features.index_copy(0, own, self.linear_encoder(graph.edges[graph.linear, :1], self.edge_linear))
        degrees = index[1].bincount(minlength=len(places)).split([part.stop - part.start for part in nodes])
        sizes = [int(own.sum()) for own in degrees]
        parts = zip(
            nodes, index[:, order].split(sizes, dim=1), degrees, features[None].split(sizes, dim=1), strict=True
        )
        return list(starmap(IndexedEdges, parts))

    def _in_directions(self, raw: Edges) -> list[Edges]:
        """The edges of raw features, and those against them."""
        w = raw.features
        if not self.config.reverse_edges:
            return [raw._replace(features=self.weight_encoder(w, self.edge_linear))]
        none = torch.zeros_like(w)
        forward, reverse = torch.cat([w, none, w], dim=3), torch.cat([none, w, w], dim=3)
        if not raw.residual:
            reverse = reverse.transpose(1, 2)
        return [
            raw._replace(features=self.weight_encoder(forward, self.edge_linear)),
            Edges(raw.senders, raw.receivers, self.weight_encoder(reverse, self.edge_linear), raw.residual),
        ]

    def _padded(self, weight: Tensor) -> Tensor:
        """[B, n_l, n_{l-1}(, kh, kw)] -> [B, n_l, n_{l-1}, K]: kernels, or single weights, in the middle of zeros."""
        kernel = weight if weight.ndim == 5 else weight[..., None, None]
        (top, bottom), (left, right) = (
            ((most - size) // 2, most - size - (most - size) // 2)
            for most, size in zip(self.kernel, kernel.shape[3:], strict=True)
        )
        return nn.functional.pad(kernel, (left, right, top, bottom)).flatten(3)


class NeuralGraphModel(Metanetwork):
    """What NG-GNN and NG-T do before and after their layers.

    Args:
        config: the hyper-parameters; inputs are normalised if it says so or, where it does not, unless they are CNNs.
        spec: the input networks.
        node_dim, edge_dim: d and d_e.
        head_dims: hidden widths of the readout of vectors.

    Raises:
        ValueError: options do not fit the networks.
    """

    def __init__(
        self, config: NeuralGraphConfig, spec: NetSpec, node_dim: int, edge_dim: int, head_dims: Sequence[int]
    ) -> None:
        normalize = not spec.is_cnn if config.normalize is None else config.normalize
        max_layers = (config.max_hidden_layers or spec.num_hidden_layers) + 1
        super().__init__(config, spec, InputNormalization(max_layers, centred=True) if normalize else None)
        self.config, self.one_pass = config, not config.changes_parameters
        self.graph = NeuralGraph(config, spec, node_dim, edge_dim)
        self.readout = None
        if not config.changes_parameters:
            num_read = spec.layout[-1] if config.pooling == "outputs" else 1
            self.readout = MLP(num_read * node_dim, head_dims, config.out_dim, "relu", layer_norm=False)
        else:
            self.edge_readout = MLP(edge_dim, [edge_dim], 1, "relu", layer_norm=False)
            self.node_readout = MLP(node_dim, [node_dim], 1, "relu", layer_norm=False)
        self.validate_spec(spec)

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`."""
        graph, options, depth = self.graph, self.config, spec.num_hidden_layers
        if (
            not 1 <= depth <= graph.max_hidden
            or (spec.layout[0], spec.layout[-1]) != graph.ends
            or (max(a - b for a, b in zip(spec.kernel, graph.kernel, strict=True)) > 0)
        ):
            raise ValueError(
                f"the model was built for networks from {graph.ends[0]} to {graph.ends[1]}, of 1 to {graph.max_hidden} "
                f"hidden layers (max_hidden_layers) and kernels up to {graph.kernel[0]}x{graph.kernel[1]}, found {spec}"
            )
        by_layer = {
            "num_probes": graph.points is not None,
            "output": self.readout is None,
        }
        bound = [name for name, given in by_layer.items() if given]
        if bound and not spec.is_chain:
            raise ValueError(f"{options.section}.{bound[0]}: expected networks that are a chain, found {spec}")
        if bound and depth != self.spec.num_hidden_layers:
            raise ValueError(f"{options.section}.{bound[0]}: the model was built for {self.spec}, found {spec}")
        unknown = {layer.activation for layer in spec.layers[:-1]} - {*_EMBEDDED, HETERO}
        if options.activation_embedding and unknown:
            raise ValueError(
                f"{options.section}.activation_embedding: there is none for {', '.join(unknown)}; use false"
            )

    def read_graph(self, nets: NetParams | Sequence[NetParams]) -> Graph:
        """The graph of networks of one architecture in blocks, if it is a chain, others as parts of one.

        Raises:
            ValueError: the model cannot read such networks.
        """
        parts = [nets] if isinstance(nets, NetParams) else nets
        for params in parts:
            self.validate_spec(params.spec)
        read = [self.normalized(params) for params in parts]
        if len(parts) == 1 and parts[0].spec.is_chain:
            return self.graph(*read, *parts)
        return self.graph.indexed(read, parts)

    def pool(self, nodes: Tensor, graph: Graph) -> Tensor:
        """What is read, of B networks: [B, n d], or [B, d] where nodes are pooled.

        Args:
            nodes: the nodes that are read, [B, n, d]; of parts of one graph, all of them one after the other, [.., d].
            graph: theirs.
        """
        pooling, dim = self.config.pooling, nodes.shape[-1]
        if graph.network is not None and self.reads_all:
            way = "amax" if pooling == "max" else "mean"
            none, places = nodes.new_zeros(graph.num_networks, dim), graph.network[:, None].expand(-1, dim)
            return none.scatter_reduce(0, places, nodes.reshape(-1, dim), way, include_self=False)
        nodes = nodes.reshape(graph.num_networks, -1, dim)
        if pooling == "outputs":
            return nodes.flatten(1)
        return nodes.amax(1) if pooling == "max" else nodes.mean(1)  # of one node, itself

    @property
    def reads_all(self) -> bool:
        """Whether the result is read from all nodes, not from output nodes alone."""
        return self.readout is None or self.config.pooling in ("mean", "max")

    def changes(self, params: NetParams, weights: Sequence[Tensor], biases: Tensor) -> NetParams:
        """Changes of weights and biases from what is read of edges and nodes.

        Args:
            params: the networks.
            weights: q_e(e) per layer, [B, n_l, n_{l-1}, 1].
            biases: q_v(x) of all nodes but inputs, [B, N - n_0, 1].
        """
        weights = tuple(change.reshape(w.shape) for change, w in zip(weights, params.weights, strict=True))
        changes = params.replace(weights=weights, biases=biases[..., 0].split(params.spec.layout[1:], dim=1))
        if self.config.denormalize:
            weights, layers = self.normalization.inverse(changes.weights, changes.biases)
            changes = params.replace(weights=tuple(weights), biases=tuple(layers))
        return self.scaled(changes)


def node_slices(spec: NetSpec) -> list[slice]:
    """Per node layer 0..L, its nodes among all N."""
    ends = list(accumulate(spec.layout, initial=0))
    return list(starmap(slice, pairwise(ends)))


_EMBEDDED = {
    name: index for index, name in enumerate(("identity", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"))
}
"""Activation -> its row in the table of embeddings."""


def _rows_of_activations(device: torch.device) -> Tensor:
    """Index into `ACTIVATIONS` -> row in the table; -1, of nodes without activation, -> -1."""
    return torch.tensor([*(_EMBEDDED.get(name, 0) for name in ACTIVATIONS), -1], device=device)


def _activations(params: NetParams) -> Tensor:
    """[B or 1, N] long, the row of each node's activation in the table; -1 of input and output nodes."""
    first, *hidden, last = params.spec.layout
    order, mixed = _rows_of_activations(params.biases[0].device), params.activation is not None
    found = [order.new_full((1, first), -1)]
    for layer, size in zip(params.spec.layers, hidden, strict=False):
        own = params.activation if layer.activation == HETERO else torch.tensor([ACTIVATIONS.index(layer.activation)])
        found.append(order[own.to(order.device)][:, None].expand(-1, size))
    found.append(order.new_full((1, last), -1))
    num = len(params) if mixed else 1
    return torch.cat([part.expand(num, -1) for part in found], dim=1)


def _types(spec: NetSpec, max_hidden: int) -> Tensor:
    """[N] long, row of each node among n_0 inputs, `max_hidden` hidden layers and n_L outputs."""
    first, *hidden, last = spec.layout
    layers = [torch.full((n,), first + index) for index, n in enumerate(hidden)]
    return torch.cat([torch.arange(first), *layers, first + max_hidden + torch.arange(last)])
