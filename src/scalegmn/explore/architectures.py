"""An architecture as the page draws it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from scalegmn.networks import ACTIVATIONS, HETERO, NetSpec
from scalegmn.networks.coupling import CoupledChannels

EVALUATED = ("sine", "tanh", "relu", "leaky_relu", "sigmoid", "identity")
"""Activations that the page computes itself."""


def is_drawable(spec: NetSpec) -> bool:
    """Whether the page can evaluate such networks: chains of linear layers without residual connections."""
    plain = spec.is_chain and not spec.is_cnn and not spec.residuals
    return plain and all(layer.activation in EVALUATED for layer in spec.layers)


def sizes_of(spec: NetSpec) -> tuple[int, int]:
    """Inputs and outputs."""
    return spec.layout[0], spec.layout[-1]


def described(spec: NetSpec, activation: str = HETERO) -> dict[str, Any]:
    """Layers with their neurons' symmetries, in plain types; of networks that have this activation where those of the
    spec differ.

    Each layer's `neurons` says whether they are free (any order), tied (they move with those of other layers) or
    pinned (they keep their places), and its `kinds` which: [start, stop, kind] of neurons side by side.
    """
    layers = []
    for index, layer in enumerate(spec.layers):
        classes = [coupled for coupled in spec.permutation_classes if index in coupled.layers]
        scaled = [coupled for coupled in spec.scaling_classes if index in coupled.layers]
        own = activation if layer.activation == HETERO else layer.activation
        groups = [
            group for group in (spec.class_symmetry(coupled, activation) for coupled in scaled) if group != HETERO
        ]
        tied = sorted({other for coupled in classes for other in coupled.layers} - {index})
        free = sum(coupled.num_channels for coupled in classes)
        neurons = "output" if index == spec.num_layers - 1 else "pinned"
        if free:
            neurons = f"tied to layer {', '.join(map(str, tied))}" if tied else "free"
            neurons += f" ({free} of {layer.out_dim})" if free < layer.out_dim else ""
        preserved = own == HETERO or ACTIVATIONS[own].group.preserves_scalars
        layers.append(
            {
                "inputs": layer.in_dim // layer.groups,
                "outputs": layer.out_dim,
                "kernel": list(layer.kernel) if layer.kernel else None,
                "reads": spec.sender(index),
                "activation": own,
                "w0": layer.w0,
                "neurons": neurons,
                "kinds": _kinds(layer.out_dim, neurons, classes),
                "residual": layer.residual,
                "groups": layer.groups,
                "constant": layer.constant,
                "signs": any(group.signs for group in groups),
                "scales": any(group.scales for group in groups),
                "weights": list(layer.weight_shape),
                "movable": spec.is_chain and not spec.residuals and neurons == "free" and preserved,
                "phases": own == "sine" and layer.bias and neurons == "free" and not layer.unscaled,
            }
        )
    return {
        "text": str(spec).replace(HETERO, activation),
        "inputs": spec.width(-1),
        "parameters": spec.num_parameters,
        "drawable": is_drawable(spec),
        "layers": layers,
    }


def _kinds(count: int, neurons: str, classes: Sequence[CoupledChannels]) -> list[list[Any]]:
    """[start, stop, kind] of a layer's neurons that stand side by side: free, tied, pinned or output."""
    kinds = ["output" if neurons == "output" else "pinned"] * count
    for coupled in classes:
        start, stop, _ = coupled.channels.indices(count)
        kinds[start:stop] = ["tied" if len(coupled.layers) > 1 else "free"] * (stop - start)
    segments = [list(members) for _, members in groupby(range(count), key=lambda neuron: kinds[neuron])]
    return [[members[0], members[-1] + 1, kinds[members[0]]] for members in segments]
