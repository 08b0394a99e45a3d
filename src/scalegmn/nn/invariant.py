"""Invariant maps: functions of a feature that do not change when its neuron is rescaled.

Rows of n nodes are [n, D]. A feature x of a neuron is multiplied by q when the neuron's incoming weights and bias are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from scalegmn.networks.scalar_groups import ScalarGroup
from scalegmn.nn.context import NodeContext, select_branches
from scalegmn.nn.mlp import BuildMLP

BuildInvariant = Callable[[int], nn.Module]
"""Width of x -> the invariant map of a symmetry, called as map(context, x)."""


class SignInvariant(nn.Module):
    """inv(x) = rho(x) + rho(-x), unchanged under x -> -x (ScaleGMN, section 4; Lim et al., 2023).

    Args:
        dim: width of x and of inv(x).
        mlp: builds rho, dim -> dim.
    """

    def __init__(self, dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.rho = mlp(dim, dim)

    def forward(self, context: NodeContext, x: Tensor) -> Tensor:
        """x [n, dim] -> [n, dim]."""
        new: Tensor = self.rho(x) + self.rho(-x)
        return new


class AbsoluteValue(nn.Module):
    """inv(x) = |x| componentwise, unchanged under x -> -x."""

    def forward(self, context: NodeContext, x: Tensor) -> Tensor:
        """x [n, dim] -> [n, dim]."""
        return x.abs()


class ScaleInvariant(nn.Module):
    """inv(x) = x / (||x||_2 + epsilon), unchanged under x -> q x, q > 0 (ScaleGMN, section 4); x where that underflows.

    Args:
        epsilon: 0 is exact; the published 1e-10 changes the result as soon as ||x|| is small.
    """

    def __init__(self, epsilon: float = 0.0) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, context: NodeContext, x: Tensor) -> Tensor:
        """x [n, dim] -> [n, dim]; the norm is over the last axis."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + self.epsilon
        smallest = torch.finfo(norm.dtype).tiny ** 0.5  # the gradient holds 1 / norm^2
        return x / torch.where(norm > smallest, norm, 1)


class Normalized(nn.Module):
    """inv(x) = inv'(x / ||x||_2), unchanged under all scalars if inv' is under x -> -x.

    Args:
        scale: the map that divides by the norm.
        sign: inv'.
    """

    def __init__(self, scale: nn.Module, sign: nn.Module) -> None:
        super().__init__()
        self.scale, self.sign = scale, sign

    def forward(self, context: NodeContext, x: Tensor) -> Tensor:
        """x [n, dim] -> [n, dim]."""
        new: Tensor = self.sign(context, self.scale(context, x))
        return new


class ByScalarGroup(nn.Module):
    """One module per scalar group; rows of nodes of a group go through its module alone.

    Args:
        groups: the scalar groups, in the order of `NodeContext.groups`.
        branches: name -> the module of each.
    """

    def __init__(self, groups: Sequence[ScalarGroup], branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.groups, self.names = tuple(groups), tuple(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)

    @property
    def branches(self) -> list[nn.Module]:
        """The module of each group."""
        return [self.get_submodule(name) for name in self.names]

    def forward(self, context: NodeContext, *inputs: Tensor) -> Tensor:
        """Inputs [n, D] -> [n, out]."""
        masks = [context.group == index for index in range(len(self.groups))]
        return select_branches(list(zip(masks, self.branches, strict=True)), context, inputs)


class InvariantLayer(nn.Module):
    """g(x, p) = phi([inv(x), p]) (ScaleGMN, eq. 12).

    Args:
        in_dim: width of x.
        extra_dim: width of the invariant extras p; 0: none are read.
        out_dim: width of the output.
        invariant: builds inv from the width of x.
        mlp: builds phi.
    """

    def __init__(self, in_dim: int, extra_dim: int, out_dim: int, invariant: BuildInvariant, mlp: BuildMLP) -> None:
        super().__init__()
        self.extra_dim = extra_dim
        self.invariant = invariant(in_dim)
        self.phi = mlp(in_dim + extra_dim, out_dim)

    def forward(self, context: NodeContext, x: Tensor, *extras: Tensor) -> Tensor:
        """x [n, in_dim], extras [n, extra_dim] -> [n, out_dim]."""
        new: Tensor = self.phi(self.invariant(context, x), *(extras if self.extra_dim else ()))
        return new
