"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from scalegmn.engine.edges import GatheredRows, ScaledRows, linear

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


class Dropout(nn.Module):
    """Zeroes each element with probability p and divides the others by 1 - p, while training.

    On a CPU, torch draws a number per element, one after the other, which takes longer than the matrix products around
    it. Here a random byte decides, so p is rounded to a multiple of 1/256, and the divisor with it.

    Args:
        p: the probability.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return nn.functional.dropout(x, self.p)
        dropped = min(round(256 * self.p), 255)  # of the 256 values of a byte
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = torch.ge(words.view(torch.int8)[: x.numel()].view(x.shape), dropped - 128, out=torch.empty_like(x))
        return x * kept.mul_(256 / (256 - dropped))


class MLP(nn.Module):
    """Linear, [LayerNorm], activation, [dropout], ..., Linear; nothing after the last Linear.

    The input may come in parts, whose concatenation is the input. Each part goes through its own columns of the first
    Linear, and the results are added, W [a, b] = W_a a + W_b b, so extras only need shapes that broadcast to x's.

    Args:
        in_dim: width of the concatenated input.
        hidden_dims: widths of the hidden layers, at least one.
        out_dim: width of the output.
        activation: a key of `ACTIVATIONS`.
        layer_norm: a LayerNorm (epsilon 1e-5) before every activation.
        dropout: probability after every activation.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dims: Sequence[int],
        out_dim: int,
        activation: str = "silu",
        layer_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dims = [in_dim, *hidden_dims, out_dim]
        self.linears = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(dims))
        self.norms = nn.ModuleList(nn.LayerNorm(d) if layer_norm else nn.Identity() for d in hidden_dims)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor | ScaledRows, *extras: Tensor | GatheredRows) -> Tensor:
        """x [..., d_0] and extras [..., d_k], the d_k summing to `in_dim` -> [..., out_dim]."""
        weight, bias = self.first(*extras)
        return self.rest(linear(x, weight, bias))

    def first(self, *extras: Tensor | GatheredRows) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first Linear for the leading part of its input, the others being given."""
        first = self.linears[0]
        if not extras:
            return first.weight, first.bias
        widths = [extra.shape[-1] for extra in extras]
        weight, *columns = first.weight.split([first.in_features - sum(widths), *widths], dim=1)
        bias = first.bias
        for extra, column in zip(extras, columns, strict=True):
            bias = linear(extra, column, bias)
        return weight, bias

    def rest(self, z: Tensor) -> Tensor:
        """From the first Linear's output to the output."""
        return self.linears[-1](self.hidden(z))

    def hidden(self, z: Tensor) -> Tensor:
        """From the first Linear's output to the last Linear's input."""
        for index, norm in enumerate(self.norms):
            if index:
                z = self.linears[index](z)
            z = self.dropout(self.activation(norm(z)))
        return z


BuildMLP = Callable[[int, int], MLP]
"""(in_dim, out_dim) -> MLP: how modules are told which MLP to use inside."""
