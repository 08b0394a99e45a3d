"""Equivariant layers: q x in, q y out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

ROLES = ("input", "hidden", "output")


class ByRole(nn.Module):
    """One module per node role; rows of a role go through its module alone.

    Only the modules of `roles` are kept: a role that never occurs has no parameters.

    Args:
        modules: role -> module; roles may share one module.
        roles: the roles that occur.
    """

    def __init__(self, modules: Mapping[str, nn.Module], roles: Collection[str]) -> None:
        super().__init__()
        distinct = {id(modules[role]): modules[role] for role in ROLES if role in roles}
        self.branches = nn.ModuleList(distinct.values())
        self.index = {role: list(distinct).index(id(modules[role])) for role in ROLES if role in roles}

    def forward(self, role: str, *inputs: Tensor) -> Tensor:
        """The branch of `role` applied to `inputs`."""
        return self.branches[self.index[role]](*inputs)


class EquivariantLayer(nn.Module):
    """(W x) * g(x, p), W without bias: multiplied by q when x is (ScaleGMN, eq. 13).

    Rows of input and output nodes have no symmetry to respect; g may be another module there.

    Args:
        in_dim: width of x.
        out_dim: width of the output.
        factor: the invariant factor by role, called as factor(role, x, *extras).
    """

    def __init__(self, in_dim: int, out_dim: int, factor: ByRole) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim, bias=False)
        self.factor = factor

    def forward(self, role: str, x: Tensor, *extras: Tensor) -> Tensor:
        """x [..., in_dim], extras broadcasting to [..., extra_dim] -> [..., out_dim]."""
        return self.linear(x) * self.factor(role, x, *extras)
