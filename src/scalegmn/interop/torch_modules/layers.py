"""The layers that a trace finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.values import Elements, Joined


class TracedAttention(NamedTuple):
    """Attention of the layer whose values it weights."""

    queries: Tensor
    keys: Tensor
    """Numbers of neurons, head by head."""

    num_heads: int
    """Of queries."""

    rotary: tuple[int, ...] = ()
    biases: tuple[Tensor, ...] = ()
    """As of `values.Scores`."""


@dataclass
class TracedLayer:
    """A layer while a module is traced."""

    place: str
    """Where the module computes it: `layer1.0.conv1 (Conv2d)`."""

    nodes: Tensor
    """[n_l] numbers of its neurons."""

    reads: Tensor | None
    """[n_{l-1}] numbers of the neurons that it reads; None: it has constant inputs."""

    weight: Elements | None
    """Of shape [n_l, n_{l-1} / groups, ...]; None: ones."""

    bias: Elements | None = None
    residual: Tensor | None = None
    """[n_l] numbers of the neurons that are added to its own."""

    statistics: tuple[Elements, ...] | None = None
    """Running mean and variance of a batch norm."""

    version: int = 0
    """How many activations and additions it has had so far."""

    is_activated: bool = False
    pinned_by: str = ""
    """What reads its neurons that no layer describes, and where."""

    coupled: tuple[Tensor, ...] | None = None
    """Of what an operation computes alike for all channels: numbers of further neurons that it reads, in the order of
    those that the layer reads."""

    same_neurons: tuple[Tensor, ...] = ()
    """Numbers of neurons that are its own at another time, each in the order of its own."""

    options: dict[str, Any] = field(default_factory=dict)
    """Fields of its `LayerSpec`."""

    operations: set[str] = field(default_factory=set)
    """What has been made of its output, of numbers too: no activation tells what layers that are coupled compute."""

    @property
    def is_linear(self) -> bool:
        """Whether its output so far is W x + b."""
        return (
            not self.is_activated
            and self.residual is None
            and self.weight is not None
            and "attention" not in self.options
        )

    @property
    def is_scale_or_constant(self) -> bool:
        """Whether each neuron has a number that multiplies one channel, or that is constant."""
        is_single = self.weight is not None and self.weight.index.shape == (len(self.nodes), 1)
        return is_single and (self.reads is None or self.options.get("groups", 1) == len(self.nodes))

    def copy(self) -> TracedLayer:
        """A layer whose changes leave this one as it is."""
        options = dict(self.options)
        if "attention" in options:
            options["attention"] = dict(options["attention"])
        return replace(self, options=options)

    def is_used_again(self, own: Elements, earlier: TracedLayer, other: Elements) -> bool:
        """Whether a parameter is the same of this layer and of an earlier one: each neuron has the elements of the one
        in its place."""
        if own.scale != other.scale:
            return False
        are_weights = own is self.weight, other is earlier.weight
        if any(are_weights):
            groups = {layer.options.get("groups", 1) for layer in (self, earlier)}
            if all(are_weights):  # in the same way, or a scale per channel elsewhere
                is_alike = len(groups) == 1 or (self.is_scale_or_constant and earlier.is_scale_or_constant)
                return is_alike and torch.equal(own.index, other.index)
            weighted = self if are_weights[0] else earlier
            if weighted.reads is not None or own.index.numel() != len(self.nodes):  # a bias elsewhere
                return False
        return torch.equal(own.index.flatten(), other.index.flatten())

    def is_transposed(self, own: Elements, earlier: TracedLayer, other: Elements) -> bool:
        """Whether a parameter is the weight of this linear layer, and its transpose that of an earlier one."""
        pairs = ((self, own), (earlier, other))
        are_linear = all(
            elements is owner.weight and owner.reads is not None and elements.index.ndim == 2
            for owner, elements in pairs
        )
        return are_linear and torch.equal(own.index, other.index.mT)

    def rows(self, chosen: Tensor, nodes: Tensor, **changes: Any) -> TracedLayer:
        """Some neurons of the layer, as a layer of their own."""
        place = as_slice(chosen.tolist())

        def part(elements: Elements | None) -> Elements | None:
            return elements and replace(elements, index=elements.index[place])

        statistics = self.statistics and tuple(
            replace(elements, index=elements.index[place]) for elements in self.statistics
        )
        changes.setdefault("residual", None if self.residual is None else self.residual[place])
        changes.setdefault("same_neurons", tuple(other[place] for other in self.same_neurons))
        return replace(
            self, nodes=nodes, weight=part(self.weight), bias=part(self.bias), statistics=statistics, **changes
        )


@dataclass
class JoinedLayer:
    """Layers that are alike, side by side as one (`experts`)."""

    place: str
    weight: Joined | None
    bias: Joined | None
    statistics: tuple[Joined, ...] | None
    pinned_by: str
    operations: set[str]


ReadLayer = TracedLayer | JoinedLayer
"""A layer of a spec, with the parameters that it has."""


class ParameterUsers:
    """Which layers have which elements of parameters."""

    def __init__(self) -> None:
        self._users: dict[str, list[tuple[int, Elements]]] = {}
        self._names: list[str] = []  # in the order in which they were added

    def saved(self) -> Callable[[], None]:
        """A function that takes back what has been added since."""
        count = len(self._names)

        def restore() -> None:
            for name in self._names[count:]:
                self._users[name].pop()
            del self._names[count:]

        return restore

    def of(self, name: str) -> Sequence[tuple[int, Elements]]:
        """The layers that have elements of a parameter, each with its elements."""
        return self._users.get(name, ())

    def add(self, layer: int, elements: Elements) -> None:
        """Notes that a layer has elements of a parameter."""
        users = self._users.setdefault(elements.name, [])
        if not any(user == layer and other is elements for user, other in users):
            users.append((layer, elements))
            self._names.append(elements.name)

    def problem(self, index: int, layer: TracedLayer, elements: Elements, layers: Sequence[TracedLayer]) -> str:
        """What is wrong where another layer has elements too that a layer has; empty if it has all in the same places,
        or the transpose of a linear layer's weight.

        Args:
            index: the number of the layer.
            layer: the layer.
            elements: its elements of a parameter.
            layers: all layers so far.
        """
        for user, other in self.of(elements.name):
            if user != index and elements.shares(other):
                earlier = layers[user]
                if layer.is_used_again(elements, earlier, other):
                    break
                if elements.scale != other.scale or not layer.is_transposed(elements, earlier, other):
                    kind = "weights" if elements is layer.weight else "parameters"
                    return f"a part of its {kind} are also those of {earlier.place}, or a multiple of them"
        return ""


def as_slice(places: list[int]) -> Any:
    """Places in a row as a slice, so that what is chosen by them is a view; others as they are."""
    is_row = bool(places) and places == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[0] + len(places)) if is_row else places
