"""NG-T: a relational transformer on neural graphs (Kofinas et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.engine.memory import tensor_bytes
from scalegmn.models.neural_graph import Graph, NeuralGraphConfig, NeuralGraphModel, node_slices
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.attention import RelationalAttention, RelationalEdgeUpdate, RelationalLayer

_LEAST_SHARE = 0.85
"""Networks that pass together have at least so many of the largest one's nodes; less would compute more padding."""


@dataclass(frozen=True)
class NGTConfig(NeuralGraphConfig):
    """NG-T: attention among all nodes of the neural graph, connected or not, with features of each pair."""

    name = "ng_t"
    supports_multiple_architectures = True

    node_dim: int = 64
    """Width of node features."""

    edge_dim: int = 32
    """Width of edge features."""

    attention_dim: int = 128
    """Width of all heads together."""

    num_heads: int = 8
    """Attention heads."""

    node_hidden_dim: int = 128
    """Hidden width of the MLP on nodes."""

    edge_hidden_dim: int = 64
    """Hidden width of the MLPs on edges."""

    readout_dim: int = 128
    """For vectors: hidden width of the readout, which has one hidden layer, for CNNs two."""

    num_layers: int = 4
    """Transformer layers."""

    modulate_values: bool = True
    """Values are multiplied by a vector of the edge before another one is added."""

    update_edges: bool = True
    """Update edge features in every layer; false: every layer reads the initial ones."""

    layer_norm: bool = True
    """LayerNorm after every addition."""

    pooling: Literal["outputs", "outputs_mean", "mean", "max", "token"] = "outputs"
    """For vectors, what is read: the output nodes, one after the other; their mean; the mean or the maximum of all; a
    learned node beside them."""

    def __post_init__(self) -> None:
        widths = ["node_dim", "edge_dim", "attention_dim", "node_hidden_dim", "edge_hidden_dim", "readout_dim"]
        problems = self.problems([*widths, "num_heads", "num_layers"])
        if self.num_heads >= 1 and self.attention_dim % self.num_heads:
            problems.append(f"attention_dim: found {self.attention_dim}, expected a multiple of {self.num_heads} heads")
        self.refuse(problems)

    def build(self, spec: NetSpec) -> NGT:
        """The model for networks of `spec`."""
        return NGT(self, spec)


METANETWORKS.register(NGTConfig.name, NGTConfig)


class NGT(NeuralGraphModel):
    """Transformer layers on all pairs of nodes, then a readout of the output nodes, or of all nodes and edges.

    It reads networks of other widths than `spec`, and, with `max_hidden_layers`, of other depths.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: options do not fit the networks.
    """

    def __init__(self, config: NGTConfig, spec: NetSpec) -> None:
        head = (config.readout_dim,) * (2 if spec.is_cnn else 1)
        super().__init__(config, spec, config.node_dim, config.edge_dim, head)
        self.token = nn.Parameter(torch.randn(config.node_dim)) if config.pooling == "token" else None
        self.layers = nn.ModuleList()
        for index in range(config.num_layers):
            attention = RelationalAttention(
                config.node_dim, config.edge_dim, config.attention_dim, config.num_heads, config.modulate_values
            )
            update = None
            if config.update_edges and (index < config.num_layers - 1 or config.changes_parameters):
                update = RelationalEdgeUpdate(
                    config.node_dim, config.edge_dim, config.edge_hidden_dim, config.dropout, config.layer_norm
                )
            self.layers.append(
                RelationalLayer(
                    attention, update, config.node_dim, config.node_hidden_dim, config.dropout, config.layer_norm
                )
            )

    def forward(self, nets: NetParams | Sequence[NetParams]) -> Tensor | NetParams:
        """B networks -> [B, out_dim], or changes of their parameters. Of several architectures, those of about the same
        size pass together, filled up to the largest of them.

        Raises:
            ValueError: the model cannot read such networks.
        """
        if not isinstance(nets, NetParams):
            return self._several(nets)
        if not nets.spec.is_chain:
            return self._filled_up([nets])
        graph = self.read_graph(nets)
        read = slice(0, graph.x.shape[1]) if self.reads_all else graph.outputs
        x, e = self._through_layers(graph.x, _all_pairs(graph), read)
        if self.readout is not None:
            return self.readout(self.pool(x, graph))
        nodes = node_slices(nets.spec)
        changes = [self.edge_readout(e[:, i, j]).transpose(1, 2) for i, j in pairwise(nodes)]
        return self.changes(nets, changes, self.node_readout(x[:, nets.spec.layout[0] :]))

    def _several(self, nets: Sequence[NetParams]) -> Tensor:
        """`forward` of several architectures."""
        outputs = [torch.empty(0)] * len(nets)
        for places in _by_size(nets, tensor_bytes(nets[0].biases[0].device) // self._pair_bytes):
            own = [nets[place] for place in places]
            together = self._filled_up(own) if len(own) > 1 else self.forward(own[0])
            for place, output in zip(places, together.split([len(params) for params in own]), strict=True):
                outputs[place] = output
        return torch.cat(outputs)

    def _filled_up(self, nets: Sequence[NetParams]) -> Tensor:
        """`forward` of several architectures, or of networks that are no chain, all at once."""
        graph = self.read_graph(nets)
        places, size = _places(graph)
        shape = (graph.num_networks, size)
        x = graph.x.new_zeros(shape[0] * size, graph.x.shape[2]).index_copy(0, places, graph.x[0]).unflatten(0, shape)
        real = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        real.view(-1)[places] = True
        senders, receivers = places[torch.cat([block.index for block in graph.edges], dim=1)]
        features = torch.cat([block.features[0] for block in graph.edges])
        pairs = senders * size + receivers % size  # what joins the same pair adds up
        e = graph.none.repeat(shape[0] * size * size, 1).index_add(0, pairs, features - graph.none)
        e = e.unflatten(0, (*shape, size))
        read = slice(0, size if self.reads_all else self.spec.layout[-1])
        x, _ = self._through_layers(x, e, read, real)
        if self.reads_all:
            x = x.flatten(0, 1)[places]
        return self.readout(self.pool(x, graph))

    def _through_layers(self, x: Tensor, e: Tensor, read: slice, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """New nodes and edges.

        Args:
            x: nodes, [B, N, d].
            e: edges, [B, N, N, d_e], e_ij of sender i and receiver j.
            read: the nodes that the result is read from, R of them, if there is no token.
            real: [B, N], which nodes there are, where networks differ in their number.

        Returns:
            [B, R or 1, d] and, for changes of parameters, [B, N, N, d_e].
        """
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1)
            e = nn.functional.pad(e, (0, 0, 1, 0, 1, 0))
            real = None if real is None else nn.functional.pad(real, (1, 0), value=True)
            read = slice(0, 1)
        whole, last = slice(0, x.shape[1]), len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            rows = read if index == last else whole  # the last layer computes what the result reads, no more
            e = e[:, rows] if e.shape[1] == e.shape[2] else e
            x = _without_padding(layer(x, e, rows, real), real, rows)
            if layer.edge_update is not None:
                rows = read if index == last - 1 and self.readout is not None else whole
                e = _without_padding(layer.edge_update(x, e, rows), real, rows)
        return x, e

    @property
    def feature_bytes(self) -> int:
        """Bytes of one query, key or value of all pairs of one network's nodes."""
        return self.spec.num_nodes**2 * self._pair_bytes

    @property
    def _pair_bytes(self) -> int:
        """Bytes of one query, key or value of a pair of nodes."""
        return self.config.attention_dim * self.layers[0].linear.weight.element_size()


def _all_pairs(graph: Graph) -> Tensor:
    """[B, N, N, d_e], e_ij of sender i and receiver j."""
    num_networks, num_nodes, _ = graph.x.shape
    e = graph.none.repeat(num_networks, num_nodes, num_nodes, 1)
    for block in graph.edges:
        if block.residual:
            index = torch.arange(num_nodes, device=e.device)
            e[:, index[block.senders], index[block.receivers]] = block.features[:, :, 0]
        else:
            e[:, block.senders, block.receivers] = block.features.transpose(1, 2)
    return e


def _without_padding(x: Tensor, real: Tensor | None, rows: slice) -> Tensor:
    """Features of some nodes [B, R, d], or of pairs [B, R, N, d], zero where a node is not `real` [B, N]."""
    if real is None:
        return x
    there = real[:, rows] if x.ndim == 3 else real[:, rows, None] & real[:, None]
    return x.masked_fill(~there[..., None], 0)


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


def _places(graph: Graph) -> tuple[Tensor, int]:
    """Where nodes are among those of networks that are filled up to the largest, [N] long, and its size: network by
    network, output nodes first."""
    by_network = graph.network.argsort(stable=True)
    sizes = graph.network.bincount(minlength=graph.num_networks)
    size = int(sizes.max())
    holes = size * torch.arange(len(sizes), device=sizes.device) - sizes.cumsum(0) + sizes  # before each network
    places = torch.empty_like(by_network)
    places[by_network] = torch.arange(len(places), device=sizes.device) + holes.repeat_interleave(sizes)
    return places, size
