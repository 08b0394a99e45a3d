"""The scalars that commute with an activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScalarGroup:
    """The scalars q by which a neuron's incoming weights and bias may be multiplied: sigma(q z) = chi(q) sigma(z).

    q is 1, or also -1 (`signs`), or also positive (`scales`). Outgoing weights are divided by
    chi(q) = sign(q)^sign_exponent |q|^exponent, so that the network's function does not change (ScaleGMN, section 3,
    https://arxiv.org/abs/2406.10685, where chi(q) = q). Every continuous activation with a group of scalars has one of
    these: tanh has signs; relu scales; z^2 both, with chi(q) = q^2, so sign_exponent 0 and exponent 2.

    Args:
        signs: whether q may be -1.
        scales: whether q may be any positive number.
        sign_exponent: 1 for odd activations, 0 for even ones.
        exponent: the degree of homogeneity.
    """

    signs: bool = False
    scales: bool = False
    sign_exponent: int = 1
    exponent: float = 1.0

    def outgoing(self, q: Tensor) -> Tensor:
        """chi(q), by which outgoing weights are divided; of a feature that is multiplied by q, componentwise, a feature
        that is multiplied by chi(q)."""
        if self.sign_exponent == 1 and self.exponent == 1:
            return q
        size = q.abs() if self.exponent == 1 else q.abs() ** self.exponent
        return size * q.sign() if self.sign_exponent == 1 else size

    def sample(self, shape: tuple[int, ...], generator: torch.Generator | None = None, decades: float = 1.0) -> Tensor:
        """Random scalars in float64: random signs and 10**u, u uniform in [-decades, decades], where they are allowed."""
        q = torch.ones(shape, dtype=torch.float64)
        if self.signs:
            q = q * (torch.randint(0, 2, shape, generator=generator).double() * 2 - 1)
        if self.scales:
            q = q * 10 ** (decades * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1))
        return q

    def canonical(self, norm: Tensor) -> Tensor:
        """The positive scalar that brings a neuron's incoming weights of this norm to norm 1; 1 without scales."""
        return 1 / torch.where(norm > 0, norm, 1) if self.scales else torch.ones_like(norm)


TRIVIAL = ScalarGroup()
"""{1}"""

SIGNS = ScalarGroup(signs=True)
"""{-1, 1} of odd activations."""

SCALES = ScalarGroup(scales=True)
"""The positive reals of positively homogeneous activations."""
