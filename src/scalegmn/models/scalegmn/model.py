"""ScaleGMN (Kalogeropoulos et al., NeurIPS 2024) and its permutation-only relative GMN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

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
from scalegmn.graphs.parameter_graph import ParameterGraph, shift_types_to_depth
from scalegmn.models.base import ONE_ARCHITECTURE, Metanetwork
from scalegmn.models.scalegmn.receptive_field import LayerReads, reads_by_role, receptive_field
from scalegmn.networks import ACTIVATIONS, HETERO, NetParams, NetSpec
from scalegmn.networks.scalar_groups import SCALES, symmetry_word
from scalegmn.nn.equivariant import ROLES
from scalegmn.nn.invariant import NodeContext
from scalegmn.nn.messages import reciprocal
from scalegmn.nn.mlp import Dropout
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.positional import PositionalEmbedding, embed_positions
from scalegmn.nn.readout import DeepSetReadout, EndsReadout, GraphReadout, OutputReadout
from scalegmn.symmetry.canonicalize import incoming_norm, scale_to_canonical
from scalegmn.symmetry.groups import GroupElement

if TYPE_CHECKING:
    from scalegmn.models.scalegmn.config import ScaleGMNConfig

_RECIPROCAL_FLOOR = 1e-3
"""Weights below this share of the norm of their neuron's [W, b] count less and less in messages against them."""


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
        reads = receptive_field(config, spec.num_layers)
        for index, own in enumerate(zip(reads, reads_by_role(config, spec, reads), strict=True)):
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
        node_features, edge_features = read.node_features(), read.edge_features()
        positions = self.node_positions() if self.node_positions else None
        nodes = self._embed_nodes(node_features, positions)
        edges = self._embed_edges(self.edge_linear, edge_features, odd)
        backward_edges = []
        if self.config.direction == "bidirectional":
            against = edges
            if self.backward_edge_linear is not None:
                floors = [_RECIPROCAL_FLOOR * incoming_norm(read, layer) for layer in range(self.spec.num_layers)]
                inverted = [
                    reciprocal(w, floor[..., None, None]) for w, floor in zip(edge_features, floors, strict=True)
                ]
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
        graph = ParameterGraph.from_params(read, self.spec.kernel, self.max_hidden)
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
