"""NG-T: a relational transformer on neural graphs (Kofinas et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.models.neural_graph import Graph, NeuralGraphConfig, NeuralGraphModel, node_slices
from scalegmn.nn.edges import kept_bytes, tensor_bytes
from scalegmn.nn.relational import RelationalAttention, RelationalEdgeUpdate, RelationalLayer
from scalegmn.spec import NetParams, NetSpec


@dataclass(frozen=True)
class NGTConfig(NeuralGraphConfig):
    """NG-T: attention among all nodes of the neural graph, connected or not, with features of each pair."""

    name = "ng_t"

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
            if config.update_edges and (index < config.num_layers - 1 or config.output == "parameters"):
                update = RelationalEdgeUpdate(
                    config.node_dim, config.edge_dim, config.edge_hidden_dim, config.dropout, config.layer_norm
                )
            self.layers.append(
                RelationalLayer(
                    attention, update, config.node_dim, config.node_hidden_dim, config.dropout, config.layer_norm
                )
            )

    def forward(self, params: NetParams) -> Tensor | tuple[list[Tensor], list[Tensor]]:
        """B networks -> [B, out_dim], or changes of their parameters.

        Raises:
            ValueError: the model cannot read such networks.
        """
        self.check(params.spec)
        graph = self.graph(self.normalized(params), params)
        x, e = graph.x, _all_pairs(graph)
        whole = slice(0, x.shape[1])
        read = whole if self.reads_all else graph.outputs
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1)
            e = nn.functional.pad(e, (0, 0, 1, 0, 1, 0))
            whole, read = slice(0, x.shape[1]), slice(0, 1)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            rows = read if index == last else whole  # the last layer computes what the result reads, no more
            x = layer(x, e[:, rows] if e.shape[1] == e.shape[2] else e, rows)
            if layer.edge_update is not None:
                e = layer.edge_update(x, e, read if index == last - 1 and self.readout is not None else whole)
        if self.readout is not None:
            return self.readout(self.pool(x, graph))
        nodes = node_slices(params.spec)
        changes = [self.edge_readout(e[:, i, j]).transpose(1, 2) for i, j in pairwise(nodes)]
        return self.changes(params, changes, self.node_readout(x[:, params.spec.layout[0] :]))

    def networks_at_once(self, device: torch.device) -> int:
        """As many as make full use of the machine, if the backward pass can keep everything of them."""
        config, bytes_each = self.config, self.layers[0].linear.weight.element_size()
        pairs = self.spec.num_nodes**2 * bytes_each
        kept = config.num_layers * (5 * config.attention_dim + 4 * config.edge_hidden_dim + 8 * config.edge_dim)
        at_once = tensor_bytes(device) // (pairs * config.attention_dim)
        return max(1, min(at_once, kept_bytes(device) // (pairs * kept)))


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
