"""Train many small CNNs at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.nets.cnn import same_padding
from scalegmn.spec import ACTIVATIONS, MIXED, LayerSpec, NetParams, NetSpec
from scalegmn.zoos.making import OnDone, seeded

STRIDE = 2
"""Of every convolution, as published."""

CACHE_BYTES = 12 << 20
"""Buffers of the networks that one CPU core works on at a time; larger ones leave its cache."""

OPTIMIZERS = ("sgd", "adam", "rmsprop")
"""`Choices.optimizer` holds indices into this tuple. Without momentum; betas 0.9 and 0.999; rho 0.9."""

EPSILON = 1e-7
"""Beside the root in Adam and RMSprop; the three optimizers have the constants of Keras, as published."""


@dataclass(frozen=True)
class Choices:
    """How each of B networks is trained; every field is [B].

    Attributes:
        lr: learning rate, constant.
        l2: coefficient of the sum of squared weights (not biases) in the loss.
        dropout: probability with which a number after a hidden activation is zero; the others grow by 1 / (1 - p).
        optimizer: index into `OPTIMIZERS`.
        init_std: standard deviation of the initial weights.
        train_fraction: share of the training images that it sees.
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
    """What the networks learn from and are tested on.

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
class Trained:
    """B networks after each of E numbers of epochs.

    Attributes:
        params: [B * E] networks; a network's own in a row.
        train_accuracy: [B, E] on the training images that each has seen.
        test_accuracy: [B, E].
        finite: [B, E] whether all parameters and outputs are finite.
    """

    params: NetParams
    train_accuracy: Tensor
    test_accuracy: Tensor
    finite: Tensor


class _Convolution:
    """The buffers of one convolution of B networks on P images.

    Attributes:
        inside: [B, C, height, width, P], its input, a view of what has the padding's zeros around.
        patches: [B, C kh kw + 1, positions * P], the patches of the input, and a row of ones.
        act: [B, out, *positions, P], its output.
        mask: as act: 0, or 1 / (1 - p); 1 without dropout.
        inside_delta: the loss's gradient by `inside`.
    """

    def __init__(
        self, layer: LayerSpec, num: int, size: tuple[int, int], padding: Literal["same", "valid"], like: Tensor, p: int
    ) -> None:
        before, after = zip(
            *(
                same_padding(n, k, STRIDE) if padding == "same" else (0, 0)
                for n, k in zip(size, layer.kernel, strict=True)
            ),
            strict=True,
        )
        rows, columns = (slice(start, start + n) for start, n in zip(before, size, strict=True))
        height, width = (sum(parts) for parts in zip(before, size, after, strict=True))
        padded, delta = (like.new_zeros(num, layer.in_dim, height, width, p) for _ in range(2))
        self.inside, self.inside_delta = padded[:, :, rows, columns], delta[:, :, rows, columns]
        kh, kw = layer.kernel
        self.positions = h, w = (height - kh) // STRIDE + 1, (width - kw) // STRIDE + 1
        self.patches = like.new_ones(num, layer.in_dim * kh * kw + 1, h * w * p)
        self.patches_delta = torch.empty_like(self.patches[:, :-1])
        self.act = like.new_empty(num, layer.out_dim, h, w, p)
        self.mask = torch.ones_like(self.act)
        shape = (num, layer.in_dim, kh, kw, h, w, p)
        self._by_position = self.patches[:, :-1].unflatten(1, shape[1:4]).unflatten(-1, shape[4:])
        b, c, y, x, one = padded.stride()
        self._windows = padded.as_strided(shape, (b, c, y, x, STRIDE * y, STRIDE * x, one))
        self._delta, parts = delta, self.patches_delta.view(shape)
        self._summands = [
            (delta[:, :, i : i + STRIDE * h : STRIDE, j : j + STRIDE * w : STRIDE], parts[:, :, i, j])
            for i in range(kh)
            for j in range(kw)
        ]

    def gather(self) -> None:
        """The patches of what is inside."""
        self._by_position.copy_(self._windows)

    def scatter(self) -> None:
        """`inside_delta`: for each number, the sum of `patches_delta` over the patches that it is in."""
        self._delta.zero_()
        for place, part in self._summands:
            place += part


class CnnFit:
    """Stochastic gradient descent on the mean cross-entropy of B CNNs, each with its own choices and images.

    Convolutions are matrix products: with M = [W | b] and X_l the patches of x_{l-1}, a row of ones included,
    z_l = M_l X_l, a_l = sigma(z_l), x_l = a_l * mask; then the mean over positions; logits = M_L x_{L-1}.
    Backwards from d = (softmax(logits) - one hot) / P: dM_l = d_l X_l^T, dX_l = W_l^T d_l, and what is in several
    patches has the sum of theirs.

    Networks are the first axis, images the last. Buffers are allocated once.

    Args:
        params: B initial networks, all relu or all tanh: convolutions, then one linear layer; not modified.
        choices: how each is trained; sorted by optimizer.
        pixels: [n, channels, height, width].
        labels: [n] classes.
        batch_size: P.
        padding: as in `nets.cnn.evaluate_cnn`.
        generator: of the order of images and of dropout.
    """

    def __init__(
        self,
        params: NetParams,
        choices: Choices,
        pixels: Tensor,
        labels: Tensor,
        batch_size: int,
        padding: Literal["same", "valid"],
        generator: torch.Generator,
    ) -> None:
        self.spec, self.choices, self.pixels, self.labels = params.spec, choices, pixels, labels
        self.batch_size, self.generator = batch_size, generator
        self.relu = params.spec.layers[0].activation == "relu"
        layers = zip(params.weights, params.biases, strict=True)
        self.flat = torch.cat([torch.cat([w.flatten(2), b[..., None]], 2).flatten(1) for w, b in layers], 1)
        self.grad, self.mean, self.square = (torch.zeros_like(self.flat) for _ in range(3))
        self.matrices, self.grads = self._matrices(self.flat), self._matrices(self.grad)
        counts = torch.bincount(choices.optimizer, minlength=len(OPTIMIZERS)).tolist()
        self.rows = [slice(sum(counts[:k]), sum(counts[: k + 1])) for k in range(len(OPTIMIZERS))]
        self.num_steps = 0
        self.convolutions, size = [], tuple(pixels.shape[2:])
        for layer in self.spec.layers[:-1]:
            self.convolutions.append(_Convolution(layer, len(params), size, padding, pixels, batch_size))
            size = self.convolutions[-1].positions
        self.pooled = pixels.new_ones(len(params), self.spec.layers[-1].in_dim + 1, batch_size)

    def _matrices(self, flat: Tensor) -> list[Tensor]:
        """Views [B, out, in + 1] of each layer's part of [B, parameters]."""
        shapes = [(layer.out_dim, math.prod(layer.weight_shape[1:]) + 1) for layer in self.spec.layers]
        parts = flat.split(list(map(math.prod, shapes)), 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward(self, index: Tensor, training: bool) -> Tensor:
        """The logits [B, classes, P] of images `index` [B, P]; with dropout while training."""
        x = self.pixels[index].permute(0, 2, 3, 4, 1)
        keep = 1 - self.choices.dropout.view(-1, 1, 1, 1, 1)
        for matrix, layer in zip(self.matrices, self.convolutions, strict=False):
            layer.inside.copy_(x)
            layer.gather()
            torch.bmm(matrix, layer.patches, out=layer.act.flatten(2))
            x = layer.act.relu_() if self.relu else layer.act.tanh_()
            if training:
                torch.rand(x.shape, generator=self.generator, out=layer.mask).lt_(keep).div_(keep)
                x = x * layer.mask
        torch.mean(x, (2, 3), out=self.pooled[:, :-1])
        return self.matrices[-1] @ self.pooled

    def backward(self, logits: Tensor, index: Tensor) -> None:
        """Gradients of each network's mean cross-entropy on images `index` [B, P], into `grads`."""
        delta = logits.softmax(1)
        delta -= nn.functional.one_hot(self.labels[index], delta.shape[1]).mT
        delta /= index.shape[1]
        torch.bmm(delta, self.pooled.mT, out=self.grads[-1])
        height, width = self.convolutions[-1].positions
        below = (self.matrices[-1][:, :, :-1].mT @ delta / (height * width))[:, :, None, None]
        for number in reversed(range(len(self.convolutions))):
            layer = self.convolutions[number]
            slope = layer.act.sign() if self.relu else 1 - layer.act.square()
            delta = slope.mul_(layer.mask).mul_(below).flatten(2)
            torch.bmm(delta, layer.patches.mT, out=self.grads[number])
            if number:
                torch.bmm(self.matrices[number][:, :, :-1].mT, delta, out=layer.patches_delta)
                layer.scatter()
                below = layer.inside_delta

    def update(self) -> None:
        """One step of each network's optimizer."""
        self.num_steps += 1
        for grad, matrix in zip(self.grads, self.matrices, strict=True):
            grad[:, :, :-1].addcmul_(2 * self.choices.l2.view(-1, 1, 1), matrix[:, :, :-1])
        lr = self.choices.lr[:, None]
        sgd, adam, rmsprop = self.rows
        self.flat[sgd].addcmul_(lr[sgd], self.grad[sgd], value=-1)
        first, second = (1 - beta**self.num_steps for beta in (0.9, 0.999))
        self.mean[adam].lerp_(self.grad[adam], 0.1)
        for rows, rho, correction, direction in ((adam, 0.999, second, self.mean), (rmsprop, 0.9, 1, self.grad)):
            grad, square = self.grad[rows], self.square[rows]
            square.mul_(rho).addcmul_(grad, grad, value=1 - rho)
            size = (square / correction).sqrt_().add_(EPSILON)
            factor = lr[rows] / (first if rows is adam else 1)
            self.flat[rows].addcdiv_(direction[rows] * factor, size, value=-1)

    def epoch(self, rows: Tensor) -> None:
        """Every network passes once, in its own order, through its images `rows` [B, n], in batches of P; what is left
        over, less than a batch, is dropped."""
        noise = torch.rand(rows.shape, generator=self.generator, device=rows.device)
        for index in rows.gather(1, noise.argsort(1)).split(self.batch_size, 1):
            if index.shape[1] == self.batch_size:
                self.backward(self.forward(index, training=True), index)
                self.update()

    def evaluate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The accuracy of each network on images `rows` [B, n], [B], and whether all its outputs are finite, [B]."""
        right, finite = torch.zeros(len(rows), device=rows.device), True
        for index in rows.split(self.batch_size, 1):
            size = index.shape[1]
            if size < self.batch_size:
                index = nn.functional.pad(index, (0, self.batch_size - size))
            logits = self.forward(index, training=False)
            right += (logits.argmax(1) == self.labels[index])[:, :size].sum(1)
            finite &= logits.isfinite().flatten(1).all(1)
        return right / rows.shape[1], finite

    def run(self, rows: Tensor, test: Tensor, checkpoints: Sequence[int]) -> Trained:
        """Trains on images `rows` [B, n]; the networks after each number of epochs in `checkpoints`."""
        kept, train_accuracy, test_accuracy, finite = [], [], [], []
        for epoch in range(checkpoints[-1] + 1):
            if epoch:
                self.epoch(rows)
            if epoch in checkpoints:
                kept.append(self.flat.clone())
                accuracy, good = self.evaluate(rows)
                train_accuracy.append(accuracy)
                accuracy, also = self.evaluate(test.expand(len(rows), -1))
                test_accuracy.append(accuracy)
                finite.append(good & also & self.flat.isfinite().all(1))
        matrices = self._matrices(torch.stack(kept, 1).flatten(0, 1))
        weights = tuple(
            matrix[:, :, :-1].unflatten(2, layer.weight_shape[1:]).contiguous()
            for matrix, layer in zip(matrices, self.spec.layers, strict=True)
        )
        params = NetParams(self.spec, weights, tuple(matrix[:, :, -1].contiguous() for matrix in matrices))
        return Trained(params, *(torch.stack(found, 1) for found in (train_accuracy, test_accuracy, finite)))


def networks_per_core(spec: NetSpec, size: tuple[int, int], batch_size: int) -> int:
    """How many networks one CPU core trains at a time, so that their buffers stay in its cache."""
    numbers, positions = 0, size[0] * size[1] * batch_size
    for layer in spec.layers[:-1]:
        numbers += 2 * positions * layer.in_dim  # the input and its gradient
        positions //= STRIDE**2
        numbers += positions * (2 * math.prod(layer.weight_shape[1:]) + 4 * layer.out_dim)
    return max(1, CACHE_BYTES // (4 * numbers))


def train_cnns(
    spec: NetSpec,
    activation: Tensor,
    choices: Choices,
    images: LabelledImages,
    checkpoints: Sequence[int],
    batch_size: int,
    padding: Literal["same", "valid"],
    seeds: tuple[int, int],
    device: str = "cpu",
    on_done: OnDone = lambda num_networks: None,
) -> Trained:
    """Trains B CNNs from random weights: on a CPU each core by itself and few at a time.

    Networks of one activation that see equally many images take their steps together. The result depends on neither
    the number of cores nor their timing.

    Args:
        spec: their architecture; its activation is `hetero` where networks differ.
        activation: [B] indices into `ACTIVATIONS`.
        choices: how each is trained.
        images: on the CPU.
        checkpoints: ascending numbers of epochs.
        batch_size: images per step; all images of a network where it has fewer.
        padding: as in `nets.cnn.evaluate_cnn`.
        seeds: numbers that all that is random depends on.
        device: `cpu` or `cuda`.
        on_done: told how many more networks are trained.
    """
    order = choices.optimizer.argsort(stable=True)
    for key in (choices.train_fraction, activation):
        order = order[key[order].argsort(stable=True)]
    kinds = torch.stack([activation[order].to(torch.float64), choices.train_fraction[order].to(torch.float64)], 1)
    sizes = kinds.unique_consecutive(dim=0, return_counts=True)[1].tolist()
    most = len(order) if device == "cuda" else networks_per_core(spec, images.pixels.shape[2:], batch_size)
    chunks = [chunk for group in order.split(sizes) for chunk in group.split(most)]
    pixels, labels, train, test = (value.to(device) for value in vars(images).values())

    def fit(number: int) -> Trained:
        rows, generator = chunks[number], seeded(*seeds, number)
        own = spec.with_activation(ACTIVATIONS[activation[rows[0]]])
        std = choices.init_std[rows]
        params = NetParams(
            own,
            tuple(
                torch.einsum("b,b...->b...", std, torch.randn(len(rows), *layer.weight_shape, generator=generator))
                for layer in own.layers
            ),
            tuple(torch.zeros(len(rows), layer.out_dim) for layer in own.layers),
        ).to(device)
        seen = round(choices.train_fraction[rows[0]].item() * len(train))
        draws = torch.rand(len(rows), len(train), generator=generator).argsort(1)[:, :seen].to(device)
        if device == "cuda":
            generator = torch.Generator(device).manual_seed(generator.initial_seed())
        mine = Choices(**{name: value.to(device) for name, value in vars(choices[rows]).items()})
        run = CnnFit(params, mine, pixels, labels, min(batch_size, seen), padding, generator)
        return run.run(train[draws], test, checkpoints)

    threads, parts = torch.get_num_threads(), []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for number, part in enumerate(pool.map(fit, range(len(chunks)))):
                parts.append(part)
                on_done(len(chunks[number]))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    back = order.argsort()

    def joined(tensors: Iterable[Tensor]) -> Tensor:
        """[B, ...] in the order of the arguments."""
        return torch.cat([tensor.cpu() for tensor in tensors])[back]

    per_network = [part.params.map(lambda t: t.unflatten(0, (-1, len(checkpoints)))) for part in parts]
    stored = NetParams(
        spec,
        tuple(joined(tensors).flatten(0, 1) for tensors in zip(*(nets.weights for nets in per_network), strict=True)),
        tuple(joined(tensors).flatten(0, 1) for tensors in zip(*(nets.biases for nets in per_network), strict=True)),
        activation.repeat_interleave(len(checkpoints)) if spec.layers[0].activation == MIXED else None,
    )
    columns = (joined(getattr(part, name) for part in parts) for name in ("train_accuracy", "test_accuracy", "finite"))
    return Trained(stored, *columns)
