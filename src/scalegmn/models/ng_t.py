"""NG-T: a relational transformer on neural graphs (Kofinas et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.relational import run_network
from scalegmn.models.neural_graph import NeuralGraph, NeuralGraphConfig, NeuralGraphModel
from scalegmn.models.registry import METANETWORKS
from scalegmn.models.visibility import Visibility
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.attention import RelationalAttention, RelationalEdgeUpdate, RelationalLayer
from scalegmn.nn.initialization import balance, balance_children, constant_features, initialized


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

    pooling: Literal["outputs", "outputs_mean", "mean", "max", "token"] = "outputs"  # type: ignore[assignment]  # wider
    """For vectors, what is read: the output nodes, one after the other; their mean; the mean or the maximum of all; a
    learned node beside them."""

    def __post_init__(self) -> None:
        widths = ["node_dim", "edge_dim", "attention_dim", "node_hidden_dim", "edge_hidden_dim", "readout_dim"]
        problems = self.problems([*widths, "num_heads", "num_layers"])
        if self.num_heads >= 1 and self.attention_dim % self.num_heads:
            problems.append(f"attention_dim: found {self.attention_dim}, expected a multiple of {self.num_heads} heads")
        self.refuse(problems)

    def build(self, spec: NetSpec) -> NGT:
        """The model for networks of `spec`; warns if it does not see all of their parameters."""
        model = initialized(NGT(self, spec), self.init, spec)
        model.visibility(spec).warn(f"use {self.section}.pooling: mean, or more layers ({self.section}.num_layers)")
        return model


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

    config: NGTConfig

    def __init__(self, config: NGTConfig, spec: NetSpec) -> None:
        head = (config.readout_dim,) * (2 if spec.is_cnn else 1)
        super().__init__(config, spec, config.node_dim, config.edge_dim, head)
        self.token = nn.Parameter(torch.randn(config.node_dim)) if config.pooling == "token" else None
        self._attention_dim = config.attention_dim
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

    def visibility(self, spec: NetSpec) -> Visibility:
        """As in `Metanetwork`. All nodes attend to all nodes and, without reverse edges, to the edges that leave them;
        a token has no edges before their first update, and modulated values are 0 without them."""
        config, num_layers, none = self.config, len(self.layers), frozenset[int]()
        token = config.pooling == "token" and self.readout is not None
        if token and config.modulate_values and (num_layers == 1 or not config.update_edges):
            return Visibility(spec, none, none)
        if self.graph.points is not None or num_layers > 1 or self.reads_all:
            return Visibility.whole(spec)
        last = len(spec.layout) - 1
        into_output = {index for index, (_, receiver) in enumerate(spec.node_layers) if receiver == last}
        seen = frozenset(into_output) if config.reverse_edges and not token else none
        return Visibility(spec, seen, frozenset(range(spec.num_layers)))

    def plain(self, nets: Sequence[NetParams]) -> Tensor | NetParams:
        """As in `NeuralGraphModel`."""
        graph = self.read_graph(nets)
        x, e, exists, pairs = self._padded(graph)
        for layer in self.layers:
            x, e = layer(x, e, exists)
        if self.token is not None and self.readout is not None:
            return self.read_out(x[:, 0])
        x = x[exists]  # nodes in the order of the graph
        if self.readout is not None:
            return self.read_out(self.pool(x, graph))
        e = e.flatten(0, 2)[pairs[: len(nets[0]) * nets[0].spec.num_edges]]
        return self.changes_of(nets[0], x, e, graph)

    def _padded(self, graph: NeuralGraph) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each network's nodes and pairs of nodes, as many as the largest network has; the token is the first node.

        Returns:
            Nodes x [B, N, d], pairs e [B, N, N, d_e], which nodes are no padding [B, N], and the place of each edge of
            the graph among all pairs.
        """
        sizes = graph.network.bincount(minlength=graph.num_networks)
        place = torch.arange(len(graph.x), device=sizes.device) - (sizes.cumsum(0) - sizes)[graph.network]
        first = 0 if self.token is None else 1
        size, place = int(sizes.max()) + first, place + first
        x = graph.x.new_zeros(graph.num_networks, size, graph.x.shape[1])
        x[graph.network, place] = graph.x
        exists = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        exists[graph.network, place] = True
        sender, receiver = graph.edge_index
        pairs = (graph.network[sender] * size + place[sender]) * size + place[receiver]
        e = graph.no_edge.repeat(graph.num_networks * size * size, 1)
        e = e.index_add(0, pairs, graph.e - graph.no_edge).view(graph.num_networks, size, size, -1)
        if self.token is not None:
            x[:, 0], exists[:, 0] = self.token, True
            e = pad(e[:, 1:, 1:], (0, 0, 1, 0, 1, 0))
        return x, e, exists, pairs

    def run_engine(self, nets: Sequence[NetParams]) -> Tensor | NetParams:
        """As in `NeuralGraphModel`."""
        return run_network(self, nets)

    @property
    def feature_bytes(self) -> int:
        """Bytes of one query, key or value of all pairs of one network's nodes."""
        return self.spec.num_nodes**2 * self.pair_bytes

    @property
    def pair_bytes(self) -> int:
        """Bytes of one query, key or value of a pair of nodes."""
        return self._attention_dim * self.graph.edge_linear.weight.element_size()

    def chunks(self, spec: NetSpec, device: torch.device) -> ChunkPlan:
        """Whether the pairs of nodes of a network are run at once, or in chunks whose intermediate results are computed
        again."""
        return ChunkPlan.plan(spec.num_nodes**2, self.pair_bytes, 8 * len(self.layers), device)


@balance.register
def _balance(model: NGT, spec: NetSpec) -> None:
    """Some features of nodes and edges are constant."""
    balance_children(model, spec)
    for linear in (model.graph.node_linear, model.graph.edge_linear):
        constant = constant_features(linear.out_features)
        linear.weight[constant] = 0
        linear.bias[constant] = linear.bias.new_tensor([1.0, -1.0]).repeat((constant.stop - constant.start) // 2)
    if model.graph.node_positions is not None:
        model.graph.node_positions[:, constant_features(model.config.node_dim)] = 0
