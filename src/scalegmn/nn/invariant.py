"""Invariant maps: what of a feature does not change when its neuron is rescaled."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from scalegmn.nn.mlp import BuildMLP

BuildInvariant = Callable[[int], nn.Module]
"""Width of x -> the invariant map of a symmetry."""


class SignInvariant(nn.Module):
    """inv(x) = rho(x) + rho(-x), unchanged under x -> -x (ScaleGMN, section 4; Lim et al., 2023).

    The first Linear is applied once (W x and its negation), the last once, to the sum of the hidden activations.

    Args:
        dim: width of x and of inv(x).
        mlp: builds rho, dim -> dim.
    """

    def __init__(self, dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.rho = mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> [..., dim]."""
        first, last = self.rho.linears[0], self.rho.linears[-1]
        z = nn.functional.linear(x, first.weight)
        both = self.rho.hidden(first.bias + z) + self.rho.hidden(first.bias - z)
        return nn.functional.linear(both, last.weight, 2 * last.bias)


class InvariantLayer(nn.Module):
    """g(x, p) = phi([inv(x), p]) (ScaleGMN, eq. 12).

    Args:
        in_dim: width of x.
        extra_dim: width of the invariant extras p (0: none).
        out_dim: width of the output.
        invariant: builds inv from the width of x.
        mlp: builds phi.
    """

    def __init__(self, in_dim: int, extra_dim: int, out_dim: int, invariant: BuildInvariant, mlp: BuildMLP) -> None:
        super().__init__()
        self.invariant = invariant(in_dim)
        self.phi = mlp(in_dim + extra_dim, out_dim)

    def forward(self, x: Tensor, *extras: Tensor) -> Tensor:
        """x [..., in_dim], extras broadcasting to [..., extra_dim] -> [..., out_dim]."""
        return self.phi(self.invariant(x), *extras)
