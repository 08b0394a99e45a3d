"""The scalars that commute with an activation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

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

    Raises:
        ValueError: an exponent is not one of these.
    """

    signs: bool = False
    scales: bool = False
    sign_exponent: int = 1
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.sign_exponent not in (0, 1):
            raise ValueError(f"sign_exponent: found {self.sign_exponent}, expected 0 (even) or 1 (odd)")
        if not math.isfinite(self.exponent) or self.exponent == 0:
            raise ValueError(f"exponent: found {self.exponent}, expected a finite number other than 0")

    @property
    def preserves_scalars(self) -> bool:
        """Whether chi(q) = q for every q of the group."""
        return (self.sign_exponent == 1 or not self.signs) and (self.exponent == 1 or not self.scales)

    @property
    def symmetry(self) -> str:
        """The word of configurations for models that keep it: `sign` for {-1, 1} and `scale` for the positive reals if
        chi(q) = q, `permutation` for {1}, and `hetero` for every other group."""
        if not (self.signs or self.scales):
            return "permutation"
        if not self.preserves_scalars or (self.signs and self.scales):
            return "hetero"
        return "sign" if self.signs else "scale"

    def outgoing(self, q: Tensor) -> Tensor:
        """chi(q), by which outgoing weights are divided; of a feature that is multiplied by q, componentwise, a feature
        that is multiplied by chi(q)."""
        if self.sign_exponent == 1 and self.exponent == 1:
            return q
        size = q.abs() if self.exponent == 1 else q.abs() ** self.exponent
        return size * q.sign() if self.sign_exponent == 1 else size

    def project(self, q: Tensor) -> Tensor:
        """Scalars of the group from any numbers but 0: without their signs and sizes where these are not allowed."""
        if self.signs and self.scales:
            return q
        return q.sign() if self.signs else q.abs() if self.scales else torch.ones_like(q)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator | None = None, decades: float = 1.0) -> Tensor:
        """Random scalars of the group: `random_scalars`, projected. Every group consumes the same random numbers."""
        return self.project(random_scalars(shape, generator, decades))

    def canonical(self, norm: Tensor) -> Tensor:
        """The positive scalar that brings a neuron's incoming weights of this norm to norm 1; 1 without scales and for
        norm 0."""
        return 1 / torch.where(norm > 0, norm, 1) if self.scales else torch.ones_like(norm)

    def __and__(self, other: ScalarGroup) -> ScalarGroup:
        """The scalars that two coupled layers can share: those of both groups with chi(q) = q.

        A residual connection adds the output of a neuron, which is multiplied by chi(q), to the input of another one,
        which is multiplied by q.
        """
        return ScalarGroup(
            signs=self.signs and other.signs and self.sign_exponent == other.sign_exponent == 1,
            scales=self.scales and other.scales and self.exponent == other.exponent == 1,
        )


def random_scalars(shape: tuple[int, ...], generator: torch.Generator | None = None, decades: float = 1.0) -> Tensor:
    """Random signs times 10**u, u uniform in [-decades, decades], in float64."""
    signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
    return signs * torch.exp(math.log(10) * decades * (torch.rand(shape, generator=generator).double() * 2 - 1))


def shared_group(groups: Iterable[ScalarGroup]) -> ScalarGroup:
    """The scalars that the neurons of coupled layers can share, one group per layer: the group of a single layer
    itself, see `ScalarGroup.__and__` for several."""
    first, *others = groups
    for other in others:
        first &= other
    return first


def symmetry_word(group: ScalarGroup | Literal["hetero"]) -> str:
    """`ScalarGroup.symmetry`; `hetero` where each network has its own group."""
    return group if isinstance(group, str) else group.symmetry


TRIVIAL = ScalarGroup()
"""{1}"""

SIGNS = ScalarGroup(signs=True)
"""{-1, 1} of odd activations."""

SCALES = ScalarGroup(scales=True)
"""The positive reals of positively homogeneous activations."""

ALL_SCALARS = ScalarGroup(signs=True, scales=True)
"""All reals but 0, of linear layers."""
