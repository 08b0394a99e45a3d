"""Edge features of one block of a parameter graph, and how a block is worked through.

A block is dense (`DenseEdges`: all edges between two layers of nodes, of networks of one architecture) or sparse
(`SparseEdges`: a list of edges of any networks). Modules read both in the same way.

Shape letters: B networks, R receivers, S senders, E edges, T edge types, D features, K raw values per edge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from scalegmn.engine.rows import GatheredRows, Rows, ScaledRows, gathered, linear, multiplied_out, times
from scalegmn.nn.context import EdgeContext


class EdgeUpdate(NamedTuple):
    """An update of edge features that is still to be done."""

    module: nn.Module
    """The plain module."""

    function: Callable[..., Tensor]
    """Called as function(module, edges, senders, receivers, *others)."""

    senders: Tensor
    """What it reads of the senders, [B, S, ...] or, of sparse blocks, [S, ...]."""

    receivers: Tensor
    """What it reads of the receivers, [B, R, ...] or [R, ...]."""

    others: tuple[Tensor, ...] = ()
    """What it reads besides, the same for all edges."""


@dataclass(frozen=True)
class Edges(ABC):
    """The features e = matrix @ values + shift of a block of edges, with updates still to do.

    Attributes:
        values: raw features, K per edge; where `matrix` is None the features themselves.
        matrix: [..., D, K], see the subclasses.
        shift: [..., D]; None: zero.
        updates: done in turn whenever the features are read.
    """

    values: Tensor
    matrix: Tensor | None = None
    shift: Tensor | None = None
    updates: tuple[EdgeUpdate, ...] = ()

    @overload
    def linear(self, weight: Tensor, bias: Tensor) -> Tensor: ...

    @overload
    def linear(self, weight: Tensor, bias: None = None) -> Tensor | ScaledRows: ...

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor | ScaledRows:
        """W e + bias, [B, R, S, out] or [E, out]; `ScaledRows` where e is one number times a vector and nothing is
        added."""
        if self.updates:
            return linear(self.features(), weight, bias)
        if self.matrix is None:
            return linear(self.values, weight, bias)
        matrix = weight @ self.matrix
        if self.shift is not None:
            shift = gathered(self._of_edges(nn.functional.linear(self.shift, weight)))
            bias = shift if bias is None else bias + shift
        if matrix.shape[-1] == 1:
            vector = self._of_edges(matrix[..., 0])
            return (
                ScaledRows(vector, self.values) if bias is None else torch.addcmul(bias, gathered(vector), self.values)
            )
        if matrix.shape[:-2].numel() == 1:
            return linear(self.values, matrix.flatten(0, -2), bias)
        product = self._product(matrix)
        return product if bias is None else product + bias

    def features(self) -> Tensor:
        """e with all updates done, [B, R, S, D] or [E, D]; for a block that has some, or that holds its features."""
        block = replace(self, updates=())
        for update in self.updates:
            block = block.holding(
                update.function(update.module, block, update.senders, update.receivers, *update.others)
            )
        return block.values

    def holding(self, features: Tensor) -> Edges:
        """The block with these features, [B, R, S, D] or [E, D]."""
        return replace(self, values=features, matrix=None, shift=None, updates=())

    def updated(self, update: EdgeUpdate) -> Edges:
        """The block with an update more to do."""
        return replace(self, updates=(*self.updates, update))

    @abstractmethod
    def at_senders(self, x: Tensor) -> Tensor:
        """Rows of senders on their edges, [B, S, ...] or [S, ...] -> what broadcasts to the features."""

    @abstractmethod
    def at_receivers(self, x: Tensor) -> Tensor:
        """Rows of receivers on their edges, [B, R, ...] or [R, ...] -> what broadcasts to the features."""

    @abstractmethod
    def of_senders(self, p: Tensor) -> Tensor | GatheredRows:
        """What all networks have in common at senders, [S, ...], or rows of senders, on their edges."""

    @abstractmethod
    def of_receivers(self, p: Tensor) -> Tensor | GatheredRows:
        """What all networks have in common at receivers, [R, ...], or rows of receivers, on their edges."""

    @abstractmethod
    def times_senders(self, x: Tensor | ScaledRows, sent: Tensor) -> Tensor | ScaledRows:
        """x * `at_senders(sent)`, for x = `linear` of the block."""

    @abstractmethod
    def sum(self, messages: Tensor | ScaledRows) -> Tensor:
        """The sum of what comes to each receiver, [B, R, D] or [R, D]."""

    @abstractmethod
    def mean(self, messages: Tensor | ScaledRows) -> Tensor:
        """The mean of what comes to each receiver, [B, R, D] or [R, D]; 0 where nothing comes."""

    @property
    @abstractmethod
    def degree(self) -> int | Tensor:
        """How many edges each receiver has: S, or [R, 1]."""

    def multiplied_out(self) -> Tensor:
        """e with all updates done, [B, R, S, D] or [E, D]; for any block."""
        if self.updates or self.matrix is None:
            return self.features()
        width = self.matrix.shape[-2]
        identity = torch.eye(width, dtype=self.matrix.dtype, device=self.matrix.device)
        return multiplied_out(self.linear(identity))

    def aggregate(self, messages: Tensor | ScaledRows, aggregator: str) -> Tensor:
        """The sum (`add`) or the mean of what comes to each receiver, [B, R, D] or [R, D]."""
        return self.sum(messages) if aggregator == "add" else self.mean(messages)

    @abstractmethod
    def context(self) -> EdgeContext:
        """What the ends of the edges belong to, for modules in their plain form: edges flattened."""

    @property
    @abstractmethod
    def rows(self) -> Rows:
        """The receivers, by network or, of sparse blocks, by edge."""

    @property
    @abstractmethod
    def num_edges(self) -> int:
        """All of them."""

    @property
    @abstractmethod
    def receivers_shape(self) -> torch.Size:
        """(B, R) or (R,)."""

    @abstractmethod
    def parts(
        self, num_edges: int, senders: Tensor | None, receivers: Tensor | None, extra: Tensor | GatheredRows | None
    ) -> Sequence[Sequence[tuple[Edges, Tensor | None, Tensor | None, Tensor | GatheredRows | None]]]:
        """Cuts the block into parts of about `num_edges` edges: of some networks (outer list) and of some receivers
        (inner list). Each comes with the rows of senders and receivers, and the `extra` rows, that it reads."""

    @abstractmethod
    def _of_edges(self, x: Tensor) -> Tensor | GatheredRows:
        """Rows that belong to `matrix` or `shift`, on their edges."""

    @abstractmethod
    def _product(self, matrix: Tensor) -> Tensor:
        """matrix @ values, for matrices that differ between edges."""


@dataclass(frozen=True)
class DenseEdges(Edges):
    """All edges from one layer of nodes to another, of B networks of one architecture, S to each receiver.

    Attributes:
        values: [B, R, S, K]; where `matrix` is None [B, R, S, D].
        matrix: [R or 1, S or 1, D, K].
        shift: [R or 1, S or 1, D]; None: zero.
        updates: as in `Edges`.
        receivers: what they belong to.
        senders: the same of the senders.
        sender: [R, S] long, where receivers have different senders (layers with groups), their rows; None: all rows
            send to all receivers.
    """

    receivers: Rows = field(kw_only=True)
    senders: Rows = field(kw_only=True)
    sender: Tensor | None = None

    def context(self) -> EdgeContext:
        """See `Edges`."""
        shape, device = self.values.shape[:3], self.values.device
        return EdgeContext(*(rows.context(shape, device) for rows in (self.receivers, self.senders)))

    @property
    def rows(self) -> Rows:
        """The receivers, by network."""
        return self.receivers

    @property
    def num_edges(self) -> int:
        """B R S."""
        return self.values.shape[:3].numel()

    @property
    def receivers_shape(self) -> torch.Size:
        """(B, R)."""
        return self.values.shape[:2]

    @property
    def degree(self) -> int:
        """S."""
        return self.values.shape[2]

    def at_senders(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [B, 1, S, ...] or, where receivers have different senders, [B, R, S, ...]."""
        return x[:, None] if self.sender is None else self._gathered(x)

    def at_receivers(self, x: Tensor) -> Tensor:
        """[B, R, ...] -> [B, R, 1, ...]."""
        return x[:, :, None]

    def of_senders(self, p: Tensor) -> Tensor:
        """[S or 1, ...] -> [1, S or 1, ...] or, where receivers have different senders, [R, S, ...]."""
        return p[None] if self.sender is None or len(p) == 1 else self._gathered(p[None])[0]

    def of_receivers(self, p: Tensor) -> Tensor:
        """[R or 1, ...] -> [R or 1, 1, ...]."""
        return p[:, None]

    def times_senders(self, x: Tensor | ScaledRows, sent: Tensor) -> Tensor | ScaledRows:
        """x * sent [B, S, D]."""
        return times(x, self.at_senders(sent))

    def sum(self, messages: Tensor | ScaledRows) -> Tensor:
        """[B, R, S, D] -> [B, R, D]."""
        return messages.sum_senders() if isinstance(messages, ScaledRows) else messages.sum(2)

    def mean(self, messages: Tensor | ScaledRows) -> Tensor:
        """[B, R, S, D] -> [B, R, D]."""
        return self.sum(messages) / self.degree

    def parts(
        self, num_edges: int, senders: Tensor | None, receivers: Tensor | None, extra: Tensor | GatheredRows | None
    ) -> list[list[tuple[DenseEdges, Tensor | None, Tensor | None, Tensor | None]]]:
        """See `Edges`; extra [R or 1, S or 1, ...]."""
        assert not isinstance(extra, GatheredRows)  # as `of_senders` and `of_receivers`
        num_networks, num_receivers, num_senders = self.values.shape[:3]
        networks = max(1, num_edges // (num_receivers * num_senders))
        # work that a part does once per sender should cost less than its work per edge
        width = min(num_receivers, max(4, num_edges // num_senders))
        sent: Sequence[Tensor | None] = [None] * num_networks if senders is None else senders.split(networks)
        received: Sequence[Tensor] = () if receivers is None else receivers.split(networks)
        return [
            [
                (
                    part,
                    sent[row],
                    None if receivers is None else received[row][:, column * width : (column + 1) * width],
                    _receivers(extra, column * width, width),
                )
                for column, part in enumerate(parts)
            ]
            for row, parts in enumerate(self.split(networks, width))
        ]

    def split(self, networks: int, receivers: int) -> list[list[DenseEdges]]:
        """Cuts the block into parts of `networks` networks (outer list) and `receivers` receivers (inner list)."""

        def parts(tensor: Tensor) -> list[tuple[Tensor, ...]]:
            return [part.split(receivers, dim=1) for part in tensor.split(networks)]

        values = parts(self.values)
        updates = [(u, u.senders.split(networks), parts(u.receivers)) for u in self.updates]
        return [
            [
                DenseEdges(
                    part,
                    _receivers(self.matrix, column * receivers, receivers),
                    _receivers(self.shift, column * receivers, receivers),
                    tuple(u._replace(senders=s[row], receivers=r[row][column]) for u, s, r in updates),
                    receivers=self.receivers.part(row * networks, row * networks + len(part)),
                    senders=self.senders.part(row * networks, row * networks + len(part)),
                    sender=_receivers(self.sender, column * receivers, receivers),
                )
                for column, part in enumerate(columns)
            ]
            for row, columns in enumerate(values)
        ]

    def _gathered(self, x: Tensor) -> Tensor:
        """Rows of senders, [B, n, ...] -> [B, R, S, ...]."""
        assert self.sender is not None
        return x.index_select(1, self.sender.flatten()).unflatten(1, self.sender.shape)

    def _of_edges(self, x: Tensor) -> Tensor:
        return x[None]

    def _product(self, matrix: Tensor) -> Tensor:
        return torch.einsum("rsdk,brsk->brsd", matrix.expand(*self.values.shape[1:3], -1, -1), self.values)


@dataclass(frozen=True)
class EdgeIndex:
    """The rows of the sender and of the receiver of each edge.

    Attributes:
        sender: [E] long.
        receiver: [E] long, ascending.
        type: [E] long.
        num_receivers: R.
        rows: the receivers, by edge.
        ends: what the ends of each edge belong to, where a module in its plain form needs it.
    """

    sender: Tensor
    receiver: Tensor
    type: Tensor
    num_receivers: int
    rows: Rows
    ends: EdgeContext | None = None

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.receiver)

    @cached_property
    def degree(self) -> Tensor:
        """[R, 1], edges to each receiver."""
        return self.receiver.bincount(minlength=self.num_receivers)[:, None]

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Type and sender of each pair that occurs, [P] long, and the pair of each edge, [E] long."""
        num_senders = int(self.sender.max()) + 1 if len(self.sender) else 0
        pairs, pair = (self.type * num_senders + self.sender).unique(return_inverse=True)
        return pairs // num_senders, pairs % num_senders, pair

    @cached_property
    def by_type(self) -> ByTypes:
        """The edges, type by type."""
        return ByTypes.of(self.type)

    def parts(self, num_edges: int) -> list[tuple[slice, slice, EdgeIndex]]:
        """Cuts the edges into parts of about `num_edges`, each with all edges of its receivers.

        Returns:
            Per part, its edges, its receivers, and its index.
        """
        starts = nn.functional.pad(self.receiver.bincount(minlength=self.num_receivers).cumsum(0), (1, 0)).cpu()
        last = max(self.num_edges, num_edges)
        cuts = torch.searchsorted(starts, torch.arange(num_edges, last, num_edges)).unique()
        cuts = cuts[starts[cuts] < self.num_edges]
        receivers = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), self.num_receivers)])
        edges = starts[receivers].tolist()
        return [
            (slice(*some), slice(*rows), self._part(slice(*some), slice(*rows)))
            for some, rows in zip(pairwise(edges), pairwise(receivers.tolist()), strict=True)
        ]

    def _part(self, edges: slice, receivers: slice) -> EdgeIndex:
        """Some of the edges."""
        return EdgeIndex(
            self.sender[edges],
            self.receiver[edges] - receivers.start,
            self.type[edges],
            receivers.stop - receivers.start,
            self.rows.part(edges.start, edges.stop),
            None if self.ends is None else EdgeContext(self.ends.receiver[edges], self.ends.sender[edges]),
        )


class ByTypes(NamedTuple):
    """Rows of several types, type by type."""

    order: Tensor
    """[E] long, the rows of the first type, then those of the next."""

    sizes: list[int]
    """How many there are of each."""

    @classmethod
    def of(cls, types: Tensor) -> ByTypes:
        """Of rows of these types, [E] long."""
        return cls(types.argsort(stable=True), types.bincount().tolist())

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """weight[type] x for each row: [E, K] and [T, D, K] -> [E, D]."""
        parts = x.index_select(0, self.order).split(self.sizes)
        new = torch.cat([nn.functional.linear(part, own) for part, own in zip(parts, weight, strict=False)])
        return new.index_select(0, self.order.argsort())


def sum_rows(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """The sum of all rows with one index, [..., n, D] and [n] long -> [..., num_rows, D]; in mixed precision in
    float32, as torch's own sums."""
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.float()
    return rows.new_zeros(*rows.shape[:-2], num_rows, rows.shape[-1]).index_add(-2, index, rows)


def linear_by_type(x: Tensor, weight: Tensor, types: Tensor) -> Tensor:
    """weight[type] x for each row: [n, K], [T, D, K] (T = 1: the same for all types) and [n] -> [n, D]."""
    return nn.functional.linear(x, weight[0]) if len(weight) == 1 else ByTypes.of(types).linear(x, weight)


@dataclass(frozen=True)
class SparseEdges(Edges):
    """Edges of networks of any architectures, whose ends are rows of all networks.

    Attributes:
        values: [E, K]; where `matrix` is None [E, D].
        matrix: [T or 1, D, K], by type.
        shift: [T, D], by type; None: zero.
        updates: as in `Edges`.
        incidence: the ends.
    """

    incidence: EdgeIndex = field(kw_only=True)

    @property
    def rows(self) -> Rows:
        """The receivers, by edge."""
        return self.incidence.rows

    def context(self) -> EdgeContext:
        """See `Edges`."""
        assert self.incidence.ends is not None  # the layout was told that a module needs it
        return self.incidence.ends

    @property
    def num_edges(self) -> int:
        """E."""
        return len(self.values)

    @property
    def receivers_shape(self) -> torch.Size:
        """(R,)."""
        return torch.Size([self.incidence.num_receivers])

    @property
    def degree(self) -> Tensor:
        """[R, 1]."""
        return self.incidence.degree

    def at_senders(self, x: Tensor) -> Tensor:
        """[S, ...] -> [E, ...]."""
        return x.index_select(0, self.incidence.sender)

    def at_receivers(self, x: Tensor) -> Tensor:
        """[R, ...] -> [E, ...]."""
        return x.index_select(0, self.incidence.receiver)

    def of_senders(self, p: Tensor) -> GatheredRows:
        """[S, ...] -> [E, ...]."""
        return GatheredRows(p, self.incidence.sender)

    def of_receivers(self, p: Tensor) -> GatheredRows:
        """[R, ...] -> [E, ...]."""
        return GatheredRows(p, self.incidence.receiver)

    def times_senders(self, x: Tensor | ScaledRows, sent: Tensor) -> Tensor | ScaledRows:
        """x * sent [S, D]; where x is a vector per type times a number, once per pair of a type and a sender."""
        if not isinstance(x, ScaledRows):
            return x * self.at_senders(sent)
        types, senders, pair = self.incidence.pairs
        vectors = x.values.values.index_select(0, types) if isinstance(x.values, GatheredRows) else x.values
        return ScaledRows(GatheredRows(vectors * sent.index_select(0, senders), pair), x.scale)

    def sum(self, messages: Tensor | ScaledRows) -> Tensor:
        """[E, D] -> [R, D]."""
        messages = messages.product() if isinstance(messages, ScaledRows) else messages
        return sum_rows(messages, self.incidence.receiver, self.incidence.num_receivers)

    def mean(self, messages: Tensor | ScaledRows) -> Tensor:
        """[E, D] -> [R, D]."""
        return self.sum(messages) / self.degree.clamp_min(1)

    def parts(
        self, num_edges: int, senders: Tensor | None, receivers: Tensor | None, extra: Tensor | GatheredRows | None
    ) -> list[list[tuple[SparseEdges, Tensor | None, Tensor | None, GatheredRows | None]]]:
        """See `Edges`; extra as of `of_senders` and `of_receivers`."""
        assert not isinstance(extra, Tensor)
        return [
            [
                (
                    replace(self, values=self.values[edges], updates=updates, incidence=incidence),
                    senders,
                    None if receivers is None else receivers[nodes],
                    None if extra is None else GatheredRows(extra.values, extra.index[edges]),
                )
            ]
            for edges, nodes, incidence in self.incidence.parts(num_edges)
            for updates in [tuple(u._replace(receivers=u.receivers[nodes]) for u in self.updates)]
        ]

    def _of_edges(self, x: Tensor) -> Tensor | GatheredRows:
        return x if len(x) == 1 else GatheredRows(x, self.incidence.type)

    def _product(self, matrix: Tensor) -> Tensor:
        return self.incidence.by_type.linear(self.values, matrix)


def _receivers(tensor: Tensor | None, start: int, count: int) -> Tensor | None:
    """Rows of [R or 1, ...] that belong to some receivers."""
    return tensor if tensor is None or len(tensor) == 1 else tensor[start : start + count]
