"""Heads of attention: which channels follow one permutation, and which have one scalar.

Each head a of keys and values has R heads b of queries. Keys have channels [a, d], queries [a, b, d], values [a, c],
and what attention returns [a, c, b]; where R = 1 that is the layer of the values. The heads of keys may be permuted,
the heads of queries of each, and the channels d and c within each: all four follow alike. Channels that are turned by
position (rotary embeddings) stay within their head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scalegmn.networks.spec import NetSpec


class Axis(NamedTuple):
    """An axis of the channels of a block, which is permuted for each block."""

    number: int
    """Axes of one number have one permutation; -1: nothing moves."""

    size: int

    fixed: tuple[bool, ...] = ()
    """Which of its channels stay; empty: none."""


class Heads(NamedTuple):
    """The heads of a layer with attention."""

    result: int
    """The layer, counted from 0."""

    query: int
    key: int
    values: int
    num_heads: int
    """Of keys and values."""

    num_repeats: int
    """R, the heads of queries of each."""

    rotary: tuple[int, ...]
    """`LayerSpec.rotary`."""

    score_biases: tuple[int, ...]
    """`LayerSpec.score_biases`."""

    def key_dim(self, spec: NetSpec) -> int:
        """Channels of a head of keys, and of one of queries."""
        return spec.width(self.key) // self.num_heads

    def axes(self, spec: NetSpec) -> Iterator[tuple[int, tuple[Axis, ...]]]:
        """Layers with the axes of their channels within a head of keys; none where a single axis moves freely."""
        if self.num_repeats == 1 and not self.rotary:
            return
        first, value_dim = 3 * self.result, spec.width(self.values) // self.num_heads
        query, value = Axis(first, self.num_repeats), Axis(first + 1, value_dim)
        key = Axis(first + 2, self.key_dim(spec), tuple(pair >= 0 for pair in self.rotary))
        yield self.key, (key,)
        if self.num_repeats == 1:
            yield self.query, (key,)
            return
        yield self.query, (query, key)
        yield self.values, (value,)
        yield self.result, (value, query)
        for layer in self.score_biases:
            yield layer, (query,)


def all_heads(spec: NetSpec) -> tuple[Heads, ...]:
    """The heads of each layer with attention."""
    found = []
    for index, layer in enumerate(spec.layers):
        if layer.attention is not None:
            query, key, num_queries = layer.attention
            repeats = spec.width(query) // spec.width(key)
            values = spec.sender(index) if repeats > 1 else index
            biases = layer.score_biases
            found.append(Heads(index, query, key, values, num_queries // repeats, repeats, layer.rotary, biases))
    return tuple(found)


def tie_scalars(spec: NetSpec, scales: list[Tensor]) -> None:
    """Gives scalars that the heads of attention share to all layers that have them.

    Args:
        spec: the network.
        scales: per hidden layer [B, n_l], changed in place. Queries of a head of keys share one scalar q for each
            channel, or for each pair that is turned: the geometric mean of theirs. Keys have 1 / q. What attention
            returns has the scalars of the values.
    """
    for heads in spec.heads:
        if spec.reciprocal_layers.get(heads.key) == heads.query:
            q = scales[heads.query].reshape(-1, heads.num_heads, heads.num_repeats, heads.key_dim(spec))
            if heads.rotary or heads.num_repeats > 1:
                pairs = [pair if pair >= 0 else -1 - place for place, pair in enumerate(heads.rotary)]
                number = torch.tensor(pairs or range(q.shape[3]), device=q.device)
                same = torch.eq(number[:, None], number)
                size = (q.abs().log().mean(2) @ (same / same.sum(1)).to(q)).exp()
                sign = q[:, :, 0].sign()[..., same.int().argmax(1)]
                q = (sign * size)[:, :, None].expand_as(q)
                scales[heads.query] = q.flatten(1)
            scales[heads.key] = 1 / q[:, :, 0].flatten(1)
        if heads.result in spec.repeated_layers:
            scales[heads.result] = scales[heads.values].repeat_interleave(heads.num_repeats, 1)
