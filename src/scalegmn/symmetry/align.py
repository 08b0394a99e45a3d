"""Alignment: the element of a network's orbit that lies near another network (vectorised over a zoo)."""

from __future__ import annotations

import torch
from torch import Tensor

from scalegmn.networks import ACTIVATIONS, HETERO, NetParams
from scalegmn.symmetry.groups import GroupElement

SWEEPS = 2
"""Passes over the hidden layers; the first sees no outgoing weights that are not aligned yet."""


@torch.no_grad()
def align(params: NetParams, reference: NetParams) -> GroupElement:
    """The permutations and signs g that bring each network near its reference: ||reference - g params||^2 small.

    Layer by layer from input to output, neuron j takes the place i where s_ij = <x_i, y_j> is large; x, y are the
    neurons' incoming [W, b] and outgoing weights as the other layers have been aligned so far. Where the activation
    admits signs, s_ij is that of the better sign: -1 negates incoming weights, and outgoing ones if chi(-1) = -1. This
    is weight matching (Git Re-Basin, Ainsworth et al., ICLR 2023, https://arxiv.org/abs/2209.04836) with a greedy
    assignment, for B pairs at once. A network is brought back exactly from any permutation and sign of it.

    Positive factors and half-turns of the phase stay: where they matter, align canonical networks.

    Args:
        params: B networks.
        reference: B networks of the same spec.

    Raises:
        ValueError: the specs or the numbers of networks differ, or layers are coupled to one another.
    """
    if params.spec != reference.spec or len(params) != len(reference):
        raise ValueError(f"expected {len(reference)} x {reference.spec}, found {len(params)} x {params.spec}")
    if params.spec.residuals or not params.spec.is_chain:
        raise ValueError(f"alignment moves neurons layer by layer, but some layers are coupled, in {params.spec}")
    shapes = [bias.shape for bias in params.biases[:-1]]
    permutations = [torch.arange(n, device=params.biases[0].device).repeat(num, 1) for num, n in shapes]
    scales = [torch.ones_like(bias) for bias in params.biases[:-1]]
    for sweep in range(SWEEPS):
        for index in range(len(shapes)):
            moved = GroupElement(tuple(permutations), tuple(scales)).act(params)
            incoming = _incoming(reference, index) @ _incoming(moved, index).mT  # [B, n_l, n_l]
            outgoing = torch.zeros_like(incoming)
            if sweep > 0 or index == len(shapes) - 1:  # output neurons have their places
                outgoing = _outgoing(reference, index) @ _outgoing(moved, index).mT
            has_signs, parity = _signs(params, index)
            kept, negated = incoming + outgoing, parity * outgoing - incoming
            is_negated = has_signs & (negated > kept)
            place = _assign(torch.where(is_negated, negated, kept))  # [B, n_l], of moved neurons
            sign = torch.where(is_negated, -1, 1).to(incoming).gather(2, place[..., None])[..., 0]
            permutations[index] = permutations[index].gather(1, place)
            scales[index] = scales[index] * torch.zeros_like(sign).scatter(1, permutations[index], sign)
    return GroupElement(tuple(permutations), tuple(scales))


def _incoming(params: NetParams, layer: int) -> Tensor:
    """[B, n_l, D]: the incoming [W, b] of a hidden layer's neurons."""
    return torch.cat([params.weights[layer].flatten(2), params.biases[layer][..., None]], dim=2)


def _outgoing(params: NetParams, layer: int) -> Tensor:
    """[B, n_l, D]: the outgoing weights of a hidden layer's neurons."""
    return params.weights[layer + 1].transpose(1, 2).flatten(2)


def _signs(params: NetParams, layer: int) -> tuple[Tensor, Tensor]:
    """[B, 1, 1] or []: whether the layer's activation admits signs, and chi(-1)."""
    name, device = params.spec.layers[layer].activation, params.biases[0].device
    names = params.spec.activations if name == HETERO else (name,)
    groups = [ACTIVATIONS[name].group for name in names]
    has_signs = torch.tensor([group.signs for group in groups], device=device)
    parity = torch.tensor([-1 if group.sign_exponent else 1 for group in groups], device=device)
    if name == HETERO:
        assert params.activation is not None
        return has_signs[params.activation][:, None, None], parity[params.activation][:, None, None]
    return has_signs[0], parity[0]


def _assign(similarity: Tensor) -> Tensor:
    """A column for each row, [B, n], from [B, n, n]: the most similar pair that is left, n times; then rows swap their
    columns in pairs while that gains, in at most n rounds."""
    num, n, _ = similarity.shape
    networks, index = (torch.arange(size, device=similarity.device) for size in (num, n))
    columns, left = similarity.new_empty(num, n, dtype=torch.long), similarity.clone()
    for _ in range(n):
        best = left.flatten(1).argmax(1)
        row, column = best // n, best % n
        columns[networks, row] = column
        left[networks, row] = -torch.inf
        left[networks, :, column] = -torch.inf
    for _ in range(n):
        held = similarity.gather(2, columns[:, None].expand(similarity.shape))  # [b, i, j]: row i with j's column
        current = held.diagonal(dim1=1, dim2=2)
        gain, other = (held + held.mT - current[:, :, None] - current[:, None]).max(2)  # 0 with itself
        if not gain.any():
            break
        mutual = torch.eq(other.gather(1, other), index)  # pairs that have no row in common
        columns = torch.where(mutual, columns.gather(1, other), columns)
    return columns
