"""Gradient descent of many small CNNs at once, each with its own hyper-parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams, NetSpec

Optimizer = Literal["sgd", "adam", "rmsprop"]

OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam", "rmsprop")
"""`Choices.optimizer` holds indices into this tuple. SGD has no momentum, Adam betas 0.9 and 0.999, RMSprop rho 0.9."""

EPSILON = 1e-7
"""Added to the root in Adam and RMSprop; the three optimizers have the constants of Keras, as published."""


@dataclass(frozen=True)
class Choices:
    """How each of B networks is trained; every field is [B].

    Attributes:
        lr: learning rate, constant.
        l2: coefficient of the sum of squared weights (not biases) in the loss.
        dropout: probability with which a number after a hidden activation is zero; the others grow by 1 / (1 - p).
        optimizer: index into `OPTIMIZERS`.
        init_std: standard deviation of the initial weights.
        train_fraction: share of the training images that the network is trained on.
    """

    lr: Tensor
    l2: Tensor
    dropout: Tensor
    optimizer: Tensor
    init_std: Tensor
    train_fraction: Tensor

    def __getitem__(self, rows: Tensor) -> Choices:
        return Choices(**{name: column[rows] for name, column in vars(self).items()})


@dataclass(frozen=True)
class LabelledImages:
    """The images that networks are trained and tested on.

    Attributes:
        pixels: [n, channels, height, width].
        labels: [n] classes.
        train, test: numbers of images.
    """

    pixels: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class TrainingResult:
    """B networks after each of E numbers of epochs.

    Attributes:
        nets: of each of the B networks, its E checkpoints.
        train_accuracy: [B, E] on the training images that each has seen.
        test_accuracy: [B, E].
        finite: [B, E] whether all parameters and outputs are finite.
    """

    nets: tuple[NetParams, ...]
    train_accuracy: Tensor
    test_accuracy: Tensor
    finite: Tensor


class Fit(ABC):
    """Stochastic gradient descent on the mean cross-entropy of B CNNs, each with its own choices and images.

    Args:
        nets: initial networks, convolutions, then one linear layer; B in all, in the order of `choices`; not modified.
        choices: how each is trained; sorted by optimizer.
        pixels: [n, channels, height, width].
        labels: [n] classes.
        batch_size: P.
        generator: of the order of images and of dropout.

    Attributes:
        flat: [D] all parameters: network by network, layer by layer a matrix [W | b].
        grad: [D] gradients of each network's loss.
    """

    def __init__(
        self,
        nets: Sequence[NetParams],
        choices: Choices,
        pixels: Tensor,
        labels: Tensor,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        self.specs = [params.spec for params in nets for _ in range(len(params))]
        self.choices, self.pixels, self.labels = choices, pixels, labels
        self.batch_size, self.generator = batch_size, generator
        self.flat = torch.cat([_flat(params).flatten() for params in nets])
        self.grad, self.mean, self.square = (torch.zeros_like(self.flat) for _ in range(3))
        self.sizes = [spec.num_parameters for spec in self.specs]
        sizes = torch.tensor(self.sizes, device=pixels.device)
        is_weight = torch.cat([_is_weight(params).flatten() for params in nets])
        self.lr = choices.lr.repeat_interleave(sizes)
        self.decay = 2 * choices.l2.repeat_interleave(sizes) * is_weight
        ends = [0, *(int(sizes[choices.optimizer <= k].sum()) for k in range(len(OPTIMIZERS)))]
        self.parts = [slice(*pair) for pair in pairwise(ends)]
        self.num_steps = 0

    @abstractmethod
    def forward(self, index: Tensor, training: bool) -> Tensor:
        """The logits [B, classes, P] of images `index` [B, P]; with dropout while training."""

    @abstractmethod
    def differentiate(self, index: Tensor) -> None:
        """Gradients of each network's mean cross-entropy on images `index` [B, P], with dropout, into `grad`."""

    @torch.no_grad()
    def update(self) -> None:
        """One step of each network's optimizer."""
        self.num_steps += 1
        self.grad.addcmul_(self.decay, self.flat)
        sgd, adam, rmsprop = self.parts
        self.flat[sgd].addcmul_(self.lr[sgd], self.grad[sgd], value=-1)
        first, second = (1 - beta**self.num_steps for beta in (0.9, 0.999))
        self.mean[adam].lerp_(self.grad[adam], 0.1)
        for part, rho, correction, direction in ((adam, 0.999, second, self.mean), (rmsprop, 0.9, 1, self.grad)):
            grad, square = self.grad[part], self.square[part]
            square.mul_(rho).addcmul_(grad, grad, value=1 - rho)
            size = (square / correction).sqrt_().add_(EPSILON)
            factor = self.lr[part] / (first if part is adam else 1)
            self.flat[part].addcdiv_(direction[part] * factor, size, value=-1)

    def epoch(self, rows: Tensor) -> None:
        """One epoch of every network on its images `rows` [B, n], in an order of its own, in batches of P; a last batch
        of fewer images is dropped."""
        noise = torch.rand(rows.shape, generator=self.generator, device=rows.device)
        for index in rows.gather(1, noise.argsort(1)).split(self.batch_size, 1):
            if index.shape[1] == self.batch_size:
                self.differentiate(index)
                self.update()

    @torch.no_grad()
    def evaluate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The accuracy of each network on images `rows` [B, n], [B], and whether all its outputs are finite, [B]."""
        right = torch.zeros(len(rows), device=rows.device)
        finite = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for index in rows.split(self.batch_size, 1):
            size = index.shape[1]
            if size < self.batch_size:
                index = nn.functional.pad(index, (0, self.batch_size - size))
            logits = self.forward(index, training=False)
            right += (logits.argmax(1) == self.labels[index])[:, :size].sum(1)
            finite &= logits.isfinite().flatten(1).all(1)
        return right / rows.shape[1], finite

    def run(self, rows: Tensor, test: Tensor, checkpoints: Sequence[int]) -> TrainingResult:
        """Trains on images `rows` [B, n]; the networks after each number of epochs in `checkpoints`."""
        kept, train_accuracy, test_accuracy, finite = [], [], [], []
        for epoch in range(checkpoints[-1] + 1):
            if epoch:
                self.epoch(rows)
            if epoch in checkpoints:
                kept.append(self.flat.detach().clone())
                accuracy, good = self.evaluate(rows)
                train_accuracy.append(accuracy)
                accuracy, also = self.evaluate(test.expand(len(rows), -1))
                test_accuracy.append(accuracy)
                finite.append(good & also & torch.stack([flat.isfinite().all() for flat in kept[-1].split(self.sizes)]))
        checkpoints_of = torch.stack(kept).split(self.sizes, 1)
        nets = tuple(_params(spec, flat) for spec, flat in zip(self.specs, checkpoints_of, strict=True))
        return TrainingResult(nets, *(torch.stack(column, 1) for column in (train_accuracy, test_accuracy, finite)))


def matrices(spec: NetSpec, flat: Tensor) -> list[Tensor]:
    """Views [..., out, in + 1] of each layer's part of [..., parameters]."""
    shapes = [(layer.out_dim, math.prod(layer.weight_shape[1:]) + 1) for layer in spec.layers]
    parts = flat.split(list(map(math.prod, shapes)), -1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat(params: NetParams) -> Tensor:
    """[B, parameters]: of each layer in turn the matrix [W | b]."""
    layers = zip(params.weights, params.biases, strict=True)
    return torch.cat([torch.cat([w.flatten(2), b[..., None]], 2).flatten(1) for w, b in layers], 1)


def _is_weight(params: NetParams) -> Tensor:
    """As `_flat`: 1 for weights, 0 for biases."""
    weights, biases = tuple(map(torch.ones_like, params.weights)), tuple(map(torch.zeros_like, params.biases))
    return _flat(params.replace(weights=weights, biases=biases))


def _params(spec: NetSpec, flat: Tensor) -> NetParams:
    """The inverse of `_flat`."""
    of_layers = matrices(spec, flat)
    weights = tuple(
        matrix[..., :-1].unflatten(2, layer.weight_shape[1:]).contiguous()
        for matrix, layer in zip(of_layers, spec.layers, strict=True)
    )
    return NetParams(spec, weights, tuple(matrix[..., -1].contiguous() for matrix in of_layers))
