"""Edge features of one block of a parameter graph, and how a block is worked through.

Shape letters: B networks, R receivers, S senders, D features, K raw values per edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Scaled:
    """A tensor in two factors, values * scale: linear maps act on `values`, once per node rather than once per edge.

    Attributes:
        values: [B or 1, R or 1, S or 1, D]; split only once it has B.
        scale: [B, R, S, 1].
    """

    values: Tensor
    scale: Tensor

    def product(self) -> Tensor:
        """[B, R, S, D]."""
        return self.values * self.scale

    def sum_senders(self) -> Tensor:
        """The product's sum over senders, [B, R, D]."""
        return (self.scale.transpose(2, 3) @ self.values)[:, :, 0]

    def split(self, sizes: Sequence[int]) -> list[Scaled]:
        """So many networks each."""
        return list(map(Scaled, self.values.split(sizes), self.scale.split(sizes)))


def linear(x: Tensor | Scaled, weight: Tensor, bias: Tensor | None = None) -> Tensor | Scaled:
    """W x + bias, for a bias that may be any tensor that broadcasts; `Scaled` only if x is and there is no bias."""
    if isinstance(x, Scaled):
        values = nn.functional.linear(x.values, weight)
        return Scaled(values, x.scale) if bias is None else torch.addcmul(bias, values, x.scale)
    if bias is None or bias.ndim == 1:
        return nn.functional.linear(x, weight, bias)
    return nn.functional.linear(x, weight) + bias


def linear_of_both_signs(x: Tensor | Scaled, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """W x + bias and W (-x) + bias, for W x once."""
    if isinstance(x, Scaled):
        values = nn.functional.linear(x.values, weight)
        return torch.addcmul(bias, values, x.scale), torch.addcmul(bias, values, x.scale, value=-1)
    if torch.is_autocast_enabled(x.device.type):  # rounding must not tell x from -x
        product = nn.functional.linear(x, weight)
        return bias + product, bias - product
    plus = nn.functional.linear(x, weight, bias)
    return plus, 2 * bias - plus


def times(x: Tensor | Scaled, factor: Tensor) -> Tensor | Scaled:
    """x * factor."""
    return Scaled(x.values * factor, x.scale) if isinstance(x, Scaled) else x * factor


class EdgeUpdate(NamedTuple):
    """An update of edge features that is still to be done."""

    module: nn.Module
    """Called as module(edges, senders, receivers)."""

    senders: Tensor
    """What it reads of the senders, [B, S, ...]."""

    receivers: Tensor
    """What it reads of the receivers, [B, R, ...]."""


@dataclass(frozen=True)
class EdgeBlock:
    """The features e = matrix @ values + shift of all edges from one node layer to the next, with updates still to do.

    Attributes:
        values: [B, R, S, K]; where `matrix` is None the features themselves, [B, R, S, D].
        matrix: [R or 1, S or 1, D, K].
        shift: [R or 1, S or 1, D]; None: zero.
        updates: done in turn whenever the features are read.
    """

    values: Tensor
    matrix: Tensor | None = None
    shift: Tensor | None = None
    updates: tuple[EdgeUpdate, ...] = ()

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor | Scaled:
        """W e + bias, [B, R, S, out]; `Scaled` where e is one number times a vector and nothing is added."""
        if self.updates:
            return linear(self.features(), weight, bias)
        if self.matrix is None:
            return linear(self.values, weight, bias)
        matrix = weight @ self.matrix
        if self.shift is not None:
            shift = nn.functional.linear(self.shift, weight)
            bias = shift if bias is None else bias + shift
        if matrix.shape[-1] == 1:
            vector = matrix[None, ..., 0]
            return Scaled(vector, self.values) if bias is None else torch.addcmul(bias, vector, self.values)
        if matrix.shape[:2] == (1, 1):
            return linear(self.values, matrix[0, 0], bias)
        product = torch.einsum("rsdk,brsk->brsd", matrix.expand(*self.values.shape[1:3], -1, -1), self.values)
        return product if bias is None else product + bias

    def features(self) -> Tensor:
        """e with all updates done, [B, R, S, D]; for a block that has some, or that holds its features."""
        block = replace(self, updates=())
        for update in self.updates:
            block = EdgeBlock(update.module(block, update.senders, update.receivers))
        return block.values

    def split(self, networks: int, receivers: int) -> list[list[EdgeBlock]]:
        """The block in parts of so many networks (outer list) and receivers (inner list)."""

        def parts(tensor: Tensor) -> list[tuple[Tensor, ...]]:
            return [part.split(receivers, dim=1) for part in tensor.split(networks)]

        values = parts(self.values)
        updates = [(u.module, u.senders.split(networks), parts(u.receivers)) for u in self.updates]
        return [
            [
                EdgeBlock(
                    part,
                    _receivers(self.matrix, column * receivers, receivers),
                    _receivers(self.shift, column * receivers, receivers),
                    tuple(EdgeUpdate(module, s[row], r[row][column]) for module, s, r in updates),
                )
                for column, part in enumerate(columns)
            ]
            for row, columns in enumerate(values)
        ]


def _receivers(tensor: Tensor | None, start: int, count: int) -> Tensor | None:
    """Rows of [R or 1, ...] that belong to some receivers."""
    return tensor if tensor is None or len(tensor) == 1 else tensor[start : start + count]


TENSOR = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Bytes of one feature tensor, of which there are ten or so at a time, that make full use of a kind of device; a piece
has twice as many."""


def tensor_bytes(device: torch.device) -> int:
    """The size of a feature tensor that makes full use of the device."""
    return TENSOR.get(device.type, TENSOR["cpu"])


def kept_bytes(device: torch.device) -> int:
    """Bytes of intermediate results that a forward pass may keep for its backward pass."""
    return torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else 960 << 20


EdgeFunction = Callable[[int, EdgeBlock, Tensor | None, Tensor | None], Tensor]
"""(num_odd, edges, senders, extra) -> something per receiver, [B, R, ...]."""


@dataclass(frozen=True)
class Pieces:
    """How a block of edges is worked through: at once, or in pieces that stay in cache.

    Attributes:
        num_edges: edges in a piece; None: all of them.
        recompute: do not keep a piece's intermediate results for the backward pass, compute them again.
        materialize: keep updated edge features; else the updates are done again wherever they are read, with new
            dropout inside their MLPs.
    """

    num_edges: int | None = None
    recompute: bool = False
    materialize: bool = True

    @classmethod
    def plan(cls, num_edges: int, edge_bytes: int, num_kept: int, device: torch.device) -> Pieces:
        """All at once where what the backward pass needs fits the budget, else in pieces.

        Args:
            num_edges: edges of all networks.
            edge_bytes: bytes of one feature vector.
            num_kept: feature vectors per edge that a backward pass would keep.
            device: where the features are.
        """
        size, budget = num_edges * edge_bytes, kept_bytes(device)
        if torch.compiler.is_compiling() or size * num_kept <= budget:
            return cls()
        return cls(2 * tensor_bytes(device) // edge_bytes, recompute=True, materialize=8 * size <= budget)

    def map(
        self,
        function: EdgeFunction,
        num_odd: int,
        edges: EdgeBlock,
        senders: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """`function` of a whole block, [B, R, ...].

        Args:
            function: called for each piece.
            num_odd: as in `Rows`.
            edges: the block.
            senders: what the function reads of the senders, [B, S, ...].
            extra: what it reads besides, [R or 1, S or 1, ...].
        """
        num_networks, num_receivers, num_senders = edges.values.shape[:3]
        if self.num_edges is None or num_networks * num_receivers * num_senders <= self.num_edges:
            return self._run(function, num_odd, edges, senders, extra)
        networks = max(1, self.num_edges // (num_receivers * num_senders))
        # what is done once per sender and piece should not outweigh what is done per edge
        receivers = min(num_receivers, max(16, self.num_edges // num_senders))
        sent = [None] * num_networks if senders is None else senders.split(networks)
        rows = []
        for row, parts in enumerate(edges.split(networks, receivers)):
            odd = min(max(num_odd - row * networks, 0), len(parts[0].values))
            pieces = [
                self._run(function, odd, part, sent[row], _receivers(extra, column * receivers, receivers))
                for column, part in enumerate(parts)
            ]
            rows.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1))
        return torch.cat(rows)

    def _run(self, function: EdgeFunction, *inputs: int | EdgeBlock | Tensor | None) -> Tensor:
        """One piece."""
        if self.recompute and torch.is_grad_enabled():
            edges = inputs[1]
            # a tensor among its arguments tells `checkpoint` on which device random numbers are drawn
            return checkpoint(lambda _: function(*inputs), edges.values, use_reentrant=False)
        return function(*inputs)
