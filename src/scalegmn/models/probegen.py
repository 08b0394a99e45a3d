"""ProbeGen (Kahana et al., ICLR 2025): what networks answer to learned inputs, without reading their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.nn.mlp import MLP
from scalegmn.nn.probes import ProbeImages, check_images

_SMALLEST_IMAGE = 4
"""Height and width after the generator's first layer."""


@dataclass(frozen=True)
class ProbeGenConfig(ModelConfig):
    """ProbeGen: an MLP of what a network answers to generated inputs; invariant to all that keeps its function."""

    name = "probegen"
    supports_multiple_architectures = True

    num_probes: int = 128
    """Inputs sent through each network."""

    generator: Literal["deep_linear", "none"] = "deep_linear"
    """deep_linear: probes are learned codes that went through linear layers in a row; none: they are learned themselves
    (vanilla probing)."""

    latent_dim: int = 32
    """Width of the codes, and of the generator's hidden layer for INRs."""

    generator_channels: int = 16
    """For CNNs: channels of the generator at full size; twice as many at half of it, and so on."""

    extra_generator_layer: bool = False
    """For CNNs: one more layer, before the generator's last doubling."""

    image_size: int = 32
    """For CNNs: height and width of the images that they read."""

    stride: int = 2
    """For CNNs: of every convolution."""

    padding: Literal["same", "valid"] = "same"
    """For CNNs: zeros around the input of every convolution such that only the stride makes it smaller, or none."""

    hidden_dim: int = 256
    """Width of the MLP."""

    num_linears: int = 6
    """Linears of the MLP."""

    def __post_init__(self) -> None:
        counts = ["num_probes", "latent_dim", "generator_channels", "stride", "hidden_dim", "out_dim"]
        problems = self.wrong_choices() + self.wrong_numbers(counts)
        if self.num_linears < 2:
            problems.append(f"num_linears: found {self.num_linears}, expected at least 2")
        doublings = math.log2(max(self.image_size, 1) / _SMALLEST_IMAGE)
        if self.generator == "deep_linear" and (doublings < 1 or doublings % 1):
            problems.append(f"image_size: found {self.image_size}, but a generator doubles 4: use 8, 16, 32, ..")
        problems += self.wrong_output("probing changes no network")
        if self.normalize:
            problems.append("normalize: found true, but probes go through networks as they are; leave it null")
        self.refuse(problems)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """All that keeps a network's function."""
        return frozenset({"permutation", "sign", "scale", "phase"})

    def build(self, spec: NetSpec) -> ProbeGen:
        """The model for networks of `spec`."""
        return ProbeGen(self, spec)


METANETWORKS.register(ProbeGenConfig.name, ProbeGenConfig)


class ProbeGen(Metanetwork):
    """MLP([f(p_1), ..., f(p_Q)]) of a network f, for probes p_q = generator(z_q) (Kahana et al., 2025).

    It reads networks of any widths and depths with as many inputs and outputs as those of `spec`.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the networks' convolutions do not fit the images or follow linear layers, or their residual
            connections join images of different sizes.
    """

    one_pass = True

    def __init__(self, config: ProbeGenConfig, spec: NetSpec) -> None:
        self.images = ProbeImages(config.image_size, config.stride, config.padding)
        _check_fit(self.images, spec, config)
        super().__init__(config, spec, None)
        self.config = config
        d, image = config.latent_dim, (config.image_size, config.image_size) if spec.is_cnn else ()
        self.generator = None
        if config.generator == "deep_linear":
            self.codes = nn.Parameter(torch.randn(config.num_probes, d, *(1 for _ in image)))
            self.generator = _image_generator(config, spec.layout[0]) if image else _point_generator(d, spec.layout[0])
        else:
            self.codes = nn.Parameter(torch.randn(config.num_probes, spec.layout[0], *image))
        hidden = (config.hidden_dim,) * (config.num_linears - 1)
        self.readout = MLP(self.response_dim(config, spec), hidden, config.out_dim, "relu", layer_norm=False)

    @staticmethod
    def response_dim(config: ProbeGenConfig, spec: NetSpec) -> int:
        """The width of `responses` of networks of `spec`."""
        return config.num_probes * spec.layout[-1]

    def probes(self) -> Tensor:
        """[Q, n_0] points or [Q, n_0, height, width] images."""
        return self.codes if self.generator is None else self.generator(self.codes)

    def forward(self, nets: NetParams | Sequence[NetParams]) -> Tensor:
        """B networks -> [B, out_dim]. Networks of several architectures answer in turn, to probes generated once.

        Raises:
            ValueError: the networks have other inputs or outputs than those that the model was built for.
        """
        probes, responses = self.probes(), []
        for params in [nets] if isinstance(nets, NetParams) else nets:
            self.validate_spec(params.spec)
            responses.append(self.responses(params, probes))
        output: Tensor = self.readout(torch.cat(responses))
        return output

    def responses(self, params: NetParams, probes: Tensor) -> Tensor:
        """What the readout reads of B networks, [B, Q n_L]: their answers to the probes."""
        if self.spec.is_cnn:
            return evaluate_cnn(params, probes, self.config.stride, self.config.padding).flatten(1)
        return evaluate(params, probes).flatten(1)

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`."""
        own = self.spec
        if (spec.is_cnn, spec.layout[0], spec.layout[-1]) != (own.is_cnn, own.layout[0], own.layout[-1]):
            kind = "CNN" if own.is_cnn else "MLP"
            raise ValueError(f"the model was built for {kind}s from {own.layout[0]} to {own.layout[-1]}, found {spec}")
        _check_fit(self.images, spec, self.config)


def _point_generator(latent_dim: int, num_inputs: int) -> nn.Module:
    """[Q, latent_dim] -> [Q, n_0]."""
    return nn.Sequential(nn.Linear(latent_dim, latent_dim), nn.Linear(latent_dim, num_inputs))


def _image_generator(config: ProbeGenConfig, num_channels: int) -> nn.Module:
    """[Q, latent_dim, 1, 1] -> [Q, n_0, height, width] within (-1, 1): transposed convolutions, then one tanh."""
    size, w = config.image_size, config.generator_channels
    width = w * size // _SMALLEST_IMAGE
    layers: list[nn.Module] = [nn.ConvTranspose2d(config.latent_dim, width, _SMALLEST_IMAGE)]
    while width > w:
        if config.extra_generator_layer and width == 2 * w:
            layers.append(nn.ConvTranspose2d(width, width, 3, padding=1))
        layers.append(nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1))
        width //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(w, num_channels, 3, padding=1), nn.Tanh())


def _check_fit(images: ProbeImages, spec: NetSpec, config: ProbeGenConfig) -> None:
    """Raises ValueError unless inputs go through networks of `spec`."""
    if not spec.is_chain:
        raise ValueError(f"model: {config.name} sends inputs through chains of layers only, found {spec}")
    check_images(images, spec, config.section)
