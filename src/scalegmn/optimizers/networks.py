"""The networks of learned optimisers: from the channels of each parameter to the numbers that a rule reads.

All map [B, P, C] to [B, P, 2]. Shape letters: B networks, P parameters, C channels, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from scalegmn.models.scalegmn.streams import StreamScaleGMN, StreamWidths
from scalegmn.networks import ACTIVATIONS, NetSpec
from scalegmn.networks.scalar_groups import SIGNS, TRIVIAL, ScalarGroup
from scalegmn.nn.attention import RelationalAttention, RelationalEdgeUpdate, RelationalLayer
from scalegmn.nn.mlp import MLP
from scalegmn.nn.pna import EdgeUpdate, GraphNorm, PNALayer
from scalegmn.nn.streams import StreamGraph, Streams
from scalegmn.nn.weight_space import NeuronLayer
from scalegmn.optimizers.coordinates import Coordinates
from scalegmn.optimizers.features import FeatureSet

NUM_OUTPUTS = 2
"""Numbers per parameter that rules read."""


class UpdateNetwork(nn.Module):
    """The base of all networks.

    Args:
        features: the channels.
    """

    is_batched: ClassVar[bool] = True
    """Whether `torch.func.vmap` over parameters runs it."""

    exact_symmetries: frozenset[str] = frozenset({"permutation"})
    """Which symmetries of networks under training the updates keep."""

    def __init__(self, features: FeatureSet) -> None:
        super().__init__()
        self.features = features

    def forward(self, channels: Tensor, coordinates: Coordinates) -> Tensor:
        """Channels [B, P, C] of the parameters at `coordinates` -> [B, P, 2]."""
        raise NotImplementedError


class CoordinateMLP(UpdateNetwork):
    """An MLP of the channels of each parameter (FF; MLPLOpt).

    Args:
        features: the channels.
        hidden_dims: hidden widths.
    """

    def __init__(self, features: FeatureSet, hidden_dims: Sequence[int]) -> None:
        super().__init__(features)
        self.mlp = MLP(features.num_channels, hidden_dims, NUM_OUTPUTS, "relu", layer_norm=False)

    def forward(self, channels: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `UpdateNetwork`."""
        outputs: Tensor = self.mlp(channels)
        return outputs


class TensorLSTM(UpdateNetwork):
    """An LSTM that walks the tensors in order, from the mean of their parameters' embeddings; an MLP reads its state
    and the channels (Kofinas et al., 2024, appendix).

    Args:
        features: the channels.
        dim: d.
    """

    is_batched = False

    def __init__(self, features: FeatureSet, dim: int) -> None:
        super().__init__(features)
        self.embedding = MLP(features.num_channels, (dim,), dim, "relu", layer_norm=False)
        self.cell = nn.LSTMCell(dim, dim)
        self.mlp = MLP(dim + features.num_channels, (dim,), NUM_OUTPUTS, "relu", layer_norm=False)

    def forward(self, channels: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `UpdateNetwork`."""
        means = [part.mean(1) for part in coordinates.split(self.embedding(channels))]
        hidden = cell = torch.zeros_like(means[0])
        states = []
        for mean, size in zip(means, coordinates.sizes, strict=True):
            hidden, cell = self.cell(mean, (hidden, cell))
            states.append(hidden[:, None].expand(-1, size, -1))
        outputs: Tensor = self.mlp(torch.cat(states, dim=1), channels)
        return outputs


class UniversalNFN(UpdateNetwork):
    """An MLP of each parameter, then one layer that is equivariant to permutations (UNF, Zhou et al., 2024).

    Args:
        features: the channels.
        spec: networks under training; others must have as many layers and the same kernels.
        dim: d.
    """

    def __init__(self, features: FeatureSet, spec: NetSpec, dim: int) -> None:
        super().__init__(features)
        self.spec, kernels = spec, Coordinates(spec).kernels
        self.mlp = MLP(features.num_channels, (dim, dim), dim, "relu", layer_norm=False)
        self.layer = NeuronLayer(spec.layout, kernels, dim, NUM_OUTPUTS)

    def forward(self, channels: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `UpdateNetwork`.

        Raises:
            ValueError: the networks have another depth, or other kernels.
        """
        if coordinates.kernels != Coordinates(self.spec).kernels:
            raise ValueError(f"the optimiser has maps for each layer of {self.spec}, found {coordinates.spec}")
        return coordinates.from_graph(*self.layer(*coordinates.to_graph(self.mlp(channels).relu())))


class GraphNetwork(UpdateNetwork):
    """What networks on the graph of neurons have in common: channels of edges (all values of a kernel) and of nodes,
    and an MLP of an edge's or a node's features and the parameter's own channels.

    Args:
        features: the channels.
        spec: networks under training; others must have the same largest kernel.
        edge_dim, node_dim: widths.
        head_dims: hidden widths of the MLP.
    """

    is_batched = False

    def __init__(
        self, features: FeatureSet, spec: NetSpec, node_dim: int, edge_dim: int, head_dims: Sequence[int]
    ) -> None:
        super().__init__(features)
        self.kernel = max(Coordinates(spec).kernels)
        self.node_linear = nn.Linear(features.num_channels, node_dim)
        self.edge_linear = nn.Linear(features.num_channels * self.kernel, edge_dim)
        self.inputs = nn.Parameter(torch.randn(node_dim))
        self.roles = nn.Parameter(torch.randn(2, node_dim))
        self.to_edges = nn.Linear(edge_dim, head_dims[0])
        self.to_nodes = nn.Linear(node_dim, head_dims[0])
        self.head = MLP(head_dims[0] + features.num_channels, head_dims, NUM_OUTPUTS, "relu", layer_norm=False)

    def read(self, channels: Tensor, coordinates: Coordinates) -> tuple[Tensor, list[Tensor]]:
        """Features of all nodes [B, N, d], and per block of edges [B, n_l, n_{l-1}, d].

        Raises:
            ValueError: the networks are no chain, or have another kernel.
        """
        spec = coordinates.spec
        if not spec.is_chain or max(coordinates.kernels) != self.kernel:
            raise ValueError(f"expected a chain of layers with kernels of at most {self.kernel} values, found {spec}")
        weights, biases = coordinates.to_graph(channels)
        nodes = [self.node_linear(bias) + self.roles[int(i == len(biases) - 1)] for i, bias in enumerate(biases)]
        inputs = self.inputs.expand(len(channels), spec.layout[0], -1)
        return torch.cat([inputs, *nodes], dim=1), [self.edge_linear(w) for w in coordinates.padded(weights)]

    def answer(self, nodes: Tensor, edges: Sequence[Tensor], channels: Tensor, coordinates: Coordinates) -> Tensor:
        """[B, P, 2] of features of all nodes and edges."""
        layout = coordinates.spec.layout
        of_nodes = self.to_nodes(nodes[:, layout[0] :]).split(layout[1:], dim=1)
        spread = coordinates.spread([self.to_edges(edge) for edge in edges], of_nodes)
        outputs: Tensor = self.head(spread, channels)
        return outputs


class NeuralGraphGNN(GraphNetwork):
    """NG-GNN on edges in both directions: `PNALayer`, norm, `EdgeUpdate`.

    Args:
        features, spec: as in `GraphNetwork`.
        dim: d.
        num_layers: layers.
    """

    def __init__(self, features: FeatureSet, spec: NetSpec, dim: int, num_layers: int) -> None:
        super().__init__(features, spec, dim, dim, (dim,))
        self.directions = nn.Parameter(torch.randn(2, dim))
        self.layers = nn.ModuleList(PNALayer(dim, "film", ("identity",), 1.0) for _ in range(num_layers))
        self.norms = nn.ModuleList(GraphNorm(dim) for _ in range(num_layers))
        self.updates = nn.ModuleList(EdgeUpdate(dim) for _ in range(num_layers))

    def forward(self, channels: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `UpdateNetwork`."""
        spec, num_networks = coordinates.spec, len(channels)
        x, blocks = self.read(channels, coordinates)
        x, num_nodes = x.flatten(0, 1), x.shape[1]
        along = torch.cat([block.flatten(1, 2) for block in blocks], dim=1).flatten(0, 1)
        starts = num_nodes * torch.arange(num_networks, device=x.device)
        forward_index = (spec.edge_index.to(x.device)[:, None] + starts[:, None]).flatten(1)
        edge_index = torch.cat([forward_index, forward_index.flip(0)], dim=1)
        e = torch.cat([along + self.directions[0], along + self.directions[1]])
        network = torch.arange(num_networks, device=x.device).repeat_interleave(num_nodes)
        for layer, norm, update in zip(self.layers, self.norms, self.updates, strict=True):
            x = x + nn.functional.silu(norm(layer(x, e, edge_index), network, num_networks))
            e = e + update(x[edge_index[1]], x[edge_index[0]], e)
        both = e[: len(along)] + e[len(along) :]
        shapes = [block.shape[1:3] for block in blocks]
        parts = both.unflatten(0, (num_networks, -1)).split([n * m for n, m in shapes], dim=1)
        edges = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return self.answer(x.unflatten(0, (num_networks, -1)), edges, channels, coordinates)


class NeuralGraphTransformer(GraphNetwork):
    """NG-T: relational attention among all nodes.

    Args:
        features, spec: as in `GraphNetwork`.
        dim: d.
        num_layers: layers.
        num_heads: heads.
    """

    def __init__(self, features: FeatureSet, spec: NetSpec, dim: int, num_layers: int, num_heads: int = 4) -> None:
        edge_dim = dim // 2
        super().__init__(features, spec, dim, edge_dim, (dim,))
        self.layers = nn.ModuleList(
            RelationalLayer(
                RelationalAttention(dim, edge_dim, dim, num_heads, True),
                RelationalEdgeUpdate(dim, edge_dim, dim, 0.0, True),
                dim,
                2 * dim,
                0.0,
                True,
            )
            for _ in range(num_layers)
        )

    def forward(self, channels: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `UpdateNetwork`."""
        x, blocks = self.read(channels, coordinates)
        num_nodes = x.shape[1]
        starts = [sum(coordinates.spec.layout[:index]) for index in range(len(coordinates.spec.layout))]
        e = x.new_zeros(len(x), num_nodes, num_nodes, blocks[0].shape[-1])
        places = []
        for index, block in enumerate(blocks):
            rows = slice(starts[index], starts[index] + block.shape[2])
            columns = slice(starts[index + 1], starts[index + 1] + block.shape[1])
            e[:, rows, columns] = block.transpose(1, 2)
            places.append((rows, columns))
        exists = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for layer in self.layers:
            x, e = layer(x, e, exists)
        return self.answer(x, [e[:, i, j].transpose(1, 2) for i, j in places], channels, coordinates)


class StreamOptimizer(UpdateNetwork):
    """ScaleGMN with both streams on networks whose scales are canonical; what is left of their scalars are signs.

    Odd channels enter both streams, even ones are invariant features. The first output of a parameter is odd: a linear
    map of the odd features of its edge or node and of its own odd channels, times factors that are invariant; the
    second one is invariant.

    Args:
        features: the channels.
        spec: networks under training; others must have the same largest kernel, and the same scalars.
        dim: d.
        num_layers: layers.
        bidirectional: whether messages go against the edges.
    """

    def __init__(self, features: FeatureSet, spec: NetSpec, dim: int, num_layers: int, bidirectional: bool) -> None:
        super().__init__(features)
        self.group = remaining_scalars(spec)
        self.kernel = max(Coordinates(spec).kernels)
        odd, even = features.num_odd, features.num_even
        widths = StreamWidths((odd + 1, odd + 1, even), (odd * self.kernel, odd * self.kernel, even * self.kernel))
        self.model = StreamScaleGMN(self.group, widths, dim, num_layers, bidirectional, (dim,), mean=True)
        self.odd_linear = nn.Linear(odd, dim, bias=False)
        self.to_edges = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.to_nodes = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.factors = MLP(dim + even, (dim,), dim + 1, "silu", layer_norm=False)
        self.last = nn.Linear(dim, 1, bias=False)
        kept = {"permutation"} | ({"sign"} if self.group.signs else set())
        self.exact_symmetries = frozenset(kept)

    def forward(self, channels: Tensor, coordinates: Coordinates) -> Tensor:
        """As in `UpdateNetwork`.

        Raises:
            ValueError: the networks are no chain, or have other scalars or another kernel.
        """
        spec, odd = coordinates.spec, self.features.num_odd
        if not spec.is_chain or remaining_scalars(spec) != self.group or max(coordinates.kernels) != self.kernel:
            signs = "with signs (tanh, sine)" if self.group.signs else "without signs (relu)"
            raise ValueError(
                f"the optimiser trains chains of layers {signs}, with kernels of {self.kernel} values; found {spec}; "
                "choose one that was trained on such networks, or optimizer.network ff, mlp_lopt or lstm for any module"
            )
        graph = self.model(self.graph(channels, coordinates))
        e, f, _ = zip(*graph.edges, strict=True)
        edges = [self.to_edges[0](a) + self.to_edges[1](b) for a, b in zip(e, f, strict=True)]
        nodes = self.to_nodes[0](graph.nodes.covariant) + self.to_nodes[1](graph.nodes.contravariant)
        of_nodes = nodes[:, spec.layout[0] :].split(spec.layout[1:], dim=1)
        own = self.odd_linear(channels[..., :odd]) + coordinates.spread(edges, of_nodes)
        invariant = own.abs() if self.group.signs else own
        factors = self.factors(invariant, channels[..., odd:])
        return torch.cat([self.last(own * factors[..., :-1]), factors[..., -1:]], dim=-1)

    def graph(self, channels: Tensor, coordinates: Coordinates) -> StreamGraph:
        """Raw features of both streams. A constant marks input and output nodes, which have no scalars."""
        spec, odd = coordinates.spec, self.features.num_odd
        weights, biases = coordinates.to_graph(channels)
        nodes = torch.cat([channels.new_zeros(len(channels), spec.layout[0], channels.shape[-1]), *biases], dim=1)
        constant = nodes.new_zeros(*nodes.shape[:2], 1)
        constant[:, : spec.layout[0]] = 1
        constant[:, -spec.layout[-1] :] = 1
        x = torch.cat([nodes[..., :odd], constant], dim=-1)
        edges = []
        for weight in coordinates.padded(weights):
            split = odd * self.kernel
            edges.append(Streams(weight[..., :split], weight[..., :split], weight[..., split:]))
        return StreamGraph(Streams(x, x, nodes[..., odd:]), edges, spec.layout)


def remaining_scalars(spec: NetSpec) -> ScalarGroup:
    """The scalars of hidden neurons after scales have been made canonical: signs, or none.

    Where activations differ, those that all of them have.
    """
    groups = [ACTIVATIONS[layer.activation].group for layer in spec.layers[:-1]]
    return SIGNS if all(group.signs and group.preserves_scalars for group in groups) else TRIVIAL
