"""Canonical representatives of an orbit (vectorised over a zoo)."""

from __future__ import annotations

import math

from scalegmn.spec import ACTIVATIONS, MIXED, NetParams


def canonicalize_phase(params: NetParams) -> NetParams:
    """Removes the phase symmetry of sine layers, sin(w0 z + k pi) = (-1)^k sin(w0 z).

    k = floor(w0 b / pi + 1/2);  b -> b - k pi / w0;  the neuron's outgoing weights times (-1)^k.
    Afterwards |w0 b| <= pi / 2; the function is unchanged. Layers without a sine, and the last layer's bias, stay.
    """
    weights, biases = list(params.weights), list(params.biases)
    for index, layer in enumerate(params.spec.layers[:-1]):
        if layer.activation in ("sine", MIXED):
            turns = (layer.w0 * biases[index] / math.pi + 0.5).floor()  # [B, n_l]
            if layer.activation == MIXED:
                turns = turns * (params.activation == ACTIVATIONS.index("sine"))[:, None]
            biases[index] = biases[index] - turns * (math.pi / layer.w0)
            parity = 1 - 2 * turns.remainder(2)
            outgoing = weights[index + 1]
            weights[index + 1] = outgoing * parity.reshape(len(params), 1, -1, *[1] * (outgoing.ndim - 3))
    return NetParams(params.spec, tuple(weights), tuple(biases), params.activation)
