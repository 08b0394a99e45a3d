"""From traced layers to the `NetSpec` of the architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.cutting import cut
from scalegmn.interop.torch_modules.layers import TracedLayer, as_slice
from scalegmn.interop.torch_modules.pinning import pin, pin_neurons, pin_or_refuse
from scalegmn.interop.torch_modules.trace import SOURCE, Trace
from scalegmn.interop.torch_modules.values import Elements, Neurons
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.networks.coupling import UnequalBlocks


def assemble(trace: Trace, results: Sequence[Any]) -> tuple[list[TracedLayer], NetSpec]:
    """The layers as they are in the spec, in order, the output last, and the spec.

    Args:
        trace: the layers that were found.
        results: the values that the module returns.

    Raises:
        ValueError: the trace is strict, and the output is not that of one layer, or parameters are shared in a way that
            no spec describes.
    """
    connected = _without_unread(trace, _output_last(trace, results))
    layers = list(_side_by_side_resolved(trace, _values_after_keys(list(cut(trace, connected)))))
    if not layers:
        raise ValueError("expected a module with weights, found none that its output depends on")
    layer_of = {neuron: index for index, layer in enumerate(layers) for neuron in layer.nodes.tolist()}
    if trace.input is not None:
        layer_of |= dict.fromkeys(trace.input.tolist(), -1)
    tied, used_again = _shared_parameters(trace, layers)
    for index, earlier in used_again.items():
        layers[index].same_neurons += tuple(layers[first].nodes for first in earlier)
    while True:
        specs = (_layer_spec(trace, layers, index, layer_of, tied.get(index)) for index in range(len(layers)))
        try:
            spec = NetSpec(tuple(specs))
            break
        except UnequalBlocks as error:
            if trace.is_strict:
                raise
            for index in error.layers:
                pin_neurons(trace, layers[index].nodes, str(error))
    for layer in layers:
        layer.pinned_by = trace.neurons.reason(layer.nodes)
    return layers, spec


def _output_last(trace: Trace, results: Sequence[Any]) -> list[TracedLayer]:
    """The layers, that which the module returns at the end; pins what else it returns, or refuses it."""
    result = results[0]
    if isinstance(result, Neurons) and result.factor != 1 and not result.is_output and trace.can_settle(result):
        result = trace.settled(result)
    problem = _output_problem(trace, result) if len(results) == 1 else "it returns several tensors"
    last = len(trace.layers) - 1
    if not problem:
        last = trace.neurons.layer_of(result.ids.flatten()[0])
    elif trace.is_strict:
        raise ValueError(problem)
    else:
        trace.place = "the output"
        pin(trace, [item for value in results for item in (value if isinstance(value, list) else [value])], problem)
        last = len(trace.layers) - 1
        if last >= 0 and not trace.neurons.is_pinned(trace.layers[last].nodes).all():
            options = {"constant": True, "opaque": True, "affine": False}
            trace.add_layer(trace.new_layer(1, None, None, is_activated=True, options=options))
            last += 1
    layers = list(trace.layers)
    if layers:
        layers.append(layers.pop(last))
        layers[-1].options |= {"activation": "identity", "w0": 1.0}  # no symmetry moves outputs
    return layers


def _output_problem(trace: Trace, result: Any) -> str:
    """What is wrong with a value as the output of the last layer; nothing where it is one."""
    if not isinstance(result, Neurons):
        return "expected a module that returns a layer's output, found another value; return a tensor of one"
    neurons = set(result.ids.unique().tolist())
    owners = {trace.neurons.layer_of(neuron) for neuron in neurons}
    last = max(owners)
    if len(owners) > 1 or last < 0 or neurons != set(trace.layers[last].nodes.tolist()):
        return "expected a module that returns all outputs of one layer, found a part, or several layers"
    if trace.neurons.is_read(trace.layers[last].nodes):
        return f"{trace.layers[last].place}: other layers read the layer whose output the module returns"
    return ""


def _without_unread(trace: Trace, layers: Sequence[TracedLayer]) -> list[TracedLayer]:
    """The layers without those that nothing reads of operations which compute channels alike."""
    kept: list[TracedLayer] = []
    read: set[int] = {number for joined in trace.attended for nodes in joined for number in nodes.tolist()}
    read |= trace.kept
    read |= {number for nodes, _ in trace.blocks.values() for number in nodes.tolist()}
    for layer in reversed(layers):
        if layer.coupled is not None and kept and not read & set(layer.nodes.tolist()):
            continue
        kept.append(layer)
        for nodes in (layer.reads, layer.residual, *(layer.coupled or ()), *layer.same_neurons):
            if nodes is not None:
                read |= set(nodes.tolist())
    return kept[::-1]


def _layer_spec(
    trace: Trace, layers: Sequence[TracedLayer], index: int, layer_of: dict[int, int], tied: int | None
) -> LayerSpec:
    """The spec of a layer.

    Args:
        trace: knows which neurons are pinned.
        layers: all of them.
        index: the layer's place.
        layer_of: neuron -> layer, -1 for the input.
        tied: the layer whose weight is the transpose of this one's.
    """
    layer = layers[index]
    options = dict(layer.options)
    if options.get("activation") in ("relu", "leaky_relu"):
        options.pop("maximum", None)  # maxima commute with positive scalars
    if index < len(layers) - 1 and bool(trace.neurons.is_pinned(layer.nodes).any()):
        options["pinned"] = True
    if layer.reads is not None:
        reads = layer_of[int(layer.reads[0])]
        options["reads"] = None if reads == index - 1 else reads
    if layer.residual is not None:
        options["residual"] = layer_of[int(layer.residual[0])]
    if layer.coupled is not None:
        options["coupled"] = tuple(layer_of[int(nodes[0])] for nodes in layer.coupled)
    if layer.same_neurons:
        options["same_neurons"] = tuple(dict.fromkeys(layer_of[int(nodes[0])] for nodes in layer.same_neurons))
    if trace.neurons.is_aligned(layer.nodes) and not options.get("pinned") and index < len(layers) - 1:
        options["unscaled"] = True
    attention = options.pop("attention", None)
    if attention:
        (item,) = attention.values()
        options["attention"] = (layer_of[int(item.queries[0])], layer_of[int(item.keys[0])], item.num_heads)
        options["rotary"] = item.rotary
        options["score_biases"] = tuple(dict.fromkeys(layer_of[int(nodes[0])] for nodes in item.biases))
    if tied is not None:
        options["tied"] = tied
    if layer.reads is not None:
        in_dim = len(layer.reads)
    else:
        in_dim = options.get("groups", 1) * (1 if layer.weight is None else layer.weight.index.shape[1])
    return LayerSpec(in_dim, len(layer.nodes), bias=layer.bias is not None, **options)


# Shared parameters


def _shared_parameters(
    trace: Trace, layers: Sequence[TracedLayer]
) -> tuple[dict[int, int], dict[int, tuple[int, ...]]]:
    """Layer -> the earlier layer whose weight is the transpose of its own, and layer -> the earlier ones that have its
    weight or bias, neuron by neuron.

    Layers that share parameters in another way are pinned, with what they read, or refused.
    """
    tied: dict[int, int] = {}
    used_again: dict[int, tuple[int, ...]] = {}
    users: dict[str, list[tuple[int, Elements]]] = {}
    for index, layer in enumerate(layers):
        for elements in (layer.weight, layer.bias, *(layer.statistics or ())):
            if elements is None:
                continue
            moved = [layer.nodes] if layer.reads is None else [layer.nodes, layer.reads]
            if not elements.is_once:
                problem = f"{elements.name} is one parameter in several places of a layer, expected each element once"
                pin_or_refuse(trace, layer, problem, *moved)
            for first, other in users.get(elements.name, ()):
                if not elements.shares(other):
                    continue
                earlier = layers[first]
                if layer.is_used_again(elements, earlier, other):
                    if first not in (index, *used_again.get(index, ())):
                        used_again[index] = (*used_again.get(index, ()), first)
                    if (layer.reads is None) != (earlier.reads is None) and other is earlier.weight:
                        fixed = [nodes for nodes in (layer.reads, earlier.reads) if nodes is not None]
                        if layer.is_scale_or_constant and earlier.is_scale_or_constant:
                            for nodes in fixed:
                                trace.neurons.mark_unscaled(nodes)
                        elif elements is layer.weight:
                            pin_or_refuse(trace, layer, "its weights also read values that no layer describes", *fixed)
                    break
                if elements.scale == other.scale and layer.is_transposed(elements, earlier, other):
                    tied[index] = first
                    continue
                kind = "weights" if elements is layer.weight else "parameters"
                problem = f"a part of its {kind} are also those of {earlier.place}, or a multiple of them"
                moved += [earlier.nodes] if earlier.reads is None else [earlier.nodes, earlier.reads]
                pin_or_refuse(trace, layer, problem, *moved)
            users.setdefault(elements.name, []).append((index, elements))
    return tied, used_again


def _values_after_keys(layers: Sequence[TracedLayer]) -> list[TracedLayer]:
    """The layers, those of values behind those of their queries, keys and biases of scores."""
    ordered: list[TracedLayer] = []
    waiting: list[tuple[set[int], TracedLayer]] = []
    known: set[int] = set()
    for layer in layers:
        attended = layer.options.get("attention", {}).values()
        needed = {int(nodes[0]) for item in attended for nodes in (item.queries, item.keys, *item.biases)}
        waiting.append((needed, layer))
        while ready := next((item for item in waiting if item[0] <= known), None):
            waiting.remove(ready)
            ordered.append(ready[1])
            known.add(int(ready[1].nodes[0]))
    return [*ordered, *(layer for _, layer in waiting)]


# Layers that read several layers


def _side_by_side_resolved(trace: Trace, layers: Sequence[TracedLayer]) -> Iterator[TracedLayer]:
    """The layers, those that read several layers side by side replaced by a layer for each, that are summed up. What
    cannot be read so is pinned, and read as opaque."""
    owners: dict[int, Tensor] = {}  # neuron -> all neurons of its layer
    for nodes in (trace.input, *trace.sources):
        if nodes is not None:
            owners |= dict.fromkeys(nodes.tolist(), nodes)
    for layer in layers:
        joined = [nodes for nodes in (layer.residual, *layer.same_neurons) if nodes is not None]
        if not all(_is_layer(nodes, owners) for nodes in joined):
            problem = "several layers side by side, a part of one, or channels in another order are added to a layer"
            pin_or_refuse(trace, layer, problem, layer.nodes, *joined)
            layer = replace(layer, residual=None, same_neurons=())
        if layer.reads is None:
            parts = [layer]
        elif layer.options.get("groups", 1) == 1 and layer.weight is not None and layer.coupled is None:
            parts = list(_summands(trace, layer, owners))
        else:
            read = (layer.reads, *(layer.coupled or ()))
            parts = [layer]
            if not all(_is_layer(nodes, owners) for nodes in read):
                problem = "channel by channel it reads several layers, a part of one, or channels in another order"
                pin_or_refuse(trace, layer, problem, *read)
                parts = [_reading_opaque(trace, layer)]
        for part in parts:
            owners |= dict.fromkeys(part.nodes.tolist(), part.nodes)
            is_opaque = part.reads is not None and trace.neurons.layer_of(part.reads[0]) == SOURCE
            yield _reading_opaque(trace, part) if is_opaque else part


def _is_layer(nodes: Tensor, owners: dict[int, Tensor]) -> bool:
    """Whether neurons are those of a layer, in its order."""
    return torch.equal(owners.get(int(nodes[0]), nodes), nodes)


def _reading_opaque(trace: Trace, layer: TracedLayer) -> TracedLayer:
    """A layer that reads what it reads as constant inputs; channel by channel, its neurons stay."""
    if layer.options.get("groups", 1) > 1 or layer.coupled is not None:
        pin_neurons(trace, layer.nodes, f"{layer.place}: it reads, channel by channel, what no layer computes")
    options = {**layer.options, "constant": True, "opaque": True, "linear": False}
    return replace(layer, reads=None, coupled=None, options=options)


def _summands(trace: Trace, layer: TracedLayer, owners: dict[int, Tensor]) -> Iterator[TracedLayer]:
    """W x + b of a layer that reads several layers, as W_1 x_1, W_2 x_2 + (W_1 x_1), ..., the last with b; what it
    reads of a part of a layer is pinned."""
    assert layer.reads is not None, "only layers that read others have summands"
    assert layer.weight is not None, "layers without weights are norms"
    places: dict[int, list[int]] = {}  # by layer that is read
    for place, number in enumerate(layer.reads.tolist()):
        places.setdefault(id(owners.get(number)), []).append(place)
    residual = layer.residual
    if len(places) > 1 and residual is not None and layer.options.get("residual_after", False):
        pin_or_refuse(trace, layer, "reads several layers side by side, and has an addition", layer.nodes, residual)
        residual = None
    remaining = len(places)
    for columns in places.values():
        remaining -= 1
        nodes = layer.reads[columns]
        source = owners.get(int(nodes[0]), nodes)
        is_whole = len(source) == len(nodes)
        if is_whole:  # in the order of the layer that is read
            column = dict(zip(nodes.tolist(), columns, strict=True))
            nodes, columns = source, [column[number] for number in source.tolist()]
        weight = layer.weight
        if columns != list(range(len(layer.reads))):
            weight = replace(weight, index=weight.index[:, as_slice(columns)])
        part = replace(layer, reads=nodes, weight=weight, residual=residual)
        if remaining:
            names = ("attention", "maximum", "blocks", "residual_after")
            options = {key: value for key, value in layer.options.items() if key not in names}
            new = trace.neurons.number(len(layer.nodes), PART)
            part = replace(part, nodes=new, bias=None, same_neurons=(), options={**options, "activation": "identity"})
            if bool(trace.neurons.is_pinned(layer.nodes).any()):
                pin_neurons(trace, new, trace.neurons.reason(layer.nodes))
            residual = new
        if not is_whole:
            pin_or_refuse(trace, layer, "reads a part of a layer", nodes)
            part = _reading_opaque(trace, part)
        yield part


PART = -3
"""In place of a layer, of the neurons of summands."""
