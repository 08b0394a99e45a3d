"""Which activation several elementwise operators make up, by what they do to numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_FAR = torch.tensor([-29.5, -13.0, -6.5, 6.5, 13.0, 29.5], dtype=torch.float64)
GRID = torch.cat([(torch.arange(96, dtype=torch.float64) - 47.5) / 8, _FAR])
"""Numbers at which activations are compared: none is 0, and all have few digits, so that w0 z / z is w0; some
are beyond the bounds of relu6."""

TOLERANCE = 1e-6
"""Of activations on the grid: files hold constants such as sqrt(2) in single precision."""

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": functional.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "gelu(tanh)": lambda z: functional.gelu(z, approximate="tanh"),
    "relu6": functional.relu6,
    "hardtanh": functional.hardtanh,
    "elu": functional.elu,
    "selu": functional.selu,
    "softplus": functional.softplus,
    "log_sigmoid": functional.logsigmoid,
    "mish": functional.mish,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
}

ELEMENTWISE = {
    *("Relu", "LeakyRelu", "Tanh", "Sigmoid", "Sin", "Erf", "Neg", "Gelu", "Swish", "Identity", "Sqrt"),
    *("Elu", "Selu", "Softplus", "Mish", "HardSwish", "HardSigmoid", "PRelu"),
    *("Add", "Sub", "Mul", "Div", "Pow", "Exp", "Log", "Abs", "Clip", "Max", "Min"),
}
"""Operators that activations are made of."""


@dataclass(frozen=True)
class Elementwise:
    """A value f(z), computed element by element from another one.

    Attributes:
        base: the name of z.
        values: f at `GRID`.
        frequency: w0 where f is sin(w0 z).
    """

    base: str
    values: Tensor
    frequency: float = 1.0

    def activation(self) -> str | None:
        """The name of f; None: it is no known activation."""
        candidates = {**_FUNCTIONS, "sine": lambda z: torch.sin(self.frequency * z)}
        close = (name for name, f in candidates.items() if bool((f(GRID) - self.values).abs().max() < TOLERANCE))
        return next(close, None)


def frequency_of(values: Tensor) -> float:
    """w0 where these are w0 z at `GRID`, else 1."""
    factors = values / GRID
    is_linear = bool((factors - factors[0]).abs().max() < TOLERANCE) and float(factors[0]) > 0
    return float(factors[0]) if is_linear else 1.0


class ActivationStep(nn.Module):
    """An activation by name, in place of the operators that made it up."""

    def __init__(self, name: str, frequency: float) -> None:
        super().__init__()
        self.name, self.frequency = name, frequency

    def forward(self, z: Tensor) -> Tensor:
        """sigma(z), or sin(w0 z)."""
        return torch.sin(self.frequency * z) if self.name == "sine" else _FUNCTIONS[self.name](z)
