"""Numbers of neurons: the layer of each, and what operations do with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.values import compact


class NeuronTable:
    """The neurons of a network by number, each with its layer, whether something reads it, whether it is pinned (and by
    what), and whether an operation reads it that computes each channel alike (it is aligned)."""

    def __init__(self) -> None:
        self._layer_of: list[int] = []  # neuron -> layer, -1 for the input
        self._is_read = torch.zeros(0, dtype=torch.bool)
        self._is_pinned = torch.zeros(0, dtype=torch.bool)
        self._is_aligned = torch.zeros(0, dtype=torch.bool)
        self._reasons: dict[int, str] = {}  # layer -> what pins its neurons

    def saved(self) -> Callable[[], None]:
        """A function that takes back what has changed since."""
        count = len(self._layer_of)
        masks = self._is_read.clone(), self._is_pinned.clone(), self._is_aligned.clone()

        def restore() -> None:
            del self._layer_of[count:]
            self._is_read, self._is_pinned, self._is_aligned = (mask.clone() for mask in masks)

        return restore

    def number(self, size: int, layer: int) -> Tensor:
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

    def layers_of(self, nodes: Tensor) -> set[int]:
        """The layers that neurons, given by their numbers in any shape, belong to."""
        return {self._layer_of[number] for number in self.mask(nodes).nonzero()[:, 0].tolist()}

    def mask(self, nodes: Tensor) -> Tensor:
        """[all neurons] bool, which have these numbers, in any shape."""
        mask = torch.zeros_like(self._is_pinned)
        mask[compact(nodes)] = True
        return mask

    def mark_read(self, nodes: Tensor) -> None:
        """Notes that a layer, an addition or attention reads these neurons."""
        self._is_read[nodes] = True

    def is_read(self, nodes: Tensor) -> bool:
        """Whether a layer, an addition or attention reads one of these neurons."""
        return bool(self._is_read[nodes].any())

    def mark_pinned(self, nodes: Tensor, reason: str) -> None:
        """Notes that what no layer describes reads these neurons."""
        mask = self.mask(nodes)
        self._is_pinned |= mask
        self._is_read |= mask
        for layer in self.layers_of(nodes):
            self._reasons.setdefault(layer, reason)

    def is_pinned(self, nodes: Tensor) -> Tensor:
        """[n] bool, which of these neurons are pinned."""
        return self._is_pinned[nodes]

    def reason(self, nodes: Tensor) -> str:
        """What pins the neurons of a layer, if anything does."""
        return self._reasons.get(self.layer_of(nodes[0]), "")

    def mark_aligned(self, nodes: Tensor) -> None:
        """Notes that an operation reads these neurons that computes each channel alike: no scalar commutes with it."""
        self.mark_unscaled(nodes)
        self.mark_read(nodes)

    def mark_unscaled(self, nodes: Tensor) -> None:
        """Notes that no scalar of these neurons commutes with what the module computes."""
        self._is_aligned[nodes] = True

    def is_aligned(self, nodes: Tensor) -> bool:
        """Whether an operation reads one of these neurons that computes each channel alike."""
        return bool(self._is_aligned[nodes].any())
