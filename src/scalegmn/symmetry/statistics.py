"""Statistics of networks that permutations, signs and scales of their neurons leave as they are.

They are statistics of canonical networks (`canonicalize_scale`), which have no scales left, and each of them is the
same for all orders of neurons and, where an activation commutes with signs, for all signs. So they are exactly
invariant; means and quantiles of the weights themselves (Unterthiner et al., 2020, https://arxiv.org/abs/2002.11448)
move when neurons are rescaled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scalegmn.networks import NetParams
from scalegmn.networks.scalar_groups import ScalarGroup
from scalegmn.symmetry.canonicalize import canonicalize_scale, incoming_norm
from scalegmn.symmetry.groups import by_group, by_receiver

SMALLEST = 1e-8
"""Sizes below this one count as this one."""

NUM_QUANTILES = 5
"""Minimum, quartiles, maximum."""

NUM_LAYER_STATISTICS = 2 + 2 * (1 + 2 * (1 + NUM_QUANTILES)) + 1 + 3 * NUM_QUANTILES
"""Of `layer_statistics`."""

NUM_NETWORK_STATISTICS = 2 + 1 + NUM_QUANTILES
"""Of `network_statistics`."""


NUM_NEURON_STATISTICS = 3
"""Of `neuron_statistics`."""


def sizes(params: NetParams) -> Tensor:
    """log10 of the root mean square of each layer's canonical weights, and of its canonical biases.

    Args:
        params: B networks of L layers.

    Returns:
        [B, L, 2]: weights, biases.
    """
    canonical = _canonical(params)
    return torch.stack(
        [
            torch.cat([_log_size(tensor) for tensor in tensors], dim=1)
            for tensors in zip(canonical.weights, canonical.biases, strict=True)
        ],
        dim=1,
    )


def invariant_statistics(params: NetParams) -> tuple[Tensor, Tensor]:
    """All statistics here, of each layer and of each network as a whole.

    Args:
        params: B networks of L layers.

    Returns:
        [B, L, NUM_LAYER_STATISTICS], see `layer_statistics`; [B, NUM_NETWORK_STATISTICS], see `network_statistics`.
    """
    canonical = _canonical(params)
    return layer_statistics(canonical), network_statistics(canonical)


def layer_statistics(canonical: NetParams) -> Tensor:
    """Statistics of each layer of B canonical networks, [B, L, NUM_LAYER_STATISTICS].

    In this order: whether its neurons admit signs, and scales; of its weights, then of its biases, the size as in
    `sizes` and, divided by the root mean square, mean and quantiles of the absolute values, then of the values (0 where
    the layer, or the one that it reads, admits signs); of its neurons' importances ||[W_i, b_i]|| ||outgoing weights||
    the size and, divided by the root mean square, quantiles; quantiles of |b_i| / ||[W_i, b_i]||; quantiles of
    ||sum of W_i over the kernel|| / ||[W_i, b_i]||. The last layer's outgoing norms are 1.
    """
    spec = canonical.spec
    signs, scales = (_admits(canonical, allowed) for allowed in (_has_signs, _has_scales))
    outgoing = outgoing_norms(canonical)
    rows = []
    for index, (weight, bias) in enumerate(zip(canonical.weights, canonical.biases, strict=True)):
        sender = spec.sender(index)
        signed = signs[index] if sender < 0 else signs[index] | signs[sender]
        norm = incoming_norm(canonical, index)
        summed = weight.flatten(3).sum(3) if spec.layers[index].kernel else weight
        importance = norm * outgoing[index]
        parts = [torch.stack([signs[index], scales[index]], 1).to(bias)]
        parts += [_values(weight.flatten(1), ~signed), _values(bias, ~signs[index])]
        parts += [_log_size(importance), quantiles(importance / _size(importance))]
        parts += [quantiles(bias.abs() / norm.clamp_min(SMALLEST))]
        parts += [quantiles(torch.linalg.vector_norm(summed, dim=2) / norm.clamp_min(SMALLEST))]
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows, dim=1)


def network_statistics(canonical: NetParams) -> Tensor:
    """Statistics of B canonical networks as a whole, [B, NUM_NETWORK_STATISTICS].

    log10 of the sum over all paths from input to output of the product of absolute weights, and of squared weights;
    log10 of the largest singular value of the last layer, and quantiles of its singular values divided by the largest.
    """
    last = canonical.weights[-1].flatten(1)
    size = _size(last)
    values = torch.linalg.svdvals((last / size).nan_to_num().reshape_as(canonical.weights[-1].flatten(2)))
    largest = values[:, :1].clamp_min(SMALLEST)
    paths = [_log_paths(canonical, fn) for fn in (torch.abs, torch.square)]
    return torch.cat([*paths, size.log10() + largest.log10(), quantiles(values / largest)], dim=1)


def at_depth(statistics: Tensor, num_layers: int) -> Tensor:
    """Statistics of each layer, [B, l, ...], at the places of networks of more layers, [B, num_layers, ...].

    The last layer's are the last; those of layers that the networks do not have are NaN.
    """
    shape = len(statistics), num_layers - statistics.shape[1], *statistics.shape[2:]
    return torch.cat([statistics[:, :-1], statistics.new_full(shape, torch.nan), statistics[:, -1:]], dim=1)


def quantiles(x: Tensor) -> Tensor:
    """Minimum, quartiles and maximum, linear between values: [B, n] -> [B, 5]."""
    places = torch.linspace(0, x.shape[1] - 1, NUM_QUANTILES, dtype=torch.float64, device=x.device)  # n may be large
    below = places.floor()
    ordered = x.sort(dim=1).values
    return torch.lerp(ordered[:, below.long()], ordered[:, places.ceil().long()], (places - below).to(x))


def _canonical(params: NetParams) -> NetParams:
    """The canonical form of networks without the outgoing weights of neurons that send nothing.

    A neuron with scales whose incoming weights and bias are zero has no canonical scale, and its output is zero.
    """
    params = params.with_batch_norm_folded()
    spec, weights, scales = params.spec, list(params.weights), _admits(params, _has_scales)
    alone = {coupled.layers[0]: coupled.num_channels for coupled in spec.scaling_classes if len(coupled.layers) == 1}
    for index, layer in enumerate(spec.layers):
        sender = spec.sender(index)
        if alone.get(sender) == spec.width(sender):
            incoming = torch.cat([weights[sender].flatten(2), params.biases[sender][..., None]], dim=2)
            speaks = by_receiver(~scales[sender][:, None] | (incoming != 0).any(2), layer)
            weights[index] = weights[index] * speaks.reshape(*speaks.shape, *[1] * (weights[index].ndim - 3))
    return canonicalize_scale(params.replace(weights=tuple(weights)))


def _has_signs(group: ScalarGroup) -> bool:
    return group.signs


def _has_scales(group: ScalarGroup) -> bool:
    return group.scales


def _admits(params: NetParams, allowed: Callable[[ScalarGroup], bool]) -> list[Tensor]:
    """Per layer [B] bool, whether one of its neurons has a group of scalars that `allowed` accepts; of the last layer,
    no."""
    none = torch.zeros(len(params), dtype=torch.bool, device=params.biases[0].device)
    result = [none] * params.spec.num_layers
    for coupled in params.spec.scaling_classes:
        admits = by_group(params, coupled, lambda group: torch.full_like(none, allowed(group))[:, None])[:, 0]
        for layer in coupled.layers:
            result[layer] = result[layer] | admits
    return result


def _size(x: Tensor) -> Tensor:
    """The root mean square, at least `SMALLEST`: [B, ...] -> [B, 1]."""
    x = x.flatten(1)
    largest = x.detach().abs().amax(1, keepdim=True).clamp_min(SMALLEST)  # taken out, so that no square overflows
    floor = (SMALLEST / largest).square()
    return largest * (x / largest).square().mean(1, keepdim=True).clamp_min(floor).sqrt()


def _log_size(x: Tensor) -> Tensor:
    """log10 of `_size`."""
    return _size(x).log10()


def _values(x: Tensor, signed: Tensor) -> Tensor:
    """Statistics of values [B, n], those of signed ones where `signed` [B]: [B, 1 + 2 (1 + NUM_QUANTILES)]."""
    size = _size(x)
    absolute, own = x.abs() / size, x * signed[:, None] / size
    parts = [part for values in (absolute, own) for part in (values.mean(1, keepdim=True), quantiles(values))]
    return torch.cat([size.log10(), *parts], dim=1)


def neuron_statistics(params: NetParams) -> list[Tensor]:
    """Sizes of what comes to each neuron and of what leaves it, per layer [B, n_l, NUM_NEURON_STATISTICS].

    log10 ||[W_i, b_i]||, log10 of the norm of the outgoing weights (0 of outputs), |b_i| / ||[W_i, b_i]||. They are
    permuted with the neurons and the same for all signs; scales move them.
    """
    rows = []
    for index, (bias, outgoing) in enumerate(zip(params.biases, outgoing_norms(params), strict=True)):
        norm = incoming_norm(params, index).clamp_min(SMALLEST)
        rows.append(torch.stack([norm.log10(), outgoing.log10(), bias.abs() / norm], dim=-1))
    return rows


def outgoing_norms(params: NetParams) -> list[Tensor]:
    """Per layer [B, n_l], the norm of all weights that read a neuron; of layers that no weight reads, 1."""
    squares: dict[int, Tensor] = {}
    for index, (layer, weight) in enumerate(zip(params.spec.layers, params.weights, strict=True)):
        sender = params.spec.sender(index)
        in_groups = weight.flatten(3) if layer.kernel else weight[..., None]
        square = in_groups.unflatten(1, (layer.groups, -1)).square().sum((2, 4)).flatten(1)
        if sender >= 0:
            squares[sender] = squares[sender] + square if sender in squares else square
    return [
        squares[index].clamp_min(SMALLEST**2).sqrt() if index in squares else torch.ones_like(bias)
        for index, bias in enumerate(params.biases)
    ]


def _log_paths(params: NetParams, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """log10 of the sum over all paths through weights, from input to output, of the product of `fn` of each, [B, 1]."""
    spec = params.spec
    sums: list[Tensor] = []
    logs: list[Tensor] = []
    for index, (layer, weight) in enumerate(zip(spec.layers, params.weights, strict=True)):
        kernel_sum = fn(weight).flatten(3).sum(3) if layer.kernel else fn(weight)
        sender = spec.sender(index)
        into = sums[sender] if sender >= 0 else weight.new_ones(len(weight), layer.in_dim)
        paths = (kernel_sum * by_receiver(into, layer)).sum(2)
        largest = paths.detach().amax(1, keepdim=True).clamp_min(SMALLEST**2)  # taken out, so that nothing overflows
        sums.append(paths / largest)
        logs.append(largest.log10() + (logs[sender] if sender >= 0 else 0))
    return logs[-1] + sums[-1].sum(1, keepdim=True).clamp_min(SMALLEST).log10()
