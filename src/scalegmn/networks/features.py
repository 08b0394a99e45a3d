"""The raw features of a network's parameter graph: from parameters, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scalegmn.networks.params import NetParams
    from scalegmn.networks.spec import NetSpec


def node_features(params: NetParams) -> list[Tensor]:
    """Raw node features, per node layer [B, n_l, 1]: the biases; `spec.input_value` for input nodes.

    Of networks with batch norms, here and on edges, the features of `with_batch_norm_folded()`.
    """
    spec, biases = params.spec, params.with_batch_norm_folded().biases
    nodes = [biases[0].new_full((len(params), size), spec.input_value) for size in spec.layout]
    for bias, (_, place) in zip(biases, spec.node_layers, strict=True):
        nodes[place] = bias
    return [layer[..., None] for layer in nodes]


class Kernels(NamedTuple):
    """The raw features of one block of edges, without the zeros around kernels."""

    values: Tensor
    """[B, n_l, n_{l-1}, k]; [B, n_l, n_{l-1} / groups, k] of layers with groups."""

    places: Tensor
    """[k] long, the components that they fill among those of the largest kernel, ascending."""


def kernels(params: NetParams, kernel: tuple[int, int] | None = None) -> list[Kernels]:
    """`edge_features`, each block as wide as its own kernels."""
    places = _kernel_slots(params.spec, kernel or params.spec.kernel)
    weights = params.with_batch_norm_folded().weights
    return [
        Kernels(weight.reshape(*weight.shape[:3], -1), filled) for weight, filled in zip(weights, places, strict=True)
    ]


def beside(blocks: Sequence[Kernels], more: Sequence[Tensor], width: int) -> list[Kernels]:
    """Kernels with more raw features of their edges.

    Args:
        blocks: of kernels with at most `width` components.
        more: per block [B, n_l, n_{l-1}, H k], H further kernels, whose components come K, 2 K, ... after those of the
            first.
        width: K.
    """
    return [
        Kernels(
            torch.cat([values, added], -1),
            torch.cat([places + start for start in range(0, width * (1 + added.shape[-1] // len(places)), width)]),
        )
        for (values, places), added in zip(blocks, more, strict=True)
    ]


def edge_features(params: NetParams, kernel: tuple[int, int] | None = None) -> list[Tensor]:
    """Raw edge features, per block [B, n_l, n_{l-1}, K]; [B, n_l, n_{l-1} / groups, K] of layers with groups.

    K = 1: the weight. CNNs: the kernel centred in the largest kernel with zeros around, flattened; a linear
    layer's weight stands in component 0.

    Args:
        params: B networks.
        kernel: the largest kernel (kh, kw), of K values; None: the largest of these networks.
    """
    edge_dim = math.prod(kernel or params.spec.kernel)
    return [padded(*block, edge_dim) for block in kernels(params, kernel)]


def padded(values: Tensor, places: Tensor, width: int) -> Tensor:
    """[..., k] -> [..., width], with component i at `places[i]` and zeros elsewhere."""
    if len(places) == width:
        return values
    zeros = values.new_zeros(*values.shape[:-1], width)
    return zeros.index_copy_(-1, places.to(values.device), values)


def parameters_of(
    spec: NetSpec, nodes: Sequence[Tensor], edges: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases: the inverse of `edge_features` and `node_features` (same shapes), without batch norms."""
    weights = tuple(
        block[..., slots.to(block.device)].reshape(len(block), *layer.weight_shape)
        for layer, block, slots in zip(spec.layers, edges, _kernel_slots(spec, spec.kernel), strict=True)
    )
    return weights, tuple(nodes[place][..., 0] for _, place in spec.node_layers)


def _kernel_slots(spec: NetSpec, kernel: tuple[int, int]) -> list[Tensor]:
    """Per layer, which of the K raw edge values its weights fill: a window centred in `kernel`, or component 0."""
    height, width = kernel
    grid = torch.arange(height * width).reshape(height, width)
    slots = []
    for layer in spec.layers:
        if layer.kernel is None:
            slots.append(grid[0, :1])
        else:
            top, left = (height - layer.kernel[0]) // 2, (width - layer.kernel[1]) // 2
            slots.append(grid[top : top + layer.kernel[0], left : left + layer.kernel[1]].flatten())
    return slots
