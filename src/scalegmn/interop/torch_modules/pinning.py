"""What no layer describes: neurons and parameters that it reads are pinned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.alignment import coupled_layer
from scalegmn.interop.torch_modules.layers import TracedLayer
from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import (
    ComputedParameters,
    ComputedWeights,
    Elements,
    Neurons,
    OfHeads,
    Scores,
    Turned,
    compact,
)


def pin(trace: Trace, values: Sequence[Any], problem: str) -> None:
    """Pins all neurons that something reads which no layer describes, and the parameters that it reads.

    Args:
        trace: the layers so far.
        values: what it reads.
        problem: what it is.
    """
    reason = f"{trace.place}: {problem}"
    for value in values:
        if isinstance(value, Neurons):
            pin_neurons(trace, value.ids, reason)
        elif isinstance(value, ComputedParameters | ComputedWeights):
            pin(trace, value.parts, problem)
        elif isinstance(value, Scores):
            _pin_scores(trace, value, reason)
        elif isinstance(value, Turned):
            for ids, _ in value.terms:
                pin_neurons(trace, ids, reason)
        elif isinstance(value, OfHeads):
            pin_neurons(trace, value.heads, reason)
        elif isinstance(value, Elements) and not value.is_buffer:
            _pin_parameter(trace, value, reason)


def pin_neurons(trace: Trace, nodes: Tensor, reason: str) -> None:
    """Pins neurons, given by their numbers in any shape; those of the input stay anyway."""
    is_meant = trace.neurons.mask(nodes)
    for owner in trace.neurons.layers_of(nodes):
        if owner >= 0 and trace.layers[owner].coupled is not None:
            layer = trace.layers[owner]
            assert layer.reads is not None, "it reads other layers"
            for part in (layer.reads, *(layer.coupled or ())):
                pin_neurons(trace, part[is_meant[layer.nodes]], reason)
    trace.neurons.mark_pinned(nodes, reason)


def pin_or_refuse(trace: Trace, layer: TracedLayer, problem: str, *nodes: Tensor) -> None:
    """Pins neurons for what is wrong with a layer; a strict trace refuses it."""
    if trace.is_strict:
        raise ValueError(f"{layer.place}: {problem}")
    for numbers in nodes:
        pin_neurons(trace, numbers, f"{layer.place}: {problem}")


def pin_layer(trace: Trace, layer: TracedLayer, reason: str) -> None:
    """Pins the neurons of a layer, and those that it reads."""
    pin_neurons(trace, layer.nodes, reason)
    if layer.reads is not None:
        pin_neurons(trace, layer.reads, reason)


def _pin_scores(trace: Trace, scores: Scores, reason: str) -> None:
    """Pins the heads of queries and keys; channels of a head, which are summed over, move together. Several heads
    of queries may have one of keys."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for query, key in zip(scores.queries.tolist(), scores.keys.tolist(), strict=True):
        groups.setdefault(tuple(key), []).append(query)
    is_even = len({*map(len, groups.values())}) == 1 and scores.queries.shape == scores.keys.shape
    rows = [torch.tensor(list(groups))]
    if is_even:
        rows += [torch.tensor(list(heads)) for heads in zip(*groups.values(), strict=True)]
    numbers = torch.cat(rows).flatten()
    is_one_layer = all(len({trace.neurons.layer_of(node) for node in nodes.flatten().tolist()}) == 1 for nodes in rows)
    for nodes in scores.biases:
        pin_neurons(trace, nodes, reason)
    is_repeated = len(numbers.unique()) < len(numbers)
    if trace.is_strict or scores.rotary or not is_even or not is_one_layer or is_repeated:
        pin_neurons(trace, scores.queries, reason)
        pin_neurons(trace, scores.keys, reason)
        return
    for nodes in rows:
        if not trace.in_blocks(nodes):
            pin_neurons(trace, nodes, reason)
    trace.kept.add(int(coupled_layer(trace, [nodes.flatten() for nodes in rows])[0]))


def _pin_parameter(trace: Trace, elements: Elements, reason: str) -> None:
    """Pins the neurons of all layers that have elements of a parameter, and those that they read; elements that no
    layer has become a layer of pinned neurons with constant inputs."""
    used = torch.zeros(trace.tensors[elements.name].numel(), dtype=torch.bool)
    index = compact(elements.index)
    used[index.flatten()] = True
    is_once = int(used.sum()) == index.numel()
    for user, other in trace.users.of(elements.name):
        if bool(used[other.index.flatten()].any()):
            pin_layer(trace, trace.layers[user], reason)
            used[other.index.flatten()] = False
            is_once = False
    if not used.any():
        return
    index = index.squeeze() if is_once else used.nonzero()[:, 0]
    index = index.reshape(-1, 1) if index.ndim < 2 else index.flatten(1)
    if trace.tensors[elements.name].is_complex():  # real and imaginary parts
        index = torch.stack([2 * index, 2 * index + 1], -1).flatten(1)
    options = {"constant": True}
    layer = trace.new_layer(len(index), None, replace(elements, index=index, scale=1.0), options=options)
    trace.layers.append(layer)
    trace.users.add(len(trace.layers) - 1, elements)
    pin_neurons(trace, layer.nodes, reason)
