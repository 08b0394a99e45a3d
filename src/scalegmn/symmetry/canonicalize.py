"""Canonical representatives of an orbit (vectorised over a zoo)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalegmn.spec import ACTIVATIONS, MIXED, NetParams, Tie
from scalegmn.symmetry.groups import GroupElement, PhaseShift


def phase_to_canonical(params: NetParams) -> PhaseShift:
    """The element that removes the phase symmetry of sine layers, sin(w0 z + k pi) = (-1)^k sin(w0 z).

    k = floor(w0 b / pi + 1/2);  b -> b - k pi / w0;  the neuron's outgoing weights times (-1)^k.
    Afterwards |w0 b| <= pi / 2. Layers without a sine, neurons that residual connections read, and the last layer's
    bias, stay.
    """
    turns = []
    for layer, bias in zip(params.spec.layers[:-1], params.biases, strict=False):
        k = -(layer.w0 * bias / math.pi + 0.5).floor()  # [B, n_l]
        if layer.activation == MIXED:
            k = k * (params.activation == ACTIVATIONS.index("sine"))[:, None]
        turns.append(k if layer.activation in ("sine", MIXED) else torch.zeros_like(k))
    for source, _, channels in params.spec.residuals:
        turns[source][:, :channels] = 0
    return PhaseShift(tuple(turns))


def incoming_norm(params: NetParams, layer: int, scale: Tensor | None = None) -> Tensor:
    """||[W_i, b_i]|| of each neuron of a layer (counted from 0), [B, n_l]; W as it is once the layer below has been
    multiplied by `scale` [B, n_{l-1}]."""
    weight, bias = params.weights[layer], params.biases[layer]
    if scale is not None:
        weight = weight / scale.reshape(len(params), 1, -1, *[1] * (weight.ndim - 3))
    rows = torch.cat([weight.flatten(2), bias[..., None]], dim=2)
    largest = rows.detach().abs().amax(2, keepdim=True)  # taken out, so that no square under- or overflows
    largest = torch.where(largest > torch.finfo(rows.dtype).tiny, largest, 1)
    return torch.linalg.vector_norm(rows / largest, dim=2) * largest[..., 0]


def scale_to_canonical(params: NetParams) -> GroupElement:
    """The element that removes the scale symmetry of relu and leaky relu layers, sigma(q z) = q sigma(z) for q > 0.

    Each hidden neuron's incoming [W, b] is divided by its norm, and its outgoing weights are multiplied by it, layer by
    layer. Neurons that residual connections tie have one factor, from the first of them. Neurons whose incoming weights
    and bias are zero, and those of other activations, stay.
    """
    spec, permutations, scales = params.spec, [], []
    for index, layer in enumerate(spec.layers[:-1]):
        norm = incoming_norm(params, index, *scales[-1:])
        own = 1 / torch.where(norm > 0, norm, 1)  # [B, n_l]
        parts = []
        for tie in spec.ties:
            if index == tie.layers[0]:
                parts.append(_where_homogeneous(params, tie, own[:, tie.channels]))
            elif index in tie.layers:
                parts.append(scales[tie.layers[0]][:, tie.channels])
        scales.append(torch.cat(parts, dim=1))
        permutations.append(torch.arange(layer.out_dim, device=own.device).expand(own.shape))
    return GroupElement(tuple(permutations), tuple(scales))


def _where_homogeneous(params: NetParams, tie: Tie, q: Tensor) -> Tensor:
    """q [B, n] of a tie's neurons; 1 where positive factors do not commute with all of its activations."""
    kind = params.spec.tie_symmetry(tie)
    if kind != MIXED:
        return q if kind == "scale" else torch.ones_like(q)
    found = [params.spec.tie_symmetry(tie, name) == "scale" for name in ACTIVATIONS]
    return torch.where(torch.tensor(found, device=q.device)[params.activation][:, None], q, 1)


TO_CANONICAL: dict[str, Callable[[NetParams], GroupElement | PhaseShift]] = {
    "phase": phase_to_canonical,
    "scale": scale_to_canonical,
}
"""The symmetries that can be removed, by name: each network's element that leads to its canonical representative."""


def canonicalize_phase(params: NetParams) -> NetParams:
    """The same functions without phase symmetry, see `phase_to_canonical`."""
    return phase_to_canonical(params).act(params)


def canonicalize_scale(params: NetParams) -> NetParams:
    """The same functions without scale symmetry, see `scale_to_canonical`."""
    return scale_to_canonical(params).act(params)


def canonicalize(params: NetParams, names: Sequence[str]) -> NetParams:
    """Removes the named symmetries, in that order."""
    for name in names:
        params = TO_CANONICAL[name](params).act(params)
    return params
