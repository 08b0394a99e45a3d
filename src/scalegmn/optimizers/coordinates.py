"""The parameters of B networks as rows of numbers, [B, P], and as features of nodes and edges.

Shape letters: B networks, P parameters, C numbers per parameter, K kernel values (1 for linear layers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scalegmn.networks import NetSpec


def all_finite(values: Tensor) -> Tensor:
    """Which rows have no infinite number and no NaN, [B, P] -> [B]. Several times faster than `isfinite().all(1)`."""
    return values.abs().amax(1).isfinite()


class Coordinates:
    """Where the parameters of networks of one architecture stand in `NetParams.flatten`: the weight and bias of each
    layer in turn.

    Args:
        spec: the architecture.
    """

    def __init__(self, spec: NetSpec) -> None:
        self.spec = spec
        self.sizes = [size for layer in spec.layers for size in (math.prod(layer.weight_shape), layer.out_dim)]
        self.num_parameters = sum(self.sizes)
        self.kernels = [math.prod(layer.kernel or ()) for layer in spec.layers]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """[B, P, ...] -> per tensor [B, size, ...]."""
        parts: tuple[Tensor, ...] = values.split(self.sizes, dim=1)
        return parts

    def root_mean_squares(self, values: Tensor) -> Tensor:
        """Of each tensor, at all its places: [B, P, C] -> [B, P, C]."""
        parts = [part.square().mean(1, keepdim=True).sqrt().expand_as(part) for part in self.split(values)]
        return torch.cat(parts, dim=1)

    def factored(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each weight the means over the parameters of each output neuron, over those of each input neuron, and
        their product over the mean of all, at all its places; of a bias three times its values. [B, P, C] each."""
        of_tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        for index, part in enumerate(self.split(values)):
            if index % 2:
                of_tensors.append((part, part, part))
                continue
            shape = self.spec.layers[index // 2].weight_shape
            weight = part.unflatten(1, (shape[0], shape[1], self.kernels[index // 2]))
            row, column = weight.mean((2, 3), keepdim=True), weight.mean((1, 3), keepdim=True)
            mean = row.mean(1, keepdim=True)
            product = row * column / torch.where(mean > 0, mean, 1)
            expanded = [x.expand_as(weight).flatten(1, 3) for x in (row, column, product)]
            of_tensors.append((expanded[0], expanded[1], expanded[2]))
        rows, columns, products = (torch.cat(parts, dim=1) for parts in zip(*of_tensors, strict=True))
        return rows, columns, products

    def to_graph(self, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """[B, P, C] -> weights, per layer [B, n_l, n_{l-1}, C K_l], channel by channel, and biases [B, n_l, C]."""
        parts, weights, biases = self.split(values), [], []
        for index, layer in enumerate(self.spec.layers):
            shape = (layer.weight_shape[0], layer.weight_shape[1], self.kernels[index])
            weights.append(parts[2 * index].unflatten(1, shape).transpose(-1, -2).flatten(-2))
            biases.append(parts[2 * index + 1])
        return weights, biases

    def from_graph(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """The inverse of `to_graph`."""
        parts = []
        for weight, bias, size in zip(weights, biases, self.kernels, strict=True):
            parts += [weight.unflatten(-1, (-1, size)).transpose(-1, -2).flatten(1, 3), bias]
        return torch.cat(parts, dim=1)

    def padded(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights with C K_l numbers per edge -> C K, K of the largest kernel, zeros after each kernel's own values."""
        most = max(self.kernels)
        return [
            weight if size == most else pad(weight.unflatten(-1, (-1, size)), (0, most - size)).flatten(-2)
            for weight, size in zip(weights, self.kernels, strict=True)
        ]

    def spread(self, edges: Sequence[Tensor], nodes: Sequence[Tensor]) -> Tensor:
        """Features of edges [B, n_l, n_{l-1}, d] and of all nodes but the inputs [B, n_l, d], at each parameter: those
        of an edge at all values of its kernel. [B, P, d]."""
        weights = [
            edge.flatten(1, 2) if size == 1 else edge.flatten(1, 2).repeat_interleave(size, dim=1)
            for edge, size in zip(edges, self.kernels, strict=True)
        ]
        return torch.cat([part for pair in zip(weights, nodes, strict=True) for part in pair], dim=1)
