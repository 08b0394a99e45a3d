"""The state of a trace: the neurons and layers so far, and the checks that all operators share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.input_elements import InputElements
from scalegmn.interop.torch_modules.layers import ParameterUsers, TracedLayer
from scalegmn.interop.torch_modules.neuron_table import NeuronTable
from scalegmn.interop.torch_modules.values import (
    Elements,
    NetworkInput,
    Neurons,
    Opaque,
    Scores,
    Turned,
    is_constant_along,
)

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
        self.attended: list[tuple[Tensor, ...]] = []
        """Neurons of values, queries, keys and biases of scores of each attention."""
        self.blocks: dict[int, tuple[Tensor, int]] = {}
        """First neuron -> those of values that are mixed over positions, and into how many blocks they are cut."""
        self.kept: set[int] = set()
        """First neurons of layers that nothing reads, which join channels that are multiplied and summed up."""
        self.sources: list[Tensor] = []
        """Numbers for the channels of what no layer describes, that layers read."""
        self.tensors: Mapping[str, Tensor] = {}
        """Parameters and buffers by name, for the check of what is read."""
        self.shared: set[str] = set()
        """Names of parameters that several operations read."""
        self.claimed: Tensor | None = None
        """What the layer that the operation at hand leads to computes as it was read, where that is known."""
        self.parts: list[Tensor] = []
        """Neurons that operations read which compute each channel alike, one entry for each."""
        self.neurons = NeuronTable()
        self.users = ParameterUsers()
        self._input_elements = InputElements()

    def refuse(self, problem: str) -> NoReturn:
        """Raises `Refusal` for an operation that no layer describes."""
        raise Refusal(self.place, problem)

    def is_activated(self, layer: int) -> bool:
        """Whether a layer has its activation already; the input has none."""
        return layer >= 0 and self.layers[layer].is_activated

    def new_input(self, value: Tensor) -> NetworkInput:
        """Elements of the input, or of what is computed from it without parameters."""
        return self._input_elements.new(value)

    def input_neurons(self, size: int) -> Tensor:
        """[n_0] numbers of the input's neurons."""
        if self.input is None:
            self.input = self.neurons.number(size, -1)
        if len(self.input) != size:
            problem = f"it reads {size} channels of the input, where another layer reads {len(self.input)}"
            self.refuse(f"{problem}; concatenate what the network reads, before its first layer")
        return self.input

    def saved(self, values: Sequence[Any]) -> Callable[[], None]:
        """A function that takes back what an operation on these values has changed."""
        owners: set[int] = set()
        for value in values:
            if isinstance(value, Neurons):
                owners |= {layer for layer in value.versions if layer >= 0}
            elif isinstance(value, Scores):
                owners |= {self.neurons.layer_of(nodes.flatten()[0]) for nodes in (value.queries, value.keys)}
            elif isinstance(value, Turned):
                owners |= {layer for ids, _ in value.terms for layer in self.neurons.layers_of(ids)}
        copies = {owner: self.layers[owner].copy() for owner in owners if owner >= 0}
        lists: tuple[list[Any], ...] = (self.layers, self.attended, self.sources, self.parts)
        counts = [len(items) for items in lists]
        restores = [self.neurons.saved(), self.users.saved()]
        if self.input is None and any(isinstance(value, NetworkInput) for value in values):
            restores.append(self._input_elements.saved())
        had_input, blocks, kept = self.input is not None, dict(self.blocks), set(self.kept)

        def restore() -> None:
            for items, count in zip(lists, counts, strict=True):
                del items[count:]
            for restore_part in restores:
                restore_part()
            self.blocks, self.kept = dict(blocks), set(kept)
            for owner, layer in copies.items():
                self.layers[owner] = layer.copy()
            if not had_input:
                self.input = None
            self.claimed = None

        return restore

    def in_blocks(self, rows: Tensor) -> bool:
        """Notes that blocks of channels [blocks, channels] stay where they are; false where they are cut otherwise."""
        nodes = rows.flatten()
        if len(rows) == 1:
            return True
        known, blocks = self.blocks.setdefault(int(nodes[0]), (nodes, len(rows)))
        return blocks == len(rows) and torch.equal(known, nodes)

    # Layers

    def new_layer(self, size: int, reads: Tensor | None, weight: Elements | None, **rest: Any) -> TracedLayer:
        """A layer of `size` new neurons; `output_of` adds it to the network."""
        return TracedLayer(self.place, self.neurons.number(size, len(self.layers)), reads, weight, **rest)

    def output_of(self, layer: TracedLayer, axis: int, shape: Sequence[int]) -> Neurons:
        """Adds a layer; returns its output, with channels along an axis."""
        self.add_layer(layer)
        view = [1] * len(shape)
        view[axis] = len(layer.nodes)
        return Neurons(layer.nodes.reshape(view).expand(*shape), {len(self.layers) - 1: 0})

    def add_layer(self, layer: TracedLayer) -> None:
        """Adds a layer to the network."""
        self.own_parameters(len(self.layers), layer)
        self.layers.append(layer)
        if layer.reads is None:
            return
        self.neurons.mark_read(layer.reads)
        owner = self.neurons.layer_of(layer.reads[0])
        if layer.weight is None and owner >= 0 and len(layer.reads) < len(self.layers[owner].nodes):
            self.parts.append(layer.reads)

    def own_parameters(self, index: int, layer: TracedLayer) -> None:
        """Notes the parameters of a layer; refuses those that another layer has in another way (`ParameterUsers`)."""
        for elements in (layer.weight, layer.bias, *(layer.statistics or ())):
            if elements is None:
                continue
            if self.tensors and self.tensors[elements.name].is_complex():
                self.refuse(f"{elements.name} has complex numbers")
            problem = self.users.problem(index, layer, elements, self.layers)
            if problem:
                self.refuse(problem)
            self.users.add(index, elements)

    def depends(self, nodes: Tensor, others: Tensor) -> bool:
        """Whether neurons are computed from others."""
        waiting, seen = [*self.neurons.layers_of(nodes)], set[int]()
        while waiting:
            owner = waiting.pop()
            if owner < 0 or owner in seen:
                continue
            seen.add(owner)
            layer = self.layers[owner]
            attended = [
                nodes for item in layer.options.get("attention", {}).values() for nodes in (item.queries, item.keys)
            ]
            for read in (layer.reads, layer.residual, *(layer.coupled or ()), *attended):
                if read is not None:
                    waiting += self.neurons.layers_of(read)
        return bool(seen & self.neurons.layers_of(others))

    def refuse_sources(self, value: Neurons) -> None:
        """Refuses what lies beside something that no layer describes, where a layer alone may stand."""
        if SOURCE in value.versions:
            self.refuse("channels of layers lie beside others that no layer computes")

    def note_operation(self, text: str, value: Neurons) -> None:
        """Notes an operation on a value with the layers that this is computed from channel by channel, or a sum of."""
        waiting, seen = [*value.versions], set[int]()
        while waiting:
            owner = waiting.pop()
            if owner < 0 or owner in seen:
                continue
            seen.add(owner)
            layer = self.layers[owner]
            layer.operations.add(text)
            read = [] if layer.coupled is None else [layer.reads, *layer.coupled]
            read += [layer.residual] if layer.options.get("activation", "identity") == "identity" else []
            for nodes in read:
                waiting += [] if nodes is None else self.neurons.layers_of(nodes)

    # What is read, evaluated

    def read(self, elements: Elements, index: Tensor | None = None) -> Tensor:
        """The elements of a parameter or buffer as they are read, or those at other positions."""
        tensor = self.tensors[elements.name] if elements.computed is None else elements.computed
        values = elements.of(tensor) if index is None else tensor.reshape(-1)[index.to(tensor.device)]
        return values if elements.scale == 1 else values * elements.scale

    def read_if_any(self, elements: Elements | None) -> Tensor | None:
        """`read`; None of nothing."""
        return None if elements is None else self.read(elements)

    # Values

    def is_derived(self, value: Neurons) -> bool:
        """Whether a value is another than what its layers compute at the end, but the same function for all
        channels."""
        if value.is_output:
            return value.is_uniform
        return value.factor != 1 or any(
            layer >= 0 and self.layers[layer].version != version for layer, version in value.versions.items()
        )

    def can_settle(self, value: Neurons) -> bool:
        """Whether `settled` can multiply the weights."""
        (owner, *others) = value.versions
        if value.factor == 0 or owner < 0 or others or value.is_output:
            return False
        layer = self.layers[owner]
        if not self.is_strict and layer.weight is not None and layer.weight.name in self.shared:
            return False  # others read it without the factor
        is_whole = layer.version == value.versions[owner] and len(value.ids.unique()) == len(layer.nodes)
        return layer.is_linear and is_whole and not self.neurons.is_read(layer.nodes)

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
        if isinstance(value, Elements) and value.is_buffer:
            value = self.read(value)
        if isinstance(value, Tensor) and not self.is_strict:
            return self._new_source(value, axis)
        if isinstance(value, Elements) and not value.is_buffer:
            return replace(self.layer_of_constants(value, axis), value=self.read(value))
        if not isinstance(value, NetworkInput):
            self.refuse("a layer reads constants, expected the input or a layer's output")
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
            self._input_elements.assign(value.index, ids)
        if not self._input_elements.have(value.index, ids):
            if not self.is_strict:
                return self._new_source(value.value, axis)
            problem = (
                "a part of the input is read, or its channels in another order or prepared otherwise than elsewhere"
            )
            self.refuse(f"{problem}; concatenate what the network reads, before its first layer")
        return Neurons(ids, {-1: 0}, value=value.value)

    def layer_of_constants(self, elements: Elements, axis: int) -> Neurons:
        """Parameters in place of activations, such as learned queries: a layer of constant inputs, with a neuron for
        each place along an axis."""
        shape = elements.index.shape
        rows = elements.index.movedim(axis, 0).reshape(shape[axis], -1)
        in_order = rows[0].sort().values
        if bool((in_order[1:] == in_order[:-1]).any()):  # expanded over batches, for example: each position once
            rows = torch.stack(list(rows.mT.unique(dim=0)), dim=1)
        layer = self.new_layer(len(rows), None, replace(elements, index=rows), options={"constant": True})
        return self.output_of(layer, axis, shape)

    def _new_source(self, value: Tensor | None, axis: int) -> Neurons:
        """What no layer describes, or channels of the input that other layers read otherwise, as neurons."""
        assert value is not None
        shape = [1] * value.ndim
        shape[axis] = value.shape[axis]
        nodes = self.neurons.number(value.shape[axis], SOURCE)
        self.sources.append(nodes)
        return Neurons(nodes.reshape(shape).expand_as(value), {SOURCE: 0}, value=value)

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


def _others(tensor: Tensor, axis: int) -> list[int]:
    """All axes but one."""
    return [other for other in range(tensor.ndim) if other != axis % tensor.ndim]
