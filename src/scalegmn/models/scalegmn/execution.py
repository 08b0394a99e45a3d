"""How the engine runs networks: layer by layer, in dense blocks, or as one sparse graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scalegmn.graphs.parameter_graph import scalar_groups_by_layer
from scalegmn.networks import ACTIVATIONS, HETERO, NetParams, NetSpec
from scalegmn.networks.parameter_indices import has_places
from scalegmn.networks.scalar_groups import ScalarGroup

if TYPE_CHECKING:
    from scalegmn.models.scalegmn.model import ScaleGMN

LEAST_EDGES_OF_BLOCK = 4096
"""Edges that layers of weights, other than those of chains, have at least on average where they run one by one."""


def runs_by_layer(model: ScaleGMN, params: NetParams) -> bool:
    """Whether networks run in dense blocks, one for each layer of weights; else as one sparse graph."""
    spec = params.spec
    if is_chain(model, spec):
        return True
    several = model.config.aggregator != "add" and model.bidirectional  # means are of all edges together
    large = len(params) * spec.num_edges >= LEAST_EDGES_OF_BLOCK * spec.num_layers
    return large and not several and _blocks(spec) == _blocks(model.spec) and layer_groups(model, spec) is not None


def is_chain(model: ScaleGMN, spec: NetSpec) -> bool:
    """Whether networks of `spec` are chains, of one activation each, with the blocks of `model.spec`."""
    groups = {
        HETERO if layer.activation == HETERO else ACTIVATIONS[layer.activation].group for layer in spec.layers[:-1]
    }
    mixed = model.config.symmetry == "hetero" and len(groups) > 1
    alike = (spec.layout, spec.kernel) == (model.spec.layout, model.spec.kernel)
    return alike and spec.is_chain and not spec.residuals and not mixed


def layer_groups(model: ScaleGMN, spec: NetSpec) -> tuple[int, ...] | None:
    """Per layer of nodes, the index into `groups` of their scalar group; None where networks differ in it, or
    nodes of a layer."""
    if len(model.groups) == 1:
        return (0,) * len(spec.layout)
    if spec.is_hetero:
        return None
    groups: dict[ScalarGroup, int] = {}
    layers = scalar_groups_by_layer(spec, HETERO, groups)
    if any(len(nodes) and bool((nodes != nodes[0]).any()) for nodes in layers):
        return None
    return tuple(model.branches(tuple(groups), torch.stack([nodes[0] for nodes in layers])).tolist())


def _blocks(spec: NetSpec) -> tuple[object, ...]:
    """What the nodes and the blocks of edges of networks are."""
    kernels = tuple((layer.kernel, layer.groups) for layer in spec.layers)
    return spec.layout, kernels, spec.node_layers, has_places(spec)
