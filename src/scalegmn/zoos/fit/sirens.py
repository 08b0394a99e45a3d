"""Fit many networks at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scalegmn.engine.native import has_library_for
from scalegmn.engine.siren_fit import padded, residuals_and_gradients
from scalegmn.networks import NetParams, NetSpec

CACHE_BYTES = 6 << 20
"""Buffers of the networks that one CPU core works on at a time; larger ones leave its cache."""

BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Descent:
    """How networks are fitted.

    Attributes:
        steps: the largest number of steps of a network.
        lr: learning rate at the start; falls to zero as a cosine over `steps`.
        optimizer: adamw (betas 0.9 and 0.999, epsilon 1e-8) or sgd (no momentum).
        weight_decay: decoupled, times the learning rate.
        target_psnr: in dB; a network stops at the first step at which its fit reaches it. None: all steps.
        base_width: weights that read n hidden neurons have the learning rate lr base_width / n, those of muP for Adam
            (Yang et al., 2022, https://arxiv.org/abs/2203.03466). None: lr.
    """

    steps: int
    lr: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    target_psnr: float | None = None
    base_width: int | None = None


@dataclass(frozen=True)
class Fitted:
    """B fitted networks.

    Attributes:
        params: their parameters.
        mse: [B] mean squared error over points and channels.
        steps: [B] steps that each took.
    """

    params: NetParams
    mse: Tensor
    steps: Tensor


class SirenFit:
    """Gradient descent on the mean squared error of B SIRENs, one image each; nothing is allocated per step.

    With x_0 the points, each x carrying a row of ones, and M = [W | b]:
    x_l = sin(w0 M_l x_{l-1}), residual r = M_L x_{L-1} - target, d_L = r, and backwards with s = 2 / numel(r), then w0:
    dM_l = s d_l x_{l-1}^T, d_{l-1} = (s W_l^T d_l) cos(w0 M_{l-1} x_{l-2}).

    Networks are the first axis, points the last. Parameters, moments and gradients are flat buffers, one segment per
    layer, so that a step of the optimizer is a handful of calls.

    Args:
        params: B initial networks whose hidden layers are sines; not modified.
        points: [P, n_0] positions, the same for all networks.
        targets: [B, P, n_L].
    """

    def __init__(self, params: NetParams, points: Tensor, targets: Tensor) -> None:
        self.spec = params.spec
        self.rows = torch.arange(len(params), device=points.device)  # which of the networks are still being fitted
        self.targets = targets.mT.contiguous()
        layers = zip(params.weights, params.biases, strict=True)
        self.flat = torch.cat([torch.cat([weight, bias[..., None]], -1).flatten() for weight, bias in layers])
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self._allocate(points)
        self._bind()

    def _allocate(self, points: Tensor) -> None:
        """Buffers for what `evaluate` computes."""
        shape = len(self.rows), len(points)
        self.inputs = [points.new_ones(shape[0], layer.in_dim + 1, shape[1]) for layer in self.spec.layers]
        self.inputs[0][:, :-1] = points.mT
        self.phases = [points.new_empty(shape[0], layer.out_dim, shape[1]) for layer in self.spec.layers[:-1]]
        self.deltas = [points.new_empty(shape[0], layer.out_dim, shape[1]) for layer in self.spec.layers]

    def _bind(self) -> None:
        """Views of the flat buffers."""
        self.grad, self.scratch = torch.empty_like(self.flat), torch.empty_like(self.flat)
        self.matrices, self.grads = self._matrices(self.flat), self._matrices(self.grad)

    def _matrices(self, flat: Tensor) -> list[Tensor]:
        """[B, out, in + 1] of each layer."""
        shapes = [(len(self.rows), layer.out_dim, layer.in_dim + 1) for layer in self.spec.layers]
        return [part.view(shape) for part, shape in zip(flat.split(list(map(math.prod, shapes))), shapes, strict=True)]

    def evaluate(self) -> Tensor:
        """The residuals, output minus target, [B, n_L, P]; sets `grads`, the gradients of each network's mean squared
        residual, [B, out, in + 1] per layer."""
        residual = self._forward()
        result = residual.clone()
        self._backward()
        return result

    def _forward(self) -> Tensor:
        """The residuals; keeps what `_backward` needs."""
        for index, phase in enumerate(self.phases):
            w0 = self.spec.layers[index].w0
            torch.baddbmm(phase, self.matrices[index], self.inputs[index], beta=0, alpha=w0, out=phase)
            torch.sin(phase, out=self.inputs[index + 1][:, :-1])
        return torch.baddbmm(self.targets, self.matrices[-1], self.inputs[-1], beta=-1, out=self.deltas[-1])

    def _backward(self) -> None:
        """The gradients; overwrites what `_forward` has kept."""
        scale = 2 / self.targets[0].numel()
        for index in reversed(range(self.spec.num_layers)):
            grad, delta = self.grads[index], self.deltas[index]
            torch.baddbmm(grad, delta, self.inputs[index].mT, beta=0, alpha=scale, out=grad)
            if index:
                below, weight = self.deltas[index - 1], self.matrices[index][:, :, :-1]
                torch.baddbmm(below, weight.mT, delta, beta=0, alpha=scale, out=below)
                below.mul_(self.phases[index - 1].cos_())
                scale = self.spec.layers[index - 1].w0

    def update(self, step: int, descent: Descent) -> None:
        """A step of the optimizer, number `step` from 0."""
        lr = descent.lr * (1 + math.cos(math.pi * step / descent.steps)) / 2
        if descent.weight_decay:
            self.flat.mul_(1 - lr * descent.weight_decay)
        if descent.optimizer == "sgd":
            self.flat.add_(self.grad, alpha=-lr)
            return
        first, second = BETAS
        self.mean.lerp_(self.grad, 1 - first)
        self.square.mul_(second).addcmul_(self.grad, self.grad, value=1 - second)
        correction = math.sqrt(1 - second ** (step + 1))
        torch.sqrt(self.square, out=self.scratch).add_(EPSILON * correction)
        if descent.base_width is not None:
            for divisors in self._matrices(self.scratch)[1:]:
                divisors[:, :, :-1].mul_((divisors.shape[2] - 1) / descent.base_width)
        self.flat.addcdiv_(self.mean, self.scratch, value=-lr * correction / (1 - first ** (step + 1)))

    def run(self, descent: Descent) -> Fitted:
        """Fits all networks; a finished network takes no part in later steps."""
        matrices = [torch.empty_like(matrix) for matrix in self.matrices]
        mse, steps = self.flat.new_empty(len(self.rows)), torch.empty_like(self.rows)
        limit = -1.0 if descent.target_psnr is None else 10 ** (-descent.target_psnr / 10)
        step = 0
        while len(self.rows):
            residual = self.evaluate()
            if descent.target_psnr is not None or step == descent.steps:
                errors = residual.square().mean((1, 2))
                finished = errors <= limit if step < descent.steps else torch.ones_like(errors, dtype=torch.bool)
                if finished.any():
                    rows = self.rows[finished]
                    mse[rows], steps[rows] = errors[finished], step
                    for result, matrix in zip(matrices, self.matrices, strict=True):
                        result[rows] = matrix[finished]
                    self._keep(~finished)
                    continue
            self.update(step, descent)
            step += 1
        weights = tuple(matrix[:, :, :-1].contiguous() for matrix in matrices)
        biases = tuple(matrix[:, :, -1].contiguous() for matrix in matrices)
        return Fitted(NetParams(self.spec, weights, biases), mse, steps)

    def _keep(self, kept: Tensor) -> None:
        """Goes on with the networks marked in `kept`, [B] bool."""
        flats = [self._matrices(flat) for flat in (self.flat, self.mean, self.square)]
        self.flat, self.mean, self.square = (torch.cat([part[kept].flatten() for part in parts]) for parts in flats)
        self.rows, self.targets = self.rows[kept], self.targets[kept]
        self._shorten()
        self._bind()

    def _shorten(self) -> None:
        """Buffers for as many networks as are left."""
        for buffers in (self.inputs, self.phases, self.deltas):
            buffers[:] = [buffer[: len(self.rows)] for buffer in buffers]


class CompiledSirenFit(SirenFit):
    """The same in single precision on a CPU, by compiled code (`scalegmn.engine.siren_fit`)."""

    def _allocate(self, points: Tensor) -> None:
        self.points, self.residuals = padded(points), torch.empty_like(self.targets)

    def evaluate(self) -> Tensor:
        """As in `SirenFit`."""
        frequencies = [layer.w0 for layer in self.spec.layers[:-1]]
        residuals_and_gradients(self.points, self.targets, frequencies, self.matrices, self.residuals, self.grads)
        return self.residuals

    def _shorten(self) -> None:
        self.residuals = self.residuals[: len(self.rows)]


def networks_per_core(spec: NetSpec, num_points: int) -> int:
    """How many networks one CPU core fits at a time, so that their buffers stay in its cache."""
    numbers = num_points * sum(layer.in_dim + 3 * layer.out_dim for layer in spec.layers)
    return max(1, CACHE_BYTES // (4 * numbers))


def fit_sirens(
    params: NetParams,
    points: Tensor,
    targets: Tensor,
    descent: Descent,
    device: str = "cpu",
    on_done: Callable[[int], object] = lambda num_networks: None,
) -> Fitted:
    """Fits B SIRENs to B images: on a CPU each core by itself and few at a time, on a GPU all together.

    The result depends on neither the number of cores nor their timing.

    Args:
        params, points, targets: see `SirenFit`; on the CPU.
        descent: how they are fitted.
        device: `cpu`, or a GPU such as `cuda:0`.
        on_done: called with the number of networks that have been fitted since the call before.
    """
    size = len(params) if device.startswith("cuda") else networks_per_core(params.spec, len(points))
    kind = CompiledSirenFit if has_library_for(points.to(device)) else SirenFit

    def fit(start: int) -> Fitted:
        rows = slice(start, start + size)
        return kind(params[rows].to(device), points.to(device), targets[rows].to(device)).run(descent)

    threads = torch.get_num_threads()
    parts = []
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for part in pool.map(fit, range(0, len(params), size)):
                parts.append(Fitted(part.params.to("cpu"), part.mse.cpu(), part.steps.cpu()))
                on_done(len(part.mse))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    return Fitted(
        NetParams.cat([part.params for part in parts]),
        torch.cat([part.mse for part in parts]),
        torch.cat([part.steps for part in parts]),
    )
