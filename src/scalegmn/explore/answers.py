"""What classifiers answer: the shares of their classes for some inputs, evaluated when the page is written."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scalegmn.networks import NetParams
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.zoos.fit.cnn_zoo import as_read
from scalegmn.zoos.images import SOURCES, load_images
from scalegmn.zoos.zoo_format import Networks, Zoo, in_single

INPUTS = 10
"""Inputs, at most."""

SHARES = 2 * 10**6
"""Shares on a page, at most; of many networks with many classes there are fewer inputs."""

BATCH = 64
"""Networks that are evaluated together."""


@dataclass(frozen=True)
class Inputs:
    """What networks are asked about.

    Attributes:
        words: what they are.
        values: [P, n_0] points, or [P, n_0, height, width] images, as the networks read them.
        pictures: [P, height, width, channels] in [0, 1]; None: points are not drawn.
        labels: the class of each; None: they have none.
        classes: names of the classes; None: they have only numbers.
        padding: of convolutions.
        stride: of convolutions.
    """

    words: str
    values: Tensor
    pictures: Tensor | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    padding: Literal["same", "valid"] = "same"
    stride: int = 2


def inputs_of_zoo(zoo: Zoo, path: Path | None) -> Inputs | None:
    """An image of each class, of those that a zoo of `scalegmn zoo cnn` was trained on; noise where they are not there.

    Args:
        zoo: the zoo.
        path: where the files of its images are; digits need none.

    Returns:
        None for other zoos: they do not tell how their networks read images.
    """
    recipe = zoo.provenance.get("recipe", {})
    if not {"padding", "grey", "mixed"} <= set(recipe) or not all(params.spec.is_cnn for params in zoo.nets):
        return None
    stride = 1 if recipe["mixed"] else 2
    try:
        images = load_images(zoo.provenance["images"], path) if zoo.provenance["images"] in SOURCES else None
    except (ValueError, OSError):
        images = None
    if images is None or images.source != zoo.provenance.get("image_source"):
        height, width, _ = zoo.provenance["image_shape"]
        channels = zoo.nets[0].spec.layout[0]
        pixels = torch.rand(INPUTS, height, width, channels, generator=torch.Generator().manual_seed(0))
        return Inputs("images of noise", as_read(pixels, False), pixels, padding=recipe["padding"], stride=stride)
    rows = torch.stack([(images.labels == label).nonzero()[0, 0] for label in images.labels.unique()[:INPUTS]])
    pixels = images.take(rows)
    words = f"the first image of each class of {zoo.provenance['images']}"
    values = as_read(pixels, recipe["grey"])
    return Inputs(words, values, pixels, images.labels[rows], images.classes, recipe["padding"], stride)


def inputs_of_width(width: int) -> Inputs:
    """Points of a standard normal distribution, for networks that nothing is known about."""
    points = torch.randn(INPUTS, width, generator=torch.Generator().manual_seed(0))
    return Inputs("inputs drawn from a standard normal distribution", points)


@torch.no_grad()
def shares(params: NetParams, inputs: Inputs) -> Tensor | None:
    """softmax of the outputs of B networks, [B, P, classes]; None for networks of one output, and for those that
    cannot be evaluated here."""
    if params.spec.layout[-1] < 2:
        return None
    parts = []
    for start in range(0, len(params), BATCH):
        part = in_single(params[start : start + BATCH])
        values = inputs.values.to(part.biases[0])
        try:
            if inputs.values.ndim == 4:
                z = evaluate_cnn(part, values, inputs.stride, inputs.padding)
            else:
                z = evaluate(part, values)
        except ValueError:
            return None
        parts.append(z.softmax(2))
    return torch.cat(parts)


def answers_of(nets: Networks, of_zoo: Inputs | None) -> dict[str, Any] | None:
    """What networks answer, as the page shows it; None where there is nothing to show.

    Args:
        nets: the networks.
        of_zoo: what all of them are asked about; None: chains of linear layers with more than two inputs, of which the
            page shows nothing else, are asked about points, and others about nothing.
    """
    values, shown = [], of_zoo
    for params in nets.nets:
        inputs, width = of_zoo, params.spec.layout[0]
        if inputs is None and width > 2 and params.spec.is_chain and not params.spec.is_cnn:
            shown = inputs = inputs_of_width(width)
        share = None if inputs is None else shares(params, inputs)
        values.append(share)
    if shown is None or all(share is None for share in values):
        return None
    most = max(share[0].numel() for share in values if share is not None)
    count = max(1, min(len(shown.values), SHARES * len(shown.values) // (len(nets) * most)))
    pictures = None
    if shown.pictures is not None:
        height, width, channels = shown.pictures.shape[1:]
        pixels = b64encode(shown.pictures[:count].mul(255).round().byte().numpy().tobytes()).decode()
        pictures = {"height": height, "width": width, "channels": channels, "pixels": pixels}
    return {
        "of": shown.words,
        "count": count,
        "labels": None if shown.labels is None else shown.labels[:count].tolist(),
        "classes": shown.classes,
        "pictures": pictures,
        "values": [None if share is None else _encoded(share[:, :count]) for share in values],
    }


def _encoded(share: Tensor) -> dict[str, Any]:
    """Shares [B, P, classes], a byte each."""
    return {"classes": share.shape[2], "shares": b64encode(share.mul(255).round().byte().numpy().tobytes()).decode()}
