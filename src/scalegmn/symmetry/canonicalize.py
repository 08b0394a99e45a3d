"""Canonical representatives of an orbit (vectorised over a zoo)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from scalegmn.networks import ACTIVATIONS, HETERO, NetParams, ScalarGroup
from scalegmn.networks.heads import tie_scalars
from scalegmn.networks.scalar_groups import TRIVIAL
from scalegmn.symmetry.groups import (
    GroupElement,
    PhaseShift,
    by_group,
    by_receiver,
    is_sine,
    outgoing_scalars,
    without_residual_turns,
)


def phase_to_canonical(params: NetParams) -> PhaseShift:
    """The element that removes the phase symmetry of sine layers, sin(w0 z + k pi) = (-1)^k sin(w0 z).

    k = floor(w0 b / pi + 1/2);  b -> b - k pi / w0;  the neuron's outgoing weights times (-1)^k.
    Afterwards |w0 b| <= pi / 2. Layers without a sine, neurons that residual connections read, and the last layer's
    bias, stay.
    """
    turns = []
    for layer, bias in zip(params.spec.layers[:-1], params.biases, strict=False):
        k = -(layer.w0 * bias / math.pi + 0.5).floor()  # [B, n_l]
        if layer.activation == HETERO:
            k = k * is_sine(params)[:, None]
        turns.append(k if layer.activation in ("sine", HETERO) else torch.zeros_like(k))
    return PhaseShift(tuple(without_residual_turns(params.spec, turns)))


def incoming_norm(params: NetParams, layer: int, sender: Tensor | None = None) -> Tensor:
    """||[W_i, b_i]|| of each neuron of a layer (counted from 0), [B, n_l].

    Args:
        params: B networks; of those with batch norms, `with_batch_norm_folded()`.
        layer: counted from 0.
        sender: [B, n_{l-1}], by which W is divided before; None: it is taken as it is.
    """
    weight, bias = params.weights[layer], params.biases[layer]
    if sender is not None:
        factors = by_receiver(sender, params.spec.layers[layer])
        weight = weight / factors.reshape(*factors.shape, *[1] * (weight.ndim - 3))
    rows = torch.cat([weight.flatten(2), bias[..., None]], dim=2)
    largest = rows.detach().abs().amax(2, keepdim=True)  # taken out, so that no square under- or overflows
    largest = torch.where(largest > torch.finfo(rows.dtype).tiny, largest, 1)
    norms: Tensor = torch.linalg.vector_norm(rows / largest, dim=2)
    return norms * largest[..., 0]


def scale_to_canonical(params: NetParams) -> GroupElement:
    """The element that removes the scale symmetry of homogeneous activations, sigma(q z) = |q|^exponent sigma(z) for
    q > 0: relu, leaky relu.

    Each hidden neuron's incoming [W, b] is divided by its norm, q = 1 / norm, and its outgoing weights by chi(q), layer
    by layer. Neurons that residual connections couple have one factor, from the first of them. Neurons whose incoming
    weights and bias are zero, and those of other activations, stay.
    """
    spec, folded = params.spec, params.with_batch_norm_folded()
    scales = [torch.ones_like(bias) for bias in params.biases[:-1]]
    for index in range(spec.num_layers - 1):
        reads = spec.sender(index)
        sender = None
        if reads >= 0:
            sender = outgoing_scalars(scales[reads], spec, reads, params.activation)
        for coupled in spec.scaling_classes:
            if index == coupled.layers[0]:
                norm = incoming_norm(folded, index, sender)[:, coupled.channels]
                q = by_group(params, coupled, partial(ScalarGroup.canonical, norm=norm))
                for layer in coupled.layers:
                    scales[layer] = _with_channels(scales[layer], coupled.channels, q)
        if index in spec.repeated_layers:
            tie_scalars(spec, scales)
    tie_scalars(spec, scales)
    return GroupElement(tuple(map(_places, scales)), tuple(scales))


def even_scale_to_canonical(params: NetParams) -> GroupElement:
    """As `scale_to_canonical`, which leaves all size of L layers to the last one, but with this size in all of them.

    Neurons of the l-th layer get the further factor c^l, where c^L is the root mean square norm of the outputs'
    incoming weights: so incoming weights have about the norm c everywhere, as in networks that are being trained.

    Raises:
        ValueError: the networks are no chains of relu or leaky relu layers.
    """
    spec, names = params.spec, {layer.activation for layer in params.spec.layers[:-1]}
    groups = [TRIVIAL if name == HETERO else ACTIVATIONS.require(name).group for name in names]
    if not spec.is_chain or spec.residuals or not all(group.scales and group.exponent == 1 for group in groups):
        raise ValueError(
            f"data.canonicalize: even_scale: found {spec}, expected a chain of relu or leaky relu layers; use scale"
        )
    element = scale_to_canonical(params)
    last = element.act(params).weights[-1].flatten(2)
    size = torch.linalg.vector_norm(last, dim=2).square().mean(1).sqrt()
    even = torch.where(size > 0, size, 1) ** (1 / spec.num_layers)
    scales = tuple(q * (even ** (index + 1))[:, None] for index, q in enumerate(element.scales))
    return replace(element, scales=scales)


def _with_channels(x: Tensor, channels: slice, values: Tensor) -> Tensor:
    """x [B, n] with other values of some channels."""
    return torch.cat([x[:, : channels.start], values, x[:, channels.stop :]], dim=1)


def _places(q: Tensor) -> Tensor:
    """[B, n], the permutations that move no neuron."""
    return torch.arange(q.shape[1], device=q.device).expand(q.shape)


TO_CANONICAL: dict[str, Callable[[NetParams], GroupElement | PhaseShift]] = {
    "phase": phase_to_canonical,
    "scale": scale_to_canonical,
    "even_scale": even_scale_to_canonical,
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
