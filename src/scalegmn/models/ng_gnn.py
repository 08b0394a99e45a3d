"""NG-GNN: a graph network on neural graphs (Kofinas et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.large_pna import run_large_network
from scalegmn.engine.memory import tensor_bytes
from scalegmn.engine.pna import run_network
from scalegmn.engine.pna_programs import run_chains
from scalegmn.models.base import Metanetwork
from scalegmn.models.neural_graph import NeuralGraphConfig, NeuralGraphModel
from scalegmn.models.registry import METANETWORKS
from scalegmn.models.visibility import Visibility
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.initialization import PAIR, balance, balance_children, initialized, repeat_rows
from scalegmn.nn.mlp import Dropout
from scalegmn.nn.pna import EdgeUpdate, GraphNorm, PNALayer

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
    """An edge against every weight; the edge then has the raw features [w, 0, w], its reverse [0, w, w]."""

    frequency_scale: float = 3.0
    """Standard deviation of the frequencies."""

    def __post_init__(self) -> None:
        problems = self.problems(["hidden_dim", "num_layers"])
        if not self.scalers or not set(self.scalers) <= set(get_args(Scaler)):
            problems.append(f"scalers: found {list(self.scalers)}, expected some of {', '.join(get_args(Scaler))}")
        if self.mean_log_degree is not None and not self.mean_log_degree > 0:
            problems.append(f"mean_log_degree: found {self.mean_log_degree}, expected above 0")
        self.refuse(problems)

    def build_for(self, architectures: Mapping[NetSpec, int]) -> Metanetwork:
        """As in `ModelConfig`; `mean_log_degree` is that of the training networks."""
        if len(architectures) == 1 or self.mean_log_degree is not None:
            return super().build_for(architectures)
        return replace(self, mean_log_degree=_mean_log_degree(architectures)).build_for(architectures)

    def build(self, spec: NetSpec) -> NGGNN:
        """The model for networks of `spec`; warns if it does not see all of their parameters."""
        model = initialized(NGGNN(self, spec), self.init, spec)
        model.visibility(spec).warn(f"use {self.section}.pooling: mean, or more layers ({self.section}.num_layers)")
        return model


METANETWORKS.register(NGGNNConfig.name, NGGNNConfig)


class NGGNN(NeuralGraphModel):
    """Messages and edge updates on the neural graph, then a readout of the output nodes, or of all nodes and edges.

    It reads networks of other widths than `spec`, and, with `max_hidden_layers`, of other depths.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: options do not fit the networks.
    """

    config: NGGNNConfig

    def __init__(self, config: NGGNNConfig, spec: NetSpec) -> None:
        d = config.hidden_dim
        super().__init__(config, spec, d, d, (d, d))
        mean = _mean_log_degree({spec: 1}) if config.mean_log_degree is None else config.mean_log_degree
        between = range(config.num_layers - 1)
        self.layers = nn.ModuleList(
            PNALayer(d, config.modulation, config.scalers, mean) for _ in range(config.num_layers)
        )
        self.norms = nn.ModuleList(GraphNorm(d) for _ in between)
        self.edge_updates = nn.ModuleList(EdgeUpdate(d) for _ in between)
        self.dropout = Dropout(config.dropout)
        self._edge_dim = d

    def visibility(self, spec: NetSpec) -> Visibility:
        """As in `Metanetwork`; the norms between layers divide by statistics of all nodes."""
        return Visibility.whole(spec) if len(self.norms) else super().visibility(spec)

    def plain(self, nets: Sequence[NetParams]) -> Tensor | NetParams:
        """As in `NeuralGraphModel`."""
        graph = self.read_graph(nets)
        x, e, (sender, receiver) = graph.x, graph.e, graph.edge_index
        *layers, last = self.layers
        for layer, norm, update in zip(layers, self.norms, self.edge_updates, strict=True):
            x = norm(layer(x, e, graph.edge_index), graph.network, graph.num_networks)
            x = self.dropout(silu(x))
            e = update(x[receiver], x[sender], e)
        x = last(x, e, graph.edge_index)
        if self.readout is not None:
            return self.read_out(self.pool(x, graph))
        return self.changes_of(nets[0], x, e[: len(nets[0]) * nets[0].spec.num_edges], graph)

    def run_engine(self, nets: Sequence[NetParams]) -> Tensor | NetParams:
        """As in `NeuralGraphModel`; large networks one by one, in chunks of edges."""
        plans = [self.chunks(params.spec, params.biases[0].device) for params in nets]
        if all(plan.num_edges is None for plan in plans):
            planned = run_chains(self, nets[0]) if len(nets) == 1 else None
            return run_network(self, nets) if planned is None else planned
        outputs = [
            run_large_network(self, params[row : row + 1], plan)
            for params, plan in zip(nets, plans, strict=True)
            for row in range(len(params))
        ]
        if self.readout is None:
            return NetParams.cat(cast("list[NetParams]", outputs))
        return torch.cat(cast("list[Tensor]", outputs))

    def chunks(self, spec: NetSpec, device: torch.device) -> ChunkPlan:
        """Whether the edges of a network are run at once, or in chunks whose features are computed again."""
        config, size = self.config, self.graph.edge_linear.weight.element_size()
        frequencies = 4 * config.num_frequencies  # angles, cosines, sines and both of these joined
        num_kept = 8 * len(self.layers) + frequencies // self._edge_dim
        num_edges = (2 if config.reverse_edges else 1) * spec.num_edges
        plan = ChunkPlan.plan(num_edges, self._edge_dim * size, num_kept, device)
        if plan.num_edges is None:
            return plan
        widest = max(2 * config.num_frequencies, 2 * self._edge_dim) * size
        return replace(plan, num_edges=tensor_bytes(device) // widest)

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of one network's edges."""
        directions = 2 if self.config.reverse_edges else 1
        return directions * self.spec.num_edges * self._edge_dim * self.graph.edge_linear.weight.element_size()


@balance.register
def _balance(model: NGGNN, spec: NetSpec) -> None:
    """Node features come in pairs (SiLU(z + c), SiLU(-z + c)), which the next layer subtracts."""
    balance_children(model, spec)
    layers, norms = cast("Sequence[PNALayer]", model.layers), cast("Sequence[GraphNorm]", model.norms)
    for layer, norm in zip(layers, norms, strict=False):  # one layer more
        repeat_rows(layer.last.weight, PAIR)
        norm.bias.normal_()
        repeat_rows(norm.bias, (1.0, 1.0))


def _mean_log_degree(architectures: Mapping[NetSpec, int]) -> float:
    """The mean of log(incoming edges + 1) over all nodes of all networks, so many of each architecture."""
    total = sum(count * _sum_of_log_degrees(spec) for spec, count in architectures.items())
    return total / sum(count * spec.num_nodes for spec, count in architectures.items())


def _sum_of_log_degrees(spec: NetSpec) -> float:
    """The sum of log(incoming edges + 1) over the nodes of one network."""
    receivers = torch.cat([spec.residual_index[1], spec.attention_index[1]])
    degrees = receivers.bincount(minlength=spec.num_nodes)
    starts = [0, *accumulate(spec.layout)]
    for layer, (_, receiver) in zip(spec.layers, spec.node_layers, strict=True):
        degrees[starts[receiver] : starts[receiver + 1]] += layer.in_dim // layer.groups
    return degrees.add(1).double().log().sum().item()
