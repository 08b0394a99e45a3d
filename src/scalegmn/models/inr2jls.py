"""INR2JLS: a latent map of an INR's weights, from which the image is drawn and the class is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.models.dng import DNG, DNGConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.siren import render
from scalegmn.nn.mlp import MLP


@dataclass(frozen=True)
class INR2JLSConfig(DNGConfig):
    """INR2JLS: DNG encoder, a latent map that must be enough to draw the image in training, and an MLP of it."""

    name = "inr2jls"

    latent_channels: int = 32
    """Channels of the latent map, which has a quarter of the image's height and width."""

    image_size: int = 8
    """Height and width of the images that are drawn in training, a multiple of 4."""

    drawing_weight: float = 10.0
    """Of the mean squared error of the drawn image, in the training loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self.wrong_numbers(["latent_channels"])
        if self.image_size < 4 or self.image_size % 4:
            problems.append(f"image_size: found {self.image_size}, expected a multiple of 4")
        if not self.drawing_weight >= 0:
            problems.append(f"drawing_weight: found {self.drawing_weight}, expected 0 or more")
        self.refuse(problems)

    def build(self, spec: NetSpec) -> INR2JLS:
        """The model for networks of `spec`."""
        return INR2JLS(self, spec)


METANETWORKS.register(INR2JLSConfig.name, INR2JLSConfig)


class INR2JLS(DNG):
    """A DNG encoder, a latent map, and what is read from it:

        z      = A s                    s the encoder's states of all outputs; z [C, H / 4, W / 4]
        output = MLP(z)
        in training, + drawing_weight * ||decoder(z) - image||^2 / (H W)

    The decoder has two transposed convolutions and a convolution. The image is what the INR itself draws at H x W
    points of [-1, 1]^2, so that no other data are needed, and augmented networks have the images that they draw. The
    decoder is used in training alone. The model is exact for permutations, as `DNG` is.

    See Wu et al., 2026, https://arxiv.org/abs/2607.02166; written from a summary of its equations.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: as `DNG`, or the networks do not read two coordinates.
    """

    config: INR2JLSConfig

    def __init__(self, config: INR2JLSConfig, spec: NetSpec) -> None:
        if spec.is_cnn or spec.layout[0] != 2:
            raise ValueError(f"model: inr2jls reads INRs of images, of two coordinates, found {spec}; use dng")
        super().__init__(config, spec)
        self.config, c, size = config, config.latent_channels, config.image_size // 4
        self.latent = nn.Linear(config.hidden_dim * spec.layout[-1], c * size * size)
        hidden = (config.readout_dim, config.readout_dim)
        self.readout = MLP(c * size * size, hidden, config.out_dim, dropout=config.dropout)
        self.decoder = nn.Sequential(
            nn.Unflatten(1, (c, size, size)),
            *(nn.ConvTranspose2d(c, c, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(c, c, 4, 2, 1), nn.SiLU()),
            nn.Conv2d(c, spec.layout[-1], 3, padding=1),
        )

    def forward(self, params: NetParams) -> Tensor:
        """B networks -> [B, out_dim]; sets `auxiliary_loss` in training mode.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        z = self.latent(self.encoded(params))
        if self.training:
            size = self.config.image_size
            with torch.no_grad():
                images = render(params, size, size).movedim(-1, 1)
            self.auxiliary_loss = self.config.drawing_weight * (self.decoder(z) - images).square().mean()
        output: Tensor = self.readout(z)
        return output
