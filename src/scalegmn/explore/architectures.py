"""An architecture as the page draws it."""

from __future__ import annotations

from typing import Any

from scalegmn.networks import ACTIVATIONS, HETERO, NetSpec

EVALUATED = ("sine", "tanh", "relu", "leaky_relu", "sigmoid", "identity")
"""Activations that the page computes itself."""


def is_drawable(spec: NetSpec) -> bool:
    """Whether the page can evaluate such networks: chains of linear layers without residual connections."""
    plain = spec.is_chain and not spec.is_cnn and not spec.residuals
    return plain and all(layer.activation in EVALUATED for layer in spec.layers)


def sizes_of(spec: NetSpec) -> tuple[int, int]:
    """Inputs and outputs."""
    return spec.layout[0], spec.layout[-1]


def described(spec: NetSpec) -> dict[str, Any]:
    """Layers with their neurons' symmetries, in plain types.

    Each layer's `neurons` says whether they are free (any order), tied (they move with those of other layers) or
    pinned (they keep their places).
    """
    layers = []
    for index, layer in enumerate(spec.layers):
        classes = [coupled for coupled in spec.permutation_classes if index in coupled.layers]
        scaled = [coupled for coupled in spec.scaling_classes if index in coupled.layers]
        groups = [group for group in (spec.class_symmetry(coupled) for coupled in scaled) if group != HETERO]
        tied = sorted({other for coupled in classes for other in coupled.layers} - {index})
        free = sum(coupled.num_channels for coupled in classes)
        neurons = "output" if index == spec.num_layers - 1 else "pinned"
        if free:
            neurons = f"tied to layer {', '.join(map(str, tied))}" if tied else "free"
            neurons += f" ({free} of {layer.out_dim})" if free < layer.out_dim else ""
        preserved = layer.activation == HETERO or ACTIVATIONS[layer.activation].group.preserves_scalars
        layers.append(
            {
                "inputs": layer.in_dim // layer.groups,
                "outputs": layer.out_dim,
                "kernel": list(layer.kernel) if layer.kernel else None,
                "reads": spec.sender(index),
                "activation": layer.activation,
                "w0": layer.w0,
                "neurons": neurons,
                "signs": any(group.signs for group in groups),
                "scales": any(group.scales for group in groups),
                "weights": list(layer.weight_shape),
                "movable": spec.is_chain and not spec.residuals and neurons == "free" and preserved,
                "phases": layer.activation == "sine" and layer.bias and neurons == "free" and not layer.unscaled,
            }
        )
    return {
        "text": str(spec),
        "inputs": spec.width(-1),
        "parameters": spec.num_parameters,
        "drawable": is_drawable(spec),
        "layers": layers,
    }
