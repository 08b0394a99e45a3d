"""A batch of networks of several architectures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from scalegmn.networks.params import NetParams


@dataclass(frozen=True, eq=False)
class MultiArchBatch:
    """B networks of several architectures: batches of one architecture, one after the other.

    Iterating gives these batches; the length and slices count networks.

    Attributes:
        parts: the batches.
    """

    parts: tuple[NetParams, ...]

    @classmethod
    def of(cls, parts: Iterable[NetParams]) -> NetParams | MultiArchBatch:
        """The networks of batches, in order; a single batch stays what it is."""
        parts = tuple(parts)
        return parts[0] if len(parts) == 1 else cls(parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[NetParams]:
        return iter(self.parts)

    def __getitem__(self, index: slice) -> NetParams | MultiArchBatch:
        """The networks of a slice without step; of an empty one, none of the first architecture."""
        start, stop, _ = index.indices(len(self))
        selected, first = [], 0
        for params in self.parts:
            rows = slice(max(start - first, 0), min(stop - first, len(params)))
            selected += [params[rows]] if rows.start < rows.stop else []
            first += len(params)
        return MultiArchBatch.of(selected or [self.parts[0][:0]])

    def to(self, *args: Any, **kwargs: Any) -> MultiArchBatch:
        """`NetParams.to` for all."""
        return MultiArchBatch(tuple(params.to(*args, **kwargs) for params in self.parts))
