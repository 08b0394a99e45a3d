"""The parameter graphs of networks of any architectures, as one flat graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from scalegmn.graphs.edge_values import EdgeValues
from scalegmn.networks import HETERO, NetParams, NetSpec
from scalegmn.networks.features import beside
from scalegmn.networks.parameter_indices import ROLES
from scalegmn.networks.scalar_groups import TRIVIAL, ScalarGroup


@dataclass(frozen=True)
class ParameterGraph:
    """The parameter graphs of G networks as the separate components of one graph (ScaleGMN, section 4,
    https://arxiv.org/abs/2406.10685): a node per neuron or channel, an edge per weight or kernel.

    Networks follow one another as they are given, nodes and edges of each in the order of its spec. All networks
    together have N nodes, E edges and C connections without weights.

    Attributes:
        nodes: [N, 1] raw node features: biases; `NetSpec.input_value` for input nodes.
        edges: of [E, K] raw edge features: kernels centred in the largest one, flattened, zeros around; the weight of a
            linear layer in component 0; with `gradients`, H kernels more.
        edge_index: [2, E] long, rows sender and receiver.
        network: [N] long, the network of a node, 0..G-1.
        num_networks: G.
        num_inputs: n_0.
        role: [N] long, index into `ROLES`. Besides a network's inputs, of types below n_0, constant ones are inputs.
        node_type: [N] long: n_0 types of input nodes, one per hidden layer, n_L of output nodes, one per place of
            pinned nodes (`parameter_indices.has_places`).
        edge_type: [E] long: n_0 types of edges from input nodes, those between hidden layers, n_L of edges to output
            nodes. Types of outputs come after those of as many hidden layers as the model reads.
        linear: [E] bool, whether an edge is of a linear layer; else of a convolution.
        activation: [N] long, index into `activations` of a hidden node's own activation; -1 of input and output nodes.
        activations: the names of those that the architectures admit.
        scalar_group: [N] long, index into `scalar_groups`: the scalars of a hidden node's class, by which it and all
            nodes that residual connections couple with it may be multiplied; of input and output nodes, as for the
            first hidden node of their network.
        scalar_groups: the different groups.
        residuals: [2, C] long, rows sender and receiver of residual connections, which have no weights.
        attention: the same of attention, whose queries and keys act on values (`NetSpec.attention_index`).
    """

    nodes: Tensor
    edges: EdgeValues
    edge_index: Tensor
    network: Tensor
    num_networks: int
    num_inputs: int
    role: Tensor
    node_type: Tensor
    edge_type: Tensor
    linear: Tensor
    activation: Tensor
    activations: tuple[str, ...]
    scalar_group: Tensor
    scalar_groups: tuple[ScalarGroup, ...]
    residuals: Tensor
    attention: Tensor

    @classmethod
    def from_params(
        cls,
        nets: Sequence[NetParams],
        kernel: tuple[int, int],
        max_hidden_layers: int,
        gradients: Sequence[Sequence[Tensor]] = (),
    ) -> ParameterGraph:
        """The graph of all networks, in order; one batch of networks per spec is the fastest.

        Args:
            nets: networks with as many inputs and as many outputs as one another.
            kernel: (kh, kw), at least that of each.
            max_hidden_layers: at least the hidden layers of each.
            gradients: of each batch, further raw features of edges, H kernels like their own, per block
                [B, n_l, n_{l-1}, H k]; empty: none.
        """
        kernels, width = [params.kernels(kernel) for params in nets], math.prod(kernel)
        if gradients:
            num_kernels = 1 + gradients[0][0].shape[-1] // len(kernels[0][0].places)
            kernels = [beside(blocks, more, width) for blocks, more in zip(kernels, gradients, strict=True)]
            width *= num_kernels
        device, sizes = nets[0].biases[0].device, [len(params) for params in nets]
        indices = [_indices(params.spec, max_hidden_layers) for params in nets]
        activations = tuple(dict.fromkeys(name for of_spec in indices for name in of_spec.activations))
        scalar_groups = tuple(dict.fromkeys(group for of_spec in indices for group in of_spec.scalar_groups))
        num_nodes = torch.tensor([params.spec.num_nodes for params in nets]).repeat_interleave(torch.tensor(sizes))
        first_nodes = torch.split(num_nodes.cumsum(0) - num_nodes, sizes)  # of each network

        def repeated(name: str) -> Tensor:
            """[N] or [E]: an attribute that all networks of a spec share."""
            parts = (getattr(of_spec, name).repeat(size) for of_spec, size in zip(indices, sizes, strict=True))
            return torch.cat(list(parts)).to(device)

        def shifted(name: str) -> Tensor:
            """[2, E] or [2, C]: pairs of nodes, numbered in the whole graph."""
            pairs = zip(indices, first_nodes, strict=True)
            moved = [(getattr(of_spec, name)[:, None] + first[:, None]).flatten(1) for of_spec, first in pairs]
            return torch.cat(moved, dim=1).to(device)

        return cls(
            nodes=torch.cat([torch.cat(params.node_features(), dim=1).flatten(0, 1) for params in nets]),
            edges=EdgeValues.of_networks(kernels, width),
            edge_index=shifted("edge_index"),
            network=torch.arange(sum(sizes)).repeat_interleave(num_nodes).to(device),
            num_networks=sum(sizes),
            num_inputs=nets[0].spec.layout[0],
            role=repeated("role"),
            node_type=repeated("node_type"),
            edge_type=repeated("edge_type"),
            linear=repeated("linear"),
            activation=_by_activation(nets, [_renumbered(i.activation, i.activations, activations) for i in indices]),
            activations=activations,
            scalar_group=_by_activation(
                nets, [_renumbered(i.scalar_group, i.scalar_groups, scalar_groups) for i in indices]
            ),
            scalar_groups=scalar_groups,
            residuals=shifted("residuals"),
            attention=shifted("attention"),
        )


class _Indices(NamedTuple):
    """Attributes of the graph of one network that follow from its spec alone.

    `activation` and `scalar_group` are tables with a row for each activation that a network of a mixed batch may have;
    of other specs they have one row.
    """

    edge_index: Tensor
    role: Tensor
    node_type: Tensor
    edge_type: Tensor
    linear: Tensor
    activation: Tensor
    activations: tuple[str, ...]
    scalar_group: Tensor
    scalar_groups: tuple[ScalarGroup, ...]
    residuals: Tensor
    attention: Tensor


def _by_activation(nets: Sequence[NetParams], tables: Sequence[Tensor]) -> Tensor:
    """[N]: of each network the row of its spec's table, [activations, nodes], that its activation names."""
    device, rows = nets[0].biases[0].device, []
    for params, table in zip(nets, tables, strict=True):
        activation = torch.zeros(len(params), dtype=torch.long, device=device)
        activation = activation if params.activation is None else params.activation.to(device)
        rows.append(table.to(device)[activation].flatten())
    return torch.cat(rows)


def _renumbered(index: Tensor, items: Sequence[object], others: Sequence[object]) -> Tensor:
    """Indices into `items` as indices into `others`, which has all of them; -1 stays."""
    return torch.tensor([*(others.index(item) for item in items), -1])[index]


@lru_cache(256)
def _indices(spec: NetSpec, max_hidden_layers: int) -> _Indices:
    """The indices of one network; of a mixed batch, a row for each of the spec's activations."""
    sizes = torch.tensor(spec.layout)
    later = max_hidden_layers - spec.num_hidden_layers
    blocks = list(zip(spec.layers, spec.edge_types, strict=True))
    edge_type = torch.cat([types.expand(layer.weight_shape[:2]).flatten() for layer, types in blocks])
    linear = [torch.full(layer.weight_shape[:2], layer.kernel is None).flatten() for layer, _ in blocks]
    of_networks = spec.activations if spec.is_hetero else (HETERO,)
    activations = tuple(dict.fromkeys([*spec.activations, *(layer.activation for layer in spec.layers[:-1])]))
    activations = tuple(name for name in activations if name != HETERO)
    scalar_groups: dict[ScalarGroup, int] = {}
    return _Indices(
        edge_index=spec.edge_index,
        role=torch.tensor([ROLES.index(role) for role in spec.roles]).repeat_interleave(sizes),
        node_type=node_types(spec, max_hidden_layers),
        edge_type=shift_types_to_depth(edge_type, spec.num_edge_types, spec.num_output_edge_types, later),
        linear=torch.cat(linear),
        activation=torch.stack([node_activations(spec, name, activations) for name in of_networks]),
        activations=activations,
        scalar_group=torch.stack(
            [torch.cat(scalar_groups_by_layer(spec, name, scalar_groups)) for name in of_networks]
        ),
        scalar_groups=tuple(scalar_groups),
        residuals=spec.residual_index,
        attention=spec.attention_index,
    )


def shift_types_to_depth(types: Tensor, num_types: int, num_last: int, num_more: int) -> Tensor:
    """Types of nodes or edges, of any shape, in the numbering of networks with `num_more` more hidden layers; the last
    `num_last` types are of no hidden layer."""
    return types + num_more * (types >= num_types - num_last)


def node_types(spec: NetSpec, max_hidden_layers: int) -> Tensor:
    """[N]: types of a network's nodes, in the numbering of networks with so many hidden layers."""
    num_last, num_more = spec.layout[-1] + spec.num_places, max_hidden_layers - spec.num_hidden_layers
    return shift_types_to_depth(torch.cat(spec.node_types), spec.num_node_types, num_last, num_more)


def node_activations(spec: NetSpec, hetero: str, names: Sequence[str]) -> Tensor:
    """[N]: indices into `names`, -1 of input and output nodes; `hetero` is the activation of hetero layers."""
    indices = torch.full((len(spec.layout),), -1)
    for layer, (_, place) in zip(spec.layers[:-1], spec.node_layers, strict=False):
        indices[place] = names.index(hetero if layer.activation == HETERO else layer.activation)
    return indices.repeat_interleave(torch.tensor(spec.layout))


def scalar_groups_by_layer(spec: NetSpec, hetero: str, groups: dict[ScalarGroup, int]) -> list[Tensor]:
    """Per layer of nodes [n_l]: the number of each node's group in `groups`, to which new ones are added.

    Args:
        spec: of the networks.
        hetero: the activation of hetero layers.
        groups: those known so far, numbered.
    """
    layers = [torch.zeros(size, dtype=torch.long) for size in spec.layout]
    for coupled in spec.scaling_classes:
        group = spec.class_symmetry(coupled, hetero)
        assert isinstance(group, ScalarGroup)  # a hetero layer has its network's activation here
        for index in coupled.layers:
            layers[spec.node_layers[index][1]][coupled.channels] = groups.setdefault(group, len(groups))
    hidden = [layer for layer, role in zip(layers, spec.roles, strict=True) if role == "hidden"]
    first = int(hidden[0][0]) if hidden else groups.setdefault(TRIVIAL, len(groups))
    for index, layer in enumerate(spec.layers):
        if layer.pinned:
            layers[spec.node_layers[index][1]].fill_(groups.setdefault(TRIVIAL, len(groups)))
    for nodes, role in zip(layers, spec.roles, strict=True):
        if role != "hidden":
            nodes.fill_(first)
    return layers
