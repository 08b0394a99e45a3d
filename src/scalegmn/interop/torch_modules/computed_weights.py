"""Weights that a module computes from parameters: standardised, masked, normalised, multiplied by gains.

What is computed is not known; how it follows permutations of the parameters is found numerically. Rows and columns that
constants (a mask) tell apart stay apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.alignment import coupled_layer
from scalegmn.interop.torch_modules.layers import TracedLayer
from scalegmn.interop.torch_modules.pinning import pin
from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import ComputedWeights, Elements, Neurons

Recompute = Callable[[Mapping[str, Tensor]], Tensor]
"""Parameters by name -> the weights that are computed with these."""


@dataclass(frozen=True)
class Roles:
    """How weights [n_l, n_{l-1}, ...] follow permutations of the parameters that they are computed from."""

    main: Elements
    """The parameter that the layer has, with the computed weights in place of its numbers."""

    others: tuple[tuple[Elements, int | None], ...]
    """Further ones: with the same rows and columns (None), or along one axis of the weights."""

    rows: Tensor
    columns: Tensor
    """Labels of rows and columns: those that are computed alike have the same."""

    is_linear: bool
    """Whether factors of rows and columns are those of the computed weights."""


def roles_of(trace: Trace, weight: ComputedWeights, recompute: Recompute, groups: int) -> Roles:
    """The roles of the parameters of computed weights.

    Args:
        trace: the layers so far.
        weight: what is computed from them.
        recompute: how.
        groups: of the layer that has the weights.

    Raises:
        Refusal: they do not follow permutations of rows and columns.
    """
    parts = list({part.name: part for part in weight.parts}.values())
    tensors = {part.name: trace.tensors[part.name] for part in parts}
    flat = recompute(tensors)
    shapes = [tensor.shape for tensor in tensors.values() if tensor.shape[0] == flat.shape[0]]
    is_row = flat.ndim == 2 and flat.shape not in shapes  # all numbers of a neuron, one behind the other
    whole = [shape for shape in shapes if len(shape) > 2 and shape.numel() == flat.numel()] if is_row else []
    actual = flat.reshape(whole[0]) if whole else flat

    def computed(tensors: Mapping[str, Tensor]) -> Tensor:
        return recompute(tensors).reshape(actual.shape)

    mains = [part for part in parts if tensors[part.name].shape == actual.shape]
    if not mains or actual.ndim < 2 or any(tensor.is_complex() for tensor in tensors.values()):
        trace.refuse("weights are computed from parameters of other shapes")
    main, rest = mains[0], [part for part in parts if part is not mains[0]]
    constant = [
        computed({name: torch.full_like(tensor, fill) for name, tensor in tensors.items()}).nan_to_num()
        for fill in (0.5, 1.0)
    ]
    patterns = torch.stack(constant, -1).round(decimals=5)
    rows = patterns.flatten(1).unique(dim=0, return_inverse=True)[1]
    columns = patterns.transpose(0, 1).flatten(1).unique(dim=0, return_inverse=True)[1]
    options = [_axes(tensors[part.name], actual) for part in rest]
    for axes in itertools.product(*options):
        move = _Move.sample(rows, columns, groups)
        axis_of: dict[str, int | None] = dict(zip([part.name for part in rest], axes, strict=True))
        axis_of[main.name] = None
        moved = {name: move.apply(tensor, axis_of[name]) for name, tensor in tensors.items()}
        if _is_close(computed(moved), move.apply(actual, None)):
            break
    else:
        trace.refuse("weights are computed from parameters, but do not follow permutations of their rows and columns")
    factors = (
        torch.rand(actual.shape[:2], dtype=actual.dtype).reshape(*actual.shape[:2], *[1] * (actual.ndim - 2)) - 0.5
    )
    scaled = computed(tensors | {main.name: tensors[main.name] * factors})
    index = _numbers(tensors[main.name]).reshape(flat.shape)
    known = replace(main, index=index, counted=None, scale=1.0, computed=actual)
    return Roles(
        known, tuple(zip(rest, axes, strict=True)), rows, columns, not rest and _is_close(scaled, actual * factors)
    )


def join_roles(trace: Trace, layer: TracedLayer, roles: Roles, groups: int) -> None:
    """Notes which rows and columns of a layer's computed weights move, and which other parameters with them."""
    reads = layer.reads
    moved = [layer.nodes] if reads is None else [layer.nodes, reads]
    is_cut = reads is not None and len(roles.columns) * groups != len(reads)
    if reads is not None and is_cut:  # several inputs for each column of the parameters
        pin(trace, [Neurons(reads, {})], "a part of the weights that are computed for a column of parameters")
    for labels, nodes in zip((roles.rows, roles.columns.repeat(groups)), moved, strict=False):
        if labels.any() and len(labels) == len(nodes):
            trace.parts += [nodes[labels == label] for label in labels.unique()]
    if not roles.is_linear:
        for nodes in moved:
            trace.neurons.mark_unscaled(nodes)
    for elements, axis in roles.others:
        tensor = trace.tensors[elements.name]
        elements = replace(elements, index=_numbers(tensor), counted=None, scale=1.0)
        if axis is None and is_cut:
            rows = replace(elements, index=elements.index.flatten(1))
            other = trace.new_layer(len(layer.nodes), None, rows, options={"constant": True})
            axis = 0
        elif axis is None:
            index = elements.index.unsqueeze(2) if tensor.ndim == 3 else elements.index
            options = {**layer.options, "activation": "identity", "kernel": tuple(index.shape[2:]) or None}
            other = trace.new_layer(len(layer.nodes), reads, replace(elements, index=index), options=options)
        elif axis < 0 or (axis == 1 and is_cut):
            pin(trace, [elements], "a parameter that all weights of a layer are computed from")
            continue
        else:
            rows = replace(elements, index=elements.index.reshape(-1, 1))
            other = trace.new_layer(tensor.numel(), None, rows, options={"constant": True})
        trace.add_layer(other)
        beside = layer.nodes if axis is None else moved[axis]
        trace.kept.add(int(coupled_layer(trace, [beside, other.nodes])[0]))


def _numbers(tensor: Tensor) -> Tensor:
    """The numbers of a parameter's elements, in its shape."""
    return torch.arange(tensor.numel()).reshape(tensor.shape)


def _axes(tensor: Tensor, weights: Tensor) -> list[int | None]:
    """Along which axis of weights a parameter may lie; -1: it is one number; None: it has their rows and columns."""
    if tensor.shape in (weights.shape, weights.shape[:2], (*weights.shape[:2], *[1] * (weights.ndim - 2))):
        return [None]
    if tensor.numel() == 1:
        return [-1]
    return [axis for axis in (0, 1) if tensor.numel() == weights.shape[axis]]


@dataclass(frozen=True)
class _Move:
    """Permutations of rows, within groups, and of columns, for each group."""

    rows: Tensor
    columns: Tensor
    """[rows, columns]."""

    @classmethod
    def sample(cls, rows: Tensor, columns: Tensor, groups: int) -> _Move:
        """Permutations within labels of rows and of columns."""
        size = len(rows) // groups
        groups_of_rows = torch.arange(len(rows)) // size
        chosen = [_shuffled(columns) for _ in range(groups)]
        return cls(_shuffled(rows + (int(rows.max()) + 1) * groups_of_rows), torch.stack(chosen)[groups_of_rows])

    def apply(self, tensor: Tensor, axis: int | None) -> Tensor:
        """The tensor with its rows and columns moved (None), or its numbers, which lie along an axis of the weights."""
        if axis is None:
            tensor = tensor[self.rows]
            places = self.columns.reshape(*self.columns.shape, *[1] * (tensor.ndim - 2)).expand_as(tensor)
            return tensor.gather(1, places)
        if axis < 0:
            return tensor
        order = (self.rows, self.columns[0])[axis]
        return tensor.reshape(-1)[order].reshape(tensor.shape)


def _shuffled(labels: Tensor) -> Tensor:
    """A random order in which each place has its label."""
    order = torch.arange(len(labels))
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        order[places] = places[torch.randperm(len(places))]
    return order


def _is_close(values: Tensor, others: Tensor) -> bool:
    tolerance = 1e-9 if values.dtype == torch.float64 else 1e-4
    return bool(((values - others).abs() <= tolerance * others.abs().max()).all())
