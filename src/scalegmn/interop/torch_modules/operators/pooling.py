"""Pooling, upsampling, means and maxima over positions: channels stay, positions do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.channelwise import elementwise
from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.operators.views import indexed_axes
from scalegmn.interop.torch_modules.values import (
    Elements,
    NetworkInput,
    Neurons,
    Opaque,
    Scores,
    is_constant_along,
    is_number,
)

FAMILY = "pooling and resizing"

POSITION_AXES = {
    **dict.fromkeys(("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"), 1),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"), 2),
    **dict.fromkeys(("upsample_nearest1d", "upsample_linear1d"), 1),
    **dict.fromkeys(("adaptive_max_pool1d", "upsample_nearest1d", "upsample_linear1d"), 1),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), 2),
    **dict.fromkeys(("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d"), 3),
    **dict.fromkeys(("upsample_nearest3d", "upsample_trilinear3d"), 3),
}
"""Operation -> over how many of the last axes it works."""


def mark_maximum(call: Call, neurons: Neurons) -> None:
    """Notes that the largest of a layer's values over positions is read, which no sign commutes with."""
    for layer in neurons.versions:
        if layer >= 0:
            call.trace.layers[layer].options["maximum"] = True


@operator(FAMILY, *POSITION_AXES)
def pool(call: Call, value: Any, *args: Any, **kwargs: Any) -> Any:
    """The same channels at fewer positions, or at more."""
    axes = POSITION_AXES[call.name]
    neurons = value if isinstance(value, Neurons) else call.trace.as_neurons(value, 1)
    if not all(is_constant_along(neurons.ids, axis) for axis in range(-axes, 0)):
        call.trace.refuse("pooling over channels, expected over positions")
    if "max" in call.name:
        mark_maximum(call, neurons)
    ids = neurons.ids
    for axis in range(-axes, 0):
        ids = ids.narrow(axis, 0, 1)
    pooled = replace(neurons, ids=ids.expand(*call.shape))
    return [pooled, None] if isinstance(call.result, list | tuple) else pooled


PADS = ("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d")


@operator(FAMILY, "pad", "constant_pad_nd", *PADS, "replication_pad3d")
def pad(call: Call, value: Any, *args: Any, **kwargs: Any) -> Any:
    """More positions, which hold zeros or repeat others."""
    fill = [number for number in (*args[1:], kwargs.get("value")) if is_number(number)]
    if any(float(number) != 0 for number in fill):
        call.trace.refuse("padding with another number than 0")
    neurons = value if isinstance(value, Neurons) else call.trace.as_neurons(value, 1)
    sizes = zip(neurons.ids.shape, call.shape, strict=True)
    padded = [axis for axis, (before, after) in enumerate(sizes) if before != after]
    if any(not is_constant_along(neurons.ids, axis) for axis in padded):
        return pad_channels(call, neurons, [int(number) for number in args[0]])
    ids = neurons.ids
    for axis in padded:
        ids = ids.narrow(axis, 0, 1)
    return replace(neurons, ids=ids.expand(*call.shape))


def pad_channels(call: Call, neurons: Neurons, widths: Sequence[int]) -> Neurons:
    """Channels beside others that are zeros: as a layer without weights, such as the state before a first step."""
    trace, axis = call.trace, call.trace.channel_axis(neurons)
    place = 2 * (neurons.ids.ndim - 1 - axis)
    before, after = widths[place : place + 2]
    if call.name not in ("pad", "constant_pad_nd") or [width for width in widths if width] != [
        width for width in (before, after) if width
    ]:
        trace.refuse("padding of channels and positions, or of channels with others than zeros")
    shape = [*neurons.ids.shape]
    parts = [neurons]
    for width, place in ((before, 0), (after, len(parts) + 1)):
        if width > 0:
            shape[axis] = width
            parts.insert(place, trace.as_neurons(torch.zeros(shape), axis))
    versions = {layer: version for part in parts for layer, version in part.versions.items()}
    ids = torch.cat([part.ids for part in parts], axis)
    start = max(-before, 0)
    return replace(neurons, ids=ids.narrow(axis, start, call.shape[axis]), versions=versions)


@operator(FAMILY, "mean", "sum")
def mean(call: Call, x: Any, axes: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Any:
    """A mean or a sum over positions."""
    if isinstance(x, Scores):  # of attention weights, which are returned only to be shown
        return x
    if not isinstance(x, Neurons | NetworkInput):
        call.trace.refuse(f"a {call.name} of parameters")
    if isinstance(axes, int):
        axes = [axes]
    numbers = x.ids if isinstance(x, Neurons) else x.index
    for axis in sorted({axis % numbers.ndim for axis in axes or range(numbers.ndim)}, reverse=True):
        if isinstance(x, Neurons) and not is_constant_along(numbers, axis):
            call.trace.refuse(f"{call.name} over channels, expected over positions")
        numbers = numbers.narrow(axis, 0, 1) if keepdim else numbers.select(axis, 0)
    return replace(x, ids=numbers) if isinstance(x, Neurons) else replace(x, index=numbers)


@operator(FAMILY, "amax", "amin")
def amax(call: Call, x: Any, axes: Sequence[int] | None = None, keepdim: bool = False) -> Any:
    """The largest or smallest values over positions."""
    if isinstance(x, Neurons):
        mark_maximum(call, x)
    return mean(call, x, axes, keepdim)


@operator(FAMILY, "max", "min")
def largest(call: Call, x: Any, axis: int | None = None, keepdim: bool = False) -> Any:
    """The largest or smallest values over positions, and where they are."""
    if axis is None or not isinstance(axis, int):
        call.trace.refuse(f"{call.name} over all values or of two, expected over an axis of positions")
    return [amax(call, x, [axis], keepdim), None]


@operator(FAMILY, "index_add", "scatter_add", "scatter_reduce", "index_reduce")
def gather_sums(call: Call, x: Any, axis: int, places: Any, source: Any, *rest: Any, **options: Any) -> Neurons:
    """Sums, means or largest values of positions at other positions, as of the neighbours in a graph, onto zeros; sums
    onto what layers return, too."""
    trace = call.trace
    reduction = rest[0] if rest else options.get("reduce", "sum")
    is_sum = call.name in ("index_add", "scatter_add")
    places = places.value if isinstance(places, Opaque) else places
    is_onto_known = (isinstance(x, Tensor) and not x.any()) or (isinstance(x, Neurons) and is_sum)
    if not is_onto_known or not isinstance(places, Tensor) or not isinstance(source, Neurons):
        trace.refuse(f"{call.name} of what is no layer's output, to computed places, or onto others than zeros")
    if reduction not in ("sum", "mean", "amax", "amin") or options.get("alpha", 1) != 1:
        trace.refuse(f"{call.name} with other options than a sum, a mean or the largest")
    trace.check_current(source)
    varying = [other for other in range(source.ids.ndim) if not is_constant_along(source.ids, other)]
    is_alike = places.ndim < 2 or all(is_constant_along(places, other) for other in varying)
    if axis % source.ids.ndim in varying or not is_alike:
        trace.refuse(f"{call.name} over channels, or to places that differ by channel")
    if reduction.startswith("am"):
        mark_maximum(call, source)
    ids = source.ids
    for other in range(ids.ndim):
        if other not in varying:
            ids = ids.narrow(other, 0, 1)
    added = replace(source, ids=ids.expand(*call.shape))
    return elementwise(trace, [(x, x.value), (added, None)], call.shape) if isinstance(x, Neurons) else added


@operator(FAMILY, "index_put")
def put(call: Call, x: Any, places: Any, new: Any, *_: Any) -> Neurons:
    """A layer's values at some positions, in place of zeros or of what layers return, or added to these."""
    is_onto_known = (isinstance(x, Tensor) and not x.any()) or isinstance(x, Neurons)
    if not is_onto_known or not isinstance(new, Neurons):
        call.trace.refuse("values at some positions of what no layer computes, or in place of others than zeros")
    tensors = [place.value if isinstance(place, Opaque | NetworkInput) else place for place in places]
    axes, ids = indexed_axes(tensors), new.ids
    varying = [axis for axis in range(ids.ndim) if not is_constant_along(ids, axis)]
    if min(varying, default=0) - ids.ndim + len(call.shape) <= max(axes):
        call.trace.refuse("values at some channels")
    for axis in range(ids.ndim):
        if axis not in varying:
            ids = ids.narrow(axis, 0, 1)
    added = replace(new, ids=ids.reshape(ids.shape[min(varying) :]).expand(*call.shape))
    return elementwise(call.trace, [(x, x.value), (added, None)], call.shape) if isinstance(x, Neurons) else added


@operator(FAMILY, "grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sample_grid(call: Call, x: Any, places: Any, *_: Any) -> Neurons:
    """Values between those of the positions, at places of the input or at places that no symmetry moves."""
    if isinstance(places, Neurons) or not isinstance(x, Neurons | Elements):
        call.trace.refuse("values at places that a layer computes, or of what no layer computes")
    neurons = call.trace.as_neurons(x, 1)
    if not all(is_constant_along(neurons.ids, axis) for axis in range(2, neurons.ids.ndim)):
        call.trace.refuse("values between those of channels, expected of positions")
    ids = neurons.ids
    for axis in range(2, ids.ndim):
        ids = ids.narrow(axis, 0, 1)
    return replace(neurons, ids=ids.expand(*call.shape))


@operator(FAMILY, "im2col")
def unfold(call: Call, x: Any, *_: Any) -> Neurons:
    """The positions of each patch side by side, channel by channel."""
    neurons = call.trace.as_neurons(x, 1)
    channels = call.trace.channels_along(neurons, 1)
    rows = channels.repeat_interleave(call.shape[1] // len(channels))
    return replace(neurons, ids=rows[:, None].expand(*call.shape))
