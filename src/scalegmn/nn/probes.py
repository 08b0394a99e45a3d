"""Probes: what neurons compute for learned inputs, as features that are rescaled exactly as their neurons are, and what
networks answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.cnn import cnn_pre_activations
from scalegmn.networks.evaluate import pre_activations
from scalegmn.nn.mlp import BuildMLP

_SMALLEST = 1e-8
"""Deviations of answers below this one count as this one."""


@dataclass(frozen=True)
class ProbeImages:
    """The images that are sent through CNNs, and how the CNNs read them."""

    image_size: int = 32
    """Height and width."""

    stride: int = 2
    """Of every convolution."""

    padding: Literal["same", "valid"] = "same"
    """Zeros around the input of every convolution such that only the stride makes it smaller, or none."""

    start: Literal["noise", "strokes"] = "noise"
    """noise: pixels are standard normal; strokes: smooth, in [-1, 1], mostly dark (`smooth_images`)."""

    rate: float = 1.0
    """Images are this many times what is learned, so an optimiser whose steps have one size, such as Adam, moves them
    so many times as fast as the other parameters."""


class Probes(nn.Module):
    """A z_i / s_l, to be added to the features of neuron i of layer l.

    z_i are the values of the neuron before its activation, for P learned inputs of the network; of a channel their mean
    over positions. What a neuron reads does not change under the symmetries, so z_i is multiplied by q_i when its
    incoming weights and bias are, whatever its activation makes of q_i; A has no bias. The same A serves all hidden
    neurons, another one the outputs, whose z are the network's answers. s_l, one number per layer, is the root mean
    square of z over the training networks.

    Learned inputs are points, uniform in [-1, 1] at the start, or images (`ProbeImages`).

    Args:
        num_probes: P.
        dim: width d of features.
        spec: the input networks.
        num_layers: L, of the deepest networks; networks of fewer layers have s of the first hidden layers, and in their
            last layer that of the last.
        images: of CNNs.
    """

    scales: Tensor

    def __init__(self, num_probes: int, dim: int, spec: NetSpec, num_layers: int, images: ProbeImages) -> None:
        super().__init__()
        shape = (num_probes, spec.layout[0])
        self.images, self.rate = images, images.rate if spec.is_cnn else 1.0
        points = torch.randn(*shape, images.image_size, images.image_size) if spec.is_cnn else 2 * torch.rand(shape) - 1
        if spec.is_cnn and images.start == "strokes":
            points = smooth_images(points)
        self.inputs = nn.Parameter(points / self.rate)
        self.hidden_linear = nn.Linear(num_probes, dim, bias=False)
        self.output_linear = nn.Linear(num_probes, dim, bias=False)
        self.register_buffer("scales", torch.ones(num_layers))

    def forward(self, params: NetParams) -> tuple[list[Tensor], Tensor]:
        """Features per layer of nodes 0..L of B chains, [B, n_l, d], zeros of input nodes, whose values are the same in
        all networks; and the outputs before their activation, [B, P, n_L].

        Raises:
            ValueError: the probes do not go through the networks (`pre_activations`, `cnn_pre_activations`).
        """
        values = self.pre_activations(params)
        *hidden, outputs = [
            z.mT / s for z, s in zip(values, self.scales[layer_rows(params.spec, self.scales)], strict=True)
        ]
        features = [*map(self.hidden_linear, hidden), self.output_linear(outputs)]
        of_inputs = features[0].new_zeros(len(params), params.spec.layout[0], features[0].shape[-1])
        return [of_inputs, *features], values[-1]

    def fitted_on(self, batches: Iterable[NetParams], as_read: Callable[[NetParams], NetParams]) -> Iterator[NetParams]:
        """The same batches; once all are drawn, `scales` are set by them.

        Args:
            batches: networks as they are stored.
            as_read: networks as `forward` gets them.
        """
        return root_mean_squares(
            self.scales,
            batches,
            lambda params: (self.pre_activations(as_read(params)), layer_rows(params.spec, self.scales)),
        )

    def pre_activations(self, params: NetParams, shifts: Sequence[Tensor] | None = None) -> list[Tensor]:
        """z per layer 1..L, [B, P, n_l], with shifts of the same shapes added."""
        inputs = self.rate * self.inputs
        if params.spec.is_cnn:
            return cnn_pre_activations(params, inputs, self.images.stride, self.images.padding, shifts)
        return pre_activations(params, inputs, shifts)


def layer_rows(spec: NetSpec, scales: Tensor) -> Tensor:
    """[L] long, which of the scales of the deepest networks' layers the layers of `spec` have: the first ones, and in
    the last layer the last."""
    every = torch.arange(len(scales), device=scales.device)
    return torch.cat([every[: spec.num_layers - 1], every[-1:]])


@torch.no_grad()
def root_mean_squares(
    scales: Tensor, batches: Iterable[NetParams], measure: Callable[[NetParams], tuple[Sequence[Tensor], Tensor]]
) -> Iterator[NetParams]:
    """The same batches; once all are drawn, `scales` are the root mean squares of what was measured; 1 of nothing.

    Args:
        scales: [S].
        batches: networks.
        measure: networks -> tensors, and which of the scales each belongs to, long.
    """
    squares, counts = torch.zeros(2, len(scales), dtype=torch.float64, device=scales.device)
    for params in batches:
        values, rows = measure(params)
        squares[rows] += torch.stack([value.double().square().sum() for value in values])
        counts[rows] += torch.tensor([value.numel() for value in values], device=counts.device)
        yield params
    sizes = (squares / counts.clamp_min(1)).sqrt()
    scales.copy_(torch.where(sizes > 0, sizes, 1))


class Answers(nn.Module):
    """What classifiers answer to P probes: [B, P, n] -> [B, width].

    The softmax s over the n classes, times n, of each probe and class, or the mean over classes of MLP(n s); and log10
    of the answers' standard deviation over probes and classes.

    Args:
        num_probes: P.
        num_outputs: n.
        mlp: builds the MLP of the P answers of a class; None: classes are told apart.
    """

    def __init__(self, num_probes: int, num_outputs: int, mlp: BuildMLP | None) -> None:
        super().__init__()
        self.mlp = None if mlp is None else mlp(num_probes, num_probes)
        self.width = num_probes * (num_outputs if mlp is None else 1) + 1

    def forward(self, answers: Tensor) -> Tensor:
        """[B, P, n] -> [B, width]."""
        deviation = answers.std(dim=(1, 2), correction=0).clamp_min(_SMALLEST)
        shares = answers.shape[2] * answers.softmax(2)
        features = shares.flatten(1) if self.mlp is None else self.mlp(shares.mT).mean(1)
        return torch.cat([features, deviation.log10()[:, None]], dim=1)


def smooth_images(noise: Tensor) -> Tensor:
    """tanh(2 y - 1) of smooth y with unit variance: images in [-1, 1], mostly dark, as drawings are.

    y is the noise with its amplitude at frequency k, in cycles per image, divided by (1 + |k|)^1.5.

    Args:
        noise: standard normal, [..., height, width].
    """
    rows, columns = (size * torch.fft.fftfreq(size, device=noise.device) for size in noise.shape[-2:])
    amplitudes = (1 + (rows[:, None].square() + columns.square()).sqrt()) ** -1.5
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * amplitudes).real
    return torch.tanh(2 * smooth / amplitudes.square().mean().sqrt() - 1)


def check_images(images: ProbeImages, spec: NetSpec, section: str) -> None:
    """Checks that images go through CNNs of `spec`; other networks pass.

    Args:
        images: the images.
        spec: a chain.
        section: of a configuration, where the fields of `images` are.

    Raises:
        ValueError: a convolution is larger than its input or follows a linear layer, or a residual connection comes
            from the input or joins images of different sizes.
    """
    positions, sizes = [], [images.image_size] * 2
    for index, layer in enumerate(spec.layers if spec.is_cnn else ()):
        if layer.kernel is None:
            sizes = [1, 1]  # their mean
        elif index and spec.layers[index - 1].kernel is None:
            raise ValueError(f"{section}: found a convolution, layer {index}, after a linear layer, in {spec}")
        elif images.padding == "same":
            sizes = [math.ceil(size / images.stride) for size in sizes]
        else:
            sizes = [(size - k) // images.stride + 1 for size, k in zip(sizes, layer.kernel, strict=True)]
            if min(sizes) < 1:
                raise ValueError(f"{section}.image_size: {images.image_size} is too small for {spec} without padding")
        positions.append(math.prod(sizes))
    for source, receiver, _ in spec.residuals if spec.is_cnn else ():
        if source < 0:
            raise ValueError(f"{section}: found a residual connection from the input, expected none, in {spec}")
        if positions[source] != positions[receiver]:
            found = f"stride {images.stride} and padding {images.padding}"
            raise ValueError(f"{section}.stride: found {found}, expected 1 and same for {spec}")
