"""Inner problems: networks that learn to classify images, B at once.

Shape letters: B networks, P parameters, M images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from scalegmn.engine.native import has_library_for
from scalegmn.engine.relu_classifiers import Classifiers, losses_and_gradients
from scalegmn.networks import ACTIVATIONS, LayerSpec, NetParams, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.zoos.images import SOURCES, Images, load_images

HELD_OUT = 0.2
"""Share of the images that tests networks, where the source has no test set; half as many validate."""

INITIALIZATIONS = ("uniform", "he", "xavier")
"""uniform: weights and biases uniform within 1 / sqrt(fan-in), as in PyTorch; he and xavier: normal weights of variance
2 / fan-in and 2 / (fan-in + fan-out), no biases."""


@dataclass(frozen=True)
class ProblemConfig:
    """Networks that learn to classify images. Each outer step draws an architecture, an activation and an
    initialisation among those given, for all of its networks."""

    images: str = "digits"
    """Source of the images: digits, mnist, fashion_mnist, cifar10 or folder."""

    images_path: str | None = None
    """Where its files are; Debian's package dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist."""

    image_size: int | None = None
    """Height and width to which images are resized (means over areas); null: as they are."""

    grey: bool = False
    """Mean of the colours."""

    kind: Literal["mlp", "cnn"] = "mlp"
    """mlp: linear layers; cnn: convolutions of 3x3, the first with stride 2, mean over positions, linear layer."""

    hidden_dims: tuple[tuple[int, ...], ...] = ((32,),)
    """Widths of hidden layers, one list per architecture."""

    activations: tuple[str, ...] = ("relu",)
    """Activations of hidden layers."""

    initializations: tuple[str, ...] = ("uniform",)
    """uniform, he or xavier."""

    batch_size: int = 128
    """Images per step of an inner network, drawn with replacement."""

    def __post_init__(self) -> None:
        problems = []
        if self.images not in SOURCES:
            problems.append(f"images: found {self.images!r}, expected one of {', '.join(SOURCES)}")
        for name, known in (("activations", [*ACTIVATIONS]), ("initializations", INITIALIZATIONS)):
            given = getattr(self, name)
            if not given or not {*given} <= {*known}:
                problems.append(f"{name}: found {list(given)}, expected some of {', '.join(known)}")
        if not self.hidden_dims or any(not dims or min(dims) < 1 for dims in self.hidden_dims):
            problems.append(f"hidden_dims: found {self.hidden_dims}, expected lists of positive widths")
        if self.batch_size < 1 or (self.image_size is not None and self.image_size < 1):
            problems.append(f"batch_size, image_size: found {self.batch_size}, {self.image_size}, expected 1 or more")
        if problems:
            raise ValueError("; ".join(f"problem.{problem}" for problem in problems))


class ImageData:
    """Images to train, validate and test inner networks, standardised by those of training.

    Args:
        config: which images.
        seed: of the split, where the source has none.
    """

    def __init__(self, config: ProblemConfig, seed: int = 0) -> None:
        images = load_images(config.images, None if config.images_path is None else Path(config.images_path))
        self.source, self.num_classes = images.source, int(images.labels.max()) + 1
        pixels = _resized(images, config)
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        if images.held_out is None:
            num_test = round(HELD_OUT * len(rows))
            test, rest = rows[:num_test], rows[num_test:]
        else:
            test, rest = rows[images.held_out[rows]], rows[~images.held_out[rows]]
        num_val = round(HELD_OUT / 2 * len(rest))
        self.rows = {"train": rest[num_val:], "val": rest[:num_val], "test": test}
        train = pixels[self.rows["train"]]
        mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
        pixels = (pixels - mean) / deviation
        if config.kind == "mlp":
            pixels = pixels.flatten(1)
        self.pixels = {split: pixels[own].contiguous() for split, own in self.rows.items()}
        self.labels = {split: images.labels[own] for split, own in self.rows.items()}
        self.shape = tuple(pixels.shape[1:])


def _resized(images: Images, config: ProblemConfig) -> Tensor:
    """All images, [n, channels, height, width]."""
    parts = []
    for rows in torch.arange(len(images)).split(8192):
        pixels = images.take(rows).permute(0, 3, 1, 2)
        if config.grey:
            pixels = pixels.mean(1, keepdim=True)
        if config.image_size is not None:
            size = (config.image_size, config.image_size)
            pixels = interpolate(pixels, size, mode="area")
        parts.append(pixels.contiguous())
    return torch.cat(parts)


def architectures(config: ProblemConfig, data: ImageData) -> list[NetSpec]:
    """All that a problem draws from: each choice of widths with each activation."""
    return [_spec(config, data, dims, name) for dims in config.hidden_dims for name in config.activations]


def _spec(config: ProblemConfig, data: ImageData, hidden: Sequence[int], activation: str) -> NetSpec:
    sizes = [data.shape[0], *hidden]
    kernel = (3, 3) if config.kind == "cnn" else None
    layers = [LayerSpec(i, o, kernel, activation) for i, o in pairwise(sizes)]
    return NetSpec((*layers, LayerSpec(sizes[-1], data.num_classes)))


def initialized(spec: NetSpec, num_networks: int, initialization: str, generator: torch.Generator) -> NetParams:
    """B networks with random parameters (`INITIALIZATIONS`)."""
    weights, biases = [], []
    for layer in spec.layers:
        area = math.prod(layer.kernel or ())
        fan_in, fan_out = layer.in_dim * area, layer.out_dim * area
        shape = (num_networks, *layer.weight_shape)
        if initialization == "uniform":
            bound = fan_in**-0.5
            weights.append(bound * (2 * torch.rand(shape, generator=generator) - 1))
            biases.append(bound * (2 * torch.rand(num_networks, layer.out_dim, generator=generator) - 1))
        else:
            variance = 2 / fan_in if initialization == "he" else 2 / (fan_in + fan_out)
            weights.append(variance**0.5 * torch.randn(shape, generator=generator))
            biases.append(torch.zeros(num_networks, layer.out_dim))
    return NetParams(spec, tuple(weights), tuple(biases))


class Problem(Protocol):
    """B networks under training (`InnerProblem`); losses are also asked for more networks of the same architecture."""

    @property
    def params(self) -> NetParams:
        """Before training."""
        ...

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """What the losses of a step are of."""
        ...

    def losses(self, flat: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """[B]."""
        ...

    def losses_and_gradients(self, flat: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B] and [B, P]."""
        ...


@dataclass(frozen=True, eq=False)
class InnerProblem:
    """B networks and the images that they learn from. It is sliced like a tensor: each slice draws the same images that
    it draws as a part of the whole.

    Attributes:
        params: the networks before training.
        data: the images.
        batch_size: M.
        seed: of the batches.
        rows: [B] long, numbers of the networks among `total`.
        total: networks of the whole problem.
    """

    params: NetParams
    data: ImageData
    batch_size: int
    seed: int
    rows: Tensor
    total: int

    @classmethod
    def draw(
        cls,
        config: ProblemConfig,
        data: ImageData,
        num_networks: int,
        generator: torch.Generator,
        spec: NetSpec | None = None,
    ) -> InnerProblem:
        """A problem of one architecture and activation (`spec`, or one of the configured ones) and one initialisation,
        drawn among those of the configuration."""
        specs = architectures(config, data)
        if spec is None:
            spec = specs[int(torch.randint(len(specs), (), generator=generator))]
        choice = config.initializations[int(torch.randint(len(config.initializations), (), generator=generator))]
        seed = int(torch.randint(2**31, (), generator=generator))
        params = initialized(spec, num_networks, choice, generator)
        return cls(params, data, config.batch_size, seed, torch.arange(num_networks), num_networks)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Tensor) -> InnerProblem:
        """Some of the networks."""
        return replace(self, params=self.params[rows], rows=self.rows[rows])

    @property
    def is_relu_chain(self) -> bool:
        """Whether the networks are linear layers with relu between them, and nothing else."""
        spec = self.params.spec
        sizes = [*pairwise(spec.layout)]
        hidden = [LayerSpec(i, o, None, "relu") for i, o in sizes[:-1]]
        return spec.layers == (*hidden, LayerSpec(*sizes[-1]))

    def images_of(self, step: int) -> Tensor:
        """Which training images the networks read in a step, [B, M] long; each has its own."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count = len(self.data.labels["train"])
        return torch.randint(count, (self.total, self.batch_size), generator=generator)[self.rows]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [B, M, ...] and labels [B, M] of a step."""
        rows = self.images_of(step)
        return self.data.pixels["train"][rows], self.data.labels["train"][rows]

    def classifiers(self, steps: Sequence[int], copies: int) -> Classifiers:
        """What compiled code trains on in these steps: `copies` of all networks, which are relu chains."""
        rows = torch.stack([self.images_of(step) for step in steps]).repeat(1, copies, 1)
        return Classifiers(self.params.spec.layout, self.data.pixels["train"], self.data.labels["train"], rows)

    def outputs(self, flat: Tensor, images: Tensor) -> Tensor:
        """Logits [B, M, classes] of the networks with parameters [B, P], of images of all [M, ...] or each
        [B, M, ...]."""
        params = self.params.unflatten(flat)
        if params.spec.is_cnn:
            strides = (2, *[1] * (params.spec.num_layers - 2))
            return evaluate_cnn(params, images, strides)
        return evaluate(params, images)

    def losses(self, flat: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean cross-entropy of each network, [B]."""
        logits, labels = self.outputs(flat, batch[0]), batch[1]
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)

    def losses_and_gradients(self, flat: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The losses [B] and their gradients [B, P], by one backward pass of their sum; of relu networks in single
        precision on a CPU, by compiled code."""
        if self.is_relu_chain and batch[0].ndim == 3 and has_library_for(flat, batch[0]):
            return losses_and_gradients(flat, self.params.spec.layout, *batch)
        with torch.enable_grad():
            leaf = flat.detach().requires_grad_()
            losses = self.losses(leaf, batch)
            (gradients,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), gradients

    @torch.no_grad()
    def measure(self, flat: Tensor, split: str) -> tuple[Tensor, Tensor]:
        """Loss and accuracy [B] on all images of a split."""
        images, labels = self.data.pixels[split], self.data.labels[split]
        logits = torch.cat([self.outputs(flat, part) for part in images.split(512)], dim=1)
        losses = cross_entropy(logits.transpose(1, 2), labels.expand(len(logits), -1), reduction="none").mean(1)
        return losses, (logits.argmax(-1) == labels).to(losses).mean(1)
