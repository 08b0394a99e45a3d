"""Operations that compute each channel alike, from the same channel of one or several layers.

Elementwise functions of any kind, products of gates, softmaxes and norms that are written out: whatever they are, they
commute with permutations of the channels, if these are the same for all layers that are read. So they become layers
without weights, that are coupled to what they read (`LayerSpec.coupled`). Functions of all channels that do not depend
on their order (means, maxima) are invariant. No scalar commutes with any of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from scalegmn.interop.torch_modules.addition import constant_layer
from scalegmn.interop.torch_modules.alignment import (
    MAX_REPEATS,
    aligned_channels,
    coupled_layer,
    mark_aligned,
    without_coupled,
)
from scalegmn.interop.torch_modules.pinning import pin
from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import (
    ComputedParameters,
    ComputedWeights,
    Elements,
    NetworkInput,
    Neurons,
    Opaque,
    Scores,
    is_constant_along,
    is_traced,
    size_along,
    unique_columns,
)

ALONG_AN_AXIS = ("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp")
"""Operations that keep the shape: along channels the first four treat all alike; along positions all do."""

POINTWISE = (
    *("special_erf", "special_erfc", "special_expm1", "special_expit", "special_sinc", "special_xlogy", "hardswish"),
    *("log_sigmoid", "divide", "multiply", "subtract", "rsub", "negative", "where", "masked_fill", "copysign", "prelu"),
    *("relu6", "mish", "threshold", "lerp", "__and", "__or", "__xor"),
)
"""Elementwise operations without PyTorch's tag for them, in place at least."""

OF_ALL = (
    *("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod", "var_mean"),
    *("max", "min", "median", "quantile", "nansum", "nanmean", "aminmax"),
)
"""Operations that reduce an axis, and do not depend on the order of what they reduce."""


PRODUCTS = ("mul", "multiply", "glu")
"""Operations that are linear in one of two values."""

JOINS = ("cat", "concat", "concatenate")

MAX_TERMS = 64
"""So many neurons of one layer that are summed up for each result are read as layers of their own."""

OF_TWO = ("cosine_similarity", "linalg_vecdot", "pairwise_distance")
"""Operations that reduce an axis of two values, and do not depend on the order of what they reduce."""


def computed_alike(trace: Trace, function: Any, args: Any, kwargs: Any, actual: Any, result: Any) -> Any:
    """The value of an operation that computes each channel alike, or that is the same for all orders of channels.

    Args:
        trace: the layers so far.
        function: the operation (aten).
        args: its arguments, with traced values.
        kwargs: its named arguments.
        actual: (args, kwargs) as the module has them.
        result: an example of what it returns; None in place of what nothing reads of several tensors.

    Raises:
        Refusal: the operation is of no such kind.
    """
    name = str(function).split(".")[1].rstrip("_")
    leaves, _ = _pytree.tree_flatten((args, kwargs), is_leaf=is_traced)
    values, _ = _pytree.tree_flatten(actual)
    operands = [
        (leaf, value) for leaf, value in zip(leaves, values, strict=True) if is_traced(leaf) or isinstance(leaf, Tensor)
    ]
    is_of_two = name in ("max", "min") and len(operands) > 1
    if (name in ALONG_AN_AXIS or name in OF_ALL) and not is_of_two:
        (neurons, _), *others = operands
        if others or not isinstance(neurons, Neurons):
            trace.refuse(f"{name} of several values")
        axes = _axes(function, args, kwargs, neurons.ids.ndim)
        if name in OF_ALL:
            return _reduced(trace, name, neurons, axes, result)
        return _along(trace, name, neurons, axes)
    if name in JOINS:
        return _joined(trace, operands, kwargs.get("dim", args[1] if len(args) > 1 else 0), result.shape)
    if name in OF_TWO:
        pairs = operands[:2]
        both = elementwise(trace, pairs, torch.broadcast_shapes(*(value.shape for _, value in pairs)))
        given = {"dim": 1 if name == "cosine_similarity" else -1, **kwargs}
        axes = [both.ids.ndim - 1] if name == "pairwise_distance" else _axes(function, args, given, both.ids.ndim)
        return _reduced(trace, name, both, axes, result)
    if name == "glu" and isinstance(operands[0][0], Neurons):
        ((neurons, value),) = operands
        (axis,) = _axes(function, (args[0], *(args[1:] or (-1,))), kwargs, neurons.ids.ndim)
        halves = zip(neurons.ids.chunk(2, axis), value.chunk(2, axis), strict=True)
        operands = [(replace(neurons, ids=ids, value=half), half) for ids, half in halves]
    elif not (is_of_two or _is_pointwise(name, function, values)):
        trace.refuse(f"{function} is not a known operator")
    if not isinstance(result, Tensor):
        trace.refuse(f"{function} returns several values")
    if not any(isinstance(leaf, Neurons) for leaf, _ in operands):
        if not any(isinstance(leaf, NetworkInput | Opaque) for leaf, _ in operands):
            return _of_parameters(trace, operands, result.shape)
        operands = _with_units(trace, operands, result.shape)
    pin(trace, [leaf for leaf, _ in operands if isinstance(leaf, ComputedWeights)], f"{name} of all of it")
    operands = [(value if isinstance(leaf, ComputedWeights) else leaf, value) for leaf, value in operands]
    if name == "prelu":
        operands = [operands[0], _along_second_axis(*operands[1], len(result.shape))]
    return elementwise(trace, operands, result.shape, name in PRODUCTS)


def _is_pointwise(name: str, function: Any, values: Sequence[Any]) -> bool:
    """Whether an operation works element by element, such as numbers written where a mask is true."""
    if name == "index_put":
        value, *masks, new = [item for item in values if isinstance(item, Tensor)]
        return new.numel() == 1 and all(item.dtype == torch.bool and item.shape == value.shape for item in masks)
    return torch.Tag.pointwise in getattr(function, "tags", ()) or name in POINTWISE


def _with_units(trace: Trace, operands: Sequence[tuple[Any, Any]], shape: Sequence[int]) -> list[tuple[Any, Any]]:
    """A parameter that the input meets, as a layer of constant inputs, whose neurons lie along the axes that the input
    lacks: each neuron meets the whole input (the centres of radial basis functions, embeddings of numbers)."""
    place, elements = next(
        (
            (place, leaf)
            for place, (leaf, _) in enumerate(operands)
            if isinstance(leaf, Elements) and not leaf.is_buffer
        ),
        (0, None),
    )
    if elements is None or trace.tensors[elements.name].is_complex():
        trace.refuse("the input meets what is computed from parameters")
    others = [value for leaf, value in operands if leaf is not elements and isinstance(value, Tensor)]
    index = elements.index.expand(*shape)
    axes = [
        axis
        for axis in range(len(shape))
        if not is_constant_along(index, axis) and all(_is_repeated(item, axis - len(shape)) for item in others)
    ]
    if not axes:
        trace.refuse("the input meets a parameter along all its axes")
    rest = [axis for axis in range(len(shape)) if axis not in axes]
    small = index.permute(*axes, *rest).flatten(0, len(axes) - 1)
    neurons = trace.layer_of_constants(replace(elements, index=small, counted=None), 0)
    ids = neurons.ids.unflatten(0, [shape[axis] for axis in axes])
    ids = ids.permute(*torch.tensor([*axes, *rest]).argsort().tolist())
    new = [*operands]
    new[place] = (replace(neurons, ids=ids), operands[place][1])
    return new


def _is_repeated(value: Tensor, axis: int) -> bool:
    """Whether a value is the same along an axis (counted from the end) whatever its numbers are."""
    return size_along(value, axis) == 1 or value.stride(axis) == 0


def _joined(trace: Trace, operands: Sequence[tuple[Any, Any]], axis: int, shape: Sequence[int]) -> Neurons:
    """Positions of several layers, one behind the other: at each, one of them is not zero."""
    axis %= len(shape)
    first = []
    neurons = [leaf for leaf, _ in operands if isinstance(leaf, Neurons)]
    if not neurons or not all(is_constant_along(leaf.ids, axis) for leaf in neurons):
        trace.refuse("channels are concatenated")
    for leaf, value in operands:
        if isinstance(leaf, Elements) and not leaf.is_buffer:
            leaf = constant_layer(trace, leaf, neurons[0])
        if not isinstance(leaf, Neurons):
            trace.refuse("positions are concatenated with what no layer computes")
        first.append((replace(leaf, ids=leaf.ids.narrow(axis, 0, 1)), value.narrow(axis, 0, 1)))
    joined = elementwise(trace, first, [*shape[:axis], 1, *shape[axis + 1 :]])
    return replace(joined, ids=joined.ids.expand(*shape))


def _along_second_axis(slope: Any, value: Tensor, ndim: int) -> tuple[Any, Tensor]:
    """The slopes of a PReLU, a number or one per channel, so that they broadcast."""
    shape = [-1 if axis == 1 else 1 for axis in range(ndim)] if value.numel() > 1 else [1] * ndim
    if isinstance(slope, Elements):
        slope = replace(slope, index=slope.index.reshape(shape))
    return slope, value.reshape(shape)


def elementwise(
    trace: Trace, operands: Sequence[tuple[Any, Any]], shape: Sequence[int], is_product: bool = False
) -> Neurons:
    """A function of aligned values, element by element.

    Args:
        trace: the layers so far.
        operands: traced values and constants, with what the module computes for them.
        shape: of the result.
        is_product: whether it is linear in one of two values: that which has no activation, or the first.
    """
    parts = [leaf for leaf, _ in operands if isinstance(leaf, Neurons)]
    if not parts or any(isinstance(leaf, Scores) for leaf, _ in operands):
        trace.refuse("an operation on what no layer computes")
    size = _num_varying([leaf.ids.expand(*shape) for leaf in parts])
    sizes = [_num_varying([leaf.ids]) for leaf in parts]
    few = [leaf for leaf, own in zip(parts, sizes, strict=True) if own == 1 < size or own * MAX_REPEATS <= size]
    sources = [_num_sources(trace, leaf) for leaf in few]
    if len(few) == len(parts) and sources.count(max(sources)) == 1:
        del few[sources.index(max(sources))]  # what the others gate
    if few:  # gates that many channels of the others meet
        parts = [leaf for leaf in parts if not any(leaf is gate for gate in few)]
        pin(trace, few, "neurons that many channels meet")
        operands = [(Opaque() if any(leaf is gate for gate in few) else leaf, value) for leaf, value in operands]
        if not parts:
            trace.refuse("channels of several layers meet, each with each")
    ids, num_values = [leaf.ids.expand(*shape) for leaf in parts], len(parts)
    axes = [axis for axis in range(len(shape)) if not all(is_constant_along(item, axis) for item in ids)]
    for leaf, value in operands:
        if isinstance(leaf, Neurons):
            continue
        is_same = not isinstance(value, Tensor) or all(is_constant_along(value.expand(*shape), axis) for axis in axes)
        if isinstance(leaf, ComputedParameters) or (isinstance(leaf, Elements) and not leaf.is_buffer):
            for part in leaf.parts if isinstance(leaf, ComputedParameters) else (leaf,):
                if is_same and len(part.index.unique()) == 1:
                    pin(trace, [part], "a parameter that all channels have")
                    continue
                constants = constant_layer(trace, part, replace(parts[0], ids=ids[0]))
                parts.append(constants)
                ids.append(constants.ids.expand(*shape))
        elif not is_same:
            fixed = [axis for axis in axes if not is_constant_along(value.expand(*shape), axis)]
            for item in ids:
                _in_blocks(trace, item, axes, fixed)
    segments = aligned_channels(trace, parts, ids, axes)
    linear = None
    if is_product and len(parts) == 2:
        plain = [place for place in range(num_values) if not trace.is_derived(replace(parts[place], factor=1.0))]
        activated = [any(_has_activation(trace, columns[place]) for columns in segments) for place in plain]
        linear = plain[activated.index(min(activated))] if plain else None
    return _coupled(trace, segments, ids, axes, linear)


def _num_sources(trace: Trace, neurons: Neurons) -> int:
    """How many neurons would be pinned with those of a value."""
    owners, waiting = set[int](), trace.neurons.layers_of(neurons.ids)
    while waiting := {owner for owner in waiting - owners if owner >= 0}:
        owners |= waiting
        layers = [trace.layers[owner] for owner in waiting]
        together = [nodes for layer in layers for nodes in (layer.residual, *(layer.coupled or ()))]
        waiting = {trace.neurons.layer_of(nodes[0]) for nodes in together if nodes is not None}
    return sum(len(trace.layers[owner].nodes) for owner in owners)


def _has_activation(trace: Trace, column: Tensor) -> bool:
    """Whether a layer has an activation, or is computed channel by channel from others."""
    layer = trace.layers[trace.neurons.layer_of(column[0])]
    return layer.options.get("activation", "identity") != "identity" or layer.coupled is not None


def _of_parameters(trace: Trace, operands: Sequence[tuple[Any, Any]], shape: Sequence[int]) -> ComputedParameters:
    """A function of parameters and numbers alone, element by element."""
    parts: list[Elements] = []
    for leaf, value in operands:
        if isinstance(leaf, ComputedParameters):
            parts += leaf.parts
        elif isinstance(leaf, Elements) and not leaf.is_buffer and not trace.tensors[leaf.name].is_complex():
            parts.append(replace(leaf, scale=1.0))
        elif is_traced(leaf) or not isinstance(value, Tensor):
            trace.refuse("parameters meet values that differ from one to the other")
    indices = [part.index.expand(*shape) for part in parts]
    for leaf, value in operands:
        if not is_traced(leaf):
            axes = [axis for axis in range(len(shape)) if not is_constant_along(value.expand(*shape), axis)]
            if not all(is_constant_along(index, axis) for index in indices for axis in axes):
                trace.refuse("parameters meet values that differ from one to the other")
    return ComputedParameters(tuple(replace(part, index=part.index.expand(*shape)) for part in parts))


def _coupled(
    trace: Trace,
    segments: Sequence[Sequence[Tensor]],
    ids: Sequence[Tensor],
    axes: Sequence[int],
    linear: int | None = None,
) -> Neurons:
    """Layers without weights that are coupled to what they read, one for each segment.

    Args:
        trace: the layers so far.
        segments: as of `aligned_channels`.
        ids: neurons of the values, in the shape of the result.
        axes: those along which they differ.
        linear: the place of the value in which the layers are linear, if there is one.
    """
    small = [*ids]
    for axis in range(ids[0].ndim):
        if axis not in axes:
            small = [item.narrow(axis, 0, 1) for item in small]
    nodes: list[Tensor] = []
    versions: dict[int, int] = {}
    for columns in segments:
        nodes.append(coupled_layer(trace, columns, None if linear is None else columns[linear]))
        versions[len(trace.layers) - 1] = 0
    met = torch.cat([torch.stack([*columns]) for columns in segments], 1)
    rows = torch.stack([item.reshape(-1) for item in small])
    _, number, _ = unique_columns(torch.cat([met, rows], 1))
    node_of = torch.empty(met.shape[1], dtype=torch.long)
    node_of[number[: met.shape[1]]] = torch.cat(nodes)
    return Neurons(node_of[number[met.shape[1] :]].reshape(small[0].shape).expand(*ids[0].shape), versions)


def _in_blocks(trace: Trace, ids: Tensor, axes: Sequence[int], fixed: Sequence[int]) -> None:
    """Notes that channels of a layer are computed alike along some axes alone, and that their blocks along others stay.

    Args:
        trace: the layers so far.
        ids: neurons.
        axes: those along which they differ.
        fixed: those of them along which channels are computed in different ways.
    """
    free = [axis for axis in axes if axis not in fixed]
    if not free:
        trace.refuse("channels of a layer meet values that differ by channel")
    rows = _rows(ids, axes, fixed)
    if len(rows.unique()) < rows.numel():
        trace.refuse("channels of a layer meet values that differ by channel, in another order than by blocks")
    blocks: dict[int, list[Tensor]] = {}
    for row in rows:
        owner_of = torch.tensor([trace.neurons.layer_of(node) for node in row.tolist()])
        for owner in owner_of.unique().tolist():
            blocks.setdefault(owner, []).append(row[owner_of == owner])
    for owner, parts in blocks.items():
        is_even = len({len(part) for part in parts}) == 1
        if owner < 0 or not is_even or (len(parts) > 1 and bool((torch.cat(parts).diff() < 0).any())):
            trace.refuse("channels of a layer meet values that differ by channel, in another order than by blocks")
        if not trace.in_blocks(torch.stack(parts)):
            trace.refuse("channels of a layer are computed alike in blocks of several sizes")


def _rows(ids: Tensor, axes: Sequence[int], fixed: Sequence[int]) -> Tensor:
    """[places along fixed axes, places along the others] of the axes along which neurons differ."""
    rest, free = ([axis for axis in range(ids.ndim) if (axis in axes) == of] for of in (False, True))
    free = [axis for axis in free if axis not in fixed]
    return ids.permute(*rest, *fixed, *free)[(0,) * len(rest)].flatten(0, len(fixed) - 1).flatten(1)


def _num_varying(ids: Sequence[Tensor]) -> int:
    """How many places differ along the axes along which neurons of values in one shape differ."""
    axes = {axis for item in ids for axis in _varying(item)}
    return math.prod(ids[0].shape[axis] for axis in axes)


def _varying(ids: Tensor) -> list[int]:
    """The axes along which neurons differ."""
    return [axis for axis in range(ids.ndim) if not is_constant_along(ids, axis)]


def as_layer(trace: Trace, neurons: Neurons) -> Neurons:
    """A value of a layer, whatever has been done to all its channels alike, as a layer without weights."""
    value = None if neurons.value is None else neurons.value * neurons.factor
    return replace(elementwise(trace, [(neurons, value)], neurons.ids.shape), value=value)


def mixed_by_layer(trace: Trace, value: Neurons, axis: int, shape: Sequence[int]) -> Neurons:
    """What a linear layer makes of positions along an axis (MLP-Mixer), channel by channel: a layer without
    weights, as the layer's weights are alike for all channels."""
    trace.check_current(value)
    if not is_constant_along(value.ids, axis):
        trace.refuse("a linear layer over channels and positions")
    new = as_layer(trace, replace(value, ids=value.ids.narrow(axis, 0, 1), value=None))
    return replace(new, ids=new.ids.expand(*shape))


def _axes(function: Any, args: Any, kwargs: Any, ndim: int) -> list[int]:
    """The axes that an operation works along; all, if it names none."""
    given = kwargs | dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
    axes = given.get("dim")
    axes = range(ndim) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    return sorted({axis % ndim for axis in axes})


def _along(trace: Trace, name: str, neurons: Neurons, axes: Sequence[int]) -> Neurons:
    """An operation along an axis of positions, or a softmax over all channels."""
    varying = _varying(neurons.ids)
    is_over_channels = bool(set(axes) & set(varying))
    if is_over_channels and (varying != list(axes) or "softmax" not in name):
        trace.refuse(f"{name} over channels")
    segments = aligned_channels(trace, [neurons], [neurons.ids], varying)
    if is_over_channels:
        _check_all(trace, segments, neurons.ids, axes)
    return _coupled(trace, segments, [neurons.ids], varying)


def _reduced(trace: Trace, name: str, neurons: Neurons, axes: Sequence[int], result: Any) -> Any:
    """A function of positions, channel by channel, or of all channels, whatever their order."""
    varying = _varying(neurons.ids)
    segments = aligned_channels(trace, [neurons], [neurons.ids], varying)
    results = list(result) if isinstance(result, list | tuple) else [result]
    if set(varying) <= set(axes):
        _check_all(trace, segments, neurons.ids, varying)
        if name in ("max", "min", "median") and len(results) > 1 and results[1] is not None:
            trace.refuse(f"{name} over channels, with the channel that has it")
        _read_all(trace, segments)
        new: list[Any] = [Opaque()] * len(results)
    elif set(varying) & set(axes) and len(results) == 1 and (terms := _terms(neurons.ids, varying, axes, results[0])):
        left = [axis for axis in range(terms[0].ndim) if not all(is_constant_along(item, axis) for item in terms)]
        segments = aligned_channels(trace, [neurons] * len(terms), terms, left)
        new = [_coupled(trace, segments, terms, left)]
    elif set(varying) & set(axes):
        _in_blocks(trace, neurons.ids, varying, [axis for axis in varying if axis not in axes])
        _read_all(trace, segments)
        new = [Opaque()] * len(results)
    else:
        ids, keeps_axes = neurons.ids, any(item is not None and item.ndim == neurons.ids.ndim for item in results)
        for axis in sorted(axes, reverse=True):
            ids = ids.narrow(axis, 0, 1) if keeps_axes else ids.select(axis, 0)
        left = _varying(ids)
        new = [_coupled(trace, segments, [ids], left) for _ in results]
    return new if isinstance(result, list | tuple) else new[0]


def _terms(ids: Tensor, varying: Sequence[int], axes: Sequence[int], result: Tensor) -> list[Tensor]:
    """Neurons that a function of some axes reads, in the shape of the result, if they are fewer than the results, or
    those of a result do not stand in a row; else nothing."""
    keeps_axes = result.ndim == ids.ndim
    terms = [ids]
    for axis in sorted(axes, reverse=True):
        if is_constant_along(ids, axis):
            ranges = [slice(0, 1)]
        else:
            ranges = [slice(place, place + 1) for place in range(ids.shape[axis])]
        terms = [item.movedim(axis, 0)[part].movedim(0, axis) for item in terms for part in ranges]
        terms = terms if keeps_axes else [item.squeeze(axis) for item in terms]
        if len(terms) > MAX_TERMS:
            return []
    rows = _rows(ids, varying, [axis for axis in varying if axis not in axes])
    return terms if len(terms) <= _num_varying(terms) or bool((rows.diff(dim=0) == 1).all()) else []


def _read_all(trace: Trace, segments: Sequence[Sequence[Tensor]]) -> None:
    """Notes that neurons are summed up, whatever their order: those that they are computed from stay together."""
    for (nodes,) in segments:
        for source in without_coupled(trace, [nodes]):
            mark_aligned(trace, source)
        trace.kept.add(int(nodes[0]))


def _check_all(trace: Trace, segments: Sequence[Sequence[Tensor]], ids: Tensor, axes: Sequence[int]) -> None:
    """Refuses an operation over channels that are not all different."""
    size = 1
    for axis in axes:
        size *= ids.shape[axis]
    if size != sum(len(nodes) for (nodes,) in segments):
        trace.refuse("an operation over channels of which some occur twice")
