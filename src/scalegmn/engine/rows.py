"""Rows of features that are not multiplied out, and what they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from scalegmn.networks.scalar_groups import ScalarGroup
from scalegmn.nn.context import ROLES, NodeContext


class Rows(NamedTuple):
    """What a tensor of rows [B, ..., D] of B networks, or [n, D] of any networks, belongs to: nodes of one role, sorted
    by scalar group."""

    role: str
    """A name of `ROLES`."""

    groups: tuple[ScalarGroup, ...]
    """The scalar groups that the model tells apart."""

    sizes: tuple[int, ...] | Tensor | None = None
    """How many networks (or rows [n]) belong to each group, one group after the other; None: all to the first. Where
    shapes may not depend on the data (torch.compile), the group of each network, [B] long."""

    network: Tensor | None = None
    """Of rows [n, D] of any networks, the network of each, [n] long; None where it is not known."""

    def context(self, shape: Sequence[int], device: torch.device) -> NodeContext:
        """The same for modules in their plain form: of rows [B, ...] or [n], flattened."""
        size = torch.Size(shape).numel()
        role = torch.full((size,), ROLES.index(self.role), device=device)
        sizes = self.sizes
        if sizes is None:
            group = torch.zeros_like(role)
        else:
            if isinstance(sizes, Tensor):
                group = sizes
            else:
                counts = torch.tensor(sizes, device=device)
                group = torch.arange(len(sizes), device=device).repeat_interleave(counts)
            group = group.repeat_interleave(size // max(shape[0], 1))
        network = self.network
        if network is None:
            network = torch.arange(shape[0], device=device).repeat_interleave(size // max(shape[0], 1))
            network = network if len(shape) > 1 else torch.full_like(network, -1)
        return NodeContext(role, group, network, self.groups)

    def part(self, start: int, stop: int) -> Rows:
        """Of the networks (or rows) from `start` to `stop`."""
        if not isinstance(self.sizes, tuple):
            return self
        sizes, first = [], 0
        for size in self.sizes:
            sizes.append(max(0, min(first + size, stop) - max(first, start)))
            first += size
        return self._replace(sizes=tuple(sizes), network=None if self.network is None else self.network[start:stop])


class GatheredRows(NamedTuple):
    """Rows of a tensor, values[index]: linear maps act on `values`, once per row rather than once per edge."""

    values: Tensor
    """[n, D]."""

    index: Tensor  # type: ignore[assignment]  # it hides tuple.index, which nobody calls
    """[E] long."""

    @property
    def shape(self) -> torch.Size:
        """(E, D)."""
        return torch.Size((len(self.index), self.values.shape[-1]))

    def map(self, function: Callable[[Tensor], Tensor]) -> GatheredRows:
        """`function` of each row."""
        return GatheredRows(function(self.values), self.index)

    def split(self, sizes: Sequence[int] | int) -> list[GatheredRows]:
        """So many rows each."""
        return [GatheredRows(self.values, index) for index in self.index.split(sizes)]


def gathered(x: Tensor | GatheredRows) -> Tensor:
    """[E, D], multiplied out."""
    return x.values.index_select(0, x.index) if isinstance(x, GatheredRows) else x


def each(x: Tensor | GatheredRows, function: Callable[[Tensor], Tensor]) -> Tensor | GatheredRows:
    """`function` of each row."""
    return x.map(function) if isinstance(x, GatheredRows) else function(x)


@dataclass(frozen=True)
class ScaledRows:
    """A tensor in two factors, values * scale: linear maps act on `values`, once per node rather than once per edge.

    Attributes:
        values: [B or 1, R or 1, S or 1, D], of sparse blocks [E or 1, D]; split only once it has B, or E.
        scale: [B, R, S, 1] or [E, 1].
    """

    values: Tensor | GatheredRows
    scale: Tensor

    def product(self) -> Tensor:
        """[B, R, S, D] or [E, D]."""
        return gathered(self.values) * self.scale

    def sum_senders(self) -> Tensor:
        """The product's sum over senders, [B, R, D], of a dense block: where values are the same for all receivers, one
        product of matrices for each network."""
        assert isinstance(self.values, Tensor)  # rows of dense blocks are never gathered
        if self.values.shape[1] == 1:
            return self.scale[..., 0] @ self.values[:, 0]
        return (self.scale.transpose(2, 3) @ self.values)[:, :, 0]

    def split(self, sizes: Sequence[int]) -> list[ScaledRows]:
        """So many networks, or edges of a sparse block, each."""
        return list(map(ScaledRows, self.values.split(sizes), self.scale.split(sizes)))


@overload
def linear(x: Tensor | GatheredRows | ScaledRows, weight: Tensor, bias: Tensor) -> Tensor: ...


@overload
def linear(x: Tensor, weight: Tensor, bias: None = None) -> Tensor: ...


@overload
def linear(x: GatheredRows, weight: Tensor, bias: None = None) -> GatheredRows: ...


@overload
def linear(x: ScaledRows, weight: Tensor, bias: None = None) -> ScaledRows: ...


def linear(
    x: Tensor | GatheredRows | ScaledRows, weight: Tensor, bias: Tensor | None = None
) -> Tensor | GatheredRows | ScaledRows:
    """W x + bias, for a bias that may be any tensor that broadcasts; `ScaledRows` or `GatheredRows` only if x is and
    there is no bias."""
    if isinstance(x, ScaledRows):
        values = linear(x.values, weight)
        return ScaledRows(values, x.scale) if bias is None else torch.addcmul(bias, gathered(values), x.scale)
    if isinstance(x, GatheredRows):
        new = x.map(lambda values: nn.functional.linear(values, weight))
        return new if bias is None else gathered(new) + bias
    if bias is None or bias.ndim == 1:
        return nn.functional.linear(x, weight, bias)
    return nn.functional.linear(x, weight) + bias


def linear_of_both_signs(x: Tensor | ScaledRows, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """W x + bias and W (-x) + bias, for W x once."""
    if isinstance(x, ScaledRows):
        values = gathered(linear(x.values, weight))
        return torch.addcmul(bias, values, x.scale), torch.addcmul(bias, values, x.scale, value=-1)
    if torch.is_autocast_enabled(x.device.type):  # rounding must not tell x from -x
        product = nn.functional.linear(x, weight)
        return bias + product, bias - product
    plus = nn.functional.linear(x, weight, bias)
    return plus, 2 * bias - plus


def times(x: Tensor | ScaledRows, factor: Tensor) -> Tensor | ScaledRows:
    """x * factor."""
    return ScaledRows(gathered(x.values) * factor, x.scale) if isinstance(x, ScaledRows) else x * factor


def multiplied_out(x: Tensor | GatheredRows | ScaledRows) -> Tensor:
    """The rows as a tensor."""
    return x.product() if isinstance(x, ScaledRows) else gathered(x)
