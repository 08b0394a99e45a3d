"""SIRENs (Sitzmann et al., NeurIPS 2020): sine networks that store an image as a function of position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scalegmn.networks.evaluate import evaluate
from scalegmn.networks.params import NetParams
from scalegmn.networks.spec import NetSpec

OUTPUT_OFFSET = 0.5
"""An INR's pixel value is its output + 0.5, as in the published MNIST zoos."""


def init_siren(
    spec: NetSpec, num_networks: int, generator: torch.Generator, base_width: int | None = None
) -> NetParams:
    """B independently initialised SIRENs (Sitzmann et al., section 3.2).

    W_1 ~ U(-1/n_0, 1/n_0); other W_l ~ U(-c/w0, c/w0), c = sqrt(6/n_{l-1}); b_l ~ U(-1/sqrt(n_{l-1}), +).

    With `base_width` m, as muP has them (Yang et al., 2022, https://arxiv.org/abs/2203.03466): W_L is multiplied by
    sqrt(m/n_{L-1}), and b_l, l > 1, by sqrt(n_{l-1}/m). Networks of width m are the same, wider ones start alike.
    """
    weights, biases = [], []
    w0 = spec.layers[0].w0
    for index, layer in enumerate(spec.layers):
        bound = 1 / layer.in_dim if index == 0 else math.sqrt(6 / layer.in_dim) / w0
        shape = (num_networks, layer.out_dim, layer.in_dim)
        reads = layer.in_dim if index == 0 or base_width is None else base_width
        if index == spec.num_layers - 1:
            bound *= math.sqrt(reads / layer.in_dim)
        weights.append((torch.rand(shape, generator=generator) * 2 - 1) * bound)
        biases.append((torch.rand(shape[:2], generator=generator) * 2 - 1) / math.sqrt(reads))
    return NetParams(spec, tuple(weights), tuple(biases))


def pixel_grid(height: int, width: int) -> Tensor:
    """[height * width, 2] positions (x, y) in [-1, 1]^2, x the fastest axis."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def render(params: NetParams, height: int, width: int, output_offset: float = OUTPUT_OFFSET) -> Tensor:
    """The images [B, height, width, channels] that B INRs store: their outputs + `output_offset`."""
    pixels = evaluate(params, pixel_grid(height, width).to(params.biases[0])) + output_offset
    return pixels.reshape(len(params), height, width, -1)
