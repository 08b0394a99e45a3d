"""The state of a trace: the neurons and layers so far, and the checks that all operators share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.layers import TracedLayer
from scalegmn.interop.torch_modules.values import (
    Elements,
    NetworkInput,
    Neurons,
    Opaque,
    Scores,
    compact,
    is_constant_along,
    size_along,
)

MAX_SOURCES = 16
"""A layer that is computed channel by channel from so many others is not left out where others are computed from it."""

SOURCE = -2
"""In place of a layer, of the numbers for elements of what no layer describes."""


class Refusal(ValueError):
    """An operation that no layer describes.

    Args:
        place: where in the module it is.
        problem: what is wrong.
    """

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}; docs/architectures.md lists what can be read")
        self.problem = problem


class Trace:
    """The layers of a network, found operation by operation.

    Operators (`interop.torch_modules.operators`) read and change it; `assemble.assemble` turns it into a `NetSpec`.

    Args:
        is_strict: whether what no layer describes is refused; else the neurons that it reads are pinned.
    """

    def __init__(self, is_strict: bool = True) -> None:
        self.is_strict = is_strict
        self.layers: list[TracedLayer] = []
        self.place = ""
        """Where in the module the operation at hand is, for messages."""
        self.input: Tensor | None = None
        """[n_0] numbers of the input's neurons, once a layer has read the input."""
        self.attended: list[tuple[Tensor, Tensor, Tensor]] = []
        """Neurons of queries, keys and values of each attention."""
        self.blocks: dict[int, tuple[Tensor, int]] = {}
        """First neuron -> those of values that are mixed over positions, and into how many blocks they are cut."""
        self.kept: set[int] = set()
        """First neurons of layers that nothing reads, which join channels that are multiplied and summed up."""
        self.sources: list[Tensor] = []
        """Numbers for the channels of what no layer describes, that layers read."""
        self.tensors: Mapping[str, Tensor] = {}
        """Parameters and buffers by name, for the check of what is read."""
        self.claimed: Tensor | None = None
        """What the layer that the operation at hand leads to computes as it was read, where that is known."""
        self._entry = torch.empty(0, dtype=torch.long)  # element of the input -> its neuron
        self._inputs: list[tuple[int, tuple[int, ...]]] = []  # first element and shape of each input
        self._layer_of: list[int] = []  # neuron -> layer, -1 for the input
        self._is_read = torch.zeros(0, dtype=torch.bool)
        self._is_pinned = torch.zeros(0, dtype=torch.bool)
        self._is_aligned = torch.zeros(0, dtype=torch.bool)
        self.parts: list[Tensor] = []
        """Neurons that operations read which compute each channel alike, one entry for each."""
        self._reasons: dict[int, str] = {}  # layer -> what pins its neurons
        self._users: dict[str, list[tuple[int, Elements]]] = {}  # parameter -> layers that have it
        self._named: list[str] = []  # the names added to _users, in order

    def refuse(self, problem: str) -> NoReturn:
        """Raises `Refusal` for an operation that no layer describes."""
        raise Refusal(self.place, problem)

    # Neurons

    def number_neurons(self, size: int, layer: int) -> Tensor:
        """Numbers for new neurons of a layer."""
        first = len(self._layer_of)
        self._layer_of += [layer] * size
        new = torch.zeros(size, dtype=torch.bool)
        self._is_read, self._is_pinned = torch.cat([self._is_read, new]), torch.cat([self._is_pinned, new])
        self._is_aligned = torch.cat([self._is_aligned, new])
        return torch.arange(first, first + size)

    def layer_of(self, neuron: int | Tensor) -> int:
        """The layer that a neuron belongs to; -1 for the network's input."""
        return self._layer_of[int(neuron)]

    def is_activated(self, layer: int) -> bool:
        """Whether a layer has its activation already; the input has none."""
        return layer >= 0 and self.layers[layer].is_activated

    def new_input(self, value: Tensor) -> NetworkInput:
        """Elements of the input, or of what is computed from it without parameters."""
        first = len(self._entry)
        self._entry = torch.cat([self._entry, torch.full((value.numel(),), -1)])
        self._inputs.append((first, tuple(value.shape)))
        return NetworkInput(torch.arange(first, len(self._entry)).reshape(value.shape), value)

    def input_neurons(self, size: int) -> Tensor:
        """[n_0] numbers of the input's neurons."""
        if self.input is None:
            self.input = self.number_neurons(size, -1)
        if len(self.input) != size:
            problem = f"it reads {size} channels of the input, where another layer reads {len(self.input)}"
            self.refuse(f"{problem}; concatenate what the network reads, before its first layer")
        return self.input

    def mark_read(self, nodes: Tensor) -> None:
        """Notes that a layer, an addition or attention reads these neurons."""
        self._is_read[nodes] = True

    def is_read(self, nodes: Tensor) -> bool:
        """Whether a layer, an addition or attention reads one of these neurons."""
        return bool(self._is_read[nodes].any())

    # What no layer describes

    def saved(self, values: Sequence[Any]) -> Callable[[], None]:
        """A function that takes back what an operation on these values has changed."""
        owners: set[int] = set()
        for value in values:
            if isinstance(value, Neurons):
                owners |= {layer for layer in value.versions if layer >= 0}
            elif isinstance(value, Scores):
                owners |= {self.layer_of(nodes.flatten()[0]) for nodes in (value.queries, value.keys)}
        copies = {owner: self.layers[owner].copy() for owner in owners if owner >= 0}
        counts = len(self.layers), len(self.attended), len(self._named), len(self._layer_of), len(self.sources)
        masks, num_parts = (self._is_read.clone(), self._is_pinned.clone(), self._is_aligned.clone()), len(self.parts)
        reads_input = any(isinstance(value, NetworkInput) for value in values)
        entry = self._entry.clone() if reads_input and self.input is None else None
        had_input, blocks, kept = self.input is not None, dict(self.blocks), set(self.kept)

        def restore() -> None:
            del self.layers[counts[0] :], self.attended[counts[1] :], self._layer_of[counts[3] :]
            del self.sources[counts[4] :]
            self.blocks, self.kept = dict(blocks), set(kept)
            for name in self._named[counts[2] :]:
                self._users[name].pop()
            del self._named[counts[2] :]
            for owner, layer in copies.items():
                self.layers[owner] = layer.copy()
            self._is_read, self._is_pinned, self._is_aligned = (mask.clone() for mask in masks)
            del self.parts[num_parts:]
            if not had_input:
                self.input = None
            if entry is not None:
                self._entry = entry.clone()
            self.claimed = None

        return restore

    def pin(self, values: Sequence[Any], problem: str) -> None:
        """Pins all neurons that something reads which no layer describes, and the parameters that it reads.

        Args:
            values: what it reads.
            problem: what it is.
        """
        reason = f"{self.place}: {problem}"
        for value in values:
            if isinstance(value, Neurons):
                self.pin_neurons(value.ids, reason)
            elif isinstance(value, Scores):
                self._pin_scores(value, reason)
            elif isinstance(value, Elements) and not value.is_buffer:
                self._pin_parameter(value, reason)

    def _pin_scores(self, scores: Scores, reason: str) -> None:
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
        is_one_layer = all(len({self.layer_of(node) for node in nodes.flatten().tolist()}) == 1 for nodes in rows)
        if self.is_strict or not is_even or not is_one_layer or len(numbers.unique()) < len(numbers):
            self.pin_neurons(scores.queries, reason)
            self.pin_neurons(scores.keys, reason)
            return
        for nodes in rows:
            if not self.in_blocks(nodes):
                self.pin_neurons(nodes, reason)
        self.kept.add(int(self.coupled_layer([nodes.flatten() for nodes in rows])[0]))

    def in_blocks(self, rows: Tensor) -> bool:
        """Notes that blocks of channels [blocks, channels] stay where they are; false where they are cut otherwise."""
        nodes = rows.flatten()
        if len(rows) == 1:
            return True
        known, blocks = self.blocks.setdefault(int(nodes[0]), (nodes, len(rows)))
        return blocks == len(rows) and torch.equal(known, nodes)

    def pin_neurons(self, nodes: Tensor, reason: str) -> None:
        """Pins neurons, given by their numbers in any shape; those of the input stay anyway."""
        numbers = torch.zeros_like(self._is_pinned)
        numbers[compact(nodes)] = True
        for owner in {self._layer_of[number] for number in numbers.nonzero()[:, 0].tolist()}:
            if owner >= 0 and self.layers[owner].coupled is not None:
                layer = self.layers[owner]
                assert layer.reads is not None, "it reads other layers"
                for part in (layer.reads, *layer.coupled):
                    self.pin_neurons(part[numbers[layer.nodes]], reason)
        self._is_pinned |= numbers
        self._is_read |= numbers
        for owner in {self._layer_of[number] for number in numbers.nonzero()[:, 0].tolist()}:
            self._reasons.setdefault(owner, reason)

    def reason(self, nodes: Tensor) -> str:
        """What pins the neurons of a layer, if anything does."""
        return self._reasons.get(self.layer_of(nodes[0]), "")

    def is_pinned(self, nodes: Tensor) -> Tensor:
        """[n] bool, which of these neurons are pinned."""
        return self._is_pinned[nodes]

    def _pin_parameter(self, elements: Elements, reason: str) -> None:
        """Pins the neurons of all layers that have elements of a parameter, and those that they read; elements that no
        layer has become a layer of pinned neurons with constant inputs."""
        used = torch.zeros(self.tensors[elements.name].numel(), dtype=torch.bool)
        index = compact(elements.index)
        used[index.flatten()] = True
        is_once = int(used.sum()) == index.numel()
        for user, other in self._users.get(elements.name, ()):
            if bool(used[other.index.flatten()].any()):
                self.pin_layer(self.layers[user], reason)
                used[other.index.flatten()] = False
                is_once = False
        if not used.any():
            return
        index = index.squeeze() if is_once else used.nonzero()[:, 0]
        index = index.reshape(-1, 1) if index.ndim < 2 else index.flatten(1)
        if self.tensors[elements.name].is_complex():  # real and imaginary parts
            index = torch.stack([2 * index, 2 * index + 1], -1).flatten(1)
        options = {"constant": True}
        layer = self.new_layer(len(index), None, replace(elements, index=index, scale=1.0), options=options)
        self.layers.append(layer)
        self._users.setdefault(elements.name, []).append((len(self.layers) - 1, elements))
        self._named.append(elements.name)
        self.pin_neurons(layer.nodes, reason)

    def pin_layer(self, layer: TracedLayer, reason: str) -> None:
        """Pins the neurons of a layer, and those that it reads."""
        self.pin_neurons(layer.nodes, reason)
        if layer.reads is not None:
            self.pin_neurons(layer.reads, reason)

    def own_parameters(self, index: int, layer: TracedLayer) -> None:
        """Notes the parameters of a layer; refuses those that another layer has too, unless it has all in the same
        places, or the transpose of a linear layer's weight."""
        for elements in (layer.weight, layer.bias, *(layer.statistics or ())):
            if elements is None:
                continue
            if self.tensors and self.tensors[elements.name].is_complex():
                self.refuse(f"{elements.name} has complex numbers")
            users = self._users.setdefault(elements.name, [])
            for first, other in users:
                if first != index and elements.shares(other):
                    earlier = self.layers[first]
                    if layer.is_used_again(elements, earlier, other):
                        break
                    if elements.scale != other.scale or not layer.is_transposed(elements, earlier, other):
                        kind = "weights" if elements is layer.weight else "parameters"
                        problem = f"a part of its {kind} are also those of {earlier.place}"
                        self.refuse(f"{problem}, or a multiple of them")
            if not any(first == index and other is elements for first, other in users):
                users.append((index, elements))
                self._named.append(elements.name)

    # What is computed alike for all channels

    def is_derived(self, value: Neurons) -> bool:
        """Whether a value is another than what its layers compute at the end, but the same function for all
        channels."""
        if value.is_output:
            return value.is_uniform
        return value.factor != 1 or any(
            layer >= 0 and self.layers[layer].version != version for layer, version in value.versions.items()
        )

    def aligned_channels(self, values: Sequence[Neurons], ids: Sequence[Tensor], axes: Sequence[int]) -> list[Tensor]:
        """[n] neurons of each of several values that stand in the same places, each with one of each other value.

        Args:
            values: the values.
            ids: their neurons, in one shape.
            axes: those along which they differ.
        """
        for value in values:
            self.refuse_sources(value)
            if -1 in value.versions or (value.is_output and not value.is_uniform):
                self.refuse("channels of a layer meet those of the input, or constants that differ by channel")
        rows = []
        for item in ids:
            for axis in range(item.ndim):
                if axis not in axes:
                    item = item.narrow(axis, 0, 1)
            rows.append(item.reshape(-1))
        columns = list(torch.stack(rows).unique(dim=1))
        if any(len(column.unique()) < len(column) for column in columns):
            self.refuse("channels meet in an unknown order")
        for column in columns:
            if len({self.layer_of(neuron) for neuron in column.tolist()}) > 1:
                self.refuse("an operation on several layers side by side")
        return columns

    def without_coupled(self, columns: Sequence[Tensor]) -> list[Tensor]:
        """The neurons of layers with weights that aligned neurons are computed from, each once."""
        sources: list[Tensor] = []
        for column in columns:
            layer = self.layers[self.layer_of(column[0])]
            nodes = [column]
            is_plain = layer.coupled is not None and layer.bias is None and layer.residual is None
            if is_plain and not self.is_read(layer.nodes) and len(layer.coupled or ()) < MAX_SOURCES:
                place = torch.zeros(int(layer.nodes.max()) + 1, dtype=torch.long)
                place[layer.nodes] = torch.arange(len(layer.nodes))
                assert layer.reads is not None
                nodes = [part[place[column]] for part in (layer.reads, *(layer.coupled or ()))]
            sources += [part for part in nodes if not any(torch.equal(part, other) for other in sources)]
        numbers = torch.cat(sources)
        if len(numbers.unique()) < len(numbers):
            self.refuse("channels of one layer meet in another order")
        return sources

    def mark_aligned(self, nodes: Tensor) -> None:
        """Notes that an operation reads these neurons that computes each channel alike: no scalar commutes with it."""
        self._is_aligned[nodes] = True
        self.mark_read(nodes)
        if not any(torch.equal(nodes, part) for part in self.parts if part[0] == nodes[0]):
            self.parts.append(nodes)

    def is_aligned(self, nodes: Tensor) -> bool:
        """Whether an operation reads one of these neurons that computes each channel alike."""
        return bool(self._is_aligned[nodes].any())

    def coupled_layer(self, columns: Sequence[Tensor]) -> Tensor:
        """[n] neurons of a new layer without weights that is coupled to what it reads.

        Args:
            columns: [n] neurons of each layer that is read, in one order.
        """
        sources = self.without_coupled(columns)
        for nodes in sources:
            self.mark_aligned(nodes)
        size = len(columns[0])
        options = {"groups": size, "affine": False}
        layer = self.new_layer(size, sources[0], None, is_activated=True, options=options, coupled=tuple(sources[1:]))
        self.add_layer(layer)
        return layer.nodes

    def add_layer(self, layer: TracedLayer) -> None:
        """Adds a layer to the network."""
        self.own_parameters(len(self.layers), layer)
        self.layers.append(layer)
        if layer.reads is None:
            return
        self.mark_read(layer.reads)
        owner = self.layer_of(layer.reads[0])
        if layer.weight is None and owner >= 0 and len(layer.reads) < len(self.layers[owner].nodes):
            self.parts.append(layer.reads)

    def refuse_sources(self, value: Neurons) -> None:
        """Refuses what lies beside something that no layer describes, where a layer alone may stand."""
        if SOURCE in value.versions:
            self.refuse("channels of layers lie beside others that no layer computes")

    # What is read, evaluated

    def read(self, elements: Elements, index: Tensor | None = None) -> Tensor:
        """The elements of a parameter or buffer as they are read, or those at other positions."""
        tensor = self.tensors[elements.name]
        values = elements.of(tensor) if index is None else tensor.reshape(-1)[index.to(tensor.device)]
        return values if elements.scale == 1 else values * elements.scale

    def read_if_any(self, elements: Elements | None) -> Tensor | None:
        """`read`; None of nothing."""
        return None if elements is None else self.read(elements)

    def claim_sum(self, x: Tensor | None, bias: Tensor, axis: int) -> None:
        """Notes that the operation at hand is read as x + bias, with the bias along an axis."""
        if x is not None:
            self.claimed = x + bias.reshape([-1 if other == axis % x.ndim else 1 for other in range(x.ndim)])

    def compare(self, actual: Tensor, claimed: Tensor) -> None:
        """Refuses a layer that, as it was read, gives other values than the module."""
        size = float(actual.abs().max()) if actual.numel() else 0.0
        difference = float((actual - claimed).abs().max()) if actual.numel() else 0.0
        tolerance = 1e-6 if actual.dtype == torch.float64 else 1e-3
        if not difference <= tolerance * size and bool(actual.isfinite().all()):
            share = f"{difference / size:.1g}" if size else "all"
            self.refuse(f"the layer that was read gives other values than the module, by {share} of them")

    # Values

    def can_settle(self, value: Neurons) -> bool:
        """Whether `settled` can multiply the weights."""
        (owner, *others) = value.versions
        if value.factor == 0 or owner < 0 or others or value.is_output:
            return False
        layer = self.layers[owner]
        is_whole = layer.version == value.versions[owner] and len(value.ids.unique()) == len(layer.nodes)
        return layer.is_linear and is_whole and not self.is_read(layer.nodes)

    def settled(self, value: Neurons) -> Neurons:
        """The multiple c x of a layer's output x, as the output of that layer with c times its weights and bias."""
        if value.factor == 1:
            return value
        if not self.can_settle(value):
            self.refuse(f"the multiple {value.factor:g} x of a layer's output x is read; multiply its weights instead")
        (owner,) = value.versions
        layer = self.layers[owner]
        assert layer.weight is not None
        layer.weight = replace(layer.weight, scale=layer.weight.scale * value.factor)
        if layer.bias is not None:
            layer.bias = replace(layer.bias, scale=layer.bias.scale * value.factor)
        layer.version += 1
        evaluated = None if value.value is None else value.value * value.factor
        return replace(value, versions={owner: layer.version}, factor=1.0, value=evaluated)

    def check_current(self, value: Neurons) -> None:
        """Refuses values from before a change of their layer, and those that only an output may have."""
        if value.is_output:
            self.refuse("a layer reads a value after a softmax or an offset, which only a network's output may have")
        if any(layer >= 0 and self.layers[layer].version != version for layer, version in value.versions.items()):
            self.refuse("a layer is read both before and after its activation or an addition")

    def as_neurons(self, value: Any, axis: int) -> Neurons:
        """The neurons that a layer reads, with channels along an axis; elements of the input, and of what no layer
        describes, become neurons."""
        if isinstance(value, Opaque):
            return self._new_source(value.value, axis)
        if isinstance(value, Neurons):
            self.check_current(value)
            return self.settled(value)
        if isinstance(value, Tensor) and not value.any():  # the state before the first step
            layer = self.new_layer(value.shape[axis], None, None, options={"constant": True, "affine": False})
            return replace(self.output_of(layer, axis, value.shape), value=value)
        if not isinstance(value, NetworkInput):
            self.refuse("a layer reads parameters, expected the input or a layer's output")
        ndim = value.index.ndim
        if value.parts is not None and axis % ndim == value.parts[0] % ndim:
            parts = [self.as_neurons(part, axis) for part in value.parts[1]]
            versions = {layer: version for part in parts for layer, version in part.versions.items()}
            return Neurons(torch.cat([part.ids for part in parts], axis), versions, value=value.value)
        size = value.index.shape[axis]
        is_first = self.input is None
        shape = [1] * value.index.ndim
        shape[axis] = size
        if self.input is not None and len(self.input) != size and not self.is_strict:
            return self._new_source(value.value, axis)
        ids = self.input_neurons(size).reshape(shape).expand_as(value.index)
        if is_first:
            self._enter(value.index, ids)
        if not torch.equal(self._entry[value.index], ids):
            if not self.is_strict:
                return self._new_source(value.value, axis)
            problem = (
                "a part of the input is read, or its channels in another order or prepared otherwise than elsewhere"
            )
            self.refuse(f"{problem}; concatenate what the network reads, before its first layer")
        return Neurons(ids, {-1: 0}, value=value.value)

    def _new_source(self, value: Tensor | None, axis: int) -> Neurons:
        """What no layer describes, or channels of the input that other layers read otherwise, as neurons."""
        assert value is not None
        shape = [1] * value.ndim
        shape[axis] = value.shape[axis]
        nodes = self.number_neurons(value.shape[axis], SOURCE)
        self.sources.append(nodes)
        return Neurons(nodes.reshape(shape).expand_as(value), {SOURCE: 0}, value=value)

    def _enter(self, index: Tensor, ids: Tensor) -> None:
        """Notes which neurons elements of the input belong to. Where these lie along one of its axes, all elements have
        theirs, since a layer may read position by position."""
        self._entry[index] = ids
        first, shape = next(item for item in reversed(self._inputs) if item[0] <= int(index.min()))
        steps = torch.arange(math.prod(shape)).reshape(shape)
        if not index.numel() or int(index.max()) >= first + steps.numel():
            return
        for axis, size in enumerate(shape):
            place = (index - first) // (steps.stride(axis) or 1) % size
            neuron = torch.full((size,), -1)
            neuron[place] = ids
            if bool((neuron[place] == ids).all()) and len(neuron.unique()) == size and bool((neuron >= 0).all()):
                along = neuron.reshape([-1 if other == axis else 1 for other in range(len(shape))])
                self._entry[first : first + steps.numel()] = along.expand(shape).flatten()
                return

    def channels_along(self, neurons: Neurons, axis: int) -> Tensor:
        """[n] the neurons along an axis, where they are the same at all other places."""
        if any(not is_constant_along(neurons.ids, other) for other in _others(neurons.ids, axis)):
            self.refuse("a layer reads positions, expected channels along one axis")
        return neurons.ids.movedim(axis, -1)[(0,) * (neurons.ids.ndim - 1)]

    def channel_axis(self, neurons: Neurons) -> int:
        """The axis along which neurons differ; of a single channel, the first of size 1 behind the batch."""
        axes = [axis for axis in range(neurons.ids.ndim) if not is_constant_along(neurons.ids, axis)]
        if not axes:  # a single channel
            axes = [axis for axis in (*range(1, neurons.ids.ndim), 0) if neurons.ids.shape[axis] == 1][:1]
        if len(axes) != 1:
            self.refuse(f"channels lie along {len(axes)} axes, expected one")
        return axes[0]

    # Layers

    def new_layer(self, size: int, reads: Tensor | None, weight: Elements | None, **rest: Any) -> TracedLayer:
        """A layer of `size` new neurons; `output_of` adds it to the network."""
        return TracedLayer(self.place, self.number_neurons(size, len(self.layers)), reads, weight, **rest)

    def output_of(self, layer: TracedLayer, axis: int, shape: Sequence[int]) -> Neurons:
        """Adds a layer; returns its output, with channels along an axis."""
        self.add_layer(layer)
        view = [1] * len(shape)
        view[axis] = len(layer.nodes)
        return Neurons(layer.nodes.reshape(view).expand(*shape), {len(self.layers) - 1: 0})

    def constant_layer(self, elements: Elements, neurons: Neurons) -> Neurons:
        """Parameters in place of activations, such as position embeddings: a layer that reads constant inputs.

        Args:
            elements: the parameter.
            neurons: the activations beside which it stands.
        """
        axis, index = self.channel_axis(neurons), elements.index
        index = index.reshape([1] * (neurons.ids.ndim - index.ndim) + list(index.shape))
        if index.shape[axis] != neurons.ids.shape[axis]:
            self.refuse(f"a parameter with {index.shape[axis]} channels is added to {neurons.ids.shape[axis]} channels")
        rows = index.movedim(axis, 0).reshape(index.shape[axis], -1)
        if _has_duplicates(rows[0]):  # expanded over batches, for example: each position once
            rows = torch.stack(list(rows.mT.unique(dim=0)), dim=1)
        layer = self.new_layer(len(rows), None, replace(elements, index=rows), options={"constant": True})
        return self.output_of(layer, axis, index.shape)

    def add(self, x: Neurons, y: Neurons, shape: Sequence[int]) -> Neurons:
        """x + y as a residual connection into one of the two layers, one that has none yet."""
        for value in (x, y):
            self.check_current(value)
            self.refuse_sources(value)
        x, y = self.settled(x), self.settled(y)
        x, y = (replace(value, ids=value.ids.expand(*shape)) for value in (x, y))
        axis = self.channel_axis(x)
        first, second = self.channels_along(x, axis), self.channels_along(y, axis)

        def is_free(value: Neurons, along: Tensor) -> bool:
            (owner, *others) = value.versions
            is_whole = not others and owner >= 0 and torch.equal(along, self.layers[owner].nodes)
            if not is_whole or self.layers[owner].coupled is not None:
                return False
            return self.layers[owner].residual is None and not self.is_read(along)

        receivers = [pair for pair in ((y, second, first), (x, first, second)) if is_free(*pair[:2])]
        receivers.sort(key=lambda pair: -max(pair[0].versions))
        for value, _, added in receivers:
            (owner,) = value.versions
            sources = {self.layer_of(neuron) for neuron in added.tolist()}
            if len(sources) == 1 and max(sources) < owner:
                layer = self.layers[owner]
                layer.residual = added
                layer.options["residual_after"] = layer.is_activated
                layer.version += 1
                self.mark_read(added)
                return replace(value, versions={owner: layer.version})
        self.refuse("two layers are added, both of which are read elsewhere too or have another addition")

    def add_elements(self, neurons: Neurons, elements: Elements, shape: Sequence[int]) -> Neurons:
        """Adds a parameter: the bias of a layer that has none, or the output of a layer of constant inputs."""
        self.check_current(neurons)
        neurons = self.settled(neurons)
        (owner, *others), axis = neurons.versions, self.channel_axis(neurons)
        size = neurons.ids.shape[axis]
        is_bias = elements.index.numel() == size == size_along(elements.index, axis - neurons.ids.ndim)
        if is_bias and not others and owner >= 0 and self.layers[owner].bias is None:
            layer = self.layers[owner]
            if layer.version == 0 and torch.equal(self.channels_along(neurons, axis), layer.nodes):
                layer.bias, layer.version = replace(elements, index=elements.index.flatten()), 1
                self.own_parameters(owner, layer)
                self.claim_sum(neurons.value, self.read(layer.bias), axis)
                return replace(neurons, versions={owner: 1})
        return self.add(neurons, self.constant_layer(elements, neurons), shape)


def _others(tensor: Tensor, axis: int) -> list[int]:
    """All axes but one."""
    return [other for other in range(tensor.ndim) if other != axis % tensor.ndim]


def _has_duplicates(numbers: Tensor) -> bool:
    """Whether a number occurs twice."""
    in_order = numbers.sort().values
    return bool((in_order[1:] == in_order[:-1]).any())
