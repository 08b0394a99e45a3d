"""Canonical representatives of an orbit (vectorised over a zoo)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalegmn.spec import ACTIVATION_SYMMETRY, ACTIVATIONS, MIXED, NetParams
from scalegmn.symmetry.groups import PhaseShift


def canonicalize_phase(params: NetParams) -> NetParams:
    """Removes the phase symmetry of sine layers, sin(w0 z + k pi) = (-1)^k sin(w0 z).

    k = floor(w0 b / pi + 1/2);  b -> b - k pi / w0;  the neuron's outgoing weights times (-1)^k.
    Afterwards |w0 b| <= pi / 2; the function is unchanged. Layers without a sine, and the last layer's bias, stay.
    """
    turns = []
    for layer, bias in zip(params.spec.layers[:-1], params.biases, strict=False):
        k = -(layer.w0 * bias / math.pi + 0.5).floor()  # [B, n_l]
        if layer.activation == MIXED:
            k = k * (params.activation == ACTIVATIONS.index("sine"))[:, None]
        turns.append(k if layer.activation in ("sine", MIXED) else torch.zeros_like(k))
    return PhaseShift(tuple(turns)).act(params)


def canonicalize_scale(params: NetParams) -> NetParams:
    """Removes the scale symmetry of relu and leaky relu layers, sigma(q z) = q sigma(z) for q > 0.

    Each hidden neuron's incoming [W, b] is divided by its norm, and its outgoing weights are multiplied by it, layer by
    layer. Neurons whose incoming weights and bias are zero, and layers of other activations, stay. The function is
    unchanged.
    """
    weights, biases = list(params.weights), list(params.biases)
    for index, layer in enumerate(params.spec.layers[:-1]):
        name = ACTIVATION_SYMMETRY.get(layer.activation, MIXED)
        if name in ("scale", MIXED):
            incoming = torch.cat([weights[index].flatten(2), biases[index][..., None]], dim=2)
            norm = torch.linalg.vector_norm(incoming, dim=2)  # [B, n_l]
            norm = torch.where(norm > 0, norm, 1)
            if name == MIXED:
                homogeneous = [kind == "scale" for kind in map(ACTIVATION_SYMMETRY.get, ACTIVATIONS)]
                own = torch.tensor(homogeneous, device=norm.device)[params.activation]
                norm = torch.where(own[:, None], norm, 1)
            biases[index] = biases[index] / norm
            weights[index] = weights[index] / norm.reshape(*norm.shape, *[1] * (weights[index].ndim - 2))
            weights[index + 1] = _scale_outgoing(weights[index + 1], norm)
    return NetParams(params.spec, tuple(weights), tuple(biases), params.activation)


CANONICALIZERS: dict[str, Callable[[NetParams], NetParams]] = {
    "phase": canonicalize_phase,
    "scale": canonicalize_scale,
}
"""The symmetries that can be removed, by name."""


def canonicalize(params: NetParams, names: Sequence[str]) -> NetParams:
    """Removes the named symmetries, in that order."""
    for name in names:
        params = CANONICALIZERS[name](params)
    return params


def _scale_outgoing(weight: Tensor, factors: Tensor) -> Tensor:
    """Weights [B, out, in, ...] times factors [B, in] of the neurons that they leave."""
    return weight * factors.reshape(len(weight), 1, -1, *[1] * (weight.ndim - 3))
