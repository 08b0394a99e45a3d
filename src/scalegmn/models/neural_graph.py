"""What NG-GNN and NG-T have in common: neural graphs and what is read from them (Kofinas et al., ICLR 2024,
https://arxiv.org/abs/2403.12143)."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.graphs.probes import probe_features
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.heads import changes_by_head
from scalegmn.models.visibility import Visibility, attention_connections, residual_connections
from scalegmn.networks import HETERO, NetParams, NetSpec, not_built_in
from scalegmn.networks.activations import without_parameter
from scalegmn.networks.parameter_indices import ROLES
from scalegmn.nn.aggregation import aggregate
from scalegmn.nn.initialization import Init
from scalegmn.nn.mlp import MLP
from scalegmn.nn.neural_graph import (
    NeuralGraphFeatures,
    NeuralGraphOptions,
    linear_as_kernel,
    middle_of,
)
from scalegmn.nn.normalization import InputNormalization


@dataclass(frozen=True)
class NeuralGraphConfig(ModelConfig):
    """What NG-GNN and NG-T have in common: the graph, and what is read from it."""

    init: Init = "published"
    """Initial parameters. balanced: features keep their size through all layers and start odd, as if the model knew the
    signs of neurons (`scalegmn.nn.initialization`); INRs are learned several times as fast. published: as in the
    published code."""

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

    engine: Literal["fast", "plain"] = "fast"
    """plain: compute as the equations are written, slowly, to look for errors."""

    def problems(self, counts: Sequence[str]) -> list[str]:
        """What is wrong, also with the named counts of a model's own."""
        counts = ["encoder_layers", "out_dim", *counts]
        problems = self.wrong_choices() + self.wrong_numbers(counts, ["dropout"])
        for name, least in (("num_frequencies", 0), ("num_probes", 0), ("max_hidden_layers", 1)):
            number = getattr(self, name)
            if number is not None and number < least:
                problems.append(f"{name}: found {number}, expected at least {least}")
        if self.denormalize and self.normalize is False:
            problems.append("denormalize: needs normalize, found false")
        return problems

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations."""
        return frozenset({"permutation"})


class NeuralGraph(NamedTuple):
    """Neural graphs of G networks as the components of one graph, nodes in the order of `ParameterGraph`."""

    x: Tensor
    """Node features, [N, d]."""

    e: Tensor
    """Edge features, [E', d_e]: first those of weights in the order of `ParameterGraph`, then the others."""

    edge_index: Tensor
    """[2, E'] long, rows sender and receiver."""

    role: Tensor
    """[N] long, index into `ROLES`."""

    network: Tensor
    """[N] long, the network of a node."""

    num_networks: int
    """G."""

    no_edge: Tensor
    """[d_e], the features of a pair of nodes without an edge."""


class NeuralGraphModel(Metanetwork):
    """What NG-GNN and NG-T do before and after their layers.

    x, e = `NeuralGraphFeatures` of all nodes and edges (`read_graph`); the layers of a subclass (`plain`); then, for
    vectors, MLP(pooled x) (`pool`, `read_out`) or, for parameters, MLP_v(x_i) of every neuron for its bias and
    MLP_e(e_ij) of every edge for its weight (`changes_of`). `run_engine` computes the same.

    Args:
        config: the hyper-parameters; inputs are normalised if it says so or, where it does not, unless they are CNNs.
        spec: the input networks.
        node_dim, edge_dim: d and d_e.
        head_dims: hidden widths of the readout of vectors.

    Raises:
        ValueError: options do not fit the networks.
    """

    layers: nn.ModuleList

    def __init__(
        self, config: NeuralGraphConfig, spec: NetSpec, node_dim: int, edge_dim: int, head_dims: Sequence[int]
    ) -> None:
        normalize = not spec.is_cnn if config.normalize is None else config.normalize
        max_layers = (config.max_hidden_layers or spec.num_hidden_layers) + 1
        super().__init__(config, spec, InputNormalization(max_layers, centred=True) if normalize else None)
        self.config, self.one_pass, self.engine = config, not config.changes_parameters, config.engine
        self._check_options(spec)
        options = NeuralGraphOptions(
            **{field.name: getattr(config, field.name) for field in fields(NeuralGraphOptions)}
        )
        sizes = (node_dim, edge_dim, spec.layout, spec.kernel, max_layers - 1, spec.num_places)
        self.graph = NeuralGraphFeatures(options, *sizes, not_built_in(_hidden_activations(spec)))
        self.readout: MLP | None = None
        if not config.changes_parameters:
            num_read = spec.layout[-1] if config.pooling == "outputs" else 1
            self.readout = MLP(num_read * node_dim, head_dims, config.out_dim, "relu", layer_norm=False)
        else:
            self.edge_readout = MLP(edge_dim, [edge_dim], config.heads, "relu", layer_norm=False)
            self.node_readout = MLP(node_dim, [node_dim], config.heads, "relu", layer_norm=False)
        self.validate_spec(spec)

    def _check_options(self, spec: NetSpec) -> None:
        """Raises ValueError for options that do not fit networks of `spec`."""
        config, section = self.config, self.config.section
        if config.num_probes and spec.is_cnn:
            raise ValueError(f"{section}.num_probes: found {config.num_probes}, but CNNs have no probe features")
        if config.linear_encoder and (config.reverse_edges or not spec.is_cnn):
            raise ValueError(f"{section}.linear_encoder: only for CNNs without reverse_edges, found {spec}")
        if config.changes_parameters and spec.is_cnn:
            raise ValueError(f"{section}.output: found parameters, but changes of kernels need ScaleGMN, for {spec}")

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`."""
        own, options, depth = self.spec, self.config, spec.num_hidden_layers
        kernel, most = self.graph.kernel, self.graph.max_hidden_layers
        if (
            depth > most
            or (spec.layout[0], spec.layout[-1]) != (own.layout[0], own.layout[-1])
            or (max(a - b for a, b in zip(spec.kernel, kernel, strict=True)) > 0)
            or spec.num_places > own.num_places
        ):
            raise ValueError(
                f"the model was built for networks from {own.layout[0]} to {own.layout[-1]}, of 0 to {most} "
                f"hidden layers (max_hidden_layers), kernels up to {kernel[0]}x{kernel[1]} and pinned layers of up to "
                f"{own.num_places} neurons, found {spec}"
            )
        by_layer = {
            "num_probes": self.graph.points is not None,
            "output": self.readout is None,
        }
        bound = [name for name, given in by_layer.items() if given]
        if bound and not spec.is_chain:
            raise ValueError(f"{options.section}.{bound[0]}: expected networks that are a chain, found {spec}")
        if bound and depth != self.spec.num_hidden_layers:
            raise ValueError(f"{options.section}.{bound[0]}: the model was built for {self.spec}, found {spec}")
        self._check_embedded(_hidden_activations(spec))

    def _check_embedded(self, names: Set[str]) -> None:
        """Raises ValueError unless these activations have embeddings, where the model has any."""
        unknown = names - {*self.graph.embedded, HETERO}
        if self.config.activation_embedding and unknown:
            found = f"{self.config.section}.activation_embedding: there is none for {', '.join(sorted(unknown))}"
            raise ValueError(f"{found}; use false")

    def visibility(self, spec: NetSpec) -> Visibility:
        """As in `Metanetwork`; a model with probes sees all, since the answers of output neurons depend on all."""
        if self.graph.points is not None:
            return Visibility.whole(spec)
        last = len(spec.layout) - 1
        return Visibility.through_messages(
            spec,
            range(last + 1) if self.reads_all else (last,),
            len(self.layers),
            residual_connections(spec) | attention_connections(spec),
            against=self.config.reverse_edges,
        )

    def forward(self, nets: NetParams | Sequence[NetParams]) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the model cannot read such networks.
        """
        batches = [nets] if isinstance(nets, NetParams) else nets
        for params in batches:
            self.validate_spec(params.spec)
            if params.activation is not None and self.config.activation_embedding and not torch.compiler.is_compiling():
                numbers = params.activation.unique().tolist()
                self._check_embedded({without_parameter(params.spec.activations[number]) for number in numbers})
        return self.plain(batches) if self.engine == "plain" else self.run_engine(batches)

    def plain(self, nets: Sequence[NetParams]) -> Tensor | NetParams:
        """The equations as they are written, for networks of any architectures."""
        raise NotImplementedError

    def run_engine(self, nets: Sequence[NetParams]) -> Tensor | NetParams:
        """The same, executed by `scalegmn.engine`."""
        raise NotImplementedError

    def read_graph(self, nets: Sequence[NetParams]) -> NeuralGraph:
        """The neural graphs of networks of any architectures, for the plain form."""
        features, read = self.graph, [self.normalized(params) for params in nets]
        graph = ParameterGraph.from_params(read, features.kernel, features.max_hidden_layers)
        is_input = graph.role == ROLES.index("input")
        probes = None
        if features.points is not None:
            answers = (probe_features(params, features.points) for params in nets)
            probes = torch.cat([features.probes(of_layers).flatten(0, 1) for of_layers in answers])
        bias, activation = graph.nodes.masked_fill(is_input[:, None], 0), graph.activation
        activation_rows = features.rows_of(graph.activations, bias.device)[activation]
        x = features.nodes(bias, graph.node_type, activation_rows, probes)
        raw, linear, edge_index = _raw_edges(graph, features)
        e = features.edges(raw, linear)
        no_edge = features.edges(torch.zeros_like(raw[:1]), torch.zeros_like(linear[:1]))[0]
        return NeuralGraph(x, e, edge_index, graph.role, graph.network, graph.num_networks, no_edge)

    def pool(self, x: Tensor, graph: NeuralGraph) -> Tensor:
        """The readout's input, [G, D], from all nodes [N, d]."""
        if self.pooling in ("mean", "max"):
            return aggregate(x, graph.network, graph.num_networks, self.pooling)
        outputs = x[graph.role == ROLES.index("output")].reshape(graph.num_networks, -1, x.shape[1])
        return outputs.flatten(1) if self.pooling == "outputs" else outputs.mean(1)

    def read_out(self, pooled: Tensor) -> Tensor:
        """The readout of pooled nodes, [G, D] -> [G, out_dim]."""
        assert self.readout is not None
        output: Tensor = self.readout(pooled)
        return output

    @property
    def pooling(self) -> str:
        """How nodes are pooled, as in the configuration."""
        return self.config.pooling

    @property
    def reads_all(self) -> bool:
        """Whether the result is read from all nodes, not from output nodes alone."""
        return self.readout is None or self.pooling in ("mean", "max")

    def changes_of(self, params: NetParams, x: Tensor, e: Tensor, graph: NeuralGraph) -> NetParams:
        """Changes of parameters from the features of nodes [N, d] and of the edges of weights [E, d_e]."""
        nodes: Tensor = self.node_readout(x[graph.role != ROLES.index("input")])
        edges: Tensor = self.edge_readout(e)
        sizes = [weight[0].numel() for weight in params.weights]
        weights = torch.split(edges.unflatten(0, (len(params), -1)), sizes, dim=1)
        return self.changes(params, weights, nodes.unflatten(0, (len(params), -1)))

    def changes(self, params: NetParams, weights: Sequence[Tensor], biases: Tensor) -> NetParams:
        """Changes of parameters.

        Args:
            params: the networks.
            weights: q_e(e) per layer, [B, n_l, n_{l-1}, heads] or [B, n_l n_{l-1}, heads].
            biases: q_v(x) of all nodes but inputs, [B, N - n_0, heads].
        """
        by_layer = torch.split(biases, list(params.spec.layout[1:]), dim=1)
        of_heads = changes_by_head(params, weights, by_layer, self.config.heads)
        return self.joined_heads(list(map(self._denormalized, of_heads)) if self.config.denormalize else of_heads)

    def _denormalized(self, changes: NetParams) -> NetParams:
        """Changes in the units of the networks as they are stored."""
        assert self.normalization is not None
        weights, biases = self.normalization.inverse(changes.weights, changes.biases)
        return changes.replace(weights=weights, biases=biases)


def _hidden_activations(spec: NetSpec) -> set[str]:
    """The names of the activations of hidden layers, those that networks may have where they differ included; without
    parameters."""
    names = (*spec.extra_activations, *(layer.activation for layer in spec.layers[:-1]))
    return {without_parameter(name) for name in names}


def _raw_edges(graph: ParameterGraph, features: NeuralGraphFeatures) -> tuple[Tensor, Tensor, Tensor]:
    """All edges of a neural graph: those of weights, those of connections without weights, which are like weights of 1,
    and, with reverse edges, those against all of them.

    Returns:
        Raw features [E', R]; which edges have the encoder of linear layers [E']; senders and receivers [2, E'].
    """
    unweighted = torch.cat([graph.residuals, graph.attention], dim=1)
    weights = graph.edges.dense()
    if features.linear_encoder is None:
        weights = linear_as_kernel(weights, graph.linear, features.kernel)
    raw = torch.cat([weights, middle_of(features.kernel, weights).expand(unweighted.shape[1], -1)])
    linear = torch.cat([graph.linear, graph.linear.new_zeros(unweighted.shape[1])])
    edge_index = torch.cat([graph.edge_index, unweighted], dim=1)
    if features.reverse_edges:
        none = torch.zeros_like(raw)
        raw = torch.cat([torch.cat([raw, none, raw], dim=1), torch.cat([none, raw, raw], dim=1)])
        linear, edge_index = linear.repeat(2), torch.cat([edge_index, edge_index.flip(0)], dim=1)
    return raw, linear, edge_index
