"""Fit many networks at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scalegmn.spec import NetParams


class SirenFit:
    """AdamW on the squared error of B SIRENs, one image each; gradients written out, nothing allocated per step.

    All parameters are views of one flat buffer, one contiguous segment per layer and kind, so that AdamW is one fused
    call; all products are batched over networks with the points as rows, [B, P, in] x [B, in, out].

    Args:
        params: B initial networks whose hidden layers are sines; not modified.
        points: [P, n_0] positions, the same for all networks.
        targets: [B, P, n_L].
    """

    def __init__(self, params: NetParams, points: Tensor, targets: Tensor) -> None:
        self.spec, self.targets = params.spec, targets
        segments = [tensor.flatten() for pair in zip(params.weights, params.biases, strict=True) for tensor in pair]
        self.flat = torch.cat(segments)
        self.flat.grad = torch.zeros_like(self.flat)
        sizes = [len(segment) for segment in segments]
        self.weights, self.biases = self._views(self.flat, sizes)
        self.weight_grads, self.bias_grads = self._views(self.flat.grad, sizes)
        shape = (len(params), len(points))
        layout = params.spec.layout
        self.hidden = [points.expand(len(params), -1, -1).contiguous()]
        self.hidden += [points.new_empty(*shape, n) for n in layout[1:-1]]
        self.phases = [points.new_empty(*shape, n) for n in layout[1:]]
        self.deltas = [points.new_empty(*shape, n) for n in layout[1:]]

    def _views(self, flat: Tensor, sizes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights [B, out, in] and biases [B, 1, out] as views of a flat buffer."""
        segments = flat.split(sizes)
        weights, biases = [], []
        for layer, weight, bias in zip(self.spec.layers, segments[::2], segments[1::2], strict=True):
            weights.append(weight.view(-1, *layer.weight_shape))
            biases.append(bias.view(-1, 1, layer.out_dim))
        return weights, biases

    def forward(self) -> Tensor:
        """The residuals, output minus target, [B, P, n_L]; keeps what `backward` needs."""
        *inner, last = range(self.spec.num_layers)
        for index in inner:
            w0, phase = self.spec.layers[index].w0, self.phases[index]
            torch.baddbmm(self.biases[index], self.hidden[index], self.weights[index].mT, beta=w0, alpha=w0, out=phase)
            torch.sin(phase, out=self.hidden[index + 1])
        torch.baddbmm(self.biases[last], self.hidden[last], self.weights[last].mT, out=self.phases[last])
        return torch.sub(self.phases[last], self.targets, out=self.deltas[last])

    def backward(self) -> None:
        """Gradients, into `flat.grad`, of the sum over networks of the mean squared residual."""
        delta = self.deltas[-1]
        delta.mul_(2 / delta[0].numel())
        for index in reversed(range(self.spec.num_layers)):
            delta = self.deltas[index]
            torch.bmm(delta.mT, self.hidden[index], out=self.weight_grads[index])
            torch.sum(delta, 1, keepdim=True, out=self.bias_grads[index])
            if index:
                below = self.deltas[index - 1]
                torch.bmm(delta, self.weights[index], out=below)
                slope = self.phases[index - 1].cos_().mul_(self.spec.layers[index - 1].w0)
                below.mul_(slope)

    def run(
        self, steps: int, lr: float, weight_decay: float, on_step: Callable[[], None] = lambda: None
    ) -> tuple[NetParams, Tensor]:
        """`steps` AdamW steps under a cosine schedule that ends at zero.

        Returns:
            The fitted networks, and the mean squared error of each, [B].
        """
        optimizer = torch.optim.AdamW([self.flat], lr=lr, weight_decay=weight_decay, fused=True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            self.forward()
            self.backward()
            optimizer.step()
            on_step()
        mse = self.forward().square().flatten(1).mean(1)
        weights = tuple(weight.clone() for weight in self.weights)
        return NetParams(self.spec, weights, tuple(bias[:, 0].clone() for bias in self.biases)), mse
