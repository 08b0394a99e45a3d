"""ScaleGMN (Kalogeropoulos et al., NeurIPS 2024) and its permutation-only relative GMN."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.graphs.graph import ParameterGraph
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.nn.edges import EdgeBlock, EdgeUpdate, Pieces, kept_bytes, tensor_bytes
from scalegmn.nn.equivariant import ROLES, ByRole, EquivariantLayer, EquivariantNet, PlainLayer, SineUpdate
from scalegmn.nn.invariant import (
    AbsoluteValue,
    ByActivation,
    InvariantLayer,
    Rows,
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
from scalegmn.spec import ACTIVATION_SYMMETRY, ACTIVATIONS, MIXED, NetParams, NetSpec
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
    mixes = True

    normalize: bool | None = None
    """Divide each layer's weights and biases by one scalar each, their root mean square over the training split; null:
    only for permutation, which hardly learns without."""

    symmetry: Literal["permutation", "sign", "scale", "hetero"] = "sign"
    """Symmetry beyond permutations: `sign` for sine and tanh networks, `scale` for relu, `hetero` for zoos of both,
    `permutation` for none (GMN)."""

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
        counts = ["num_layers", "hidden_dim", "out_dim", "readout_dim"]
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
    def claims(self) -> frozenset[str]:
        """Permutations and the symmetry; of hetero both, each network its own."""
        return frozenset({"permutation", *(("sign", "scale") if self.symmetry == MIXED else (self.symmetry,))})

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

    @property
    def one_graph(self) -> bool:
        """Not for hetero, which sorts its batches by activation."""
        return self.symmetry != "hetero"

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


@dataclass(frozen=True)
class LayerReads:
    """What one message passing layer must compute, because something later reads it.

    Attributes:
        nodes: node layers 0..L.
        edges: blocks 1..L of forward edge features.
        backward_edges: blocks 1..L of backward edge features.
    """

    nodes: frozenset[int]
    edges: frozenset[int]
    backward_edges: frozenset[int]


class ScaleGMNLayer(nn.Module):
    """One round of messages and updates.

    m_i  = sum_j MSG((A x_j) * (B e_ji), p)
    x_i' = UPD([x_i, m_i], p_i) (+ S x_i);  bidirectional: UPD([x_i, m_i forward, m_i backward], p_i)
    e_ji' = (C e_ji) * phi([inv(x_j), inv(x_i)])

    (ScaleGMN, eqs. 15, 16 and 18.) It computes only what later layers and the readout read.

    Args:
        config: the model's hyper-parameters.
        spec: the input networks.
        reads: what to compute.
        out_dims: widths of the new node and edge features.
    """

    def __init__(self, config: ScaleGMNConfig, spec: NetSpec, reads: LayerReads, out_dims: tuple[int, int]) -> None:
        super().__init__()
        self.roles, self.layout = spec.roles, spec.layout
        self.node_layers = sorted(reads.nodes)
        self.edge_blocks, self.backward_edge_blocks = sorted(reads.edges), sorted(reads.backward_edges)
        self.bidirectional = config.direction == "bidirectional"
        symmetric = config.symmetry != "permutation"
        self.message_positions = symmetric and config.message.positions
        self.update_positions = symmetric and config.update.positions and config.update_rule == "net"
        d, (node_dim, edge_dim) = config.hidden_dim, out_dims
        self.forward_message = config.build_message({spec.roles[layer] for layer in reads.nodes if layer > 0})
        self.backward_message = None
        if self.bidirectional:
            roles = {spec.roles[layer] for layer in reads.nodes if layer < spec.num_layers}
            self.backward_message = config.build_message(roles)
        roles = {spec.roles[layer] for layer in reads.nodes}
        self.update = config.build_update(3 if self.bidirectional else 2, node_dim, roles)
        groups = [[n for n in self.node_layers if spec.roles[n] in alike] for alike in config.updated_alike]
        self.updated_together = [group for group in groups if group]
        self.edge_update = config.build_edge_update(edge_dim) if self.edge_blocks else None
        self.backward_edge_update = config.build_edge_update(edge_dim) if self.backward_edge_blocks else None
        self.skip = nn.Linear(d, d, bias=False) if config.skip_connections and node_dim == d else None
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        nodes: list[Tensor | None],
        edges: list[EdgeBlock | None],
        backward_edges: list[EdgeBlock | None],
        positions: list[Tensor] | None,
        num_odd: int,
        pieces: Pieces,
    ) -> tuple[list[Tensor | None], list[EdgeBlock | None], list[EdgeBlock | None]]:
        """One layer; entries of layers and blocks that nothing reads are None.

        Args:
            nodes: per node layer [B, n_l, d].
            edges: per block, from its lower to its upper end.
            backward_edges: per block, from its upper to its lower end; unused by forward models.
            positions: per node layer [n_l or 1, d]; None without positional embeddings.
            num_odd: as in `Rows`.
            pieces: how blocks are worked through.

        Returns:
            New nodes, edges and backward edges.
        """
        messages: dict[int, list[Tensor]] = {layer: [] for layer in self.node_layers}
        directions = [(self.forward_message, -1, edges, -1)]
        if self.bidirectional:
            directions.append((self.backward_message, 1, backward_edges, 0))
        for message, step, blocks, block in directions:
            senders = [layer + step for layer in self.node_layers if 0 <= layer + step < len(nodes)]
            sent = self._parts(message.send(_join(nodes, senders)), senders)
            for layer, received in messages.items():
                sender = layer + step
                if sender not in sent:
                    received.append(torch.zeros_like(nodes[layer]))
                    continue
                extra = None
                if self.message_positions:
                    extra = positions[sender][None] if self.bidirectional else positions[layer][:, None]
                function = partial(self._messages, message, self.roles[layer])
                received.append(pieces.map(function, num_odd, blocks[layer + block], sent[sender], extra))
        new_nodes = self._update_nodes(nodes, messages, positions, num_odd)

        def updated(old: list[EdgeBlock | None], update: nn.Module, blocks: list[int], step: int) -> list[EdgeBlock]:
            layers = sorted(_ends_of(blocks))
            ends = update.ends(Rows("hidden", num_odd), _join(nodes, layers))  # all rows alike
            senders, receivers = (self._parts(end, layers) for end in ends)
            new: list[EdgeBlock | None] = [None] * len(old)
            for block in blocks:
                sender, receiver = (block - 1, block)[::step]
                pending = EdgeUpdate(update, senders[sender], receivers[receiver])
                new[block - 1] = replace(old[block - 1], updates=(*old[block - 1].updates, pending))
                if pieces.materialize:
                    new[block - 1] = EdgeBlock(pieces.map(_features, num_odd, new[block - 1]))
            return new

        if self.edge_update is not None:
            edges = updated(edges, self.edge_update, self.edge_blocks, 1)
        if self.backward_edge_update is not None:
            backward_edges = updated(backward_edges, self.backward_edge_update, self.backward_edge_blocks, -1)
        return new_nodes, edges, backward_edges

    def _messages(
        self, message: nn.Module, role: str, num_odd: int, edges: EdgeBlock, sent: Tensor, extra: Tensor | None
    ) -> Tensor:
        """Messages [B, R, d] along a piece of a block."""
        return message(Rows(role, num_odd), edges, sent, *([] if extra is None else [extra]))

    def _update_nodes(
        self,
        nodes: list[Tensor | None],
        messages: dict[int, list[Tensor]],
        positions: list[Tensor] | None,
        num_odd: int,
    ) -> list[Tensor | None]:
        """UPD, once for all rows that go through the same branch."""
        updated: list[Tensor | None] = [None] * len(nodes)
        for layers in self.updated_together:
            x = _join(nodes, layers)
            received = [torch.cat(parts, dim=1) for parts in zip(*(messages[layer] for layer in layers), strict=True)]
            extras = []
            if self.update_positions:
                extras = [torch.cat([positions[layer].expand(self.layout[layer], -1) for layer in layers])]
            rows = Rows(self.roles[layers[0]], num_odd)
            new = self.update(rows, torch.cat([x, *received], dim=-1), *extras)
            if self.skip is not None:
                new = new + self.skip(x)
            for layer, part in self._parts(self.dropout(new), layers).items():
                updated[layer] = part
        return updated

    def _parts(self, rows: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Node layer -> its rows [B, n_l, ...], of rows of several layers one after the other."""
        return dict(zip(layers, rows.split([self.layout[layer] for layer in layers], dim=1), strict=True))


class ScaleGMN(Metanetwork):
    """A function of a network's parameters that is invariant, or equivariant, to the symmetries of its neurons.

    x = A_v bias, e = A_e weight, positional embeddings, `num_layers` layers, readout (ScaleGMN, section 5).

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the symmetry does not hold for the networks' activations, or they have no hidden layer or residual
            connections.
    """

    def __init__(self, config: ScaleGMNConfig, spec: NetSpec) -> None:
        _check_fit(config, spec)
        normalize = config.symmetry == "permutation" if config.normalize is None else config.normalize
        super().__init__(spec, InputNormalization(spec.num_layers) if normalize else None)
        self.config = config
        d = config.hidden_dim
        self.node_linear = nn.Linear(1, d, bias=False)
        self.edge_linear = nn.Linear(spec.edge_dim, d, bias=False)
        self.backward_edge_linear = None
        if config.direction == "bidirectional" and config.reciprocal and config.symmetry in ("scale", "hetero"):
            self.backward_edge_linear = nn.Linear(spec.edge_dim, d, bias=False)
        self.node_positions = self.node_position_net = self.node_position_map = None
        if config.node_positions != "none":
            self.node_positions = PositionalEmbedding(spec.node_types, spec.num_node_types, d)
            self.node_position_map = config.build_position_map(spec.node_types, spec.num_node_types)
            roles = {"hidden"} if config.node_positions == "net_sum" else set(spec.roles)
            self.node_position_net = config.build_position_net(roles)
        self.edge_positions = self.edge_position_net = self.edge_position_map = None
        if config.edge_positions:
            self.edge_positions = PositionalEmbedding(spec.edge_types, spec.num_edge_types, d)
            self.edge_position_map = config.build_position_map(spec.edge_types, spec.num_edge_types)
            self.edge_position_net = config.build_position_net(set(spec.roles[1:]))
        self.layers = nn.ModuleList()
        for index, reads in enumerate(_receptive_field(config, spec)):
            ends = config.output == "parameters" and index == config.num_layers - 1
            self.layers.append(ScaleGMNLayer(config, spec, reads, (1, spec.edge_dim) if ends else (d, d)))
        directions = 2 if config.direction == "bidirectional" else 1
        per_layer = 12 * directions * config.message.num_layers + 11  # measured, with what the allocator loses
        self._num_kept = config.num_layers * per_layer
        self.readout = None
        if config.output == "vector":
            self.readout = _build_readout(config, spec)
        else:
            self.add_scales(config.out_scale)

    def forward(self, params: NetParams) -> Tensor | tuple[list[Tensor], list[Tensor]]:
        """B networks -> [B, out_dim]; or, with `output: parameters`, the changes of weights and of biases, per layer
        in the shapes of the parameters.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        if params.spec != self.spec:  # sizes decide what the parameters fit, symmetries what is still exact
            if (params.spec.layout, params.spec.kernel) != (self.spec.layout, self.spec.kernel):
                raise ValueError(f"the model was built for {self.spec}, found {params.spec}")
            _check_fit(self.config, params.spec)
        if self.config.symmetry != "hetero":
            return self._forward(params, 0)
        odd = _odd_networks(params)
        order = odd.argsort(descending=True, stable=True)
        back = order.argsort()
        result = self._forward(params[order], int(odd.sum()))
        if self.readout is not None:
            return result[back]
        return tuple([change[back] for change in changes] for changes in result)

    def _forward(self, params: NetParams, num_odd: int) -> Tensor | tuple[list[Tensor], list[Tensor]]:
        """`forward` with the odd networks of a mixed batch first."""
        read, gauge = self.canonical(self.normalized(params))
        graph = ParameterGraph.from_params(read)
        positions = self.node_positions() if self.node_positions else None
        nodes = self._embed_nodes(graph.nodes, positions)
        edges = self._embed_edges(self.edge_linear, graph.edges)
        backward_edges = []
        if self.config.direction == "bidirectional":
            against = edges
            if self.backward_edge_linear is not None:
                floors = [_RECIPROCAL_FLOOR * incoming_norm(read, layer) for layer in range(self.spec.num_layers)]
                inverse = [reciprocal(w, floor[..., None, None]) for w, floor in zip(graph.edges, floors, strict=True)]
                against = self._embed_edges(self.backward_edge_linear, inverse)
            backward_edges = [_flipped(block) for block in against]
        pieces = self.pieces(len(params), params.biases[0].device)
        for layer in self.layers:
            nodes, edges, backward_edges = layer(nodes, edges, backward_edges, positions, num_odd, pieces)
        if self.readout is not None:
            return self.readout(nodes, num_odd)
        changes = [pieces.map(_features, num_odd, block) if block.updates else block.values for block in edges]
        changes = NetParams.from_features(params.spec, nodes, changes, params.activation)
        if gauge is not None:
            changes = gauge.inverse().act_on_changes(changes)
        return self.scaled(changes)

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

    def _embed_nodes(self, raw: tuple[Tensor, ...], positions: list[Tensor] | None) -> list[Tensor]:
        """A_v bias, with positional embeddings."""
        nodes = [self.node_linear(x) for x in raw]
        if positions is None:
            return nodes
        summed = ("input", "output") if self.config.node_positions.endswith("_sum") else ()
        if self.config.symmetry == "permutation":
            summed = ROLES
        nodes = embed_positions(nodes, positions, self.spec.roles, summed, self.node_position_net)
        return nodes if self.node_position_map is None else self.node_position_map(nodes)

    def _embed_edges(self, linear: nn.Linear, raw: Sequence[Tensor]) -> list[EdgeBlock]:
        """A_e weight, with positional embeddings."""
        matrices, shifts = [linear.weight[None, None]] * len(raw), [None] * len(raw)
        if self.edge_positions is None:
            return list(map(EdgeBlock, raw, matrices))
        positions = self.edge_positions()
        if self.edge_position_net is not None:
            features = [linear(values) for values in raw]
            features = embed_positions(features, positions, self.spec.roles[1:], (), self.edge_position_net)
            return list(
                map(EdgeBlock, features if self.edge_position_map is None else self.edge_position_map(features))
            )
        if self.config.symmetry == "permutation":
            shifts = positions
        else:
            matrices = [position[..., None] * linear.weight for position in positions]
        if self.edge_position_map is not None:
            matrices = map(torch.matmul, self.edge_position_map.rows(), matrices)
        return list(map(EdgeBlock, raw, matrices, shifts))

    def networks_at_once(self, device: torch.device) -> int:
        """As many as make full use of the machine, if the backward pass can keep everything of them."""
        size = self.spec.num_edges * self._edge_bytes
        return max(1, min(tensor_bytes(device) // size, kept_bytes(device) // (size * self._num_kept)))

    def pieces(self, num_networks: int, device: torch.device) -> Pieces:
        """How blocks are worked through."""
        return Pieces.plan(num_networks * self.spec.num_edges, self._edge_bytes, self._num_kept, device)

    @property
    def _edge_bytes(self) -> int:
        """Bytes of the widest features of an edge."""
        width = max(self.config.hidden_dim, sum(self.config.mlp_dims or ()))
        return width * self.edge_linear.weight.element_size()


def _join(nodes: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
    """The rows of several node layers, one after the other."""
    return torch.cat([nodes[layer] for layer in layers], dim=1)


def _features(num_odd: int, edges: EdgeBlock, senders: None, extra: None) -> Tensor:
    """The features of a piece of a block."""
    return edges.features()


def _flipped(block: EdgeBlock) -> EdgeBlock:
    """A block towards the other end of its edges."""
    matrix, shift = (None if x is None else x.transpose(0, 1) for x in (block.matrix, block.shift))
    return EdgeBlock(block.values.transpose(1, 2).contiguous(), matrix, shift)


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
    """The node layers at either end of edge blocks."""
    return {block - 1 for block in blocks} | set(blocks)


def _receptive_field(config: ScaleGMNConfig, spec: NetSpec) -> list[LayerReads]:
    """Per message passing layer, what anything later reads: from the readout back."""
    last = spec.num_layers
    bidirectional = config.direction == "bidirectional"
    nodes, edges, backward_edges = set(range(last + 1)), set(), set()
    if config.output == "parameters":
        nodes, edges = set(range(1, last + 1)), set(range(1, last + 1))
    elif config.readout == "last_layer":
        nodes = {0, last} if bidirectional else {last}
    reads = []
    for _ in range(config.num_layers):
        reads.append(LayerReads(frozenset(nodes), frozenset(edges), frozenset(backward_edges)))
        before = nodes | _ends_of(edges) | _ends_of(backward_edges)
        before |= _ends_of({layer for layer in nodes if layer > 0})
        if config.update_edges:
            edges = edges | {layer for layer in nodes if layer > 0}
        if bidirectional:
            against = {layer + 1 for layer in nodes if layer < last}
            before |= _ends_of(against)
            if config.update_edges and config.symmetry == "scale":
                backward_edges = backward_edges | against
        nodes = before
    return reads[::-1]


def _check_fit(config: ScaleGMNConfig, spec: NetSpec) -> None:
    """Raises ValueError when the symmetry is not one of the networks', or they have residual connections."""
    config.refuse_residuals(spec)
    if spec.num_layers < 2:
        raise ValueError(f"expected networks with at least one hidden layer, found {spec}")
    covered = {"permutation": {*ACTIVATION_SYMMETRY.values(), MIXED}, MIXED: {"sign", "scale", MIXED}}
    found = set(spec.symmetries)
    if not found <= covered.get(config.symmetry, {config.symmetry}):
        (fitting,) = found if len(found) == 1 else {"permutation"}
        raise ValueError(
            f"scalegmn_args.symmetry: {config.symmetry} does not hold for {spec}, whose activations admit "
            f"{', '.join(sorted(found))}; use {fitting}"
        )


def _odd_networks(params: NetParams) -> Tensor:
    """[B] bool: which networks have odd activations; the others are homogeneous.

    Raises:
        ValueError: a network's activation is neither.
    """
    if params.activation is None:
        odd = params.spec.symmetries[0] == "sign"
        return torch.full((len(params),), odd, device=params.biases[0].device)
    symmetries = [ACTIVATION_SYMMETRY[ACTIVATIONS[index]] for index in params.activation.tolist()]
    if "permutation" in symmetries:
        name = ACTIVATIONS[params.activation[symmetries.index("permutation")]]
        raise ValueError(f"scalegmn_args.symmetry: hetero does not hold for {name} networks; use permutation")
    return torch.tensor([symmetry == "sign" for symmetry in symmetries], device=params.biases[0].device)
