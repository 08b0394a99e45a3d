"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

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
        linears = (nn.Linear(i, o) for i, o in pairwise(dims))
        self.linears: Sequence[nn.Linear] = nn.ModuleList(linears)  # type: ignore[assignment]  # ModuleList has no item type
        self.norms = nn.ModuleList(nn.LayerNorm(d) if layer_norm else nn.Identity() for d in hidden_dims)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = Dropout(dropout)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs [..., d_k], the d_k summing to `in_dim`, are concatenated -> [..., out_dim]."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=-1)
        for linear, norm in zip(self.linears, self.norms, strict=False):  # one Linear more
            x = self.dropout(self.activation(norm(linear(x))))
        last: Tensor = self.linears[-1](x)
        return last


BuildMLP = Callable[[int, int], MLP]
"""(in_dim, out_dim) -> MLP: how modules are told which MLP to use inside."""
