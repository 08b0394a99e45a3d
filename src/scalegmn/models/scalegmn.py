"""ScaleGMN (Kalogeropoulos et al., NeurIPS 2024) and its permutation-only relative GMN."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.engine.chunks import ChunkPlan, EdgeInputs
from scalegmn.engine.edges import (
    DenseEdges,
    Edges,
    EdgeUpdate,
    GatheredRows,
    SparseEdges,
    linear_by_type,
    sum_rows,
)
from scalegmn.engine.layout import BY_ROLE, Direction, Layout, RoleRows, inverse, join
from scalegmn.engine.memory import kept_bytes
from scalegmn.graphs.graph import ParameterGraph
from scalegmn.graphs.sparse import SparseGraph, shift_types_to_depth
from scalegmn.models.base import ONE_ARCHITECTURE, Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import ACTIVATIONS, HETERO, NetParams, NetSpec
from scalegmn.networks.scalar_groups import SCALES, symmetry_word
from scalegmn.nn.equivariant import ROLES, ByRole, EquivariantLayer, EquivariantNet, PlainLayer, SineUpdate
from scalegmn.nn.invariant import (
    AbsoluteValue,
    ByActivation,
    InvariantLayer,
    NodeContext,
    ScaleInvariant,
    SignInvariant,
)
from scalegmn.nn.messages import (
    ConcatEdgeUpdate,
    ConcatMessage,
    EquivariantEdgeUpdate,
    EquivariantMessage,
    reciprocal,
)
from scalegmn.nn.mlp import MLP, Dropout
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.positional import PositionalEmbedding, TypedLinear, embed_positions
from scalegmn.nn.readout import DeepSetReadout, EndsReadout, GraphReadout, OutputReadout
from scalegmn.symmetry.canonicalize import incoming_norm, scale_to_canonical
from scalegmn.symmetry.groups import GroupElement

_RECIPROCAL_FLOOR = 1e-3
"""Weights below this share of the norm of their neuron's [W, b] count less and less in messages against them."""


@dataclass(frozen=True)
class EquivariantNetConfig:
    """One equivariant net, x -> (W x) * g(x, p), and what rows of input and output nodes do instead.

    `permutation` models replace it by one MLP for all rows and read none of these fields.
    """

    io: Literal["same", "factor", "mlp", "layer"] = "factor"
    """Rows of input and output nodes, which have no symmetry: `same` as hidden rows; `factor`: the same W, but an MLP
    of [x, p] for g; `mlp`: an MLP of [x, p] in place of the layer; `layer`: an equivariant layer of their own."""

    io_branches: Literal[1, 2] = 1
    """1: input and output rows share their own branch; 2: one branch each."""

    num_layers: int = 1
    """Equivariant layers in a row."""

    skip_connections: bool = False
    """A residual W_s x around each of them."""

    positions: bool = False
    """Pass the positional embedding p to g."""


@dataclass(frozen=True)
class ScaleGMNConfig(ModelConfig):
    """ScaleGMN: message passing on the parameter graph that respects permutations and rescalings of neurons."""

    name = "scalegmn"
    supports_multiple_architectures = True

    normalize: bool | None = None
    """Divide each layer's weights and biases by one scalar each, their root mean square over the training split; null:
    only for permutation, which hardly learns without."""

    symmetry: Literal["permutation", "sign", "scale", "hetero"] = "sign"
    """Symmetry beyond permutations: `sign` for sine and tanh networks, `scale` for relu, `hetero` for zoos or
    networks of both, `permutation` for none (GMN)."""

    direction: Literal["forward", "bidirectional"] = "forward"
    """Messages along the input network's edges, or along and against them."""

    readout: Literal["last_layer", "full_graph"] = "last_layer"
    """For vectors: read the output nodes (and, bidirectional, the input nodes), or all nodes."""

    readout_projection: Literal["linear", "mlp"] = "linear"
    """How a bidirectional last_layer readout projects output and input nodes before it joins them."""

    num_layers: int = 4
    """Message passing layers."""

    hidden_dim: int = 128
    """Width d of node and edge features."""

    mlp_dims: tuple[int, ...] | None = None
    """Hidden widths of every MLP; null: one hidden layer of width hidden_dim."""

    mlp_activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    """Activation inside every MLP."""

    mlp_layer_norm: bool = True
    """LayerNorm before every activation inside an MLP."""

    mlp_dropout: float = 0.0
    """Dropout after every activation inside an MLP."""

    readout_dim: int | None = None
    """Width of the sum over nodes in a full_graph readout; null: hidden_dim."""

    node_positions: Literal["none", "product", "product_sum", "net", "net_sum"] = "product_sum"
    """Positional embeddings P of node types (each input node, each hidden layer, each output node). product: x * P;
    net: an equivariant net of (x, P), `position_net`; product_sum, net_sum: so on hidden nodes, x + P on input and
    output nodes. permutation always adds."""

    edge_positions: bool = True
    """Positional embeddings P of edge types: e * P, or a net of (e, P) where node_positions has one."""

    max_hidden_layers: int | None = None
    """Hidden layers that positional embeddings, and scalars of normalize, are there for; null: as many as the networks
    have. Given, the model reads networks of up to so many, if it gives vectors."""

    position_net: EquivariantNetConfig = field(default_factory=lambda: EquivariantNetConfig(io="same", positions=True))
    """The net of node_positions net and net_sum; that of edges has the same options, and the roles of receivers."""

    position_map: Literal["none", "shared", "per_type"] = "none"
    """A linear map without bias after the positional embeddings, of nodes and of edges: one for all, or one per type.
    permutation has none."""

    skip_connections: bool = True
    """x' = S x + layer(x) around every message passing layer."""

    dropout: float = 0.0
    """Dropout on node features after every layer."""

    sign_map: Literal["symmetrized", "absolute"] = "symmetrized"
    """The sign-invariant map: rho(x) + rho(-x) with an MLP rho, or |x|."""

    norm_epsilon: float = 0.0
    """The scale-invariant map is x / (||x|| + norm_epsilon): exact at 0; 1e-10 in the published code."""

    aggregator: Literal["add", "mean"] = "add"
    """How a node joins its messages."""

    update_edges: bool = True
    """Update edge features in every layer; false: every layer reads the initial ones."""

    reciprocal: bool = True
    """Bidirectional scale and hetero: messages against an edge read w / ||w||^2, which makes them exactly equivariant
    (w / floor^2 below a floor of 1e-3 of the norm of the neuron's [W, b]); false: they read w, as in the published
    code, whose output moves when neurons are rescaled."""

    message: EquivariantNetConfig = field(default_factory=EquivariantNetConfig)
    """The message function MSG. Its p: the receiving node's; in bidirectional models the sending node's."""

    update: EquivariantNetConfig = field(default_factory=EquivariantNetConfig)
    """The update function UPD. Its p: the updated node's."""

    update_rule: Literal["net", "sine_sum", "sine_cat"] = "net"
    """UPD: the equivariant net `update`; or, for sign, all rows alike, sin(30 W [x, m...]) (sine_cat) or
    sin(30 W (W_0 x + W_1 m + ...)) (sine_sum)."""

    def __post_init__(self) -> None:
        counts = ["num_layers", "hidden_dim", "out_dim", "readout_dim", "max_hidden_layers"]
        counts += [f"{net}.num_layers" for net in ("message", "update", "position_net")]
        problems = self.wrong_choices() + self.wrong_numbers(counts, ["dropout", "mlp_dropout"])
        if self.mlp_dims is not None and (not self.mlp_dims or min(self.mlp_dims) < 1):
            problems.append(f"mlp_dims: found {list(self.mlp_dims)}, expected one or more positive widths")
        for name in ("message", "update"):
            if self.symmetry != "permutation" and getattr(self, name).positions and self.node_positions == "none":
                problems.append(f"{name}.positions: needs node_positions, found none")
        if self.symmetry != "sign" and self.update_rule != "net":
            problems.append(f"update_rule: {self.update_rule} is only {{1, -1}}-equivariant, for sign; use net")
        problems += self._position_problems() if self.symmetry != "permutation" else []
        self.refuse(problems)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations and the symmetry; of hetero both, each network its own."""
        return frozenset({"permutation", *(("sign", "scale") if self.symmetry == HETERO else (self.symmetry,))})

    def _position_problems(self) -> list[str]:
        """What contradicts the choice of positional embeddings."""
        problems = []
        if self.position_map != "none" and self.node_positions == "none" and not self.edge_positions:
            problems.append("position_map: needs node_positions or edge_positions, found none")
        if not self.node_positions.startswith("net"):
            return problems
        if self.symmetry == "hetero":
            problems.append(f"node_positions: a {self.node_positions} of hetero reads no P; use product_sum")
        if not self.position_net.positions:
            problems.append("position_net.positions: found False, but it is a net of (x, P)")
        if self.edge_positions and self.position_net.io not in ("same", "layer"):
            io = self.position_net.io
            problems.append(f"position_net.io: {io} is not equivariant on edges into output nodes; use same or layer")
        return problems

    def build_within(self, spec: NetSpec) -> ScaleGMN:
        """As in `ModelConfig`."""
        return replace(self, max_hidden_layers=self.max_hidden_layers or spec.num_hidden_layers).build(spec)

    def build(self, spec: NetSpec) -> ScaleGMN:
        """The model for networks of `spec`."""
        return ScaleGMN(self, spec)

    # Parts, by symmetry

    def build_mlp(self, in_dim: int, out_dim: int) -> MLP:
        """An MLP of the configured hidden widths, activation, normalisation and dropout."""
        hidden_dims = self.mlp_dims or (self.hidden_dim,)
        return MLP(in_dim, hidden_dims, out_dim, self.mlp_activation, self.mlp_layer_norm, self.mlp_dropout)

    def build_sign_map(self, dim: int) -> nn.Module:
        """The sign-invariant map."""
        return SignInvariant(dim, self.build_mlp) if self.sign_map == "symmetrized" else AbsoluteValue()

    def build_scale_map(self, dim: int) -> nn.Module:
        """The scale-invariant map."""
        return ScaleInvariant(self.norm_epsilon)

    def build_invariant(self, dim: int) -> nn.Module:
        """The invariant map of the symmetry."""
        if self.symmetry == "sign":
            return self.build_sign_map(dim)
        if self.symmetry == "scale":
            return self.build_scale_map(dim)
        return ByActivation(self.build_sign_map(dim), self.build_scale_map(dim))

    def build_invariant_layer(self, in_dim: int, extra_dim: int, out_dim: int) -> nn.Module:
        """g(x, p); for hetero one of each kind, without p."""
        if self.symmetry != "hetero":
            return InvariantLayer(in_dim, extra_dim, out_dim, self.build_invariant, self.build_mlp)
        return ByActivation(
            InvariantLayer(in_dim, 0, out_dim, self.build_sign_map, self.build_mlp),
            InvariantLayer(in_dim, 0, out_dim, self.build_scale_map, self.build_mlp),
        )

    def build_net(self, options: EquivariantNetConfig, in_dim: int, out_dim: int, roles: Collection[str]) -> nn.Module:
        """MSG or UPD for rows of the given roles."""
        if self.symmetry == "permutation":
            return PlainLayer(in_dim, out_dim, self.build_mlp)
        extra_dim = self.hidden_dim if options.positions else 0
        widths = [in_dim] + [out_dim] * options.num_layers

        def layer(width: int) -> nn.Module:
            def by_role(hidden: nn.Module, io: list[nn.Module]) -> ByRole:
                return ByRole({"input": io[0], "hidden": hidden, "output": io[-1]}, roles)

            def equivariant() -> EquivariantLayer:
                return EquivariantLayer(width, out_dim, self.build_invariant_layer(width, extra_dim, out_dim))

            branches = range(options.io_branches)
            if options.io == "same":
                return equivariant()
            if options.io == "layer":
                return by_role(equivariant(), [equivariant() for _ in branches])
            io = [PlainLayer(width + extra_dim, out_dim, self.build_mlp) for _ in branches]
            if options.io == "mlp":
                return by_role(equivariant(), io)
            factor = by_role(self.build_invariant_layer(width, extra_dim, out_dim), io)
            return EquivariantLayer(width, out_dim, factor)

        skips = [nn.Linear(width, out_dim, bias=False) for width in widths[:-1]] if options.skip_connections else []
        return EquivariantNet([layer(width) for width in widths[:-1]], skips)

    def build_position_net(self, roles: Collection[str]) -> nn.Module | None:
        """The net of a feature and its positional embedding, if there is one."""
        if self.symmetry == "permutation" or not self.node_positions.startswith("net"):
            return None
        return self.build_net(self.position_net, self.hidden_dim, self.hidden_dim, roles)

    def build_position_map(self, types: Sequence[Tensor], num_types: int) -> nn.Module | None:
        """The linear map after the positional embeddings, if there is one."""
        if self.symmetry == "permutation" or self.position_map == "none":
            return None
        if self.position_map == "shared":
            types, num_types = [torch.zeros(1, dtype=torch.long)] * len(types), 1
        return TypedLinear(types, num_types, self.hidden_dim)

    def build_message(self, roles: Collection[str]) -> nn.Module:
        """The message function towards nodes of the given roles."""
        d = self.hidden_dim
        if self.symmetry == "permutation":
            return ConcatMessage(d, self.build_mlp, self.aggregator)
        return EquivariantMessage(d, self.build_net(self.message, d, d, roles), self.aggregator)

    def build_update(self, num_parts: int, out_dim: int, roles: Collection[str]) -> nn.Module:
        """The update function of `num_parts` parts [x, m...] for nodes of the given roles."""
        if self.update_rule != "net":
            return SineUpdate(num_parts, self.hidden_dim, out_dim, summed=self.update_rule == "sine_sum")
        return self.build_net(self.update, num_parts * self.hidden_dim, out_dim, roles)

    @property
    def updated_alike(self) -> tuple[tuple[str, ...], ...]:
        """The roles of nodes in groups whose rows take the same way through UPD."""
        if self.symmetry == "permutation" or self.update_rule != "net" or self.update.io == "same":
            return (ROLES,)
        return (("hidden",), ("input", "output")) if self.update.io_branches == 1 else tuple((r,) for r in ROLES)

    def build_edge_update(self, out_dim: int) -> nn.Module:
        """The edge update."""
        if self.symmetry == "permutation":
            return ConcatEdgeUpdate(self.hidden_dim, out_dim, self.build_mlp)
        return EquivariantEdgeUpdate(self.hidden_dim, out_dim, self.build_invariant, self.build_mlp)


METANETWORKS.register(ScaleGMNConfig.name, ScaleGMNConfig)


@dataclass(frozen=True)
class LayerReads:
    """What one message passing layer must compute, because something later reads it.

    Attributes:
        nodes: groups of nodes of a `Layout`, ascending.
        edges: blocks 1.. of forward edge features, ascending.
        backward_edges: blocks 1.. of backward edge features, ascending.
    """

    nodes: tuple[int, ...]
    edges: tuple[int, ...]
    backward_edges: tuple[int, ...]


class ScaleGMNLayer(nn.Module):
    """One round of messages and updates.

    m_i  = sum_j MSG((A x_j) * (B e_ji), p) (+ sum_s A_r x_s over residual connections s -> i, whose ends have one q)
    x_i' = UPD([x_i, m_i], p_i) (+ S x_i);  bidirectional: UPD([x_i, m_i forward, m_i backward], p_i)
    e_ji' = (C e_ji) * phi([inv(x_j), inv(x_i)])

    (ScaleGMN, eqs. 15, 16 and 18.) It computes only what later layers and the readout read.

    Args:
        config: the model's hyper-parameters.
        spec: the input networks.
        reads: what to compute of equal chains like `spec`, layer by layer.
        role_reads: what to compute of any networks, by role; there are branches for no other roles.
        out_dims: widths of the new node and edge features.
    """

    def __init__(
        self,
        config: ScaleGMNConfig,
        spec: NetSpec,
        reads: LayerReads,
        role_reads: LayerReads,
        out_dims: tuple[int, int],
    ) -> None:
        super().__init__()
        self.reads, self.role_reads = reads, role_reads
        self.node_layers, self.edge_blocks, self.backward_edge_blocks = reads.nodes, reads.edges, reads.backward_edges
        self.bidirectional = config.direction == "bidirectional"
        symmetric = config.symmetry != "permutation"
        self.message_positions = symmetric and config.message.positions
        self.update_positions = symmetric and config.update.positions and config.update_rule == "net"
        d, (node_dim, edge_dim) = config.hidden_dim, out_dims
        roles = {ROLES[group] for group in role_reads.nodes}
        self.forward_message = config.build_message(roles - {"input"})
        self.backward_message = config.build_message(roles - {"output"}) if self.bidirectional else None
        self.update = config.build_update(3 if self.bidirectional else 2, node_dim, roles)
        self.alike = config.updated_alike
        self.edge_update = config.build_edge_update(edge_dim) if role_reads.edges else None
        self.backward_edge_update = config.build_edge_update(edge_dim) if role_reads.backward_edges else None
        self.skip = nn.Linear(d, d, bias=False) if config.skip_connections and node_dim == d else None
        self.dropout = Dropout(config.dropout)
        to_output = {"output"} if any(one.receiver == spec.num_layers - 1 for one in spec.residuals) else set()
        of_input = {"input"} if any(one.source < 0 for one in spec.residuals) else set()
        along, against = (spec.residuals and roles & {"hidden", *ends} for ends in (to_output, of_input))
        self.forward_residual = nn.Linear(d, d, bias=False) if along else None
        self.backward_residual = nn.Linear(d, d, bias=False) if against and self.bidirectional else None

    def forward(
        self,
        layout: Layout,
        rows: Sequence[NodeContext],
        nodes: list[Tensor],
        edges: list[Edges | None],
        backward_edges: list[Edges | None],
        positions: list[Tensor] | None,
        pieces: ChunkPlan,
        residuals: Sequence[Mapping[int, Tensor]] = ({}, {}),
    ) -> tuple[list[Tensor], list[Edges | None], list[Edges | None]]:
        """One layer; groups that nothing reads stay as they were, such blocks are None.

        Args:
            layout: what belongs together.
            rows: of each group of nodes.
            nodes: per group [B, n_l, d] or, by role, [n, d].
            edges: per block, from its lower to its upper end.
            backward_edges: per block, from its upper to its lower end; unused by forward models.
            positions: per group [n_l or 1, d] or [n, d]; None without positional embeddings.
            pieces: how blocks are worked through.
            residuals: along and against residual connections, group -> [2, C] long, senders among all rows and
                receivers among the group's.

        Returns:
            New nodes, edges and backward edges.
        """
        reads = self.reads if layout.chain else self.role_reads
        messages: dict[int, list[Tensor]] = {group: [] for group in reads.nodes}
        directions = [(self.forward_message, self.forward_residual, residuals[0], layout.lower, edges, -1)]
        if self.bidirectional:
            against = self.backward_message, self.backward_residual, residuals[1]
            directions.append((*against, layout.upper, backward_edges, 0))
        for message, residual, added, senders, blocks, block in directions:
            found = {group: group + block for group in messages if 0 <= group + block < len(blocks)}
            sending = sorted({sender for k in found.values() for sender in senders[k]})
            sent = _parts(message.send(join(nodes, sending)), nodes, sending)
            for group, received in messages.items():
                if group not in found:
                    received.append(torch.zeros_like(nodes[group]))
                    continue
                k = found[group]
                extra = None
                if self.message_positions:
                    extra = (
                        blocks[k].of_senders(join(positions, senders[k]))
                        if self.bidirectional
                        else blocks[k].of_receivers(positions[group])
                    )
                function = partial(self._messages, message, rows[group].role)
                inputs = EdgeInputs(blocks[k], join(sent, senders[k]), extra)
                received.append(pieces.messages(function, inputs, message.parameters()))
                if residual is not None and group in added:
                    others, receivers = added[group]
                    passed = residual(join(nodes, range(len(nodes)))).index_select(0, others)
                    received[-1] = received[-1] + sum_rows(passed, receivers, len(nodes[group]))
        new_nodes = self._update_nodes(layout, rows, nodes, messages, positions)

        def updated(
            old: list[Edges | None], update: nn.Module, chosen: Sequence[int], ends: Sequence[tuple[Sequence[int], int]]
        ) -> list[Edges | None]:
            """Blocks with an update more; `ends` per block, groups of senders and that of receivers."""
            groups = sorted({group for k in chosen for group in (*ends[k - 1][0], ends[k - 1][1])})
            sent, received = {}, {}
            for together in layout.together(groups):  # all roles alike
                own = NodeContext("hidden", rows[together[0]].odd)
                parts = (_parts(end, nodes, together) for end in update.ends(own, join(nodes, together)))
                for found, part in zip((sent, received), parts, strict=True):
                    found.update(part)
            new: list[Edges | None] = [None] * len(old)
            for k in chosen:
                block, (senders, receiver) = old[k - 1], ends[k - 1]
                pending = EdgeUpdate(update, join(sent, senders), received[receiver])
                new[k - 1] = replace(block, updates=(*block.updates, pending))
                if pieces.materialize:
                    new[k - 1] = block.holding(pieces.features(new[k - 1]))
            return new

        if self.edge_update is not None:
            ends = [(senders, k + 1) for k, senders in enumerate(layout.lower)]
            edges = updated(edges, self.edge_update, reads.edges, ends)
        if self.backward_edge_update is not None:
            ends = [(senders, k) for k, senders in enumerate(layout.upper)]
            backward_edges = updated(backward_edges, self.backward_edge_update, reads.backward_edges, ends)
        return new_nodes, edges, backward_edges

    def _messages(
        self, message: nn.Module, role: str, edges: Edges, sent: Tensor, extra: Tensor | GatheredRows | None
    ) -> Tensor:
        """Messages [B, R, d] or [R, d] along a piece of a block."""
        return message(NodeContext(role, edges.odd), edges, sent, *([] if extra is None else [extra]))

    def _update_nodes(
        self,
        layout: Layout,
        rows: Sequence[NodeContext],
        nodes: list[Tensor],
        messages: dict[int, list[Tensor]],
        positions: list[Tensor] | None,
    ) -> list[Tensor]:
        """UPD, once for all rows that go through the same branch."""
        updated = list(nodes)
        for roles in self.alike:
            for groups in layout.together([group for group in messages if layout.roles[group] in roles]):
                x = join(nodes, groups)
                received = [
                    join(parts, range(len(groups))) for parts in zip(*(messages[g] for g in groups), strict=True)
                ]
                extras = []
                if self.update_positions:
                    extras = [torch.cat([positions[g].expand(nodes[g].shape[-2], -1) for g in groups])]
                new = self.update(rows[groups[0]], torch.cat([x, *received], dim=-1), *extras)
                if self.skip is not None:
                    new = new + self.skip(x)
                for group, part in _parts(self.dropout(new), nodes, groups).items():
                    updated[group] = part
        return updated


def _parts(rows: Tensor, nodes: Sequence[Tensor], groups: Sequence[int]) -> dict[int, Tensor]:
    """Group of nodes -> its rows, of rows of several groups one after the other."""
    return dict(zip(groups, rows.split([nodes[group].shape[-2] for group in groups], dim=-2), strict=True))


class ScaleGMN(Metanetwork):
    """A function of a network's parameters that is invariant, or equivariant, to the symmetries of its neurons.

    x = A_v bias, e = A_e weight, positional embeddings, `num_layers` layers, readout (ScaleGMN, section 5).

    Equal chains, whose hidden layers have one kind of activation, pass in blocks per layer; all other networks as one
    sparse graph, with the same modules. It reads networks of other widths than `spec` and, with `max_hidden_layers`, of
    other depths.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the symmetry does not hold for the networks' activations, or they have no hidden layer, or more than
            `max_hidden_layers`.
    """

    one_pass = True

    def __init__(self, config: ScaleGMNConfig, spec: NetSpec) -> None:
        _check_fit(config, spec)
        max_hidden = config.max_hidden_layers or spec.num_hidden_layers
        normalize = config.symmetry == "permutation" if config.normalize is None else config.normalize
        super().__init__(config, spec, InputNormalization(max_hidden + 1) if normalize else None)
        self.config, self.max_hidden = config, max_hidden
        self.layout = Layout.by_layer(spec.roles)
        d, n_out, more = config.hidden_dim, spec.layout[-1], max_hidden - (spec.num_hidden_layers)
        self.node_linear = nn.Linear(1, d, bias=False)
        self.edge_linear = nn.Linear(spec.edge_dim, d, bias=False)
        self.backward_edge_linear = None
        if config.direction == "bidirectional" and config.reciprocal and config.symmetry in ("scale", "hetero"):
            self.backward_edge_linear = nn.Linear(spec.edge_dim, d, bias=False)
        self.node_positions = self.node_position_net = self.node_position_map = None
        if config.node_positions != "none":
            types = [shift_types_to_depth(block, spec.num_node_types, n_out, more) for block in spec.node_types]
            self.node_positions = PositionalEmbedding(types, spec.num_node_types + more, d)
            self.node_position_map = config.build_position_map(types, spec.num_node_types + more)
            roles = {"hidden"} if config.node_positions == "net_sum" else set(spec.roles)
            self.node_position_net = config.build_position_net(roles)
        self.edge_positions = self.edge_position_net = self.edge_position_map = None
        if config.edge_positions:
            types = [shift_types_to_depth(block, spec.num_edge_types, n_out, more) for block in spec.edge_types]
            self.edge_positions = PositionalEmbedding(types, spec.num_edge_types + more, d)
            self.edge_position_map = config.build_position_map(types, spec.num_edge_types + more)
            self.edge_position_net = config.build_position_net(set(spec.roles[1:]))
        self.layers = nn.ModuleList()
        reads = _receptive_field(config, spec.num_layers)
        for index, own in enumerate(zip(reads, _role_reads(config, spec, reads), strict=True)):
            ends = config.changes_parameters and index == config.num_layers - 1
            self.layers.append(ScaleGMNLayer(config, spec, *own, (1, spec.edge_dim) if ends else (d, d)))
        directions = 2 if config.direction == "bidirectional" else 1
        per_layer = 12 * directions * config.message.num_layers + 11  # measured, with what the allocator loses
        self._num_kept = config.num_layers * per_layer
        self.readout = None
        if not config.changes_parameters:
            self.readout = _build_readout(config, spec)
        self.validate_spec(spec)

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`."""
        own, depth = self.spec, spec.num_hidden_layers
        least = 1 if self.config.max_hidden_layers else self.max_hidden
        if (
            (spec.layout[0], spec.layout[-1]) != (own.layout[0], own.layout[-1])
            or not least <= depth <= self.max_hidden
            or max(a - b for a, b in zip(spec.kernel, own.kernel, strict=True)) > 0
        ):
            raise ValueError(
                f"the model was built for networks from {own.layout[0]} to {own.layout[-1]}, of {least} to "
                f"{self.max_hidden} hidden layers (max_hidden_layers) and kernels up to "
                f"{own.kernel[0]}x{own.kernel[1]}, found {spec}"
            )
        if self.readout is None and (depth, spec.kernel) != (own.num_layers - 1, own.kernel):
            raise ValueError(f"{self.config.section}.output: the model was built for changes of {own}, found {spec}")
        if spec.residuals and not own.residuals:
            raise ValueError(f"the model was built for networks without residual connections, found {spec}")
        _check_fit(self.config, spec)

    def forward(self, nets: NetParams | Sequence[NetParams]) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        parts = [nets] if isinstance(nets, NetParams) else nets
        for params in parts:
            if params.spec != self.spec:  # sizes decide what the parameters fit, symmetries what is still exact
                self.validate_spec(params.spec)
        return self.in_blocks(parts[0]) if len(parts) == 1 and self._is_chain(parts[0].spec) else self.as_graph(parts)

    def _is_chain(self, spec: NetSpec) -> bool:
        """Whether networks of `spec` can pass in the blocks of `self.spec`."""
        mixed = self.config.symmetry == "hetero" and len(set(spec.symmetries)) > 1
        alike = (spec.layout, spec.kernel) == (self.spec.layout, self.spec.kernel)
        return alike and spec.is_chain and not spec.residuals and not mixed

    def in_blocks(self, params: NetParams) -> Tensor | NetParams:
        """`forward` of equal chains, in blocks per layer."""
        if self.config.symmetry != "hetero":
            return self._in_blocks(params, 0)
        odd = _odd_networks(params)
        if torch.compiler.is_compiling():
            return self._in_blocks(params, odd)
        order = odd.argsort(descending=True, stable=True)
        back = order.argsort()
        result = self._in_blocks(params[order], int(odd.sum()))
        return result[back]

    def _in_blocks(self, params: NetParams, odd: int | Tensor) -> Tensor | NetParams:
        """`in_blocks`; in a mixed batch with the odd networks, as `NodeContext.odd`."""
        read, element = self.canonical(self.normalized(params))
        graph = ParameterGraph.from_params(read)
        positions = self.node_positions() if self.node_positions else None
        nodes = self._embed_nodes(graph.nodes, positions)
        edges = self._embed_edges(self.edge_linear, graph.edges, odd)
        backward_edges = []
        if self.config.direction == "bidirectional":
            against = edges
            if self.backward_edge_linear is not None:
                floors = [_RECIPROCAL_FLOOR * incoming_norm(read, layer) for layer in range(self.spec.num_layers)]
                inverted = [reciprocal(w, floor[..., None, None]) for w, floor in zip(graph.edges, floors, strict=True)]
                against = self._embed_edges(self.backward_edge_linear, inverted, odd)
            backward_edges = [_flipped(block) for block in against]
        pieces = self.pieces(len(params) * self.spec.num_edges, params.biases[0].device)
        rows = [NodeContext(role, odd) for role in self.spec.roles]
        for layer in self.layers:
            nodes, edges, backward_edges = layer(self.layout, rows, nodes, edges, backward_edges, positions, pieces)
        if self.readout is not None:
            return self.readout(nodes, odd)
        changes = [pieces.features(block) if block.updates else block.values for block in edges]
        return self._changes(NetParams.from_features(params.spec, nodes, changes, params.activation), element)

    def as_graph(self, nets: Sequence[NetParams]) -> Tensor | NetParams:
        """`forward` of networks of any architectures, as one sparse graph; in order, [sum of B, out_dim]."""
        if self.readout is None and len(nets) > 1:
            raise ValueError(ONE_ARCHITECTURE)
        read, elements = zip(*(self.canonical(self.normalized(params)) for params in nets), strict=True)
        graph = SparseGraph.from_params(read, self.spec.kernel, self.max_hidden)
        rows = RoleRows(graph, self.config.symmetry == "hetero", self.edge_positions is not None)
        types, positions = rows.split(graph.node_type), None
        if self.node_positions is not None:
            positions = [self.node_positions.table.index_select(0, own) for own in types]
        nodes = self._embed_nodes(rows.split(graph.nodes), positions, types)
        along = rows.direction(against=False)
        edges = self._embed_rows(self.edge_linear, graph.edges, along, along)
        backward_edges = []
        if self.config.direction == "bidirectional":
            raw, linear = graph.edges, self.edge_linear
            if self.backward_edge_linear is not None:
                norms = [_incoming_norms(params).flatten() for params in read]
                floors = _RECIPROCAL_FLOOR * torch.cat(norms).index_select(0, graph.edge_index[1])
                raw, linear = reciprocal(raw, floors[:, None]), self.backward_edge_linear
            backward_edges = self._embed_rows(linear, raw, along, rows.direction(against=True))
        pieces = self.pieces(len(graph.edges), graph.edges.device)
        residuals = [rows.residuals(against) for against in (False, True)]
        for layer in self.layers:
            nodes, edges, backward_edges = layer(
                BY_ROLE, rows.rows, nodes, edges, backward_edges, positions, pieces, residuals
            )
        if self.readout is not None:
            ends = [rows.by_network(group, nodes[group]) for group in (0, 2)]
            return self.readout([ends[0], nodes[1], ends[1]], rows.rows[1].odd, rows.sum_hidden)
        (params,), (element,), spec = read, elements, read[0].spec
        changes = [pieces.features(block) if block.updates else block.values for block in edges]
        edges = torch.cat(changes).index_select(0, inverse(along.order)).unflatten(0, (len(params), -1))
        nodes = torch.cat([nodes[1].new_zeros(rows.sizes[0], 1), *nodes[1:]]).index_select(0, rows.rank)
        nodes = nodes.unflatten(0, (len(params), -1)).split(spec.layout, dim=1)
        edges = [
            block.unflatten(1, layer.weight_shape[:2])
            for block, layer in zip(
                edges.split([math.prod(layer.weight_shape[:2]) for layer in spec.layers], dim=1),
                spec.layers,
                strict=True,
            )
        ]
        return self._changes(NetParams.from_features(spec, nodes, edges, params.activation), element)

    def _changes(self, changes: NetParams, element: GroupElement | None) -> NetParams:
        """Changes of the networks as they are, from those of the networks that the model read."""
        return self.scaled(changes if element is None else element.inverse().act_on_changes(changes))

    def canonical(self, params: NetParams) -> tuple[NetParams, GroupElement | None]:
        """Networks of the same function whose neurons have weights of norm 1, and what leads to them.

        Exactly scale-invariant models give the same output for both, but for rounding: features neither over- nor
        underflow, however far the sizes of the weights are apart.
        """
        options = self.config
        exact = options.reciprocal if options.direction == "bidirectional" else options.norm_epsilon == 0
        if options.symmetry not in ("scale", "hetero") or not exact:
            return params, None
        element = scale_to_canonical(params)
        return element.act(params), element

    def _embed_nodes(
        self, raw: Sequence[Tensor], positions: list[Tensor] | None, types: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """A_v bias, with positional embeddings; per layer or, where types of nodes are given, per role."""
        nodes = [self.node_linear(x) for x in raw]
        if positions is None:
            return nodes
        summed = ("input", "output") if self.config.node_positions.endswith("_sum") else ()
        if self.config.symmetry == "permutation":
            summed = ROLES
        roles = self.spec.roles if types is None else ROLES
        nodes = embed_positions(nodes, positions, roles, summed, self.node_position_net)
        if self.node_position_map is None:
            return nodes
        if types is None:
            return self.node_position_map(nodes)
        return [linear_by_type(x, self.node_position_map.table, own) for x, own in zip(nodes, types, strict=True)]

    def _embed_edges(self, linear: nn.Linear, raw: Sequence[Tensor], odd: int | Tensor) -> list[DenseEdges]:
        """A_e weight, with positional embeddings."""
        matrices, shifts = [linear.weight[None, None]] * len(raw), [None] * len(raw)
        build = partial(DenseEdges, odd=odd)
        if self.edge_positions is None:
            return list(map(build, raw, matrices))
        positions = self.edge_positions()
        if self.edge_position_net is not None:
            features = [linear(values) for values in raw]
            features = embed_positions(features, positions, self.spec.roles[1:], (), self.edge_position_net)
            return list(map(build, features if self.edge_position_map is None else self.edge_position_map(features)))
        if self.config.symmetry == "permutation":
            shifts = positions
        else:
            matrices = [position[..., None] * linear.weight for position in positions]
        if self.edge_position_map is not None:
            matrices = map(torch.matmul, self.edge_position_map.rows(), matrices)
        return list(map(build, raw, matrices, shifts))

    def _embed_rows(self, linear: nn.Linear, raw: Tensor, along: Direction, towards: Direction) -> list[SparseEdges]:
        """A_e weight of raw features [E, K], with positional embeddings.

        Args:
            linear: A_e.
            raw: in the graph's order.
            along: the edges by receiver.
            towards: the direction of the blocks.
        """
        matrix, shift = linear.weight[None], None
        if self.edge_positions is not None:
            table, mapped = self.edge_positions.table, self.edge_position_map
            if self.edge_position_net is not None:
                features = along.split(linear(raw))
                types = [block.type for block in along.blocks]
                positions = [table.index_select(0, own) for own in types]
                features = embed_positions(features, positions, ROLES[1:], (), self.edge_position_net)
                if mapped is not None:
                    features = [linear_by_type(x, mapped.table, t) for x, t in zip(features, types, strict=True)]
                raw, matrix = torch.cat(features).index_select(0, inverse(along.order)), None
            elif self.config.symmetry == "permutation":
                shift = table
            else:
                matrix = table[..., None] * linear.weight
                matrix = matrix if mapped is None else mapped.table @ matrix
        blocks = zip(towards.split(raw), towards.blocks, strict=True)
        return [SparseEdges(values, matrix, shift, incidence=incidence) for values, incidence in blocks]

    def networks_at_once(self, device: torch.device) -> int:
        """As in `Metanetwork`, and so few that their edges are not worked through in chunks (`pieces`)."""
        whole = kept_bytes(device) // (self.feature_bytes * self._num_kept)
        return max(1, min(super().networks_at_once(device), whole))

    @property
    def feature_bytes(self) -> int:
        """Bytes of the widest features of one network's edges."""
        return self.spec.num_edges * self._edge_bytes

    def pieces(self, num_edges: int, device: torch.device) -> ChunkPlan:
        """How blocks are worked through that have so many edges together."""
        return ChunkPlan.plan(num_edges, self._edge_bytes, self._num_kept, device)

    @property
    def _edge_bytes(self) -> int:
        """Bytes of the widest features of an edge."""
        width = max(self.config.hidden_dim, sum(self.config.mlp_dims or ()))
        return width * self.edge_linear.weight.element_size()


def _flipped(block: DenseEdges) -> DenseEdges:
    """A block towards the other end of its edges."""
    matrix, shift = (None if x is None else x.transpose(0, 1) for x in (block.matrix, block.shift))
    return replace(block, values=block.values.transpose(1, 2).contiguous(), matrix=matrix, shift=shift)


def _incoming_norms(params: NetParams) -> Tensor:
    """||[W_i, b_i]|| of each node, [B, N]; of input nodes 0."""
    norms = [params.biases[0].new_zeros(len(params), size) for size in params.spec.layout]
    for layer, (_, place) in enumerate(params.spec.node_layers):
        norms[place] = incoming_norm(params, layer)
    return torch.cat(norms, dim=1)


def _build_readout(config: ScaleGMNConfig, spec: NetSpec) -> nn.Module:
    """The readout of a model with vector output."""
    d, n_in, n_out, mlp = config.hidden_dim, spec.layout[0], spec.layout[-1], config.build_mlp
    readout_dim = config.readout_dim or d
    if config.readout == "last_layer" and config.direction == "forward":
        return OutputReadout(d, n_out, config.out_dim, mlp)
    if config.readout == "last_layer":
        project = nn.Linear if config.readout_projection == "linear" else mlp
        return EndsReadout(d, n_in, n_out, config.out_dim, project, mlp)
    if config.symmetry == "permutation":
        return DeepSetReadout(d, readout_dim, config.out_dim, mlp)
    invariant_layer = config.build_invariant_layer(d, 0, readout_dim)
    return GraphReadout(d, n_in + n_out, invariant_layer, readout_dim, config.out_dim, mlp)


def _ends_of(blocks: Collection[int]) -> set[int]:
    """The groups at either end of edge blocks of a chain."""
    return {block - 1 for block in blocks} | set(blocks)


def _role_reads(config: ScaleGMNConfig, spec: NetSpec, reads: Sequence[LayerReads]) -> list[LayerReads]:
    """Per message passing layer, what is read of any networks, by role: most in those with one hidden layer.

    Where all networks are chains of one depth, less: only roles that occur in `reads`.
    """
    found = _receptive_field(config, len(ROLES) - 1)
    if config.max_hidden_layers is not None or spec.residuals or not spec.is_chain:
        return found
    roles = [{spec.roles[group] for group in own.nodes} for own in reads]
    return [
        replace(role_reads, nodes=tuple(group for group in role_reads.nodes if ROLES[group] in own))
        for role_reads, own in zip(found, roles, strict=True)
    ]


def _receptive_field(config: ScaleGMNConfig, last: int) -> list[LayerReads]:
    """Per message passing layer, what anything later reads in a chain of groups 0..last: from the readout back."""
    bidirectional = config.direction == "bidirectional"
    nodes, edges, backward_edges = set(range(last + 1)), set(), set()
    if config.changes_parameters:
        nodes, edges = set(range(1, last + 1)), set(range(1, last + 1))
    elif config.readout == "last_layer":
        nodes = {0, last} if bidirectional else {last}
    reads = []
    for _ in range(config.num_layers):
        reads.append(LayerReads(*(tuple(sorted(part)) for part in (nodes, edges, backward_edges))))
        along, against = {group for group in nodes if group > 0}, {group + 1 for group in nodes if group < last}
        before = nodes | _ends_of(edges) | _ends_of(backward_edges) | _ends_of(along)
        if config.update_edges:
            edges = edges | along
        if bidirectional:
            before |= _ends_of(against)
            if config.update_edges and config.symmetry == "scale":
                backward_edges = backward_edges | against
        nodes = before
    return reads[::-1]


def _check_fit(config: ScaleGMNConfig, spec: NetSpec) -> None:
    """Raises ValueError when the symmetry is not one of the networks'."""
    if spec.num_layers < 2:
        raise ValueError(f"expected networks with at least one hidden layer, found {spec}")
    found = {symmetry_word(spec.class_symmetry(channels)) for channels in spec.scaling_classes}
    if config.symmetry not in ("permutation", HETERO) and not found <= {config.symmetry}:
        (fitting,) = found if len(found) == 1 else {HETERO}
        raise ValueError(
            f"scalegmn_args.symmetry: {config.symmetry} does not hold for {spec}, whose activations admit "
            f"{', '.join(sorted(found))}; use {fitting}"
        )


def _odd_networks(params: NetParams) -> Tensor:
    """[B] bool: of networks whose hidden layers have one kind of activation, which go with the odd ones; the others are
    homogeneous."""
    spec, device = params.spec, params.biases[0].device
    if params.activation is None:
        return torch.full((len(params),), spec.symmetries[0] != "scale", device=device)
    odd = torch.tensor([activation.group != SCALES for activation in ACTIVATIONS.values()], device=device)
    return odd[params.activation]
