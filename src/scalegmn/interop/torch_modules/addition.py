"""Additions: residual connections, biases, and parameters beside activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import Elements, Neurons, is_constant_along, size_along


def add_neurons(trace: Trace, x: Neurons, y: Neurons, shape: Sequence[int]) -> Neurons:
    """x + y as a residual connection into one of the two layers, one that has none yet."""
    for value in (x, y):
        trace.check_current(value)
        trace.refuse_sources(value)
    x, y = trace.settled(x), trace.settled(y)
    x, y = (replace(value, ids=value.ids.expand(*shape)) for value in (x, y))
    axis = trace.channel_axis(x)
    first, second = trace.channels_along(x, axis), trace.channels_along(y, axis)

    def is_free(value: Neurons, along: Tensor) -> bool:
        (owner, *others) = value.versions
        is_whole = not others and owner >= 0 and torch.equal(along, trace.layers[owner].nodes)
        if not is_whole or trace.layers[owner].coupled is not None:
            return False
        return trace.layers[owner].residual is None and not trace.neurons.is_read(along)

    receivers = [pair for pair in ((y, second, first), (x, first, second)) if is_free(*pair[:2])]
    receivers.sort(key=lambda pair: -max(pair[0].versions))
    for value, _, added in receivers:
        (owner,) = value.versions
        sources = {trace.neurons.layer_of(neuron) for neuron in added.tolist()}
        if len(sources) == 1 and max(sources) < owner:
            layer = trace.layers[owner]
            layer.residual = added
            layer.options["residual_after"] = layer.is_activated
            layer.version += 1
            trace.neurons.mark_read(added)
            return replace(value, versions={owner: layer.version})
    trace.refuse("two layers are added, both of which are read elsewhere too or have another addition")


def add_elements(trace: Trace, neurons: Neurons, elements: Elements, shape: Sequence[int]) -> Neurons:
    """Adds a parameter: the bias of a layer that has none, or the output of a layer of constant inputs."""
    trace.check_current(neurons)
    neurons = trace.settled(neurons)
    (owner, *others), axis = neurons.versions, trace.channel_axis(neurons)
    size = neurons.ids.shape[axis]
    is_bias = elements.index.numel() == size == size_along(elements.index, axis - neurons.ids.ndim)
    if is_bias and not others and owner >= 0 and trace.layers[owner].bias is None:
        layer = trace.layers[owner]
        if layer.version == 0 and torch.equal(trace.channels_along(neurons, axis), layer.nodes):
            layer.bias, layer.version = replace(elements, index=elements.index.flatten()), 1
            trace.own_parameters(owner, layer)
            if neurons.value is not None:
                along = [-1 if other == axis else 1 for other in range(neurons.value.ndim)]
                trace.claimed = neurons.value + trace.read(layer.bias).reshape(along)
            return replace(neurons, versions={owner: 1})
    return add_neurons(trace, neurons, constant_layer(trace, elements, neurons), shape)


def constant_layer(trace: Trace, elements: Elements, neurons: Neurons) -> Neurons:
    """Parameters in place of activations, such as position embeddings: a layer that reads constant inputs.

    Args:
        trace: the layers so far.
        elements: the parameter.
        neurons: the activations beside which it stands.
    """
    ids, index = neurons.ids, elements.index
    axes = [axis for axis in range(ids.ndim) if not is_constant_along(ids, axis)] or [trace.channel_axis(neurons)]
    index = index.reshape([1] * (ids.ndim - index.ndim) + list(index.shape))
    sizes = [ids.shape[axis] for axis in axes]
    found = [index.shape[axis] for axis in axes]
    if found != sizes:
        trace.refuse(f"a parameter with {math.prod(found)} channels is added to {math.prod(sizes)} channels")
    order = [axis for axis in range(ids.ndim) if axis not in axes] + axes
    flat = index.permute(order).flatten(-len(axes))
    constants = trace.layer_of_constants(replace(elements, index=flat), flat.ndim - 1)
    back = torch.tensor(order).argsort().tolist()
    return replace(constants, ids=constants.ids.unflatten(-1, sizes).permute(back))
