"""The fast form of message passing models: equal chains in dense blocks, all other networks as one sparse graph."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.edges import DenseEdges, SparseEdges, linear_by_type
from scalegmn.engine.layers import Blocks, LayerRun
from scalegmn.engine.layout import BY_ROLE, Direction, LayerReads, Layout, RoleRows, inverse
from scalegmn.engine.messages import receive, updated_edges
from scalegmn.engine.modules import run
from scalegmn.engine.readouts import read
from scalegmn.engine.rows import Rows
from scalegmn.graphs.edge_values import EdgeValues
from scalegmn.graphs.parameter_graph import ParameterGraph, shift_types_to_depth
from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.features import Kernels, padded
from scalegmn.networks.scalar_groups import ScalarGroup
from scalegmn.nn.context import NodeContext
from scalegmn.nn.message_passing import MessagePassingLayer
from scalegmn.nn.positional import PositionalEmbedding, TypedLinear


class ChainTypes(nn.Module):
    """The types of nodes, or of edges, of chains of one architecture, layer by layer: buffers that move with a model.

    Args:
        types: per layer or block, long tensors whose shapes broadcast to those of the features without D.
    """

    types: Tensor

    def __init__(self, types: Sequence[Tensor]) -> None:
        super().__init__()
        self.shapes = [tuple(block.shape) for block in types]
        self.register_buffer("types", torch.cat([block.flatten() for block in types]), persistent=False)

    @classmethod
    def of_nodes(cls, spec: NetSpec, num_more: int) -> ChainTypes:
        """Of nodes, in the numbering of networks with `num_more` more hidden layers."""
        shift = partial(
            shift_types_to_depth,
            num_types=spec.num_node_types,
            num_last=spec.layout[-1] + spec.num_places,
            num_more=num_more,
        )
        return cls(list(map(shift, spec.node_types)))

    @classmethod
    def of_edges(cls, spec: NetSpec, num_more: int) -> ChainTypes:
        """Of edges, in the numbering of networks with `num_more` more hidden layers."""
        shift = partial(
            shift_types_to_depth,
            num_types=spec.num_edge_types,
            num_last=spec.num_output_edge_types,
            num_more=num_more,
        )
        return cls(list(map(shift, spec.edge_types)))

    def rows(self, table: Tensor) -> list[Tensor]:
        """Per layer or block, table[types] of shape (*types.shape, ...); of a table with one row, [1, ...]."""
        if len(table) == 1:
            return [table] * len(self.shapes)
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        rows = table[self.types].split(sizes)
        return [block.reshape(*shape, *block.shape[1:]) for block, shape in zip(rows, self.shapes, strict=True)]


class MessagePassingModel(Protocol):
    """What the engine reads of a model; see `scalegmn.models.scalegmn.ScaleGMN`."""

    spec: NetSpec
    max_hidden: int
    groups: tuple[ScalarGroup, ...]
    layers: Sequence[MessagePassingLayer]
    reads: Sequence[tuple[LayerReads, LayerReads]]
    readout: nn.Module | None
    node_linear: nn.Linear
    edge_linear: nn.Linear
    backward_edge_linear: nn.Linear | None
    node_positions: PositionalEmbedding | None
    node_position_net: nn.Module | None
    node_position_map: TypedLinear | None
    edge_positions: PositionalEmbedding | None
    edge_position_net: nn.Module | None
    edge_position_map: TypedLinear | None
    node_types: ChainTypes
    edge_types: ChainTypes
    summed_roles: tuple[str, ...]
    adds_edge_positions: bool
    bidirectional: bool

    def network_groups(self, params: NetParams) -> Tensor:
        """[B] long, index into `groups`, of networks whose hidden nodes have one group."""
        ...

    def graph_context(self, graph: ParameterGraph) -> NodeContext:
        """What the nodes of a graph belong to."""
        ...

    def reciprocal_kernels(self, params: NetParams) -> Sequence[Kernels]:
        """Per block, the raw edge features that messages against the edges read."""
        ...

    def chunks(self, num_edges: int, device: torch.device) -> ChunkPlan:
        """How blocks are worked through that have so many edges together."""
        ...


Features = tuple[list[Tensor], list[Tensor]]
"""Node features [B, n_l, D] per layer of nodes, and edge features [B, n_l, n_{l-1}, D] per block."""


# Equal chains


def run_chains(
    model: MessagePassingModel,
    params: NetParams,
    probes: Sequence[Tensor] | None = None,
    statistics: Sequence[Tensor] = (),
) -> Tensor | Features:
    """The readout [B, out_dim], or the features of nodes and edges, of equal chains like `model.spec`.

    Args:
        model: the model.
        params: the networks.
        probes: what is added to A_v bias, per layer of nodes [B, n_l, d].
        statistics: what the readout reads beside the nodes, nothing or [B, S].
    """
    if len(model.groups) == 1:
        return _run_chains(model, params, probes, statistics, None)
    group = model.network_groups(params)
    if torch.compiler.is_compiling():
        return _run_chains(model, params, probes, statistics, group)
    order = group.argsort(stable=True)
    back = order.argsort()
    sizes = tuple(group.bincount(minlength=len(model.groups)).tolist())
    sorted_probes = None if probes is None else [features[order] for features in probes]
    result = _run_chains(model, params[order], sorted_probes, [rows[order] for rows in statistics], sizes)
    if isinstance(result, Tensor):
        return result[back]
    nodes, edges = ([features[back] for features in part] for part in result)
    return nodes, edges


def _run_chains(
    model: MessagePassingModel,
    params: NetParams,
    probes: Sequence[Tensor] | None,
    statistics: Sequence[Tensor],
    sizes: tuple[int, ...] | Tensor | None,
) -> Tensor | Features:
    """`run_chains`, with the networks of each scalar group as in `Rows.sizes`."""
    spec, raw = model.spec, list(params.edge_features())
    rows = [Rows(role, model.groups, sizes) for role in spec.roles]
    positions = model.node_types.rows(model.node_positions.table) if model.node_positions is not None else None
    nodes = [model.node_linear(x) for x in params.node_features()]
    if probes is not None:
        nodes = [x + features for x, features in zip(nodes, probes, strict=True)]
    if positions is not None:
        nodes = [_embed(model, *layer) for layer in zip(rows, nodes, positions, strict=True)]
        if model.node_position_map is not None:
            maps = model.node_types.rows(model.node_position_map.table)
            nodes = [torch.einsum("...d,...od->...o", x, m) for x, m in zip(nodes, maps, strict=True)]
    edges = _chain_edges(model, model.edge_linear, raw, rows)
    backward_edges: Blocks = []
    if model.bidirectional:
        against = edges
        if model.backward_edge_linear is not None:
            inverted = [padded(*block, spec.edge_dim) for block in model.reciprocal_kernels(params)]
            against = _chain_edges(model, model.backward_edge_linear, inverted, rows)
        backward_edges = [[_flipped(block, lower)] for block, lower in zip(against, rows[:-1], strict=True)]
    chunks = model.chunks(len(params) * spec.num_edges, params.biases[0].device)
    layers = LayerRun(Layout.by_layer(spec.roles), rows, positions, chunks)
    blocks: Blocks = [[block] for block in edges]
    for layer, (reads, _) in zip(model.layers, model.reads, strict=True):
        nodes, blocks, backward_edges = layers.layer(layer, reads, nodes, blocks, backward_edges)
    if model.readout is not None:
        hidden = torch.cat([nodes[0][:, :0], *nodes[1:-1]], dim=-2)
        of_hidden = Rows("hidden", model.groups, sizes)
        return read(model.readout, of_hidden, nodes[0], hidden, nodes[-1], lambda x: x.sum(1), *statistics)
    return nodes, _features(chunks, blocks)


def _embed(model: MessagePassingModel, rows: Rows, x: Tensor, p: Tensor) -> Tensor:
    """Node features with positional embeddings."""
    if rows.role in model.summed_roles:
        return x + p
    return x * p if model.node_position_net is None else run(model.node_position_net, rows, x, p)


def _chain_edges(
    model: MessagePassingModel, linear: nn.Linear, raw: Sequence[Tensor], rows: Sequence[Rows]
) -> list[DenseEdges]:
    """A_e weight, with positional embeddings."""
    features: list[Tensor] = list(raw)
    matrices: list[Tensor | None] = [linear.weight[None, None]] * len(raw)
    shifts: list[Tensor | None] = [None] * len(raw)
    if model.edge_positions is not None:
        positions = model.edge_types.rows(model.edge_positions.table)
        mapped = model.edge_position_map
        maps = None if mapped is None else model.edge_types.rows(mapped.table)
        if model.edge_position_net is not None:
            net = model.edge_position_net
            features = [run(net, upper, linear(x), p) for upper, x, p in zip(rows[1:], raw, positions, strict=True)]
            if maps is not None:
                features = [torch.einsum("...d,...od->...o", x, m) for x, m in zip(features, maps, strict=True)]
            matrices = [None] * len(raw)
        elif model.adds_edge_positions:
            shifts = list(positions)
        else:
            scaled = [position[..., None] * linear.weight for position in positions]
            matrices = list(scaled if maps is None else map(torch.matmul, maps, scaled))
    return [
        DenseEdges(x, matrix, shift, receivers=upper, sender_role=lower.role)
        for x, matrix, shift, upper, lower in zip(features, matrices, shifts, rows[1:], rows[:-1], strict=True)
    ]


def _flipped(block: DenseEdges, receivers: Rows) -> DenseEdges:
    """A block towards the other end of its edges."""
    matrix, shift = (None if x is None else x.transpose(0, 1) for x in (block.matrix, block.shift))
    values = block.values.transpose(1, 2).contiguous()
    return DenseEdges(values, matrix, shift, receivers=receivers, sender_role=block.rows.role)


def _features(chunks: ChunkPlan, blocks: Blocks) -> list[Tensor]:
    """The features of blocks."""
    parts = [part for block in blocks if block is not None for part in block]
    return [chunks.features(part) if part.updates else part.values for part in parts]


# Networks of any architectures


def run_graph(
    model: MessagePassingModel,
    nets: Sequence[NetParams],
    probes: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """The readout [sum of B, out_dim] of networks of any architectures, in order; or the features of all nodes [N, D]
    and edges [E, D], network by network; `probes` [N, d], where there are some, are added to A_v bias; `statistics` as
    in `run_chains`, of all networks."""
    graph = ParameterGraph.from_params(nets, model.spec.kernel, model.max_hidden)
    plain = any(not _has_fast_form(layer) for layer in model.layers)
    rows = RoleRows(graph, model.graph_context(graph), model.edge_positions is not None, plain)
    positions = None
    nodes = [model.node_linear(x) for x in rows.split(graph.nodes)]
    if probes is not None:
        nodes = [x + features for x, features in zip(nodes, rows.split(probes), strict=True)]
    if model.node_positions is not None:
        types = rows.split(graph.node_type)
        positions = [model.node_positions.table.index_select(0, own) for own in types]
        nodes = [_embed(model, *group) for group in zip(rows.rows, nodes, positions, strict=True)]
        if model.node_position_map is not None:
            table = model.node_position_map.table
            nodes = [linear_by_type(x, table, own) for x, own in zip(nodes, types, strict=True)]
    sums = all(layer.aggregator == "add" for layer in model.layers)  # means are of all edges together
    kinds = graph.edges.kinds() if sums else None
    along = rows.direction(against=False, kinds=kinds)
    edges = _graph_edges(model, model.edge_linear, graph.edges, along, along)
    backward_edges: Blocks = []
    if model.bidirectional:
        raw, linear = graph.edges, model.edge_linear
        if model.backward_edge_linear is not None:
            raw = EdgeValues.of_networks(map(model.reciprocal_kernels, nets), raw.width)
            linear = model.backward_edge_linear
        backward_edges = _graph_edges(model, linear, raw, along, rows.direction(against=True, kinds=kinds))
    chunks = model.chunks(graph.edges.num_edges, graph.nodes.device)
    residuals = [rows.residuals(against) for against in (False, True)]
    layers = LayerRun(BY_ROLE, rows.rows, positions, chunks, residuals)
    for layer, (_, reads) in zip(model.layers, model.reads, strict=True):
        nodes, edges, backward_edges = layers.layer(layer, reads, nodes, edges, backward_edges)
    if model.readout is not None:
        inputs, outputs = (rows.by_network(role, nodes[role]) for role in (0, 2))
        return read(model.readout, rows.rows[1], inputs, nodes[1], outputs, rows.sum_hidden, *statistics)
    changes = torch.cat(_features(chunks, edges)).index_select(0, inverse(along.order))
    x = torch.cat([nodes[1].new_zeros(rows.sizes[0], nodes[1].shape[-1]), *nodes[1:]]).index_select(0, rows.rank)
    return x, changes


def _has_fast_form(layer: MessagePassingLayer) -> bool:
    """Whether no message and no edge update is run in its plain form."""
    messages = [message for message in (layer.forward_message, layer.backward_message) if message is not None]
    updates = [update for update in (layer.edge_update, layer.backward_edge_update) if update is not None]
    return all(message in receive for message in messages) and all(update in updated_edges for update in updates)


def _graph_edges(
    model: MessagePassingModel, linear: nn.Linear, raw: EdgeValues, along: Direction, towards: Direction
) -> Blocks:
    """A_e weight of raw features, with positional embeddings; each part is as wide as its own largest kernel.

    Args:
        model: the model.
        linear: A_e.
        raw: in the graph's order.
        along: the edges by receiver.
        towards: the direction of the blocks.
    """
    if model.edge_positions is not None and model.edge_position_net is not None:
        features = _positioned(model, model.edge_position_net, linear, raw, along)
        parts = zip(towards.split(features), towards.all_parts, strict=True)
        return towards.by_block([SparseEdges(values, incidence=incidence) for values, incidence in parts])
    edges = []
    for block, incidence in zip(towards.split_values(raw), towards.all_parts, strict=True):
        places = block.places
        weight, shift = linear.weight[:, places.to(linear.weight.device)], None
        matrix = weight[None]
        if model.edge_positions is not None and model.adds_edge_positions:
            shift = model.edge_positions.table
        elif model.edge_positions is not None:
            mapped = model.edge_position_map
            matrix = model.edge_positions.table[..., None] * weight
            matrix = matrix if mapped is None else mapped.table @ matrix
        edges.append(SparseEdges(block.at(places), matrix, shift, incidence=incidence))
    return towards.by_block(edges)


def _positioned(
    model: MessagePassingModel, net: nn.Module, linear: nn.Linear, raw: EdgeValues, along: Direction
) -> Tensor:
    """The equivariant net of (A_e weight, P), [E, D] in the graph's order."""
    assert model.edge_positions is not None
    table, mapped = model.edge_positions.table, model.edge_position_map
    types = [part.type for part in along.all_parts]
    features = [
        run(net, part.rows, values.linear(linear.weight), table.index_select(0, part.type))
        for part, values in zip(along.all_parts, along.split_values(raw), strict=True)
    ]
    if mapped is not None:
        features = [linear_by_type(x, mapped.table, t) for x, t in zip(features, types, strict=True)]
    return torch.cat(features).index_select(0, inverse(along.order))
