"""The parameter graphs of networks of any architectures, as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from scalegmn.networks import ACTIVATIONS, HETERO, NetParams, NetSpec
from scalegmn.networks.scalar_groups import TRIVIAL, ScalarGroup

ROLES = ("input", "hidden", "output")


@dataclass(frozen=True)
class SparseGraph:
    """The parameter graphs of G networks as the separate parts of one graph.

    Networks follow one another as they are given, nodes and edges of each in its spec's order. N nodes, E edges and C
    connections of all networks together.

    Attributes:
        nodes: [N, 1] raw node features: biases; `NetSpec.input_value` for input nodes.
        edges: [E, K] raw edge features: kernels centred in the largest one, flattened, zeros around; the weight of a
            linear layer in component 0.
        edge_index: [2, E] long, rows sender and receiver.
        network: [N] long, the network of a node, 0..G-1.
        num_networks: G.
        num_inputs: n_0.
        role: [N] long, index into `ROLES`; inputs are the network's own, of types below n_0, and constant ones.
        node_type: [N] long: n_0 types of input nodes, one per hidden layer, n_L of output nodes.
        edge_type: [E] long: n_0 types of edges from input nodes, those between hidden layers, n_L of edges to output
            nodes. Types of outputs come after those of as many hidden layers as the model reads.
        linear: [E] bool, whether an edge is of a linear layer; else of a convolution.
        activation: [N] long, index into `ACTIVATIONS` of a hidden node's own activation; -1 of input and output nodes.
        group: [N] long, index into `groups`: the scalars that commute with the activations of a hidden node and of all
            nodes that residual connections couple to it; of input and output nodes, those of their network's first
            hidden node.
        residuals: [2, C] long, rows sender and receiver of residual connections, which have no weights.
        attention: the same of attention, whose queries and keys act on values (`NetSpec.attention_index`).
        groups: the scalar groups that networks of these architectures may have.
    """

    nodes: Tensor
    edges: Tensor
    edge_index: Tensor
    network: Tensor
    num_networks: int
    num_inputs: int
    role: Tensor
    node_type: Tensor
    edge_type: Tensor
    linear: Tensor
    activation: Tensor
    group: Tensor
    residuals: Tensor
    attention: Tensor
    groups: tuple[ScalarGroup, ...]

    @classmethod
    def from_params(cls, nets: Sequence[NetParams], kernel: tuple[int, int], max_hidden_layers: int) -> SparseGraph:
        """The graph of all networks, in order; one batch of networks per spec is the fastest.

        Args:
            nets: networks with as many inputs and as many outputs as one another.
            kernel: (kh, kw), at least that of each.
            max_hidden_layers: at least the hidden layers of each.
        """
        device = nets[0].biases[0].device
        found = [_indices(params.spec, max_hidden_layers, len(ACTIVATIONS)) for params in nets]
        sizes = [len(params) for params in nets]
        own = [
            torch.zeros(size, dtype=torch.long) if params.activation is None else params.activation
            for params, size in zip(nets, sizes, strict=True)
        ]
        starts = accumulate((size * params.spec.num_nodes for params, size in zip(nets, sizes, strict=True)), initial=0)
        firsts = [
            start + torch.arange(size) * params.spec.num_nodes
            for start, params, size in zip(starts, nets, sizes, strict=False)
        ]

        def alike(name: str) -> Tensor:
            """[N] or [E]: what all networks of a spec have in common."""
            parts = (getattr(indices, name) for indices in found)
            return torch.cat([part.repeat(size) for part, size in zip(parts, sizes, strict=True)]).to(device)

        def by_activation(name: str) -> Tensor:
            """[N]: what networks' own activations decide."""
            tables = (getattr(indices, name) for indices in found)
            return torch.cat([table.to(device)[a.to(device)].flatten() for table, a in zip(tables, own, strict=True)])

        def ends(name: str) -> Tensor:
            """[2, E] or [2, C], node numbers in the whole graph."""
            pairs = (getattr(indices, name) for indices in found)
            moved = [(pair[:, None] + f[:, None]).flatten(1) for pair, f in zip(pairs, firsts, strict=True)]
            return torch.cat(moved, dim=1).to(device)

        groups = tuple(dict.fromkeys(group for indices in found for group in indices.groups))
        places = [torch.tensor([groups.index(group) for group in indices.groups]) for indices in found]
        found = [indices._replace(group=place[indices.group]) for indices, place in zip(found, places, strict=True)]
        counts = torch.tensor([params.spec.num_nodes for params in nets])
        per_network = counts.repeat_interleave(torch.tensor(sizes))
        return cls(
            torch.cat([torch.cat(params.node_features(), dim=1).flatten(0, 1) for params in nets]),
            torch.cat([_edge_features(params, kernel) for params in nets]),
            ends("edge_index"),
            torch.arange(sum(sizes)).repeat_interleave(per_network).to(device),
            sum(sizes),
            nets[0].spec.layout[0],
            *map(alike, ("role", "node_type", "edge_type", "linear")),
            *map(by_activation, ("activation", "group")),
            ends("residuals"),
            ends("attention"),
            groups,
        )


class _Indices(NamedTuple):
    """What follows from a spec alone: attributes of the graph of one network, with a row per activation that a network
    of a mixed batch may have (else one row) for `activation` and `group`."""

    edge_index: Tensor
    role: Tensor
    node_type: Tensor
    edge_type: Tensor
    linear: Tensor
    activation: Tensor
    group: Tensor
    groups: tuple[ScalarGroup, ...]
    residuals: Tensor
    attention: Tensor


@lru_cache(256)
def _indices(spec: NetSpec, max_hidden_layers: int, num_activations: int) -> _Indices:
    """The indices of one network; of a mixed batch, a row for each of the `num_activations` that are registered."""
    sizes, num_outputs = torch.tensor(spec.layout), spec.layout[-1]
    later = max_hidden_layers - (spec.num_node_types - spec.layout[0] - num_outputs)
    blocks = list(zip(spec.layers, spec.edge_types, strict=True))
    node_type = torch.cat(spec.node_types)
    edge_type = torch.cat([types.expand(layer.weight_shape[:2]).flatten() for layer, types in blocks])
    linear = [torch.full(layer.weight_shape[:2], layer.kernel is None).flatten() for layer, _ in blocks]
    own = list(ACTIVATIONS)[:num_activations] if spec.is_hetero else [HETERO]
    group, groups = _scalar_groups(spec, own)
    return _Indices(
        spec.edge_index,
        torch.tensor([ROLES.index(role) for role in spec.roles]).repeat_interleave(sizes),
        shift_types_to_depth(node_type, spec.num_node_types, num_outputs, later),
        shift_types_to_depth(edge_type, spec.num_edge_types, num_outputs, later),
        torch.cat(linear),
        torch.stack([_activation(spec, name) for name in own]),
        group,
        groups,
        spec.residual_index,
        spec.attention_index,
    )


def shift_types_to_depth(types: Tensor, num_types: int, num_outputs: int, num_more: int) -> Tensor:
    """Types of nodes or edges, of any shape, in the numbering of networks with `num_more` more hidden layers."""
    return types + num_more * (types >= num_types - num_outputs)


def _activation(spec: NetSpec, own: str) -> Tensor:
    """[N], of a network that has `own` in layers where networks differ."""
    indices = torch.full((len(spec.layout),), -1)
    for layer, (_, place) in zip(spec.layers[:-1], spec.node_layers, strict=False):
        indices[place] = ACTIVATIONS.index(own if layer.activation == HETERO else layer.activation)
    return indices.repeat_interleave(torch.tensor(spec.layout))


def _scalar_groups(spec: NetSpec, activations: Sequence[str]) -> tuple[Tensor, tuple[ScalarGroup, ...]]:
    """The scalar group of each node, [A, N] index into the second result, for networks with each of A activations in
    layers where networks differ."""
    groups: dict[ScalarGroup, int] = {}
    rows = []
    for name in activations:
        layers = [torch.full((size,), groups.setdefault(TRIVIAL, len(groups))) for size in spec.layout]
        for channels in spec.scaling_classes:
            group = spec.class_symmetry(channels, name)
            assert isinstance(group, ScalarGroup)  # where networks differ, `name` is given
            index = groups.setdefault(group, len(groups))
            for layer in channels.layers:
                layers[spec.node_layers[layer][1]][channels.channels] = index
        hidden = [int(layer[0]) for layer, role in zip(layers, spec.roles, strict=True) if role == "hidden"]
        for layer, role in zip(layers, spec.roles, strict=True):
            if role != "hidden":
                layer[:] = hidden[0] if hidden else groups[TRIVIAL]
        rows.append(torch.cat(layers))
    return torch.stack(rows), tuple(groups)


def _edge_features(params: NetParams, kernel: tuple[int, int]) -> Tensor:
    """[B E, K], network by network."""
    return torch.cat([block.flatten(1, 2) for block in params.edge_features(kernel)], dim=1).flatten(0, 1)
