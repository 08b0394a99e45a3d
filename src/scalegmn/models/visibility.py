"""Which parameters of its input networks a model sees: those that its output depends on at all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalegmn.networks import NetSpec

if TYPE_CHECKING:
    from scalegmn.models.base import Metanetwork


class PartlySeen(UserWarning):
    """A model does not see all parameters of its input networks."""


@dataclass(frozen=True)
class Visibility:
    """The layers of a network, counted from 0, whose weights and whose biases change a model's output.

    The gradients of all other parameters are zero, whatever the networks and the model's parameters are; but for the
    norms of weights, which a canonical form moves from layer to layer.
    """

    spec: NetSpec
    weights: frozenset[int]
    biases: frozenset[int]

    @classmethod
    def whole(cls, spec: NetSpec) -> Visibility:
        """All layers."""
        layers = frozenset(range(spec.num_layers))
        return cls(spec, layers, layers)

    @classmethod
    def through_messages(
        cls,
        spec: NetSpec,
        read: Collection[int],
        num_layers: int,
        connections: Collection[tuple[int, int]] = (),
        against: bool = False,
    ) -> Visibility:
        """What comes to some nodes in so many rounds of messages.

        Args:
            spec: the networks.
            read: the node layers that are read after the last round (`NetSpec.node_layers`).
            num_layers: rounds of messages.
            connections: (sender, receiver), node layers that messages without weights join.
            against: messages also go against the edges.
        """
        nodes, last = set(read), set(read)
        pairs = {*spec.node_layers, *connections}
        pairs |= {(receiver, sender) for sender, receiver in pairs} if against else set()
        for _ in range(num_layers):
            last = nodes
            senders = {sender for sender, receiver in pairs if receiver in nodes}
            nodes = nodes | senders
            if nodes == last:
                break
        edges = enumerate(spec.node_layers)
        weights = {k for k, (sender, receiver) in edges if receiver in last or (against and sender in last)}
        biases = {k for k, (_, receiver) in enumerate(spec.node_layers) if receiver in nodes}
        return cls(spec, frozenset(weights if num_layers else ()), frozenset(biases))

    @property
    def share(self) -> float:
        """The share of a network's parameters that the model sees, 0 to 1."""
        layers = enumerate(self.spec.layers)
        seen = sum(
            (math.prod(layer.weight_shape) if index in self.weights else 0)
            + (layer.out_dim if index in self.biases else 0)
            for index, layer in layers
        )
        return seen / self.spec.num_parameters

    @property
    def is_whole(self) -> bool:
        """Whether the model sees all parameters."""
        return len(self.weights) == len(self.biases) == self.spec.num_layers

    def __str__(self) -> str:
        if self.is_whole:
            return "all parameters"
        return (
            f"{self.share:.0%} of the parameters, the weights of {len(self.weights)} of {self.spec.num_layers} layers"
        )

    def warn(self, remedy: str) -> None:
        """Warns unless the model sees all; `remedy` says what to change."""
        if not self.is_whole:
            warnings.warn(f"the model sees {self} of a {self.spec}; {remedy}", PartlySeen, stacklevel=3)


def least_visible(model: Metanetwork, architectures: Iterable[NetSpec]) -> Visibility:
    """Of the architectures, that of which the model sees the smallest share."""
    return min(map(model.visibility, architectures), key=lambda visibility: visibility.share)


def residual_connections(spec: NetSpec) -> set[tuple[int, int]]:
    """(sender, receiver) of residual connections, as node layers."""
    return {(_place(spec, source), _place(spec, receiver)) for source, receiver, _ in spec.residuals}


def attention_connections(spec: NetSpec) -> set[tuple[int, int]]:
    """(query, key or bias of scores, value) of attention, and (gate, neurons of experts), as node layers."""
    attended = {
        (_place(spec, source), _place(spec, heads.result))
        for heads in spec.heads
        for source in (heads.query, heads.key, *heads.score_biases)
    }
    layers = enumerate(spec.layers)
    return attended | {(_place(spec, gate), _place(spec, index)) for index, layer in layers for gate in layer.gates}


def _place(spec: NetSpec, layer: int) -> int:
    """The node layer of a layer's neurons, -1 for the network's input."""
    return 0 if layer < 0 else spec.node_layers[layer][1]
