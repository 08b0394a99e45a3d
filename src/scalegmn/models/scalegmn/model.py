"""The model: embeddings, message passing layers, readout."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.memory import kept_bytes
from scalegmn.engine.model import LayerTypes, run_graph, run_layers
from scalegmn.graphs.edge_values import EdgeValues
from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.models.base import ONE_ARCHITECTURE, Metanetwork
from scalegmn.models.scalegmn.execution import is_chain, layer_groups, runs_by_layer
from scalegmn.models.scalegmn.input_networks import check_fit, check_spec
from scalegmn.models.scalegmn.parts import ModuleBuilder, branch_name, scalar_groups
from scalegmn.models.scalegmn.receptive_field import needed_by_role, receptive_field, residual_ends
from scalegmn.models.visibility import Visibility, residual_connections
from scalegmn.networks import ACTIVATIONS, NetParams, NetSpec
from scalegmn.networks.features import Kernels
from scalegmn.networks.scalar_groups import TRIVIAL, ScalarGroup
from scalegmn.nn.context import ROLES, NodeContext
from scalegmn.nn.gradients import ProbeGradients
from scalegmn.nn.initialization import balance, balance_children, zero_hidden_positions
from scalegmn.nn.message_passing import MessagePassingLayer, NeededParts
from scalegmn.nn.messages import reciprocal
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization, StatisticsNormalization
from scalegmn.nn.positional import PositionalEmbedding, TypedLinear, embed_positions
from scalegmn.nn.probes import Answers, Probes
from scalegmn.symmetry.canonicalize import incoming_norm, scale_to_canonical
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.statistics import (
    NUM_LAYER_STATISTICS,
    NUM_NETWORK_STATISTICS,
    at_depth,
    invariant_statistics,
    sizes,
)

if TYPE_CHECKING:
    from scalegmn.models.scalegmn.config import ScaleGMNConfig

_RECIPROCAL_FLOOR = 1e-3
"""Messages against an edge read w / ||w||^2, which has no limit at w = 0. Below this share of the norm of the neuron's
[W, b], the divisor is constant (`scalegmn.nn.messages.reciprocal`), so that the result goes to 0 with w."""


class Probed(NamedTuple):
    """What probes say about B networks."""

    nodes: list[Tensor]
    """Features per layer of nodes, [B, n_l, d]."""

    edges: list[Tensor]
    """With `probe_losses`, per block [B, n_l, n_{l-1}, H k]; else empty."""

    answers: Tensor
    """[B, P, n_L], before the last activation."""


class ScaleGMN(Metanetwork):
    """A function of a network's parameters that is invariant, or equivariant, to the symmetries of its neurons.

    x = A_v bias, e = A_e weight, positional embeddings, `num_layers` layers, readout (ScaleGMN, section 5,
    https://arxiv.org/abs/2406.10685). `plain` computes this as it is written; `scalegmn.engine` computes the same, with
    the parameters of the same modules, for a fraction of the operations, and only what the readout depends on.

    The model reads networks of other widths than `spec` and, with `max_hidden_layers`, of other depths.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the symmetry does not hold for the networks' activations, or they have more hidden layers than
            `max_hidden_layers`.
    """

    one_pass = True

    def __init__(self, config: ScaleGMNConfig, spec: NetSpec) -> None:
        check_fit(config, spec)
        config = config.with_readout(spec)
        max_hidden = config.max_hidden_layers or spec.num_hidden_layers
        normalize = config.symmetry == "permutation" if config.normalize is None else config.normalize
        super().__init__(config, spec, InputNormalization(max_hidden + 1) if normalize else None)
        self.config, self.max_hidden, self.engine = config, max_hidden, config.engine
        self.groups = scalar_groups(config, spec)
        self.bidirectional = config.direction == "bidirectional"
        self.adds_edge_positions = config.symmetry == "permutation"
        self.summed_roles: tuple[str, ...] = ("input", "output") if config.node_positions.endswith("_sum") else ()
        if config.symmetry == "permutation":
            self.summed_roles = ROLES
        builder = ModuleBuilder(config, self.groups)
        self._build_embeddings(builder)
        self._build_layers(builder)
        self.readout: nn.Module | None = None
        self.branch: MLP | None = None
        self.answers: Answers | None = None
        if not config.changes_parameters:
            self._build_readout(builder)
        self.probes: Probes | None = None
        if config.num_probes:
            self.probes = Probes(config.num_probes, config.hidden_dim, spec, max_hidden + 1, config.probe_images)
        self.gradients: ProbeGradients | None = None
        if config.probe_losses:
            sizes = config.probe_losses, config.num_probes, config.hidden_dim
            self.gradients = ProbeGradients(*sizes, spec, max_hidden + 1, config.equal_outputs)
        self.validate_spec(spec)

    def _build_readout(self, builder: ModuleBuilder) -> None:
        """The readout, and the branch beside the graph."""
        config, spec, branch = self.config, self.spec, self.config.branch
        num_sizes = 2 * (self.max_hidden + 1) if config.sizes else 0
        num_invariants = 0
        if branch.statistics:
            num_invariants = NUM_LAYER_STATISTICS * (self.max_hidden + 1) + NUM_NETWORK_STATISTICS
        self.readout = builder.readout(spec.layout[0], spec.layout[-1], num_sizes)
        self.num_statistics = num_sizes, num_invariants
        if config.sizes or branch.statistics:
            self.statistics_normalization = StatisticsNormalization(num_sizes + num_invariants)
        if branch.reads:
            mlp = builder.mlp if config.equal_outputs else None
            self.answers = Answers(config.num_probes, spec.layout[-1], mlp) if branch.answers else None
            in_dim = num_invariants + (0 if self.answers is None else self.answers.width)
            self.branch = MLP(in_dim, branch.hidden_dims, config.out_dim, dropout=branch.dropout)

    def _build_embeddings(self, builder: ModuleBuilder) -> None:
        """A_v, A_e and positional embeddings."""
        config, spec, d = self.config, self.spec, self.config.hidden_dim
        more = self.max_hidden - spec.num_hidden_layers
        alike = spec.layout[-1] - 1 if config.equal_outputs else 0
        num_node_types = spec.num_node_types + more - alike
        num_edge_types = spec.layout[0] + (self.max_hidden - 1 + spec.layout[-1] - alike if self.max_hidden else 0)
        self.node_linear = nn.Linear(1, d, bias=False)
        self.edge_linear = nn.Linear(spec.edge_dim * (1 + config.probe_losses), d, bias=False)
        self.backward_edge_linear: nn.Linear | None = None
        if self.bidirectional and config.reciprocal and config.symmetry in ("scale", "hetero"):
            self.backward_edge_linear = nn.Linear(spec.edge_dim, d, bias=False)
        self.node_positions: PositionalEmbedding | None = None
        self.node_position_net: nn.Module | None = None
        self.node_position_map: TypedLinear | None = None
        if config.node_positions != "none":
            self.node_positions = PositionalEmbedding(num_node_types, d)
            self.node_position_map = builder.position_map(num_node_types)
            roles = {"hidden"} if config.node_positions == "net_sum" else set(spec.roles)
            self.node_position_net = builder.position_net(roles)
        self.edge_positions: PositionalEmbedding | None = None
        self.edge_position_net: nn.Module | None = None
        self.edge_position_map: TypedLinear | None = None
        if config.edge_positions:
            self.edge_positions = PositionalEmbedding(num_edge_types, d)
            self.edge_position_map = builder.position_map(num_edge_types)
            self.edge_position_net = builder.position_net(set(spec.roles[1:]))
        self.node_types = LayerTypes.of_nodes(spec, more, num_node_types - 1)
        self.edge_types = LayerTypes.of_edges(spec, more, num_edge_types - 1)

    def _build_layers(self, builder: ModuleBuilder) -> None:
        """The message passing layers, with branches only for those roles of nodes that something later reads."""
        config, spec = self.config, self.spec
        of_chains = receptive_field(config, spec.num_layers)
        by_role = needed_by_role(config, spec, of_chains)
        self.needed: Sequence[tuple[NeededParts, NeededParts]] = list(zip(of_chains, by_role, strict=True))
        last = config.num_layers - 1
        layers = (
            self._build_layer(builder, needed, gives_changes=config.changes_parameters and index == last)
            for index, needed in enumerate(by_role)
        )
        self.layers: Sequence[MessagePassingLayer] = nn.ModuleList(layers)  # type: ignore[assignment] # torch: untyped
        directions = 2 if self.bidirectional else 1
        per_layer = 12 * directions * config.message.num_layers + 11  # tensors as wide as edge features; measured
        self._num_kept = config.num_layers * per_layer

    def _build_layer(self, builder: ModuleBuilder, needed: NeededParts, gives_changes: bool) -> MessagePassingLayer:
        """One message passing layer.

        Args:
            builder: builds its modules.
            needed: what it must compute, by role.
            gives_changes: whether its features are the changes of biases and weights: for each head one number per
                bias, a kernel per edge. So in the last layer of models with `output: parameters`.
        """
        config, spec, d = self.config, self.spec, self.config.hidden_dim
        node_dim, edge_dim = (config.heads, config.heads * spec.edge_dim) if gives_changes else (d, d)
        roles = {ROLES[role] for role in needed.nodes}
        reads_residuals = bool(roles & residual_ends(spec, against=False))
        reads_reversed_residuals = self.bidirectional and bool(roles & residual_ends(spec, against=True))
        symmetric = config.symmetry != "permutation"
        senders = roles - {"output"} if self.bidirectional else set()  # get messages against the edges
        return MessagePassingLayer(
            builder.message(roles - {"input"}),
            builder.message(senders) if senders else None,
            builder.update(3 if senders else 2, node_dim, roles),
            builder.edge_update(edge_dim) if needed.edges else None,
            builder.edge_update(edge_dim) if needed.backward_edges else None,
            nn.Linear(d, d, bias=False) if config.skip_connections and node_dim == d else None,
            nn.Linear(d, d, bias=False) if reads_residuals else None,
            nn.Linear(d, d, bias=False) if reads_reversed_residuals else None,
            dropout=config.dropout,
            aggregator=config.aggregator,
            message_positions=symmetric and config.message.positions,
            update_positions=symmetric and config.update.positions and config.update_rule == "net",
        )

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`."""
        check_spec(self, spec)

    def visibility(self, spec: NetSpec) -> Visibility:
        """As in `Metanetwork`; a model with probes sees all, since the answers of output neurons depend on all."""
        config, last = self.config, len(spec.layout) - 1
        if self.probes is not None:
            return Visibility.whole(spec)
        read = range(last + 1)
        if config.changes_parameters:
            read = range(1, last + 1)
        elif config.readout == "last_layer":
            read = range(0, last + 1, last) if self.bidirectional else range(last, last + 1)
        connections = residual_connections(spec)
        return Visibility.through_messages(spec, read, config.num_layers, connections, self.bidirectional)

    def forward(self, nets: NetParams | Sequence[NetParams]) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Networks are normalised and brought to canonical form; statistics and probes are read of them; `plain`, or the
        engine in its place, computes the readout, to which the branch is added, or features that `_changes` makes
        changes of.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        batches = [nets] if isinstance(nets, NetParams) else nets
        for params in batches:
            if params.spec != self.spec:  # sizes decide what the parameters fit, symmetries what is still exact
                self.validate_spec(params.spec)
        if self.readout is None and len(batches) > 1:
            raise ValueError(ONE_ARCHITECTURE)
        of_readout, of_branch = self._statistics(batches)
        read, elements = zip(*(self.canonical(self.normalized(self._by_fan_in(p))) for p in batches), strict=True)
        probed = [] if self.probes is None else list(map(self._probed, batches))
        probes = self.added_features(batches, read, [of.nodes for of in probed])
        gradients = [of.edges for of in probed if of.edges]
        if self.answers is not None:
            of_branch.append(self.answers(torch.cat([of.answers for of in probed])))
        output: Tensor | tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]
        if self.engine == "fast" and len(read) == 1 and runs_by_layer(self, read[0]):
            kinds = None if is_chain(self, read[0].spec) else layer_groups(self, read[0].spec)
            of_nodes, of_edges = probes[0] if probes else None, gradients[0] if gradients else None
            output = run_layers(self, read[0], kinds, of_nodes, of_edges, of_readout)
        else:
            features = torch.cat([torch.cat(of_nets, 1).flatten(0, 1) for of_nets in probes]) if probes else None
            run = self.plain if self.engine == "plain" else partial(run_graph, self)
            output = run(read, features, gradients, of_readout)
        if isinstance(output, Tensor):
            return output if self.branch is None else output + self.branch(*of_branch)
        return self._changes(read[0], elements[0], *output)

    def _changes(
        self,
        read: NetParams,
        element: GroupElement | None,
        nodes: Tensor | list[Tensor],
        edges: Tensor | list[Tensor],
    ) -> NetParams:
        """Changes of all weights and biases, from the features of nodes and edges of networks as they are `read`, to
        which `element` has led."""
        spec = read.spec
        if isinstance(nodes, Tensor) or isinstance(edges, Tensor):
            assert isinstance(nodes, Tensor)
            assert isinstance(edges, Tensor)
            nodes, edges = _by_layer(spec, len(read), nodes, edges)
        rows = (x.to(read.biases[0]) for x in (*nodes, *edges))  # layers may round nodes or edges alone
        of_heads = zip(*(x.chunk(self.config.heads, dim=-1) for x in rows), strict=True)
        changes = [
            NetParams.from_features(spec, features[: len(nodes)], features[len(nodes) :], read.activation)
            for features in of_heads
        ]
        if element is not None:
            changes = list(map(element.inverse().act_on_changes, changes))
        return self.joined_heads([self._by_fan_in(of_head, inverse=True) for of_head in changes])

    def added_features(
        self, nets: Sequence[NetParams], read: Sequence[NetParams], probes: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """What is added to A_v bias, per batch and layer of nodes [B, n_l, d], or nothing. Here: features of probes.

        Args:
            nets: the networks as they are.
            read: as the model reads them (`canonical`).
            probes: the features of probes, where there are some.
        """
        return probes

    def _probed(self, params: NetParams) -> Probed:
        """What probes, and the gradients at them, say about networks."""
        assert self.probes is not None
        canonical = self.canonical(params)[0]
        nodes, answers = self.probes(canonical)
        if self.gradients is None:
            return Probed(nodes, [], answers)
        of_nodes, edges = self.gradients(canonical, self.probes.pre_activations)
        return Probed(list(map(torch.add, nodes, of_nodes)), edges, answers)

    def fit_normalization(self, batches: Iterable[NetParams]) -> None:
        """As in `Metanetwork`, and by what the values of probes, and gradients at them, are divided."""
        if self.probes is not None:
            batches = self.probes.fitted_on(batches, lambda params: self.canonical(params)[0])
            if self.gradients is not None:
                evaluate = self.probes.pre_activations
                batches = self.gradients.fitted_on(batches, lambda params: self.canonical(params)[0], evaluate)
        super().fit_normalization(map(self._by_fan_in, batches))
        deque(batches, maxlen=0)  # draws all, where nothing else is fitted

    # The equations as they are written

    def plain(
        self,
        nets: Sequence[NetParams],
        probes: Tensor | None = None,
        gradients: Sequence[Sequence[Tensor]] = (),
        statistics: Sequence[Tensor] = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The readout [sum of B, out_dim] of networks of any architectures, in order; or, without a readout, the
        features of all nodes [N, k] and of all edges [E, k K], network by network; `probes` [N, d] are added to A_v
        bias, `gradients` (nothing, or per batch and block [B, n_l, n_{l-1}, H k]) are read beside the weights,
        `statistics` (nothing, or [sum of B, S]) beside the nodes."""
        graph = self.graph(nets, gradients)
        context = self.graph_context(graph)
        p = self.node_positions(graph.node_type) if self.node_positions is not None else None
        x = self.embed_nodes(context, graph, p, probes)
        edge = backward_edge = self.embed_edges(context, graph, graph.edges.linear(self.edge_linear.weight))
        if self.backward_edge_linear is not None:
            inverted = EdgeValues.of_networks(map(self.reciprocal_kernels, nets), graph.edges.width)
            backward_edge = self.embed_edges(context, graph, inverted.linear(self.backward_edge_linear.weight))
        for layer in self.layers:
            x, edge, backward_edge = layer(context, graph.edge_index, graph.residuals, x, edge, backward_edge, p)
        if self.readout is None:
            return x, edge
        is_input = (graph.role == ROLES.index("input")) & (graph.node_type < graph.num_inputs)  # not constant inputs
        hidden, is_output = graph.role == ROLES.index("hidden"), graph.role == ROLES.index("output")
        inputs, outputs = (x[rows].unflatten(0, (graph.num_networks, -1)) for rows in (is_input, is_output))
        output: Tensor = self.readout(context[hidden], inputs, x[hidden], outputs, *statistics)
        return output

    def embed_nodes(
        self, context: NodeContext, graph: ParameterGraph, p: Tensor | None, probes: Tensor | None
    ) -> Tensor:
        """A_v bias plus the features of probes, with positional embeddings p: [N, d]."""
        x: Tensor = self.node_linear(graph.nodes)
        if probes is not None:
            x = x + probes
        if p is not None:
            x = embed_positions(context, x, p, self.summed_roles, self.node_position_net)
        if self.node_position_map is not None:
            x = self.node_position_map(x, graph.node_type)
        return x

    def embed_edges(self, context: NodeContext, graph: ParameterGraph, edge: Tensor) -> Tensor:
        """A_e weight [E, d], with positional embeddings."""
        if self.edge_positions is None:
            return edge
        summed = ROLES if self.adds_edge_positions else ()
        receivers, p = context[graph.edge_index[1]], self.edge_positions(graph.edge_type)
        edge = embed_positions(receivers, edge, p, summed, self.edge_position_net)
        return edge if self.edge_position_map is None else self.edge_position_map(edge, graph.edge_type)

    # What both forms read

    def statistics(self, params: NetParams) -> Tensor:
        """With `sizes`, those of each layer's canonical weights and biases; with `branch.statistics`, all invariant
        statistics. [B, S]."""
        per_layer, per_network = [], []
        if self.config.sizes:
            per_layer.append(sizes(params))
        if self.config.branch.statistics:
            of_layers, of_network = invariant_statistics(params)
            per_layer.append(of_layers)
            per_network.append(of_network)
        layers = [at_depth(rows, self.max_hidden + 1).flatten(1) for rows in per_layer]
        return torch.cat([*layers, *per_network], dim=1)

    def _statistics(self, nets: Sequence[NetParams]) -> tuple[list[Tensor], list[Tensor]]:
        """What the readout reads of networks beside their nodes, and what the branch reads: none, or [sum of B, S]
        each."""
        if self.statistics_normalization is None:
            return [], []
        rows = self.statistics_normalization(torch.cat(list(map(self.statistics, nets))))
        of_readout, of_branch = rows.split(self.num_statistics, dim=1)
        return [of_readout] if self.config.sizes else [], [of_branch] if self.config.branch.statistics else []

    def _by_fan_in(self, params: NetParams, inverse: bool = False) -> NetParams:
        """With `width_transfer`, weights times (inverse: divided by) the number of neurons that send along them."""
        if not self.config.width_transfer:
            return params
        weights = (weight / weight.shape[2] if inverse else weight * weight.shape[2] for weight in params.weights)
        return params.replace(weights=tuple(weights))

    def canonical(self, params: NetParams) -> tuple[NetParams, GroupElement | None]:
        """Networks of the same function whose neurons have weights of norm 1, and the element that leads to them.

        Exactly scale-invariant models give the same output for both, but for rounding: features neither over- nor
        underflow, however far the sizes of the weights are apart.
        """
        options = self.config
        exact = options.reciprocal if options.direction == "bidirectional" else options.norm_epsilon == 0
        if options.symmetry not in ("scale", "hetero") or not exact:
            return params, None
        element = scale_to_canonical(params)
        return element.act(params), element

    def reciprocal_kernels(self, params: NetParams) -> list[Kernels]:
        """w / ||w||^2 of each block's kernels."""
        floors = [_RECIPROCAL_FLOOR * incoming_norm(params, layer) for layer in range(params.spec.num_layers)]
        return [
            block._replace(values=reciprocal(block.values, floor[..., None, None]))
            for block, floor in zip(params.kernels(self.spec.kernel), floors, strict=True)
        ]

    def graph(self, nets: Sequence[NetParams], gradients: Sequence[Sequence[Tensor]] = ()) -> ParameterGraph:
        """The parameter graphs of networks, with the types of nodes and edges that the model tells apart; `gradients`
        as in `ParameterGraph.from_params`."""
        graph = ParameterGraph.from_params(nets, self.spec.kernel, self.max_hidden, gradients)
        if not self.config.equal_outputs:
            return graph
        node_type, edge_type = graph.node_type, graph.edge_type
        if self.node_positions is not None:
            node_type = node_type.clamp(max=len(self.node_positions.table) - 1)
        if self.edge_positions is not None:
            edge_type = edge_type.clamp(max=len(self.edge_positions.table) - 1)
        return replace(graph, node_type=node_type, edge_type=edge_type)

    def graph_context(self, graph: ParameterGraph) -> NodeContext:
        """Role, scalar group and network of the nodes of a graph."""
        group = torch.zeros_like(graph.role)
        if len(self.groups) > 1:
            group = self.branches(graph.scalar_groups, graph.scalar_group)
        return NodeContext(graph.role, group, graph.network, self.groups)

    def network_groups(self, params: NetParams) -> Tensor:
        """[B] long, the scalar group of all hidden nodes of each network, for networks with one kind of activation."""
        device = params.biases[0].device
        if params.activation is None:
            hidden = params.spec.layers[:-1]
            group = ACTIVATIONS[hidden[0].activation].group if hidden else TRIVIAL
            return self.branches([group], torch.zeros(len(params), dtype=torch.long, device=device))
        return self.branches([ACTIVATIONS[name].group for name in params.spec.activations], params.activation)

    def branches(self, groups: Sequence[ScalarGroup], index: Tensor) -> Tensor:
        """Index into `self.groups`, from an index into other groups; networks whose group is {1} go through the branch
        of {-1, 1}."""
        places = {TRIVIAL: 0, **{group: place for place, group in enumerate(self.groups)}}
        branch = torch.tensor([places.get(group, -1) for group in groups], device=index.device)[index]
        if not all(group in places for group in groups) and bool((branch < 0).any()):
            known = ", ".join(map(branch_name, self.groups))
            raise ValueError(
                f"the model was built for networks of the scalar groups {known}, found another; "
                "build it for networks with this activation"
            )
        return branch

    # Memory

    def networks_at_once(self, device: torch.device) -> int:
        """As in `Metanetwork`, and at most as many as `chunks` runs at once."""
        whole = kept_bytes(device) // (self.feature_bytes * self._num_kept)
        return max(1, min(super().networks_at_once(device), whole))

    @property
    def feature_bytes(self) -> int:
        """Bytes of the widest features of one network's edges."""
        return self.spec.num_edges * self._edge_bytes

    def chunks(self, num_edges: int, device: torch.device) -> ChunkPlan:
        """Whether blocks with `num_edges` edges together are run at once or in chunks."""
        return ChunkPlan.plan(num_edges, self._edge_bytes, self._num_kept, device)

    @property
    def _edge_bytes(self) -> int:
        """Bytes of the widest features of an edge."""
        width = max(self.config.hidden_dim, sum(self.config.mlp_dims or ()))
        return width * self.edge_linear.weight.element_size()


@balance.register
def _balance(model: ScaleGMN, spec: NetSpec) -> None:
    """Models without scalars start odd: nothing is the same for all neurons of a layer."""
    balance_children(model, spec)
    if model.config.symmetry == "permutation":
        if model.node_positions is not None:
            zero_hidden_positions(model.node_positions.table, spec)
        if model.edge_positions is not None:
            model.edge_positions.table.zero_()


def _by_layer(spec: NetSpec, num_networks: int, x: Tensor, edge: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Features of nodes [N, D] and of edges [E, K] of networks of one architecture, per layer of nodes [B, n_l, D] and
    per block [B, n_l, n_{l-1}, K]."""
    nodes = x.unflatten(0, (num_networks, -1)).split(spec.layout, dim=1)
    shapes = [layer.weight_shape[:2] for layer in spec.layers]
    blocks = edge.unflatten(0, (num_networks, -1)).split([math.prod(shape) for shape in shapes], dim=1)
    return list(nodes), [block.unflatten(1, shape) for block, shape in zip(blocks, shapes, strict=True)]
