"""Which weights, biases and neurons carry a prediction.

A metanetwork f reads the canonical network x = c(theta). Its attributions a(x) have a number for each parameter. Two
properties make them follow the symmetries that f keeps exactly: x has no phases left, and no scales where f keeps them,
so that only permutations and signs g remain; and for these, which act linearly, a(g x) is a(x) in the order of g x
(`moved`). Attributions of moved networks are the moved attributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.networks import NetParams, NetSpec, ScalarGroup
from scalegmn.symmetry.groups import GroupElement, by_group

METHODS = ("integrated", "gradient")
"""Integrated gradients, gradient x weight."""

STEPS = 64
"""Points on the path of integrated gradients."""

POINTS_AT_ONCE = 16
"""Points whose gradients are computed together."""

PARAMETERS_AT_ONCE = 2**24
"""Of networks without neurons that are answered together; at least those of one order."""

Score = Callable[[NetParams], Tensor]
"""B canonical networks -> [B], the number that is explained."""


@dataclass(frozen=True)
class Attribution:
    """How much each parameter of B networks contributes to a score.

    Attributes:
        values: as weights and biases, in place of each parameter its contribution.
        score: f(x), [B].
        reference: f of the reference network, [B]; integrated gradients sum to score - reference. None for gradients.
    """

    values: NetParams
    score: Tensor
    reference: Tensor | None = None

    def neurons(self) -> list[Tensor]:
        """Per layer l = 1..L, [B, n_l]: the contributions of a neuron's bias, incoming and outgoing weights together,
        which are gone when the neuron is."""
        spec = self.values.spec
        sums = [
            bias + weight.flatten(2).sum(2)
            for weight, bias in zip(self.values.weights, self.values.biases, strict=True)
        ]
        for index, weight in enumerate(self.values.weights):
            sender, layer = spec.sender(index), spec.layers[index]
            if sender >= 0:
                in_groups = weight.flatten(3).sum(3) if weight.ndim > 3 else weight
                sums[sender] = sums[sender] + in_groups.unflatten(1, (layer.groups, -1)).sum(2).flatten(1)
        return sums

    def moved(self, element: GroupElement) -> Attribution:
        """The attribution of the moved networks: in the order of their neurons; scalars change no contribution."""
        ones = tuple(torch.ones_like(q) for q in element.scales)
        values = self.values.replace(statistics=None) if self.values.statistics is None else self.values
        return Attribution(GroupElement(element.permutations, ones).act(values), self.score, self.reference)


def symmetries_to_remove(config: ModelConfig, canonical: Sequence[str]) -> tuple[str, ...]:
    """The symmetries that are removed before a score is explained: those that a model reads removed, and of phases and
    scales those that it keeps exactly.

    Args:
        config: of the model.
        canonical: what the model reads removed.
    """
    kept = {*config.exact_symmetries, *canonical}
    return tuple(name for name in ("phase", "scale") if name in kept)


def reference_network(params: NetParams) -> NetParams:
    """The mean of B canonical networks over networks and over all orders and signs of their neurons, a batch of one.

    No permutation and no sign changes it: weights and biases are means over the neurons of each class, and zero where
    an activation admits signs. So the straight line from g x to it is g times that from x.
    """
    spec, count = params.spec, len(params)
    signs = [torch.zeros_like(bias, dtype=torch.bool) for bias in params.biases]
    for coupled in spec.scaling_classes:
        none = torch.zeros(count, coupled.num_channels, dtype=torch.bool, device=params.biases[0].device)
        has_signs = by_group(params, coupled, partial(_signs_like, none))
        for place in coupled.layers:
            signs[place][:, coupled.channels] |= has_signs
    weights, biases = list(params.weights), list(params.biases)
    for index, layer in enumerate(spec.layers):
        sender = spec.sender(index)
        shape = (1,) * (weights[index].ndim - 2)
        kept = ~signs[index]
        biases[index] = biases[index] * kept
        weights[index] = weights[index] * kept.reshape(*kept.shape, *shape)
        if sender >= 0:
            read = ~signs[sender] if layer.groups == 1 else ~signs[sender].any(1, keepdim=True)
            weights[index] = weights[index] * read.reshape(count, 1, -1, *shape[1:])
    biases = [bias.mean(0, keepdim=True) for bias in biases]
    weights = [weight.mean(0, keepdim=True) for weight in weights]
    for coupled in spec.permutation_classes:
        for index, layer in enumerate(spec.layers):
            if index in coupled.layers:
                weights[index] = _with_mean(weights[index], 1, coupled.channels)
                biases[index] = _with_mean(biases[index], 1, coupled.channels)
            if spec.sender(index) in coupled.layers:
                channels = coupled.channels if layer.groups == 1 else slice(0, weights[index].shape[2])
                weights[index] = _with_mean(weights[index], 2, channels)
    return params[:1].replace(weights=tuple(weights), biases=tuple(biases))


def _signs_like(none: Tensor, group: ScalarGroup) -> Tensor:
    """[B, n] bool, whether a group has signs."""
    return torch.full_like(none, group.signs)


def _with_mean(x: Tensor, dim: int, channels: slice) -> Tensor:
    """x with the mean of some places of an axis in all of them."""
    size = x.shape[dim]
    start, stop, _ = channels.indices(size)
    middle = x.narrow(dim, start, stop - start)
    middle = middle.mean(dim, keepdim=True).expand_as(middle)
    return torch.cat([x.narrow(dim, 0, start), middle, x.narrow(dim, stop, size - stop)], dim)


def gradient_times_weight(score: Score, x: NetParams) -> Attribution:
    """a_k = x_k df/dx_k: how much the score rises, to first order, when parameter k grows by 100 %.

    Args:
        score: f.
        x: B canonical networks.
    """
    value, gradient = _gradient(score, x)
    return Attribution(_combined(torch.mul, x, gradient), value)


def integrated_gradients(score: Score, x: NetParams, reference: NetParams, steps: int = STEPS) -> Attribution:
    """a_k = (x_k - r_k) int_0^1 df/dx_k (r + t (x - r)) dt (Sundararajan et al., 2017,
    https://arxiv.org/abs/1703.01365), by Gauss-Legendre quadrature; sums to f(x) - f(r) up to its error.

    Args:
        score: f.
        x: B canonical networks.
        reference: r, a batch of one of the same spec; see `reference_network`.
        steps: points on the path.

    Raises:
        ValueError: the architectures differ.
    """
    if reference.spec != x.spec:
        raise ValueError(f"reference: found {reference.spec}, expected {x.spec}")
    import numpy as np

    places, lengths = (torch.from_numpy(row / 2).to(x.biases[0]) for row in np.polynomial.legendre.leggauss(steps))
    difference = _combined(lambda a, b: a - b, x, reference)
    total = x.map(torch.zeros_like).replace(statistics=x.statistics)
    chunks = torch.arange(steps).split(POINTS_AT_ONCE)
    for chunk in tqdm(chunks, desc="gradients", leave=False, disable=None):  # points first, then networks
        t, weight = places[chunk] + 0.5, lengths[chunk]
        like = x[torch.arange(len(x)).repeat(len(chunk))]
        point = _combined(partial(_along, t), reference, difference, like)
        _, gradient = _gradient(score, point)
        total = _combined(partial(_add_mean, weight), total, gradient)
    with torch.no_grad():
        start = _combined(lambda r, d: r + 0 * d, reference, difference, x)
        ends = score(x), score(start)
    return Attribution(_combined(torch.mul, difference, total), *ends)


def _along(t: Tensor, start: Tensor, difference: Tensor) -> Tensor:
    """start + t difference for each t [T]: [1, ...] and [B, ...] -> [T B, ...]."""
    return (start[None] + t.reshape(-1, *[1] * difference.ndim) * difference[None]).flatten(0, 1)


def _add_mean(weight: Tensor, total: Tensor, values: Tensor) -> Tensor:
    """total [B, ...] + the sum over points of weight [T] times values [T B, ...]."""
    of_points: Tensor = values.unflatten(0, (len(weight), -1))
    result: Tensor = total + torch.tensordot(weight, of_points, 1)
    return result


def _gradient(score: Score, x: NetParams) -> tuple[Tensor, NetParams]:
    """f(x) [B], and its gradient as parameters."""
    weights = tuple(weight.detach().clone().requires_grad_() for weight in x.weights)
    biases = tuple(bias.detach().clone().requires_grad_() for bias in x.biases)
    with torch.enable_grad():
        value = score(x.replace(weights=weights, biases=biases))
        gradients = torch.autograd.grad(value.sum(), [*weights, *biases], allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip([*weights, *biases], gradients, strict=True)]
    return value.detach(), x.replace(weights=tuple(filled[: len(weights)]), biases=tuple(filled[len(weights) :]))


def _combined(
    fn: Callable[..., Tensor], first: NetParams, second: NetParams, like: NetParams | None = None
) -> NetParams:
    """fn of each weight and bias of two networks; activations and statistics are those of `like`, or of `first`."""
    return (like or first).replace(
        weights=tuple(map(fn, first.weights, second.weights)), biases=tuple(map(fn, first.biases, second.biases))
    )


def score_of(model: Metanetwork, output: int) -> Score:
    """The number that is explained: of several outputs, the log-odds of one, z_c - log sum_{k != c} exp z_k; a single
    output as it is.

    Args:
        model: B canonical networks -> [B, out_dim].
        output: c, counted from 0.

    Raises:
        ValueError: the model has no such output.
    """

    def score(x: NetParams) -> Tensor:
        z = model(x)
        assert isinstance(z, Tensor)
        if not 0 <= output < z.shape[1]:
            raise ValueError(f"--output: found {output}, expected 0 to {z.shape[1] - 1}")
        if z.shape[1] == 1:
            return z[:, 0]
        others = torch.cat([z[:, :output], z[:, output + 1 :]], 1)
        return z[:, output] - others.logsumexp(1)

    return score


def removable_neurons(spec: NetSpec) -> list[tuple[int, int]]:
    """(layer, neuron) of all hidden neurons."""
    return [(index, neuron) for index, layer in enumerate(spec.layers[:-1]) for neuron in range(layer.out_dim)]


def without_neurons(params: NetParams, neurons: Sequence[tuple[int, int]]) -> NetParams:
    """Networks without these neurons: bias, incoming and outgoing weights are zero.

    Args:
        params: B networks.
        neurons: (layer, neuron), counted from 0.
    """
    weights, biases = [w.clone() for w in params.weights], [b.clone() for b in params.biases]
    for layer, neuron in neurons:
        weights[layer][:, neuron] = 0
        biases[layer][:, neuron] = 0
        for index, reader in enumerate(params.spec.layers):
            if params.spec.sender(index) == layer:
                inputs = params.spec.layers[layer].out_dim // reader.groups
                outputs = reader.out_dim // reader.groups
                group = neuron // inputs
                weights[index][:, group * outputs : (group + 1) * outputs, neuron % inputs] = 0
    return params.replace(weights=tuple(weights), biases=tuple(biases))


@torch.no_grad()
def deletion_curves(score: Score, x: NetParams, orders: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """f of one network without the first 0, 1, 2, ... n of the neurons of each order, [orders, n + 1].

    Args:
        score: f.
        x: a canonical network, a batch of one.
        orders: n (layer, neuron) each, in the order in which they are removed.
    """
    counts = range(len(orders[0]) + 1)
    at_once = max(1, PARAMETERS_AT_ONCE // (x.spec.num_parameters * len(counts)))
    curves = []
    for start in tqdm(range(0, len(orders), at_once), desc="removing neurons", leave=False, disable=None):
        some = orders[start : start + at_once]
        copies = NetParams.cat([without_neurons(x, order[:count]) for order in some for count in counts])
        curves.append(score(copies).reshape(len(some), len(counts)))
    return torch.cat(curves)


def ranked_neurons(attribution: Attribution) -> list[tuple[int, int]]:
    """Hidden neurons of one network from the one that raises the score most to the one that lowers it most."""
    values = attribution.neurons()
    places = removable_neurons(attribution.values.spec)
    return sorted(places, key=lambda place: -float(values[place[0]][0, place[1]]))
