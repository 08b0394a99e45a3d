"""Augmentations of networks that respect their symmetry groups (Shamsian et al., ICML 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scalegmn.networks import ACTIVATIONS, HETERO, NetParams, NetSpec, ScalarGroup
from scalegmn.symmetry.align import align
from scalegmn.symmetry.groups import GroupElement, PhaseShift


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training networks, drawn anew for each network and batch; all off by default."""

    translate: float = 0.0
    """Largest shift of the coordinates along each axis, in units of the grid [-1, 1]; for networks of 2 coordinates."""

    rotate: float = 0.0
    """Largest angle in degrees that the coordinates are rotated by; for networks of 2 coordinates."""

    flip: bool = False
    """Mirror and transpose all kernels of a CNN, as if its images were; its accuracy on such images is the same."""

    relabel: bool = False
    """Permute the outputs, as if the classes had other numbers; accuracy is the same."""

    dropout: float = 0.0
    """Share of the weights that are set to zero; biases stay."""

    noise: float = 0.0
    """Standard deviation of Gaussian noise on each weight and bias, relative to the root mean square of its tensor."""

    mixup: float = 0.0
    """a of the Beta(a, a) distribution of the shares in which two networks, aligned, and their targets are mixed."""

    group: tuple[Literal["permutation", "sign", "scale", "phase"], ...] = ()
    """Random symmetries, which leave what a network computes unchanged: `permutation` of neurons, `sign` of neurons
    with an odd activation (sine, tanh), `scale` with a homogeneous one (relu; factors from 0.1 to 10), `phase` of sine
    neurons (up to 3 half-turns)."""

    def __post_init__(self) -> None:
        problems = [
            f"data.augment.{name}: found {getattr(self, name)}, expected 0 or more"
            for name in ("translate", "rotate", "noise", "mixup")
            if not 0 <= getattr(self, name) < math.inf
        ]
        if not 0 <= self.dropout < 1:
            problems.append(f"data.augment.dropout: found {self.dropout}, expected 0 or more and less than 1")
        if problems:
            raise ValueError("; ".join(problems))


def check_augment(config: AugmentConfig, spec: NetSpec) -> None:
    """Raises ValueError when networks of `spec` cannot be augmented so; one message names each such setting."""
    problems = [
        f"data.augment.{name}: found {getattr(config, name)}, expected 0 for {spec}, which does not read 2 coordinates"
        for name in ("translate", "rotate")
        if getattr(config, name) and not _reads_two_coordinates(spec)
    ]
    if config.flip and not spec.is_cnn:
        problems.append(f"data.augment.flip: found True, expected False for {spec}, which has no kernels")
    if config.relabel and not _has_linear_outputs(spec):
        problems.append(
            f"data.augment.relabel: found True, expected False for {spec}, whose last layer does not read all neurons, "
            "or shares its weights"
        )
    if config.mixup and (spec.residuals or not spec.is_chain):
        problems.append(f"data.augment.mixup: found {config.mixup}, expected 0 for {spec}, which cannot be aligned")
    admitted = _admitted(spec)
    problems += [
        f"data.augment.group: found {name}, expected one of {', '.join(admitted)} for {spec}"
        for name in config.group
        if name not in admitted
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _reads_two_coordinates(spec: NetSpec) -> bool:
    """Whether the first layer is linear, and alone reads the input, which has two values."""
    first, *others = spec.layers
    readers = [index for index, layer in enumerate(spec.layers) if not layer.constant and spec.sender(index) == -1]
    is_shared = any(layer.tied == 0 for layer in others) or any(residual.source < 0 for residual in spec.residuals)
    is_linear = not spec.is_cnn and first.groups == 1 and first.norm is None
    return spec.layout[0] == 2 and readers == [0] and is_linear and not is_shared


def _has_linear_outputs(spec: NetSpec) -> bool:
    """Whether each output is a weighted sum of all that the last layer reads, with weights of its own layer."""
    last = spec.layers[-1]
    return last.groups == 1 and last.norm is None and last.tied is None and last.attention is None


def _admitted(spec: NetSpec) -> list[str]:
    """The groups that some layer's activation admits, all where networks differ in it."""
    names = {layer.activation for layer in spec.layers[:-1]}
    groups = [ACTIVATIONS[name].group for name in names - {HETERO}]
    admitted = {
        "permutation": True,
        "sign": any(group.signs for group in groups),
        "scale": any(group.scales for group in groups),
        "phase": "sine" in names,
    }
    return [group for group, is_admitted in admitted.items() if is_admitted or HETERO in names]


@torch.no_grad()
def augment(
    config: AugmentConfig, params: NetParams, target: Tensor, generator: torch.Generator
) -> tuple[NetParams, Tensor]:
    """What `config` switches on, in this order: translate, rotate, flip, relabel, dropout, noise, mixup, group.

    What changes one network comes before mixup, so that partners change independently of each other: first the exact
    moves of its function, then dropout, then noise, which covers the zeros too. Group elements come last, since mixup
    would align them away.

    Args:
        config: which augmentations; `check_augment` says whether they fit the networks.
        params: B networks, on any device.
        target: [B, ...]; stays as it is without mixup, and must be floating point with it.
        generator: on the CPU, so that the same seed gives the same networks on any device.

    Raises:
        ValueError: mixup of targets that are not floating point.
    """
    num = len(params)
    if config.translate:
        params = translate(params, config.translate * _symmetric((num, 2), generator))
    if config.rotate:
        params = rotate(params, config.rotate * _symmetric((num,), generator))
    if config.flip:
        params = flip(params, generator)
    if config.relabel:
        params = relabel(params, generator)
    if config.dropout:
        params = dropout(params, config.dropout, generator)
    if config.noise:
        params = noise(params, config.noise, generator)
    if config.mixup:
        seed = int(torch.randint(2**63 - 1, (), generator=generator))  # torch's own Beta takes no generator
        shares = torch.from_numpy(np.random.default_rng(seed).beta(config.mixup, config.mixup, num))
        params, target = mixup(params, target, shares)
    if config.group:
        params = transform(params, config.group, generator)
    return params, target


def translate(params: NetParams, shifts: Tensor) -> NetParams:
    """f'(x) = f(x + t): b_1' = b_1 + W_1 t. Exact.

    Args:
        params: B networks that read coordinates, W_1 [B, n_1, n_0].
        shifts: t, [B, n_0], in units of the coordinates.
    """
    weight, bias = params.weights[0], params.biases[0]
    moved = bias + (weight @ shifts.to(weight)[..., None])[..., 0]
    return params.replace(biases=(moved, *params.biases[1:]))


def rotate(params: NetParams, degrees: Tensor) -> NetParams:
    """f'(x) = f(R x): W_1' = W_1 R, with R = [[cos, -sin], [sin, cos]]. Exact.

    Args:
        params: B networks that read 2 coordinates, W_1 [B, n_1, 2].
        degrees: the angles of R, [B].
    """
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    rotation = torch.stack([cos, -sin, sin, cos], 1).reshape(-1, 2, 2)
    weight = params.weights[0]
    return params.replace(weights=(weight @ rotation.to(weight), *params.weights[1:]))


def flip(params: NetParams, generator: torch.Generator) -> NetParams:
    """f'(g x) = g f(x) for one of the 8 symmetries g of a square, drawn for each network: g turns every kernel.

    Kernels that are not square are mirrored only. Exact for strides at which the mirrored image meets the same pixels.
    """
    left, up, turned = torch.rand(3, len(params), 1, 1, 1, 1, generator=generator).to(params.biases[0]) < 0.5

    def moved(weight: Tensor) -> Tensor:
        if weight.ndim == 3:
            return weight
        weight = torch.where(left, weight.flip(-1), weight)
        weight = torch.where(up, weight.flip(-2), weight)
        return torch.where(turned, weight.mT, weight) if weight.shape[-1] == weight.shape[-2] else weight

    return params.replace(weights=tuple(map(moved, params.weights)))


def relabel(params: NetParams, generator: torch.Generator) -> NetParams:
    """f'(x) = P f(x), P a permutation of the outputs, drawn for each network."""
    bias = params.biases[-1]
    order = torch.rand(bias.shape, generator=generator).argsort(1).to(bias.device)
    rows = torch.arange(len(params), device=bias.device)[:, None]
    weights, biases = (*params.weights[:-1], params.weights[-1][rows, order]), (*params.biases[:-1], bias[rows, order])
    return params.replace(weights=weights, biases=biases)


def dropout(params: NetParams, share: float, generator: torch.Generator) -> NetParams:
    """Each weight is set to zero with probability `share`, independently; biases stay."""

    def dropped(weight: Tensor) -> Tensor:
        is_dropped = torch.rand(weight.shape, generator=generator) < share
        return weight.masked_fill(is_dropped.to(weight.device), 0)

    return params.replace(weights=_changed_weights(params, dropped))


def noise(params: NetParams, std: float, generator: torch.Generator) -> NetParams:
    """w' = w + std ||w||_rms e, with e ~ N(0, 1) independent for each weight and bias.

    ||w||_rms is the root mean square of one network's weights, or biases, of one layer. Statistics of batch norms,
    which are no parameters, stay.
    """

    def noisy(tensor: Tensor) -> Tensor:
        size = tensor.square().mean(tuple(range(1, tensor.ndim)), keepdim=True).sqrt()
        return tensor + std * size * torch.randn(tensor.shape, generator=generator).to(tensor)

    return params.replace(weights=_changed_weights(params, noisy), biases=tuple(map(noisy, params.biases)))


def mixup(params: NetParams, target: Tensor, shares: Tensor) -> tuple[NetParams, Tensor]:
    """s a + (1 - s) g b of each network a and the one before it in the batch, b, aligned to a by g; targets likewise.

    Zhang et al., ICLR 2018, for weights: Shamsian et al., ICML 2024. g moves permutations and signs; where networks
    also differ by scale or phase, canonical ones mix better. In a batch of several activations, b is the one before
    that has a's activation, and the first network of each stays as it is.

    Args:
        params: B networks.
        target: [B, ...] floating point: scores, or class labels as probabilities [B, classes].
        shares: s, [B], in [0, 1].

    Raises:
        ValueError: the target is not floating point.
    """
    if not target.is_floating_point():
        raise ValueError(f"mixup: found targets of {target.dtype}, expected scores or probabilities of classes")
    order = torch.arange(len(params), device=params.biases[0].device)
    if params.activation is not None:
        order = params.activation.argsort(stable=True)
    partner = torch.empty_like(order).scatter(0, order, order.roll(1))
    if params.activation is not None:
        differs = params.activation != params.activation[partner]
        shares = torch.where(differs, 1, shares.to(differs.device))
    other = params[partner]
    other = align(other, params).act(other)
    mixed = params.replace(
        weights=tuple(_mix(*pair, shares) for pair in zip(params.weights, other.weights, strict=True)),
        biases=tuple(_mix(*pair, shares) for pair in zip(params.biases, other.biases, strict=True)),
    )
    return mixed, _mix(target, target[partner.to(target.device)], shares)


def transform(params: NetParams, group: Sequence[str], generator: torch.Generator) -> NetParams:
    """A random element of the named groups acts on each network; what it computes stays the same.

    Args:
        params: B networks.
        group: any of `permutation`, `sign`, `scale`, `phase`; each acts on the layers whose activation admits it.
        generator: draws the elements, see `GroupElement.sample` and `PhaseShift.sample`.
    """
    element = GroupElement.sample(params, generator, permute="permutation" in group)
    chosen = ScalarGroup(signs="sign" in group, scales="scale" in group)
    params = GroupElement(element.permutations, tuple(map(chosen.project, element.scales))).act(params)
    return PhaseShift.sample(params, generator).act(params) if "phase" in group else params


def _changed_weights(params: NetParams, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """`fn` of each weight that is a parameter: norms without scale keep their ones, and tied layers the weights that
    they share."""
    weights: list[Tensor] = []
    for layer, weight in zip(params.spec.layers, params.weights, strict=True):
        if layer.tied is not None:
            weights.append(weights[layer.tied].transpose(1, 2))
        else:
            weights.append(fn(weight) if layer.affine else weight)
    return tuple(weights)


def _symmetric(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in [-1, 1)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def _mix(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """s first + (1 - s) second, [B, ...], for shares s [B]."""
    return second.lerp(first, shares.to(first).reshape(-1, *[1] * (first.ndim - 1)))
