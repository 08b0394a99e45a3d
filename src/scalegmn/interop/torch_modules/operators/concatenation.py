"""Concatenations, of channels or of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import Elements, NetworkInput, Neurons


@operator("concatenation", "cat")
def concatenate(call: Call, values: Sequence[Any], axis: int = 0) -> Any:
    """Channels of several layers side by side, or one layer's channels at more positions."""
    neurons = [value for value in values if isinstance(value, Neurons)]
    if not neurons:
        if all(isinstance(value, NetworkInput) for value in values):
            return replace(values[0], index=torch.cat([value.index for value in values], axis))
        call.trace.refuse("parameters are concatenated")
    if axis % neurons[0].ids.ndim != call.trace.channel_axis(neurons[0]):
        return concatenate_positions(call, values, axis)
    if len(neurons) < len(values):
        call.trace.refuse("channels are concatenated with a value that is not a layer's output")
    versions = {key: version for value in neurons for key, version in value.versions.items()}
    for value in neurons:
        call.trace.check_current(value)
    return Neurons(torch.cat([value.ids for value in neurons], axis), versions)


def concatenate_positions(call: Call, values: Sequence[Any], axis: int) -> Neurons:
    """Positions of several values, as their sum: each counts as zero at the positions of the others."""
    trace = call.trace
    total: Neurons = next(value for value in values if isinstance(value, Neurons))
    first = total
    for value in values:
        if value is first:
            continue
        added = trace.constant_layer(value, total) if isinstance(value, Elements) else value
        if not isinstance(added, Neurons):
            trace.refuse("positions are concatenated with a value that is neither a layer's output nor a parameter")
        shape = [*total.ids.shape]
        shape[axis] = 1
        total, added = (replace(part, ids=part.ids.narrow(axis, 0, 1)) for part in (total, added))
        total = trace.add(added, total, shape)
    return replace(total, ids=total.ids.narrow(axis, 0, 1).expand(*call.shape))
