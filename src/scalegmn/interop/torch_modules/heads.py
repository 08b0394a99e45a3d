"""Heads of queries and keys: sums of channels with constant factors (rotary embeddings), and what is computed from each
head alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import Neurons, OfHeads, Scores, Turned, compact, is_constant_along


def as_turned(trace: Trace, value: Any) -> Turned:
    """Neurons as a sum of themselves."""
    if isinstance(value, Turned):
        return value
    if not isinstance(value, Neurons) or -1 in value.versions:
        trace.refuse("queries or keys of attention are not a layer's output")
    trace.check_current(value)
    trace.refuse_sources(value)
    if value.value is None:
        trace.refuse("queries or keys of attention have no values to compare with")
    return Turned(((value.ids, torch.full_like(value.value, value.factor).expand(value.ids.shape)),))


def as_of_heads(trace: Trace, value: Any) -> OfHeads:
    """Channels of heads along the last axis, as what is computed from each head alike."""
    if isinstance(value, OfHeads):
        return value
    turned = as_turned(trace, value)
    heads, number, terms = local_terms(trace, turned)
    trace.neurons.mark_aligned(heads.flatten())
    shape, is_plain = turned.terms[0][0].shape, len(terms) == 1 and not _pairs(heads.shape[1], [terms, terms])
    return OfHeads(number[..., None].expand(shape), heads, terms[0][0].expand(shape) if is_plain else None)


def local_terms(trace: Trace, turned: Turned) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """The heads of a sum [..., channels] of neurons with constant factors.

    Returns:
        [P, d] the neurons of each head, ascending; [...] which head each place has; and the terms, that all heads have
        alike: places of neurons in their head [channels], and factors [..., channels].
    """
    all_ids = torch.stack([ids for ids, _ in turned.terms], -2)
    factors = torch.stack([factors for _, factors in turned.terms], -2).cpu()
    for axis in range(all_ids.ndim - 2):
        if not is_constant_along(all_ids, axis) and not is_constant_along(factors, axis):
            trace.refuse("heads of attention are turned in different ways")
    small = compact(all_ids)
    used = factors != 0
    for axis in range(all_ids.ndim - 2):
        if small.shape[axis] > 1 and is_constant_along(small, axis):
            small = small.narrow(axis, 0, 1)
    used = used.reshape(-1, *used.shape[-2:]).any(0)
    rows = small.expand(*small.shape[:-2], *all_ids.shape[-2:]).reshape(-1, *all_ids.shape[-2:])
    sets = [sorted(set(row[used].tolist())) for row in rows]
    if len({*map(len, sets)}) > 1:
        trace.refuse("heads of attention have different numbers of channels")
    known = list(dict.fromkeys(map(tuple, sets)))
    number = torch.tensor([known.index(tuple(row)) for row in sets]).reshape(small.shape[:-2])
    heads = torch.tensor(known)
    if len(heads.unique()) < heads.numel():
        trace.refuse("heads of attention share channels")
    local = torch.stack([torch.searchsorted(heads[n], row) for n, row in zip(number.flatten(), rows, strict=True)])
    local = torch.where(used, local, 0)
    if not torch.equal(local, local[:1].expand_as(local)):
        trace.refuse("channels of heads are turned in different ways")
    places = [(local[0, term], factors[..., term, :]) for term in range(len(turned.terms))]
    return heads, number.expand(all_ids.shape[:-2]), places


def head_scores(trace: Trace, queries: Any, keys: Any, shape: Sequence[int]) -> Scores:
    """Products of queries and keys [..., T, channels] of which some are turned, or computed otherwise from each head.

    Args:
        trace: the layers so far.
        queries: of attention.
        keys: of attention.
        shape: [...] of the heads.
    """
    if isinstance(queries, OfHeads) or isinstance(keys, OfHeads):
        both = [as_of_heads(trace, value) for value in (queries, keys)]
        heads, labels = [value.heads for value in both], [value.labels for value in both]
        if not all(is_constant_along(item, axis) for item in labels for axis in (-1, -2)):
            trace.refuse("heads lie along another axis")
        numbers = [item[..., 0, 0] for item in labels]
        size = heads[0].shape[1]
        rotary = () if _are_alike(both, size) else tuple(range(size))
        if heads[1].shape[1] != size:
            trace.refuse("heads of queries and keys have different widths")
    else:
        found = [local_terms(trace, as_turned(trace, value)) for value in (queries, keys)]
        heads, numbers = [item[0] for item in found], [item[1] for item in found]
        if not all(is_constant_along(item, -1) for item in numbers):
            trace.refuse("heads lie along another axis")
        numbers = [item[..., 0] for item in numbers]
        if heads[0].shape[1] != heads[1].shape[1]:
            trace.refuse("heads of queries and keys have different widths")
        rotary = _pairs(heads[0].shape[1], [item[2] for item in found])
    rows = [item[number.expand(tuple(shape)).flatten()] for item, number in zip(heads, numbers, strict=True)]
    return scores_of_rows(rows[0], rows[1], rotary)


def _are_alike(values: Sequence[OfHeads], size: int) -> bool:
    """Whether queries and keys [..., channels] have their channels in one order, each computed alike."""
    rows = []
    for value in values:
        if value.channels is None or not all(
            is_constant_along(value.channels, a) for a in range(value.labels.ndim - 1)
        ):
            return False
        rows.append(value.channels[(0,) * (value.channels.ndim - 1)])
    return torch.equal(rows[0], rows[1]) and torch.equal(rows[0].sort().values, torch.arange(size))


def scores_of_rows(queries: Tensor, keys: Tensor, rotary: tuple[int, ...] = ()) -> Scores:
    """Scores of [n, channels] neurons of queries and keys, one row for each place along the axes of batch and heads."""
    both = list(zip(map(tuple, queries.tolist()), map(tuple, keys.tolist()), strict=True))
    pairs = {pair: number for number, pair in enumerate(dict.fromkeys(both))}
    order = torch.tensor([pairs[pair] for pair in both])
    first, second = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    return Scores(first, second, order, rotary=rotary)


def _pairs(size: int, terms: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[int, ...]:
    """The number of the pair that each channel of a head is turned in, -1 for those that are not; empty if none is.

    Args:
        size: channels of a head.
        terms: of queries and of keys, as of `local_terms`.
    """
    first = list(range(size))  # channel -> the first that it meets

    def root(place: int) -> int:
        return place if first[place] == place else root(first[place])

    num_channels = len(terms[0][0][0])
    plain = set(range(size))
    scales: set[tuple[float, ...]] = set()
    met: list[set[int]] = []
    for channel in range(num_channels):
        members: list[int] = []
        constant: list[float] = []
        for side in terms:
            used = [(int(place[channel]), x[..., channel]) for place, x in side if bool((x[..., channel] != 0).any())]
            members += [place for place, _ in used]
            is_plain = len(used) == 1 and bool((used[0][1] == used[0][1].flatten()[0]).all())
            constant.append(float(used[0][1].flatten()[0]) if is_plain else math.nan)
        for place in members:
            a, b = sorted((root(place), root(members[0])))
            first[b] = a
        met.append({*members})
        if len({*members}) > 1 or any(map(math.isnan, constant)):
            plain -= {*members}
        else:
            scales.add(tuple(constant))
    counts = [sum(place in members for members in met) for place in range(size)]
    plain = {place for place in plain if counts[place] == 1} if len(scales) == 1 else set()
    if len(plain) == size:
        return ()
    roots = list(dict.fromkeys(root(place) for place in range(size) if place not in plain))
    return tuple(-1 if place in plain else roots.index(root(place)) for place in range(size))
