"""Concatenations, of channels or of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.addition import add_neurons, constant_layer
from scalegmn.interop.torch_modules.alignment import mark_part
from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import PREPARED, Elements, NetworkInput, Neurons, Opaque


@operator("concatenation", "cat", "concat", "concatenate")
def concatenate(call: Call, values: Sequence[Any], axis: int = 0) -> Any:
    """Channels of several layers, or of the input, side by side, or one layer's channels at more positions."""
    trace = call.trace
    values = [value for value in values if not _is_empty(value)]
    if len(values) == 1:  # beside nothing, such as the keys of no earlier words
        return values[0]
    neurons = [value for value in values if isinstance(value, Neurons)]
    is_opaque = any(isinstance(value, Opaque) for value in values)
    if is_opaque and not neurons:
        trace.refuse("what no layer computes is concatenated")
    if not neurons:
        if all(isinstance(value, NetworkInput) for value in values):
            return replace(values[0], index=torch.cat([value.index for value in values], axis))
        if any(isinstance(value, NetworkInput) for value in values) and not any(map(_is_parameter, values)):
            are_states = all(isinstance(value, NetworkInput) or _is_zero(value) for value in values)
            ndim = len(call.shape)
            return replace(PREPARED, parts=(axis % ndim - ndim, tuple(values))) if are_states else PREPARED
        if all(map(_is_parameter, values)) and len({(value.name, value.scale) for value in values}) == 1:
            return replace(values[0], index=torch.cat([value.index for value in values], axis))
        trace.refuse("parameters are concatenated, expected values of layers")
    if axis % neurons[0].ids.ndim != trace.channel_axis(neurons[0]):
        if is_opaque:
            trace.refuse("positions are concatenated with what no layer computes")
        return concatenate_positions(call, values, axis)
    parts = [
        trace.as_neurons(value, axis) if isinstance(value, Neurons | NetworkInput | Opaque | Tensor) else None
        for value in values
    ]
    versions: dict[int, int] = {}
    for part in parts:
        if part is None:
            trace.refuse("channels are concatenated with a value that is not a layer's output or the input")
        versions |= part.versions
    nodes = [trace.channels_along(part, axis) for part in parts if part is not None]
    owners = [trace.neurons.layer_of(item[0]) for item in nodes]
    for item, owner in zip(nodes, owners, strict=True):  # positions of parts of one layer may have moved apart
        if owner >= 0 and owners.count(owner) > 1:
            mark_part(trace, item)
    return Neurons(torch.cat([part.ids for part in parts if part is not None], axis), versions)


def _is_empty(value: Any) -> bool:
    """Whether a tensor has no elements, such as no class tokens."""
    index = value.ids if isinstance(value, Neurons) else value.value if isinstance(value, Opaque) else None
    index = value.index if isinstance(value, Elements | NetworkInput) else index
    tensor = value if isinstance(value, Tensor) else index
    return isinstance(tensor, Tensor) and not tensor.numel()


def _is_zero(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.any()


def _is_parameter(value: Any) -> bool:
    return isinstance(value, Elements) and not value.is_buffer


def concatenate_positions(call: Call, values: Sequence[Any], axis: int) -> Neurons:
    """Positions of several values, as their sum: each counts as zero at the positions of the others."""
    trace = call.trace
    total = trace.settled(next(value for value in values if isinstance(value, Neurons)))
    channels = trace.channel_axis(total)
    is_first = True
    for value in values:
        if isinstance(value, Neurons) and is_first:
            is_first = False
            continue
        if isinstance(value, Tensor) and not value.any():
            continue
        added = value
        if isinstance(value, Elements):
            added = constant_layer(trace, value, total)
        elif isinstance(value, NetworkInput):
            added = trace.as_neurons(value, channels)
        if not isinstance(added, Neurons):
            trace.refuse("positions are concatenated with constants other than 0, expected layers' outputs")
        shape = [*total.ids.shape]
        shape[axis] = 1
        total, added = (replace(part, ids=part.ids.narrow(axis, 0, 1)) for part in (total, added))
        total = add_neurons(trace, added, total, shape)
    return replace(total, ids=total.ids.narrow(axis, 0, 1).expand(*call.shape))
