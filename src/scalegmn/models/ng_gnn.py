"""NG-GNN: a graph network on neural graphs (Kofinas et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.engine.modules import after_first_linear
from scalegmn.models.neural_graph import Edges, Graph, IndexedEdges, NeuralGraphConfig, NeuralGraphModel
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.mlp import Dropout
from scalegmn.nn.pna import NUM_AGGREGATORS, Aggregate, EdgeUpdate, GraphNorm, Message, joined

Scaler = Literal["identity", "amplification", "attenuation"]


@dataclass(frozen=True)
class NGGNNConfig(NeuralGraphConfig):
    """NG-GNN: PNA with edge updates and modulated messages on the neural graph."""

    name = "ng_gnn"
    supports_multiple_architectures = True

    hidden_dim: int = 32
    """Width of node and edge features."""

    num_layers: int = 4
    """Message passing layers."""

    modulation: Literal["film", "gate", "concat"] = "film"
    """How edges enter messages: gamma * m + beta, sigmoid(gamma) * m, or beside the nodes."""

    scalers: tuple[Scaler, ...] = ("identity", "amplification")
    """Factors of the aggregates by a node's number of messages."""

    mean_log_degree: float | None = None
    """Mean of log(incoming edges + 1) over the nodes of the data; null: that of the training networks, without reverse
    edges."""

    reverse_edges: bool = True
    """An edge against every weight; an edge then knows [w, 0, w], its reverse [0, w, w]."""

    frequency_scale: float = 3.0
    """Standard deviation of the frequencies."""

    def __post_init__(self) -> None:
        problems = self.problems(["hidden_dim", "num_layers"])
        if not self.scalers or not set(self.scalers) <= set(Scaler.__args__):
            problems.append(f"scalers: found {list(self.scalers)}, expected some of {', '.join(Scaler.__args__)}")
        if self.mean_log_degree is not None and not self.mean_log_degree > 0:
            problems.append(f"mean_log_degree: found {self.mean_log_degree}, expected above 0")
        self.refuse(problems)

    def build_for(self, architectures: Mapping[NetSpec, int]) -> NGGNN:
        """As in `ModelConfig`; `mean_log_degree` is that of the training networks."""
        if len(architectures) == 1 or self.mean_log_degree is not None:
            return super().build_for(architectures)
        return replace(self, mean_log_degree=_mean_log_degree(architectures)).build_for(architectures)

    def build(self, spec: NetSpec) -> NGGNN:
        """The model for networks of `spec`."""
        return NGGNN(self, spec)


METANETWORKS.register(NGGNNConfig.name, NGGNNConfig)


class NGGNNLayer(nn.Module):
    """x' = O U [x, a, ...], a the aggregate of messages, without what follows it.

    Args:
        config: the hyper-parameters.
        mean_log_degree: as in `Aggregate`.
    """

    def __init__(self, config: NGGNNConfig, mean_log_degree: float) -> None:
        super().__init__()
        d = config.hidden_dim
        self.message = Message(d, config.modulation)
        self.aggregate = Aggregate(config.scalers, mean_log_degree)
        self.update = nn.Linear((1 + NUM_AGGREGATORS * len(config.scalers)) * d, d)
        self.last = nn.Linear(d, d)

    def forward(self, x: Tensor, edges: Sequence[Edges | IndexedEdges], receivers: Sequence[slice]) -> Tensor:
        """New features of some of `Graph.nodes`.

        Args:
            x: [B, N, d].
            edges: blocks of what `Message.edge_map` makes of edges.
            receivers: these.

        Returns:
            [B, their nodes, d].
        """
        to, sent = self.message.ends(x)
        rows = []
        for nodes in receivers:
            messages = [
                block.reduced(self.message(block.features, block.ends(to, sent)))
                for block in edges
                if block.receivers.start == nodes.start  # residual connections go to the first nodes
            ]
            rows.append(torch.cat([x[:, nodes], self.aggregate(messages, x[:, nodes])], dim=-1))
        return nn.functional.linear(torch.cat(rows, dim=1), *joined(self.last, self.update))


class NGGNN(NeuralGraphModel):
    """Messages and edge updates on the neural graph, then a readout of the output nodes, or of all nodes and edges.

    It reads networks of other widths than `spec`, and, with `max_hidden_layers`, of other depths.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: options do not fit the networks.
    """

    def __init__(self, config: NGGNNConfig, spec: NetSpec) -> None:
        d = config.hidden_dim
        super().__init__(config, spec, d, d, (d, d))
        mean = _mean_log_degree({spec: 1}) if config.mean_log_degree is None else config.mean_log_degree
        between = range(config.num_layers - 1)
        self.layers = nn.ModuleList(NGGNNLayer(config, mean) for _ in range(config.num_layers))
        self.norms = nn.ModuleList(GraphNorm(d) for _ in between)
        self.edge_updates = nn.ModuleList(EdgeUpdate(d) for _ in between)
        self.dropout = Dropout(config.dropout)

    def forward(self, nets: NetParams | Sequence[NetParams]) -> Tensor | NetParams:
        """B networks -> [B, out_dim], or changes of their parameters.

        Raises:
            ValueError: the model cannot read such networks.
        """
        graph = self.read_graph(nets)
        x, edges, inner = self._through_layers(graph)
        if self.readout is not None:
            return self.readout(self.pool(x, graph))
        forward = [block for block in edges if block.senders.start < block.receivers.start and not block.residual]
        (to_readout,) = _mapped(forward, [joined(self.edge_readout.linears[0], inner)])
        changes = [after_first_linear(self.edge_readout, block.features) for block in to_readout]
        return self.changes(nets, changes, self.node_readout(x[:, nets.spec.layout[0] :]))

    def _through_layers(self, graph: Graph) -> tuple[Tensor, Sequence[Edges | IndexedEdges], nn.Linear | None]:
        """The nodes that are read [B, n, d], edges, and the Linear that makes their features of what they hold."""
        x, edges = graph.x, graph.edges
        read = graph.nodes if self.reads_all else [graph.outputs]
        inner = None
        for index, (norm, update) in enumerate(zip(self.norms, self.edge_updates, strict=True)):
            layer = self.layers[index]
            maps = [layer.message.edge_map(inner), joined(update.edge_linear, inner)]
            to_messages, to_edges = _mapped(edges, maps)
            x = norm(layer(x, to_messages, graph.nodes), graph.network, graph.num_networks)
            x = self.dropout(nn.functional.silu(x))
            to, sent = update.receiver_linear(x), update.sender_linear(x)
            needed = {nodes.start for nodes in (read if index == len(self.norms) - 1 else graph.nodes)}
            edges = [
                block._replace(features=update(block.features, block.ends(to, sent)))
                for block in to_edges
                if block.receivers.start in needed
            ]
            inner = update.last
        last = self.layers[-1]
        (to_messages,) = _mapped(edges, [last.message.edge_map(inner)])
        return last(x, to_messages, read), edges, inner

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of one network's edges."""
        directions = 2 if self.config.reverse_edges else 1
        element_size = self.layers[0].last.weight.element_size()
        return directions * self.spec.num_edges * self.config.hidden_dim * element_size


def _mean_log_degree(architectures: Mapping[NetSpec, int]) -> float:
    """The mean of log(incoming edges + 1) over all nodes of all networks, so many of each architecture."""
    total = sum(count * _sum_of_log_degrees(spec) for spec, count in architectures.items())
    return total / sum(count * spec.num_nodes for spec, count in architectures.items())


def _sum_of_log_degrees(spec: NetSpec) -> float:
    """The sum of log(incoming edges + 1) over the nodes of one network."""
    receivers = torch.cat([index[1] for index in (spec.edge_index, spec.residual_index, spec.attention_index)])
    return receivers.bincount(minlength=spec.num_nodes).add(1).double().log().sum().item()


def _mapped(
    edges: Sequence[Edges | IndexedEdges], maps: Sequence[tuple[Tensor, Tensor]]
) -> list[list[Edges | IndexedEdges]]:
    """What each map (weight, bias) makes of the edges, all in one product per block."""
    weight, bias = (torch.cat(parts) for parts in zip(*maps, strict=True))
    sizes = [len(own) for own, _ in maps]
    found = [nn.functional.linear(block.features, weight, bias).split(sizes, dim=-1) for block in edges]
    return [
        [block._replace(features=parts[index]) for block, parts in zip(edges, found, strict=True)]
        for index in range(len(maps))
    ]
