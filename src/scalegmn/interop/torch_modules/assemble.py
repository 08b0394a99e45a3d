"""From traced layers to the `NetSpec` of the architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.layers import TracedLayer
from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import Elements, Neurons
from scalegmn.networks import LayerSpec, NetSpec


def assemble(trace: Trace, result: Any) -> tuple[list[TracedLayer], NetSpec]:
    """The layers as they are in the spec, in order, the output last, and the spec.

    Args:
        trace: the layers that were found.
        result: the value that the module returns.

    Raises:
        ValueError: the output is not that of one layer, or parameters are shared in a way that no spec describes.
    """
    _move_output_last(trace, result)
    layers = list(_side_by_side_resolved(trace, list(_cut_for_attention(trace))))
    layer_of = {neuron: index for index, layer in enumerate(layers) for neuron in layer.nodes.tolist()}
    if trace.input is not None:
        layer_of |= dict.fromkeys(trace.input.tolist(), -1)
    tied = _tied_layers(layers)
    specs = (_layer_spec(index, layer, layer_of, tied.get(index)) for index, layer in enumerate(layers))
    return layers, NetSpec(tuple(specs))


def _move_output_last(trace: Trace, result: Any) -> None:
    """Puts the layer that the module returns at the end; raises ValueError where there is no such layer."""
    if not isinstance(result, Neurons):
        raise ValueError("expected a module that returns a layer's output, found another value; return a tensor of one")
    if result.factor != 1 and not result.is_output and trace.can_settle(result):
        result = trace.settled(result)
    neurons = set(result.ids.unique().tolist())
    owners = {trace.layer_of(neuron) for neuron in neurons}
    last = max(owners)
    if len(owners) > 1 or last < 0 or neurons != set(trace.layers[last].nodes.tolist()):
        raise ValueError("expected a module that returns all outputs of one layer, found a part, or several layers")
    if trace.is_read(trace.layers[last].nodes):
        raise ValueError(f"{trace.layers[last].place}: other layers read the layer whose output the module returns")
    trace.layers.append(trace.layers.pop(last))
    trace.layers[-1].options |= {"activation": "identity", "w0": 1.0}  # no symmetry moves outputs


def _layer_spec(index: int, layer: TracedLayer, layer_of: dict[int, int], tied: int | None) -> LayerSpec:
    """The spec of a layer.

    Args:
        index: its place.
        layer: the layer.
        layer_of: neuron -> layer, -1 for the input.
        tied: the layer whose weight is the transpose of this one's.
    """
    options = dict(layer.options)
    if options.get("activation") in ("relu", "leaky_relu"):
        options.pop("maximum", None)  # maxima commute with positive scalars
    if layer.reads is not None:
        reads = layer_of[int(layer.reads[0])]
        options["reads"] = None if reads == index - 1 else reads
    if layer.residual is not None:
        options["residual"] = layer_of[int(layer.residual[0])]
    attention = options.pop("attention", None)
    if attention:
        ((queries, keys, heads),) = attention.values()
        options["attention"] = (layer_of[int(queries[0])], layer_of[int(keys[0])], heads)
    if tied is not None:
        options["tied"] = tied
    if layer.reads is not None:
        in_dim = len(layer.reads)
    else:
        assert layer.weight is not None, "constant inputs have weights"
        in_dim = layer.weight.index.shape[1]
    return LayerSpec(in_dim, len(layer.nodes), bias=layer.bias is not None, **options)


# Shared parameters


def _tied_layers(layers: Sequence[TracedLayer]) -> dict[int, int]:
    """Layer -> the earlier layer whose weight is the transpose of its own.

    Raises:
        ValueError: layers share parameters in another way.
    """
    tied: dict[int, int] = {}
    users: dict[str, list[tuple[int, Elements]]] = {}
    for index, layer in enumerate(layers):
        for elements in (layer.weight, layer.bias, *(layer.statistics or ())):
            if elements is None:
                continue
            used = _used(elements)
            if int(used.sum()) < elements.index.numel():
                problem = f"{elements.name} is one parameter in several places of a layer"
                raise ValueError(f"{layer.place}: {problem}, expected each element once")
            for first, other in users.get(elements.name, ()):
                both = _used(other)
                size = min(len(used), len(both))
                if bool((used[:size] & both[:size]).any()):
                    if elements.scale != other.scale or not _is_transposed(layer, elements, layers[first], other):
                        kind = "weights" if elements is layer.weight else "parameters"
                        problem = f"its {kind} are also those of {layers[first].place}"
                        raise ValueError(f"{layer.place}: {problem}; only a weight and its transpose may be shared")
                    tied[index] = first
            users.setdefault(elements.name, []).append((index, elements))
    return tied


def _used(elements: Elements) -> Tensor:
    """Which elements of a parameter are used, up to the last of them."""
    index = elements.index
    used = torch.zeros(int(index.max()) + 1 if index.numel() else 0, dtype=torch.bool)
    used[index.flatten()] = True
    return used


def _is_transposed(layer: TracedLayer, own: Elements, earlier: TracedLayer, other: Elements) -> bool:
    """Whether a layer's parameter is the weight of a linear layer, and its transpose that of an earlier one."""
    pairs = ((layer, own), (earlier, other))
    are_linear = all(
        elements is owner.weight and owner.reads is not None and elements.index.ndim == 2 for owner, elements in pairs
    )
    return are_linear and torch.equal(own.index, other.index.mT)


# Attention


def _cut_for_attention(trace: Trace) -> Iterator[TracedLayer]:
    """The layers, those that compute several of queries, keys and values cut into a layer for each."""
    part_of = {neuron: part for part, nodes in enumerate(trace.attended) for neuron in nodes.tolist()}
    for layer in trace.layers:
        numbers = layer.nodes.tolist()
        parts = [trace.attended[part] for part in sorted({part_of[n] for n in numbers if n in part_of})]
        if not parts:
            yield layer
            continue
        if layer.residual is not None or layer.options.get("groups", 1) > 1:
            raise ValueError(f"{layer.place}: queries, keys or values of a layer with groups or an addition")
        rest = [number for number in numbers if number not in part_of]
        if rest:
            parts.append(torch.tensor(rest))
        place = {number: index for index, number in enumerate(numbers)}
        for nodes in parts:
            options = dict(layer.options)
            attention, first = options.pop("attention", {}), int(nodes[0])
            if first in attention:
                options["attention"] = {first: attention[first]}
            yield layer.rows(torch.tensor([place[number] for number in nodes.tolist()]), nodes, options=options)


# Layers that read several layers


def _side_by_side_resolved(trace: Trace, layers: Sequence[TracedLayer]) -> Iterator[TracedLayer]:
    """The layers, those that read several layers side by side replaced by a layer for each: by summands or, where the
    layer reads channel by channel, by parts."""
    owners: dict[int, Tensor] = {}  # neuron -> all neurons of its layer
    if trace.input is not None:
        owners |= dict.fromkeys(trace.input.tolist(), trace.input)
    for layer in layers:
        for nodes in (layer.reads, layer.residual):
            if nodes is not None:
                _check_order(layer, nodes, owners)
        for part in _parts(trace, layer, owners):
            owners |= dict.fromkeys(part.nodes.tolist(), part.nodes)
            yield part


def _parts(trace: Trace, layer: TracedLayer, owners: dict[int, Tensor]) -> list[TracedLayer]:
    """One layer for each that a layer reads."""
    reads, is_dense = layer.reads, layer.options.get("groups", 1) == 1
    known = [] if reads is None else [owners[neuron] for neuron in reads.tolist() if neuron in owners]
    sources = list({id(nodes): nodes for nodes in known}.values())
    if len(sources) == 1 and is_dense and layer.weight is not None:
        return [replace(_summands(trace, layer, sources)[0], residual=layer.residual)]
    if reads is None or len(sources) < 2:
        return [layer]
    if layer.residual is None and is_dense:
        return _summands(trace, layer, sources)
    if layer.residual is None and layer.options.get("norm", "batch") == "batch":
        places = torch.arange(len(reads)).split([*map(len, sources)])
        parts = [layer.rows(place, layer.nodes[place], reads=reads[place]) for place in places]
        return [replace(part, options={**part.options, "groups": len(part.nodes)}) for part in parts]
    raise ValueError(f"{layer.place}: reads several layers side by side, and has groups or an addition")


def _summands(trace: Trace, layer: TracedLayer, sources: Sequence[Tensor]) -> list[TracedLayer]:
    """W x + b of a layer that reads several layers, as W_1 x_1, W_2 x_2 + (W_1 x_1), ..., the last with b."""
    assert layer.reads is not None, "only layers that read others have summands"
    assert layer.weight is not None, "layers without weights are norms"
    summands: list[TracedLayer] = []
    column = {number: index for index, number in enumerate(layer.reads.tolist())}
    for nodes in sources:
        columns = [column[number] for number in nodes.tolist()]
        weight = layer.weight
        if columns != list(range(len(column))):
            weight = replace(weight, index=weight.index[:, columns])
        part = replace(layer, reads=nodes, weight=weight, residual=summands[-1].nodes if summands else None)
        if nodes is not sources[-1]:
            options = {**layer.options, "activation": "identity"}
            part = replace(part, nodes=trace.number_neurons(len(layer.nodes), -2), bias=None, options=options)
        summands.append(part)
    return summands


def _check_order(layer: TracedLayer, nodes: Tensor, owners: dict[int, Tensor]) -> None:
    """Refuses a part of a layer, and, where channels stand for channels, another order than the layer's."""
    known = {id(owners[neuron]): owners[neuron] for neuron in nodes.tolist() if neuron in owners}
    is_whole = sum(map(len, known.values())) in (0, len(nodes))
    is_aligned = nodes is layer.residual or layer.options.get("groups", 1) > 1
    if not is_whole or (is_aligned and known and not torch.equal(torch.cat(list(known.values())), nodes)):
        raise ValueError(f"{layer.place}: reads a part of a layer, or its channels in another order")
