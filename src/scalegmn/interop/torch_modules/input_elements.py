"""Elements of the network's input, and of what is computed from it without parameters: the neuron of each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.values import NetworkInput


class InputElements:
    """A number for each element of the input, and the neuron that it belongs to once a layer has read it."""

    def __init__(self) -> None:
        self._neuron_of = torch.empty(0, dtype=torch.long)  # element -> neuron, -1 where no layer has read it
        self._inputs: list[tuple[int, tuple[int, ...]]] = []  # first element and shape of each input

    def saved(self) -> Callable[[], None]:
        """A function that takes back what has been read since."""
        before = self._neuron_of.clone()

        def restore() -> None:
            self._neuron_of = before.clone()

        return restore

    def new(self, value: Tensor) -> NetworkInput:
        """Elements of the input, or of what is computed from it without parameters."""
        first = len(self._neuron_of)
        self._neuron_of = torch.cat([self._neuron_of, torch.full((value.numel(),), -1)])
        self._inputs.append((first, tuple(value.shape)))
        return NetworkInput(torch.arange(first, len(self._neuron_of)).reshape(value.shape), value)

    def have(self, index: Tensor, neurons: Tensor) -> bool:
        """Whether elements belong to these neurons."""
        return torch.equal(self._neuron_of[index], neurons)

    def assign(self, index: Tensor, neurons: Tensor) -> None:
        """Notes which neurons elements of the input belong to. Where these lie along one of its axes, all elements have
        theirs, since a layer may read position by position."""
        self._neuron_of[index] = neurons
        first, shape = next(item for item in reversed(self._inputs) if item[0] <= int(index.min()))
        steps = torch.arange(math.prod(shape)).reshape(shape)
        if not index.numel() or int(index.max()) >= first + steps.numel():
            return
        for axis, size in enumerate(shape):
            place = (index - first) // (steps.stride(axis) or 1) % size
            neuron = torch.full((size,), -1)
            neuron[place] = neurons
            if bool((neuron[place] == neurons).all()) and len(neuron.unique()) == size and bool((neuron >= 0).all()):
                along = neuron.reshape([-1 if other == axis else 1 for other in range(len(shape))])
                self._neuron_of[first : first + steps.numel()] = along.expand(shape).flatten()
                return
