"""Layers that compute several of queries, keys and values, or pinned neurons beside others, cut into one for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.layers import TracedLayer
from scalegmn.interop.torch_modules.pinning import pin_or_refuse
from scalegmn.interop.torch_modules.trace import Trace


def cut(trace: Trace, layers: Sequence[TracedLayer]) -> Iterator[TracedLayer]:
    """The layers, those that compute several of queries, keys and values, or pinned neurons beside others, cut into a
    layer for each. Where that cannot be, the neurons are pinned."""
    cuts = _Cuts(layers)
    for values, *others in trace.attended:
        layer = cuts.owner[int(values[0])]
        if not cuts.take(values, *others):
            problem = "queries, keys or values are a part of a layer with groups or an addition"
            pin_or_refuse(trace, layer, problem, values, *others)
            layer.options["attention"].pop(int(values[0]))
    for first, (nodes, _) in list(trace.blocks.items()):
        if not cuts.take(nodes):
            problem = "values that are mixed over positions are a part of a layer with groups or an addition"
            pin_or_refuse(trace, cuts.owner[first], problem, nodes)
            del trace.blocks[first]
    for nodes in trace.parts:
        first = int(nodes[0])
        if first in cuts.owner and not cuts.take(nodes):  # else of a layer that nothing reads
            problem = "channels that meet others are a part of a layer that cannot be cut"
            pin_or_refuse(trace, cuts.owner[first], problem, nodes)
    for layer in layers:
        parts = cuts.parts(layer)
        inside = {number for nodes in parts for number in nodes.tolist()}
        rest = torch.tensor([number for number in layer.nodes.tolist() if number not in inside], dtype=torch.long)
        pinned = rest[trace.neurons.is_pinned(rest)]
        is_alone = layer.residual is None and not layer.same_neurons and not cuts.is_added(layer)
        is_cut = 0 < len(pinned) < len(rest) and is_alone and cuts.is_part(pinned)
        yield from _parts_of(trace, layer, parts, rest, is_cut)


class _Cuts:
    """The parts that layers are cut into.

    Args:
        layers: all of them.

    Attributes:
        owner: neuron -> its layer.
    """

    def __init__(self, layers: Sequence[TracedLayer]) -> None:
        self.owner = {number: layer for layer in layers for number in layer.nodes.tolist()}
        self._sets, self._sets_of = _read_together(layers)
        self._parts: dict[int, list[Tensor]] = {id(layer): [] for layer in layers}
        self._added_to: dict[int, list[TracedLayer]] = {}  # layer -> those that its neurons are added to
        for layer in layers:
            for number in {int(nodes[0]) for nodes in _added(layer)}:
                if number in self.owner:
                    self._added_to.setdefault(id(self.owner[number]), []).append(layer)

    def parts(self, layer: TracedLayer) -> list[Tensor]:
        """The parts of a layer so far."""
        return self._parts[id(layer)]

    def is_added(self, layer: TracedLayer) -> bool:
        """Whether neurons of a layer are added to those of others."""
        return id(layer) in self._added_to

    def is_part(self, nodes: Tensor) -> bool:
        """Whether neurons can be a part of their layer beside those that it has."""
        layer = self.owner[int(nodes[0])]
        if torch.equal(nodes, layer.nodes):
            return _fits(nodes, self.parts(layer))
        numbers = set(nodes.tolist())
        is_cut = layer.options.get("groups", 1) == 1 or _is_by_channel(layer)
        if any(self.owner.get(number) is not layer for number in numbers) or not is_cut:
            return False
        together = {place for number in numbers for place in self._sets_of.get(number, ())}
        return all(self._sets[place] <= numbers for place in together) and _fits(nodes, self.parts(layer))

    def take(self, *selected: Tensor) -> bool:
        """Makes neurons parts of their layers; false where they cannot be."""
        groups = [self._with_added(nodes) for nodes in selected]
        if None in groups:
            return False
        for part in [part for group in groups for part in group or ()]:
            known = self.parts(self.owner[int(part[0])])
            if not any(torch.equal(part, other) for other in known):
                known.append(part)
        return True

    def _with_added(self, nodes: Tensor) -> list[Tensor] | None:
        """A part of a layer, with those of the layers that additions join to it; None where they are no parts."""
        joined: list[Tensor] = []
        waiting = [nodes]
        while waiting:
            part = waiting.pop()
            if any(torch.equal(part, other) for other in joined):
                continue
            if int(part[0]) not in self.owner or not self.is_part(part):
                return None
            joined.append(part)
            layer = self.owner[int(part[0])]
            if torch.equal(part, layer.nodes):
                continue
            place = _places(layer.nodes, part)
            waiting += [nodes[place] for nodes in _added(layer)]
            if _is_by_channel(layer):
                assert layer.reads is not None
                waiting.append(layer.reads[place])
            for other in self._added_to.get(id(layer), ()):
                for nodes in _added(other):
                    if self.owner.get(int(nodes[0])) is layer:
                        waiting.append(other.nodes[_places(nodes, part)])
        return joined


def _added(layer: TracedLayer) -> list[Tensor]:
    """Numbers of neurons of other layers in the order of a layer's own, which are cut as these are."""
    return [*([] if layer.residual is None else [layer.residual]), *layer.same_neurons]


def _is_by_channel(layer: TracedLayer) -> bool:
    """Whether each neuron reads one channel alone, such as of a batch norm."""
    is_diagonal = layer.reads is not None and layer.options.get("groups", 1) == len(layer.nodes) == len(layer.reads)
    return is_diagonal and layer.coupled is None and layer.options.get("norm", "batch") == "batch"


def _places(nodes: Tensor, part: Tensor) -> Tensor:
    """Where the neurons of a part are among others."""
    place = {number: index for index, number in enumerate(nodes.tolist())}
    return torch.tensor([place[number] for number in part.tolist() if number in place], dtype=torch.long)


def _fits(nodes: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether neurons are one of the parts of a layer, or in none of them."""
    if any(torch.equal(nodes, part) for part in parts):
        return True
    return not {number for part in parts for number in part.tolist()} & set(nodes.tolist())


def _parts_of(
    trace: Trace, layer: TracedLayer, parts: Sequence[Tensor], rest: Tensor, is_cut: bool
) -> Iterator[TracedLayer]:
    """A layer in parts: given ones and, if `is_cut`, of its other neurons pinned ones and others."""
    numbers = layer.nodes.tolist()
    is_pinned = trace.neurons.is_pinned(rest)
    others = [rest[is_pinned], rest[~is_pinned]] if is_cut else [rest]
    place = {number: index for index, number in enumerate(numbers)}
    attention = layer.options.get("attention", {})
    for nodes in [*parts, *(nodes for nodes in others if len(nodes))]:
        first = int(nodes[0])
        options = {key: value for key, value in layer.options.items() if key != "attention"}
        if first in attention:
            options["attention"] = {first: attention[first]}
        if first in trace.blocks:
            options["blocks"] = trace.blocks[first][1]
        if torch.equal(nodes, layer.nodes):
            yield replace(layer, options=options)
            continue
        chosen, changes = torch.tensor([place[number] for number in nodes.tolist()]), {}
        if _is_by_channel(layer):
            assert layer.reads is not None
            changes, options["groups"] = {"reads": layer.reads[chosen]}, len(nodes)
        yield layer.rows(chosen, nodes, options=options, **changes)


def _read_together(layers: Sequence[TracedLayer]) -> tuple[list[set[int]], dict[int, list[int]]]:
    """Sets of neurons that a layer reads channel by channel; neuron -> places of those that it is in."""
    tensors = [layer.reads for layer in layers if layer.options.get("groups", 1) > 1 and not _is_by_channel(layer)]
    tensors += [nodes for layer in layers for nodes in layer.coupled or ()]
    sets = [set(nodes.tolist()) for nodes in tensors if nodes is not None]
    places: dict[int, list[int]] = {}
    for place, numbers in enumerate(sets):
        for number in numbers:
            places.setdefault(number, []).append(place)
    return sets, places
