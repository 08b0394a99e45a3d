"""The raw features of edges, each as wide as its own kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scalegmn.networks.features import Kernels, padded

LEAST_SAVED = 2**23
"""How many numbers a table of raw features must be too large before edges are worked through kind by kind."""

MOST_ALIKE = 4
"""The largest kernel of one kind may be so many times as large as its smallest."""


class _Part(NamedTuple):
    """Edges whose kernels fill the same components."""

    rows: Tensor
    """[e] long, their places among the E edges."""

    values: Tensor
    """[e, k]."""


class EdgeValues:
    """Raw features of edges, [E, K], of which most components are zero where few kernels are large: edges are kept by
    the components that their kernels fill.

    Args:
        parts: the components, ascending -> the edges that fill these.
        num_edges: E.
        width: K.
    """

    def __init__(self, parts: dict[tuple[int, ...], _Part], num_edges: int, width: int) -> None:
        self._parts, self.num_edges, self.width = parts, num_edges, width

    @classmethod
    def of_networks(cls, kernels: Iterable[Sequence[Kernels]], width: int) -> EdgeValues:
        """Of the blocks of several batches of networks (`NetParams.kernels`), batch by batch, network by network."""
        gathered: dict[tuple[int, ...], list[_Part]] = {}
        num_edges = 0
        for blocks in kernels:
            sizes = [block.values.shape[1:3].numel() for block in blocks]
            start, num_networks = num_edges, len(blocks[0].values)
            networks = num_edges + sum(sizes) * torch.arange(num_networks, device=blocks[0].values.device)[:, None]
            for block, size in zip(blocks, sizes, strict=True):
                rows = networks + start - num_edges + torch.arange(size, device=networks.device)
                part = _Part(rows.flatten(), block.values.flatten(0, 2))
                gathered.setdefault(tuple(block.places.tolist()), []).append(part)
                start += size
            num_edges += num_networks * sum(sizes)
        return cls(_together(gathered), num_edges, width)

    @classmethod
    def joined(cls, edges: Sequence[EdgeValues]) -> EdgeValues:
        """The edges of several, one after the other."""
        gathered: dict[tuple[int, ...], list[_Part]] = {}
        start = 0
        for item in edges:
            for places, part in item._parts.items():
                gathered.setdefault(places, []).append(part._replace(rows=part.rows + start))
            start += item.num_edges
        return cls(_together(gathered), start, edges[0].width)

    @classmethod
    def ones(cls, num_edges: int, place: int, like: EdgeValues) -> EdgeValues:
        """Edges with 1 in one component."""
        values = next(iter(like._parts.values())).values
        rows = torch.arange(num_edges, device=values.device)
        return cls({(place,): _Part(rows, values.new_ones(num_edges, 1))}, num_edges, like.width)

    def repeated(self, slabs: Sequence[int], num_slabs: int) -> EdgeValues:
        """The same values in some of `num_slabs` slabs of K components each: [E, num_slabs K]."""
        parts = {
            tuple(slab * self.width + place for slab in slabs for place in places): part._replace(
                values=part.values.repeat(1, len(slabs))
            )
            for places, part in self._parts.items()
        }
        return EdgeValues(parts, self.num_edges, num_slabs * self.width)

    def moved(self, before: int, after: int) -> EdgeValues:
        """The same edges; of those that fill component `before` alone, the values are moved to component `after`."""
        parts = dict(self._parts)
        alone = [part for part in (parts.pop((before,), None), parts.pop((after,), None)) if part is not None]
        if alone:
            parts |= _together({(after,): alone})
        return EdgeValues(parts, self.num_edges, self.width)

    def linear(self, weight: Tensor) -> Tensor:
        """W r of all edges, [E, D], with W [D, K]."""
        outputs = [part.values @ weight[:, list(places)].T for places, part in self._parts.items()]
        rows = torch.cat([part.rows for part in self._parts.values()])
        return torch.cat(outputs).index_select(0, rows.argsort())

    def split(self, order: Tensor, sizes: Sequence[int]) -> list[EdgeValues]:
        """The edges that `order` [E] names, in this order, as consecutive runs of these sizes."""
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        runs: list[dict[tuple[int, ...], _Part]] = [{} for _ in sizes]
        for places, part in self._parts.items():
            rows, by_row = rank[part.rows].sort()
            starts = torch.tensor([0, *sizes], device=rows.device).cumsum(0)
            stops = torch.searchsorted(rows, starts).tolist()
            for run, first, start, stop in zip(runs, starts.tolist(), stops, stops[1:], strict=False):
                if start < stop:
                    run[places] = _Part(rows[start:stop] - first, part.values.index_select(0, by_row[start:stop]))
        none = {places: _Part(part.rows[:0], part.values[:0]) for places, part in list(self._parts.items())[:1]}
        return [EdgeValues(run or none, size, self.width) for run, size in zip(runs, sizes, strict=True)]

    def kinds(self) -> Tensor | None:
        """[E] long, from 0: edges of one kind have kernels of about one size; None where a table [E, k] of all of
        them is small, or not much smaller in parts."""
        by_size: dict[int, list[_Part]] = {}
        for places, part in self._parts.items():
            by_size.setdefault(len(places), []).append(part)
        sizes = sorted(by_size)
        saved = sum(len(part.rows) * (sizes[-1] - size) for size, parts in by_size.items() for part in parts)
        if saved < LEAST_SAVED:
            return None
        kinds = torch.empty(self.num_edges, dtype=torch.long, device=by_size[sizes[0]][0].rows.device)
        kind, least = 0, sizes[0]
        for size in sizes:
            if size > MOST_ALIKE * least:
                kind, least = kind + 1, size
            for part in by_size[size]:
                kinds[part.rows] = kind
        return kinds

    @property
    def places(self) -> Tensor:
        """[k] long, the components that any edge fills, ascending."""
        return torch.tensor(sorted({place for places in self._parts for place in places}), dtype=torch.long)

    def at(self, places: Tensor) -> Tensor:
        """These components of all edges, [E, k]; they have to be all that edges fill."""
        index = {place: column for column, place in enumerate(places.tolist())}
        values = []
        for filled, part in self._parts.items():
            columns = torch.tensor([index[place] for place in filled], device=part.values.device)
            values.append(padded(part.values, columns, len(places)))
        rows = torch.cat([part.rows for part in self._parts.values()])
        return torch.cat(values).index_select(0, rows.argsort())

    def dense(self) -> Tensor:
        """All components, [E, K]."""
        return self.at(torch.arange(self.width))


def _together(parts: dict[tuple[int, ...], list[_Part]]) -> dict[tuple[int, ...], _Part]:
    """Components -> all edges that fill these, one part after the other."""
    return {places: _Part(*map(torch.cat, zip(*alike, strict=True))) for places, alike in parts.items()}
