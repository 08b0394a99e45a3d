"""Channels of several layers that stand in the same places, and layers without weights that are coupled to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import Neurons, unique_columns

MAX_SOURCES = 16
"""A layer that is computed channel by channel from so many others is not left out where others are computed from it."""

MAX_REPEATS = 4
"""So many channels that meet one are not taken apart."""


def aligned_channels(
    trace: Trace, values: Sequence[Neurons], ids: Sequence[Tensor], axes: Sequence[int]
) -> list[list[Tensor]]:
    """Neurons of several values that stand in the same places, each with one of each other value.

    Args:
        trace: the layers so far.
        values: the values.
        ids: their neurons, in one shape.
        axes: those along which they differ.

    Returns:
        A segment for each combination of layers that meet, such as where the values are layers side by side: [n]
        neurons of each value, each of one layer, that occur once.
    """
    for value in values:
        trace.refuse_sources(value)
        if -1 in value.versions or (value.is_output and not value.is_uniform):
            trace.refuse("channels of a layer meet those of the input, or constants that differ by channel")
    rows = []
    for item in ids:
        for axis in range(item.ndim):
            if axis not in axes:
                item = item.narrow(axis, 0, 1)
        rows.append(item.reshape(-1))
    columns, _, _ = unique_columns(torch.stack(rows))
    keys = [tuple(map(trace.neurons.layer_of, column)) for column in columns.mT.tolist()]
    segments: list[list[Tensor]] = []
    for key in dict.fromkeys(keys):
        met = columns[:, torch.tensor([other == key for other in keys])]
        number = torch.stack([occurrences(row) for row in met]).amax(0)
        if int(number.max()) >= MAX_REPEATS:
            trace.refuse("channels meet in an unknown order")
        segments += [list(met[:, number == count]) for count in number.unique().tolist()]
    if any(len(row.unique()) < len(row) for segment in segments for row in segment):
        trace.refuse("channels meet in an unknown order")
    return segments


def over_positions(trace: Trace, value: Neurons, axis: int) -> Neurons:
    """A value whose channels along an axis are other neurons at other positions (pixels that are shuffled), as a layer
    without weights that is coupled to these.

    Raises:
        Refusal: positions of several channels have the same neuron, or they are many.
    """
    trace.check_current(value)
    trace.refuse_sources(value)
    columns = list(value.ids.movedim(axis, 0).flatten(1).unique(dim=1).mT)
    if len(columns) > MAX_SOURCES or len(torch.cat(columns).unique()) < len(columns) * len(columns[0]):
        trace.refuse("a layer reads positions, expected channels along one axis")
    if min(map(trace.neurons.layer_of, torch.cat(columns).tolist())) < 0:
        trace.refuse("positions of the input are read as channels")
    nodes = coupled_layer(trace, columns)
    shape = [1] * value.ids.ndim
    shape[axis] = len(nodes)
    return Neurons(nodes.reshape(shape).expand(value.ids.shape), {len(trace.layers) - 1: 0}, value=value.value)


def occurrences(numbers: Tensor) -> Tensor:
    """[n] how often each of [n] numbers has occurred before."""
    order = numbers.argsort(stable=True)
    ordered = numbers[order]
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    places = torch.arange(len(numbers))
    first = torch.where(is_first, places, 0).cummax(0).values
    return torch.empty_like(numbers).scatter_(0, order, places - first)


def without_coupled(trace: Trace, columns: Sequence[Tensor]) -> list[Tensor]:
    """The neurons of layers with weights that aligned neurons are computed from, each once."""
    sources: list[Tensor] = []
    for column in columns:
        layer = trace.layers[trace.neurons.layer_of(column[0])]
        nodes = [column]
        is_plain = layer.coupled is not None and layer.bias is None and layer.residual is None
        if is_plain and not trace.neurons.is_read(layer.nodes) and len(layer.coupled or ()) < MAX_SOURCES:
            place = torch.zeros(int(layer.nodes.max()) + 1, dtype=torch.long)
            place[layer.nodes] = torch.arange(len(layer.nodes))
            assert layer.reads is not None
            nodes = [part[place[column]] for part in (layer.reads, *(layer.coupled or ()))]
        sources += [part for part in nodes if not any(torch.equal(part, other) for other in sources)]
    numbers = torch.cat(sources)
    if len(numbers.unique()) < len(numbers):
        trace.refuse("channels of one layer meet in another order")
    return sources


def mark_aligned(trace: Trace, nodes: Tensor) -> None:
    """Notes that an operation reads these neurons that computes each channel alike: no scalar commutes with it."""
    trace.neurons.mark_aligned(nodes)
    mark_part(trace, nodes)


def mark_part(trace: Trace, nodes: Tensor) -> None:
    """Notes that an operation reads these neurons channel by channel, so that they are a layer of their own."""
    if not any(torch.equal(nodes, part) for part in trace.parts if part[0] == nodes[0]):
        trace.parts.append(nodes)


def coupled_layer(trace: Trace, columns: Sequence[Tensor], linear: Tensor | None = None) -> Tensor:
    """[n] neurons of a new layer without weights that is coupled to what it reads.

    Args:
        trace: the layers so far.
        columns: [n] neurons of each layer that is read, in one order.
        linear: the column in which it is linear, if there is one.
    """
    sources = without_coupled(trace, columns)
    values = _linear_source(trace, sources, columns, linear)
    for nodes in sources:
        if nodes is values:
            trace.neurons.mark_read(nodes)
            mark_part(trace, nodes)
        else:
            mark_aligned(trace, nodes)
    size = len(columns[0])
    options: dict[str, Any] = {"groups": size, "affine": False}
    if values is not None:
        options["linear"] = True
        sources = [values, *(nodes for nodes in sources if nodes is not values)]
    layer = trace.new_layer(size, sources[0], None, is_activated=True, options=options, coupled=tuple(sources[1:]))
    trace.add_layer(layer)
    return layer.nodes


def _linear_source(
    trace: Trace, sources: Sequence[Tensor], columns: Sequence[Tensor], linear: Tensor | None
) -> Tensor | None:
    """The neurons among those that a layer is computed from in which it is linear; None where there are none, or where
    others are computed from them too."""
    if linear is None or len(sources) < 2:
        return None
    others = without_coupled(trace, [column for column in columns if column is not linear])
    found = [nodes for nodes in sources if torch.equal(nodes, linear)]
    is_alone = bool(found) and not any(torch.equal(linear, other) for other in others)
    return found[0] if is_alone else None
