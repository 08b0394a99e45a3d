"""Train many small CNNs at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy

from scalegmn.networks import ACTIVATIONS, LayerSpec, NetParams, NetSpec
from scalegmn.networks.cnn import same_padding
from scalegmn.networks.evaluate import activate, with_residual
from scalegmn.zoos.fit.common import OnDone, seeded

STRIDE = 2
"""Of every convolution of networks of one architecture, as published."""

CACHE_BYTES = 12 << 20
"""Buffers of the networks of one architecture that one CPU core works on at a time; larger ones leave its cache."""

MIXED_AT_ONCE = 16
"""Networks of mixed architecture that one CPU core works on at a time."""

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
        own = torch.tensor(self.sizes, device=pixels.device)
        is_weight = torch.cat([_is_weight(params).flatten() for params in nets])
        self.lr = choices.lr.repeat_interleave(own)
        self.decay = 2 * choices.l2.repeat_interleave(own) * is_weight
        ends = [0, *(int(own[choices.optimizer <= k].sum()) for k in range(len(OPTIMIZERS)))]
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
        """Every network passes once, in its own order, through its images `rows` [B, n], in batches of P; what is left
        over, less than a batch, is dropped."""
        noise = torch.rand(rows.shape, generator=self.generator, device=rows.device)
        for index in rows.gather(1, noise.argsort(1)).split(self.batch_size, 1):
            if index.shape[1] == self.batch_size:
                self.differentiate(index)
                self.update()

    @torch.no_grad()
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
                finite.append(good & also & torch.stack([own.isfinite().all() for own in kept[-1].split(self.sizes)]))
        checkpoints_of = torch.stack(kept).split(self.sizes, 1)
        nets = tuple(_params(spec, own) for spec, own in zip(self.specs, checkpoints_of, strict=True))
        return TrainingResult(nets, *(torch.stack(found, 1) for found in (train_accuracy, test_accuracy, finite)))


def _matrices(spec: NetSpec, flat: Tensor) -> list[Tensor]:
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
    matrices = _matrices(spec, flat)
    weights = tuple(
        matrix[..., :-1].unflatten(2, layer.weight_shape[1:]).contiguous()
        for matrix, layer in zip(matrices, spec.layers, strict=True)
    )
    return NetParams(spec, weights, tuple(matrix[..., -1].contiguous() for matrix in matrices))


class AlikeFit(Fit):
    """Networks of one architecture, all relu or all tanh, with convolutions of stride 2.

    Convolutions are matrix products: with M = [W | b] and X_l the patches of x_{l-1}, a row of ones included,
    z_l = M_l X_l, a_l = sigma(z_l), x_l = a_l * mask; then the mean over positions; logits = M_L x_{L-1}.
    Backwards from d = (softmax(logits) - one hot) / P: dM_l = d_l X_l^T, dX_l = W_l^T d_l, and what is in several
    patches has the sum of theirs.

    Networks are the first axis, images the last. Buffers are allocated once.

    Args:
        arguments: as of `Fit`; one batch of networks.
        padding: as in `nets.cnn.evaluate_cnn`.
    """

    def __init__(self, *arguments: Any, padding: Literal["same", "valid"]) -> None:
        super().__init__(*arguments)
        self.spec = self.specs[0]
        self.relu = self.spec.layers[0].activation == "relu"
        num = len(self.specs)
        self.matrices, self.grads = (_matrices(self.spec, flat.view(num, -1)) for flat in (self.flat, self.grad))
        self.convolutions, size = [], tuple(self.pixels.shape[2:])
        for layer in self.spec.layers[:-1]:
            self.convolutions.append(_Convolution(layer, num, size, padding, self.pixels, self.batch_size))
            size = self.convolutions[-1].positions
        self.pooled = self.pixels.new_ones(num, self.spec.layers[-1].in_dim + 1, self.batch_size)

    def forward(self, index: Tensor, training: bool) -> Tensor:
        """As in `Fit`."""
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

    def differentiate(self, index: Tensor) -> None:
        """As in `Fit`."""
        self.backward(self.forward(index, training=True), index)

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


class _Kind(NamedTuple):
    """Networks that take a layer in the same way: layers are equal, and so are the widths of their residual sources."""

    layer: LayerSpec
    members: list[int]
    keep: Tensor
    """[members, 1, 1, 1], 1 - p of their dropout."""


class MixedFit(Fit):
    """Networks of any architectures with convolutions of stride 1 and odd kernels, padded to keep the size of images.

    Layer by layer: convolutions of one size are one call, each network a group of its channels; what follows is one
    call for all that have the same activation and residual connection. Per network there are only views: even alone,
    one convolution outweighs them a hundred times.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.flat.requires_grad_()
        self.layers = [self._calls(index) for index in range(max(spec.num_layers for spec in self.specs))]

    def _calls(self, index: int) -> list[list[_Kind]]:
        """Which networks take layer `index` together, by size, then by kind."""
        calls: dict[tuple[int, ...], dict[tuple[LayerSpec, int], list[int]]] = {}
        for number, spec in enumerate(self.specs):
            if index < spec.num_layers:
                layer = spec.layers[index]
                width = 0 if layer.residual is None else spec.layers[layer.residual].out_dim
                calls.setdefault(layer.weight_shape, {}).setdefault((layer, width), []).append(number)
        keep = 1 - self.choices.dropout.view(-1, 1, 1, 1)
        return [
            [_Kind(layer, members, keep[members]) for (layer, _), members in kinds.items()] for kinds in calls.values()
        ]

    def forward(self, index: Tensor, training: bool) -> Tensor:
        """As in `Fit`."""
        matrices = [_matrices(spec, own) for spec, own in zip(self.specs, self.flat.split(self.sizes), strict=True)]
        x = dict(enumerate(self.pixels[index]))  # of each network [P, channels, height, width]
        found = []  # x after each layer
        for number, calls in enumerate(self.layers):
            found.append({})
            for kinds in calls:
                layer, together = kinds[0].layer, [k for kind in kinds for k in kind.members]
                inside = torch.cat([x[k] for k in together], 1).contiguous(memory_format=torch.channels_last)
                if layer.kernel is None:
                    inside = inside.mean((2, 3), keepdim=True)
                matrix = torch.cat([matrices[k][number] for k in together])
                weight = matrix[:, :-1].unflatten(1, (layer.in_dim, *(layer.kernel or (1, 1))))
                z = conv2d(inside, weight, matrix[:, -1], padding="same", groups=len(together))
                z = z.unflatten(1, (len(together), layer.out_dim))
                sizes = [len(kind.members) for kind in kinds]
                for (own, members, keep), out in zip(kinds, z.split(sizes, 1), strict=True):
                    if own.residual is not None:
                        out = with_residual(out, torch.stack([found[own.residual][k] for k in members], 1))
                    out = activate(out, own.activation)
                    if training and own.kernel is not None:
                        noise = torch.empty_like(out).uniform_(generator=self.generator)
                        out = out * noise.lt_(keep).div_(keep)
                    found[-1].update(zip(members, out.unbind(1), strict=True))
            x = found[-1]
        last = [found[spec.num_layers - 1][number] for number, spec in enumerate(self.specs)]
        return torch.stack(last)[..., 0, 0].mT

    def differentiate(self, index: Tensor) -> None:
        """As in `Fit`."""
        loss = cross_entropy(self.forward(index, training=True), self.labels[index], reduction="sum") / index.shape[1]
        (self.grad,) = torch.autograd.grad(loss, self.flat)


def networks_per_core(spec: NetSpec, size: tuple[int, int], batch_size: int) -> int:
    """How many networks one CPU core trains at a time, so that their buffers stay in its cache."""
    numbers, positions = 0, size[0] * size[1] * batch_size
    for layer in spec.layers[:-1]:
        numbers += 2 * positions * layer.in_dim  # the input and its gradient
        positions //= STRIDE**2
        numbers += positions * (2 * math.prod(layer.weight_shape[1:]) + 4 * layer.out_dim)
    return max(1, CACHE_BYTES // (4 * numbers))


def train_cnns(
    specs: Sequence[NetSpec],
    choices: Choices,
    images: LabelledImages,
    checkpoints: Sequence[int],
    batch_size: int,
    padding: Literal["same", "valid"] | None,
    seeds: tuple[int, int],
    device: str = "cpu",
    on_done: OnDone = lambda num_networks: None,
) -> TrainingResult:
    """Trains B CNNs from random weights: on a CPU each core by itself and few at a time.

    Networks that see equally many images (and have one activation, where all have one architecture) take their steps
    together. The result depends on neither the number of cores nor their timing.

    Args:
        specs: the architecture of each; convolutions, then one linear layer.
        choices: how each is trained.
        images: on the CPU.
        checkpoints: ascending numbers of epochs.
        batch_size: images per step; all images of a network where it has fewer.
        padding: all have one architecture, relu or tanh, and stride 2; padding as in `nets.cnn.evaluate_cnn`. None: any
            architectures with odd kernels, stride 1 and padding `same`.
        seeds: numbers that all that is random depends on.
        device: `cpu` or `cuda`.
        on_done: told how many more networks are trained.
    """
    kinds, most = torch.zeros(len(specs)), MIXED_AT_ONCE
    if padding is not None:
        kinds = torch.tensor([ACTIVATIONS.index(spec.layers[0].activation) for spec in specs])
        most = networks_per_core(specs[0], images.pixels.shape[2:], batch_size)
    order = choices.optimizer.argsort(stable=True)
    for key in (choices.train_fraction, kinds):
        order = order[key[order].argsort(stable=True)]
    alike = torch.stack([kinds[order].to(torch.float64), choices.train_fraction[order].to(torch.float64)], 1)
    sizes = alike.unique_consecutive(dim=0, return_counts=True)[1].tolist()
    chunks = [chunk for group in order.split(sizes) for chunk in group.split(len(order) if device == "cuda" else most)]
    pixels, labels, train, test = (value.to(device) for value in vars(images).values())

    def fit(number: int) -> TrainingResult:
        rows, generator = chunks[number], seeded(*seeds, number)
        own = [specs[row] for row in rows]
        std = choices.init_std[rows]
        if padding is None:
            nets = [_initial(spec, std[k : k + 1], generator) for k, spec in enumerate(own)]
        else:
            nets = [_initial(own[0], std, generator)]
        seen = round(choices.train_fraction[rows[0]].item() * len(train))
        draws = torch.rand(len(rows), len(train), generator=generator).argsort(1)[:, :seen].to(device)
        if device == "cuda":
            generator = torch.Generator(device).manual_seed(generator.initial_seed())
        mine = Choices(**{name: value.to(device) for name, value in vars(choices[rows]).items()})
        arguments = ([net.to(device) for net in nets], mine, pixels, labels, min(batch_size, seen), generator)
        run = MixedFit(*arguments) if padding is None else AlikeFit(*arguments, padding=padding)
        return run.run(train[draws], test, checkpoints)

    threads, parts = torch.get_num_threads(), []
    numbers = range(len(chunks))[::-1]  # those that see most images first
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for number, part in zip(numbers, pool.map(fit, numbers), strict=True):
                parts.insert(0, part)
                on_done(len(chunks[number]))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    back = order.argsort()

    def joined(name: str) -> Tensor:
        """[B, E] in the order of the arguments."""
        return torch.cat([getattr(part, name).cpu() for part in parts])[back]

    nets = [net.to("cpu") for part in parts for net in part.nets]
    columns = (joined(name) for name in ("train_accuracy", "test_accuracy", "finite"))
    return TrainingResult(tuple(nets[place] for place in back), *columns)


def _initial(spec: NetSpec, std: Tensor, generator: torch.Generator) -> NetParams:
    """Networks of one architecture with normal weights of standard deviation `std`, [B], and biases 0."""
    weights = tuple(
        torch.einsum("b,b...->b...", std, torch.randn(len(std), *layer.weight_shape, generator=generator))
        for layer in spec.layers
    )
    return NetParams(spec, weights, tuple(torch.zeros(len(std), layer.out_dim) for layer in spec.layers))
