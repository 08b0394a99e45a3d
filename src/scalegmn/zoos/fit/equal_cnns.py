"""Training of CNNs of one architecture: batched matrix products with written-out gradients."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.networks.cnn import same_padding
from scalegmn.networks.evaluate import activate
from scalegmn.zoos.fit.cnn_descent import Fit, matrices

STRIDE = 2
"""Of every convolution of networks of one architecture, as published."""

CACHE_BYTES = 12 << 20
"""Buffers of the networks of one architecture that one CPU core works on at a time; larger ones leave its cache."""


class _Convolution:
    """The buffers of one convolution of B networks on P images.

    Attributes:
        inside: [B, C, height, width, P], its input, a view of what has the padding's zeros around.
        patches: [B, C kh kw + 1, positions * P], the patches of the input, and a row of ones.
        act: [B, out, *positions, P], its output.
        slope: as act, sigma'(z), of activations whose slope is no function of their value.
        mask: as act: 0, or 1 / (1 - p); 1 without dropout.
        inside_delta: the loss's gradient by `inside`.
    """

    def __init__(
        self, layer: LayerSpec, num: int, size: tuple[int, int], padding: Literal["same", "valid"], like: Tensor, p: int
    ) -> None:
        kernel = layer.kernel or (1, 1)
        before, after = zip(
            *(same_padding(n, k, STRIDE) if padding == "same" else (0, 0) for n, k in zip(size, kernel, strict=True)),
            strict=True,
        )
        rows, columns = (slice(start, start + n) for start, n in zip(before, size, strict=True))
        height, width = (sum(parts) for parts in zip(before, size, after, strict=True))
        padded, delta = (like.new_zeros(num, layer.in_dim, height, width, p) for _ in range(2))
        self.inside, self.inside_delta = padded[:, :, rows, columns], delta[:, :, rows, columns]
        kh, kw = kernel
        self.positions = h, w = (height - kh) // STRIDE + 1, (width - kw) // STRIDE + 1
        self.patches = like.new_ones(num, layer.in_dim * kh * kw + 1, h * w * p)
        self.patches_delta = torch.empty_like(self.patches[:, :-1])
        self.act = like.new_empty(num, layer.out_dim, h, w, p)
        self.slope: Tensor | None = None
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


class EqualFit(Fit):
    """Networks of one architecture and one activation, with convolutions of stride 2.

    Convolutions are matrix products: with M = [W | b] and X_l the patches of x_{l-1}, a row of ones included,
    z_l = M_l X_l, a_l = sigma(z_l), x_l = a_l * mask; then the mean over positions; logits = M_L x_{L-1}.
    Backwards from d = (softmax(logits) - one hot) / P: dM_l = d_l X_l^T, dX_l = W_l^T d_l, and what is in several
    patches has the sum of theirs. The slopes of relu and tanh follow from their values; others are differentiated.

    Networks are the first axis, images the last. Buffers are allocated once.

    Args:
        arguments: as of `Fit`; one batch of networks.
        padding: as in `networks.cnn.evaluate_cnn`.
    """

    def __init__(self, *arguments: Any, padding: Literal["same", "valid"]) -> None:
        super().__init__(*arguments)
        self.spec = self.specs[0]
        self.activation = self.spec.layers[0].activation
        num = len(self.specs)
        self.matrices, self.grads = (matrices(self.spec, flat.view(num, -1)) for flat in (self.flat, self.grad))
        self.convolutions: list[_Convolution] = []
        size = (self.pixels.shape[2], self.pixels.shape[3])
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
            x = self._activate(layer)
            if training:
                torch.rand(x.shape, generator=self.generator, out=layer.mask).lt_(keep).div_(keep)
                x = x * layer.mask
        torch.mean(x, (2, 3), out=self.pooled[:, :-1])
        return self.matrices[-1] @ self.pooled

    def _activate(self, layer: _Convolution) -> Tensor:
        """sigma(z) in the place of z; where its slope does not follow from it, the slope too."""
        if self.activation == "relu":
            return layer.act.relu_()
        if self.activation == "tanh":
            return layer.act.tanh_()
        with torch.enable_grad():
            z = layer.act.detach().requires_grad_()
            values = activate(z, self.activation, self.spec.layers[0].w0)
            (layer.slope,) = torch.autograd.grad(values.sum(), z)
        return layer.act.copy_(values.detach())

    def _slope(self, layer: _Convolution) -> Tensor:
        """sigma'(z), a tensor that may be overwritten."""
        if self.activation == "relu":
            return layer.act.sign()
        if self.activation == "tanh":
            return 1 - layer.act.square()
        assert layer.slope is not None
        return layer.slope.clone()

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
            delta = self._slope(layer).mul_(layer.mask).mul_(below).flatten(2)
            torch.bmm(delta, layer.patches.mT, out=self.grads[number])
            if number:
                torch.bmm(self.matrices[number][:, :, :-1].mT, delta, out=layer.patches_delta)
                layer.scatter()
                below = layer.inside_delta


def networks_per_core(spec: NetSpec, size: tuple[int, int], batch_size: int) -> int:
    """How many networks one CPU core trains at a time, so that their buffers stay in its cache."""
    numbers, positions = 0, size[0] * size[1] * batch_size
    for layer in spec.layers[:-1]:
        numbers += 2 * positions * layer.in_dim  # the input and its gradient
        positions //= STRIDE**2
        numbers += positions * (2 * math.prod(layer.weight_shape[1:]) + 4 * layer.out_dim)
    return max(1, CACHE_BYTES // (4 * numbers))
