"""The fast form of message passing models: networks of one architecture in dense blocks, others as one sparse graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.edges import DenseEdges, SparseEdges, linear_by_type, sum_rows
from scalegmn.engine.layer_plans import run_as_plan
from scalegmn.engine.layers import Blocks, LayerRun
from scalegmn.engine.layout import BY_ROLE, Direction, Layout, RoleRows, inverse
from scalegmn.engine.messages import receive, updated_edges
from scalegmn.engine.modules import run
from scalegmn.engine.readouts import read
from scalegmn.engine.rows import Rows
from scalegmn.graphs.edge_values import EdgeValues
from scalegmn.graphs.parameter_graph import ParameterGraph, shift_types_to_depth
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.features import Kernels, beside
from scalegmn.networks.parameter_indices import senders_by_group
from scalegmn.networks.scalar_groups import ScalarGroup
from scalegmn.nn.context import NodeContext
from scalegmn.nn.message_passing import MessagePassingLayer, NeededParts
from scalegmn.nn.positional import PositionalEmbedding, TypedLinear


class LayerTypes(nn.Module):
    """The types of nodes, or of edges, of networks of one architecture, layer by layer: buffers that move with a model.

    Args:
        types: per layer or block, long tensors whose shapes broadcast to those of the features without D.
    """

    types: Tensor

    def __init__(self, types: Sequence[Tensor]) -> None:
        super().__init__()
        self.shapes = [tuple(block.shape) for block in types]
        self.register_buffer("types", torch.cat([block.flatten() for block in types]), persistent=False)

    @classmethod
    def of_nodes(cls, spec: NetSpec, num_more: int, last: int) -> LayerTypes:
        """Of nodes, in the numbering of networks with `num_more` more hidden layers; types above `last` are `last`."""
        shift = partial(
            shift_types_to_depth,
            num_types=spec.num_node_types,
            num_last=spec.layout[-1] + spec.num_places,
            num_more=num_more,
        )
        return cls([shift(types).clamp(max=last) for types in spec.node_types])

    @classmethod
    def of_edges(cls, spec: NetSpec, num_more: int, last: int) -> LayerTypes:
        """Of edges, in the numbering of networks with `num_more` more hidden layers; types above `last` are `last`."""
        shift = partial(
            shift_types_to_depth,
            num_types=spec.num_edge_types,
            num_last=spec.num_output_edge_types,
            num_more=num_more,
        )
        return cls([shift(types).clamp(max=last) for types in spec.edge_types])

    def rows(self, table: Tensor) -> list[Tensor]:
        """Per layer or block, table[types] of shape (*types.shape, ...); of a table with one row, [1, ..., 1, ...]."""
        if len(table) == 1:
            return [table.view(*[1] * len(shape), *table.shape[1:]) for shape in self.shapes]
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        rows = table[self.types].split(sizes)
        return [block.reshape(*shape, *block.shape[1:]) for block, shape in zip(rows, self.shapes, strict=True)]


class MessagePassingModel(Protocol):
    """What the engine reads of a model; see `scalegmn.models.scalegmn.ScaleGMN`."""

    spec: NetSpec
    max_hidden: int
    groups: tuple[ScalarGroup, ...]
    layers: Sequence[MessagePassingLayer]
    needed: Sequence[tuple[NeededParts, NeededParts]]
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
    node_types: LayerTypes
    edge_types: LayerTypes
    summed_roles: tuple[str, ...]
    adds_edge_positions: bool
    bidirectional: bool

    def network_groups(self, params: NetParams) -> Tensor:
        """[B] long, index into `groups`, of networks whose hidden nodes have one group."""
        ...

    def graph(self, nets: Sequence[NetParams], gradients: Sequence[Sequence[Tensor]]) -> ParameterGraph:
        """The parameter graphs of networks, with the types of nodes and edges that the model tells apart; `gradients`
        as in `ParameterGraph.from_params`."""
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


# Networks of one architecture


def run_layers(
    model: MessagePassingModel,
    params: NetParams,
    kinds: tuple[int, ...] | None,
    probes: Sequence[Tensor] | None = None,
    gradients: Sequence[Tensor] | None = None,
    statistics: Sequence[Tensor] = (),
) -> Tensor | Features:
    """The readout [B, out_dim], or the features of nodes and edges, of networks like `model.spec`: a dense block for
    each layer of weights, without a list of edges.

    Args:
        model: the model.
        params: the networks.
        kinds: per layer of nodes, the index into `model.groups` of their scalar group; None: the hidden nodes of a
            network have one (`model.network_groups`).
        probes: what is added to A_v bias, per layer of nodes [B, n_l, d].
        gradients: what is read beside the weights, per block [B, n_l, n_{l-1}, H k].
        statistics: what the readout reads beside the nodes, nothing or [B, S].
    """
    num_layers, num_groups = len(params.spec.layout), len(model.groups)
    if num_groups == 1 or kinds is not None:
        kinds = (0,) * num_layers if num_groups == 1 or kinds is None else kinds
        sizes = [tuple(len(params) * (group == kind) for group in range(num_groups)) for kind in kinds]
        groups = sizes if num_groups > 1 else [None] * num_layers
        return _run_layers(model, params, probes, gradients, statistics, kinds, groups)
    group, kinds = model.network_groups(params), (0,) * num_layers
    if torch.compiler.is_compiling():
        return _run_layers(model, params, probes, gradients, statistics, kinds, [group] * num_layers)
    order = group.argsort(stable=True)
    back = order.argsort()
    of_all = [tuple(group.bincount(minlength=num_groups).tolist())] * num_layers
    of_nodes, of_edges = (
        None if part is None else [features[order] for features in part] for part in (probes, gradients)
    )
    sorted_statistics = [rows[order] for rows in statistics]
    result = _run_layers(model, params[order], of_nodes, of_edges, sorted_statistics, kinds, of_all)
    if isinstance(result, Tensor):
        return result[back]
    nodes, edges = ([features[back] for features in part] for part in result)
    return nodes, edges


def _run_layers(
    model: MessagePassingModel,
    params: NetParams,
    probes: Sequence[Tensor] | None,
    gradients: Sequence[Tensor] | None,
    statistics: Sequence[Tensor],
    kinds: tuple[int, ...],
    sizes: Sequence[tuple[int, ...] | Tensor | None],
) -> Tensor | Features:
    """`run_layers`, with the networks of each scalar group as in `Rows.sizes`, per layer of nodes."""
    spec, layout = params.spec, Layout.by_layer(params.spec, kinds)
    rows = [Rows(role, model.groups, of_layer) for role, of_layer in zip(spec.roles, sizes, strict=True)]
    positions = model.node_types.rows(model.node_positions.table) if model.node_positions is not None else None
    nodes = [model.node_linear(x) for x in params.node_features()]
    if probes is not None:
        nodes = [x + features for x, features in zip(nodes, probes, strict=True)]
    if positions is not None:
        nodes = [_embed(model, *layer) for layer in zip(rows, nodes, positions, strict=True)]
        if model.node_position_map is not None:
            maps = model.node_types.rows(model.node_position_map.table)
            nodes = [torch.einsum("...d,...od->...o", x, m) for x, m in zip(nodes, maps, strict=True)]
    kernels = params.kernels()
    if gradients is not None:
        kernels = beside(kernels, gradients, model.spec.edge_dim)
    blocks: Blocks = [[block] for block in _layer_edges(model, model.edge_linear, params, kernels, rows)]
    backward_blocks: Blocks = []
    if model.bidirectional:
        linear = model.edge_linear
        if model.backward_edge_linear is not None:
            linear, kernels = model.backward_edge_linear, list(model.reciprocal_kernels(params))
        against = _layer_edges(model, linear, params, kernels, rows)
        backward_blocks = [[turned(block, layer)] for block, layer in zip(against, spec.layers, strict=True)]
    chunks = model.chunks(len(params) * spec.num_edges, params.biases[0].device)
    residuals = _residuals(spec, params.biases[0].device)
    layers = LayerRun(layout, rows, positions, chunks, residuals)
    is_chain = spec.is_chain and not spec.residuals
    needed = [of_chains if is_chain else layout.needed(by_role) for of_chains, by_role in model.needed]
    planned = None
    if model.readout is not None:
        planned = run_as_plan(model.layers, layers, needed, nodes, blocks, backward_blocks)
    if planned is not None:
        nodes = planned
    else:
        for layer, parts in zip(model.layers, needed, strict=True):
            nodes, blocks, backward_blocks = layers.layer(layer, parts, nodes, blocks, backward_blocks)
    if model.readout is None:
        return nodes, _features(chunks, blocks)
    hidden = [index for index, role in enumerate(spec.roles) if role == "hidden"]
    if len({kinds[index] for index in hidden}) <= 1:
        joined = torch.cat([nodes[0][:, :0], *(nodes[index] for index in hidden)], dim=-2)
        of_hidden = rows[hidden[0]] if hidden else rows[0]._replace(role="hidden")
        return read(model.readout, of_hidden, nodes[0], joined, nodes[-1], lambda x: x.sum(1), *statistics)
    hidden.sort(key=lambda index: kinds[index])
    joined = torch.cat([nodes[index].flatten(0, 1) for index in hidden])
    networks = torch.arange(len(params), device=joined.device)
    network = torch.cat([networks.repeat_interleave(spec.layout[index]) for index in hidden])
    counts = [len(params) * sum(spec.layout[i] for i in hidden if kinds[i] == k) for k in range(len(model.groups))]
    of_hidden = Rows("hidden", model.groups, tuple(counts), network)
    total = partial(sum_rows, index=network, num_rows=len(params))
    return read(model.readout, of_hidden, nodes[0], joined, nodes[-1], total, *statistics)


def _residuals(spec: NetSpec, device: torch.device) -> list[dict[int, Tensor]]:
    """Residual connections along and against, as in `LayerRun`."""
    if not spec.residuals:
        return [{}, {}]
    starts = [0, *accumulate(spec.layout)]
    ends = []
    for senders, receivers in (spec.residual_index, spec.residual_index.flip(0)):
        of_set = torch.searchsorted(torch.tensor(starts[1:]), receivers, right=True)
        by_set = {int(k): torch.stack([senders, receivers - starts[k]])[:, of_set == k] for k in of_set.unique()}
        ends.append({k: pairs.to(device) for k, pairs in by_set.items()})
    return ends


def _embed(model: MessagePassingModel, rows: Rows, x: Tensor, p: Tensor) -> Tensor:
    """Node features with positional embeddings."""
    if rows.role in model.summed_roles:
        return x + p
    return x * p if model.node_position_net is None else run(model.node_position_net, rows, x, p)


def _layer_edges(
    model: MessagePassingModel,
    linear: nn.Linear,
    params: NetParams,
    kernels: Sequence[Kernels],
    rows: Sequence[Rows],
) -> list[DenseEdges]:
    """A_e weight, with positional embeddings; each block is as wide as its own kernels."""
    spec, positions, maps = params.spec, None, None
    if model.edge_positions is not None:
        positions = model.edge_types.rows(model.edge_positions.table)
        maps = None if model.edge_position_map is None else model.edge_types.rows(model.edge_position_map.table)
    blocks = []
    for index, ((values, places), (lower, upper)) in enumerate(zip(kernels, spec.node_layers, strict=True)):
        sender = senders_by_group(spec.layers[index]).to(values.device) if spec.layers[index].groups > 1 else None
        block = DenseEdges(values, receivers=rows[upper], senders=rows[lower], sender=sender)
        whole = len(places) == linear.in_features
        weight = linear.weight if whole else linear.weight[:, places.to(linear.weight.device)]
        if positions is None:
            blocks.append(replace(block, matrix=weight[None, None]))
        elif model.edge_position_net is not None:
            features = run(model.edge_position_net, rows[upper], nn.functional.linear(values, weight), positions[index])
            if maps is not None:
                features = torch.einsum("...d,...od->...o", features, maps[index])
            blocks.append(replace(block, values=features))
        elif model.adds_edge_positions:
            blocks.append(replace(block, matrix=weight[None, None], shift=positions[index]))
        else:
            scaled = positions[index][..., None] * weight
            blocks.append(replace(block, matrix=scaled if maps is None else maps[index] @ scaled))
    return blocks


def turned(block: DenseEdges, layer: LayerSpec) -> DenseEdges:
    """A block towards the other end of its edges."""
    groups, sender = layer.groups, None
    if groups > 1:
        size = layer.out_dim // groups
        first = torch.arange(groups, device=block.values.device).repeat_interleave(layer.in_dim // groups) * size
        sender = first[:, None] + torch.arange(size, device=first.device)
    matrix, shift = (
        x
        if x is None or x.shape[:2] == (1, 1)
        else _transposed(x.expand(*block.values.shape[1:3], *x.shape[2:])[None], groups)[0]
        if groups > 1
        else x.transpose(0, 1)
        for x in (block.matrix, block.shift)
    )
    values = _transposed(block.values, groups)
    return DenseEdges(values, matrix, shift, receivers=block.senders, senders=block.receivers, sender=sender)


def _transposed(x: Tensor, groups: int) -> Tensor:
    """Values of edges [B, R, S, ...] of a layer with groups, by sender: [B, groups S, R / groups, ...]."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(1, 2).contiguous()


def _features(chunks: ChunkPlan, blocks: Blocks) -> list[Tensor]:
    """The features of blocks."""
    parts = [part for block in blocks if block is not None for part in block]
    return [chunks.features(part) if part.updates else part.values for part in parts]


# Networks of any architectures


def run_graph(
    model: MessagePassingModel,
    nets: Sequence[NetParams],
    probes: Tensor | None = None,
    gradients: Sequence[Sequence[Tensor]] = (),
    statistics: Sequence[Tensor] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """The readout [sum of B, out_dim] of networks of any architectures, in order; or the features of all nodes [N, D]
    and edges [E, D], network by network; `probes` [N, d], where there are some, are added to A_v bias; `gradients` as
    in `run_layers`, of each batch, where there are some; `statistics` as in `run_layers`, of all networks."""
    graph = model.graph(nets, gradients)
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
    for layer, (_, needed) in zip(model.layers, model.needed, strict=True):
        nodes, edges, backward_edges = layers.layer(layer, needed, nodes, edges, backward_edges)
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
