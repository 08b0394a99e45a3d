"""How messages of a block of edges are computed: of all edges at once, or in chunks that stay in cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from scalegmn.engine.derivatives import once_differentiable
from scalegmn.engine.edges import Edges, EdgeUpdate
from scalegmn.engine.memory import kept_bytes, tensor_bytes
from scalegmn.engine.rows import GatheredRows


class EdgeInputs(NamedTuple):
    """What a function of a block of edges reads."""

    edges: Edges
    senders: Tensor | None = None
    """What it reads of the senders, [B, S, ...] or [S, ...]."""

    receivers: Tensor | None = None
    """What it reads of the receivers, [B, R, ...] or [R, ...]."""

    extra: Tensor | GatheredRows | None = None
    """What it reads besides, [R or 1, S or 1, ...] or, of sparse blocks, E rows."""

    def tensors(self) -> list[Tensor | None]:
        """All tensors that may have gradients."""
        edges = self.edges
        of_updates = [x for update in edges.updates for x in (update.senders, update.receivers, *update.others)]
        extra = self.extra.values if isinstance(self.extra, GatheredRows) else self.extra
        return [edges.values, edges.matrix, edges.shift, *of_updates, self.senders, self.receivers, extra]

    def holding(self, tensors: Sequence[Any]) -> EdgeInputs:
        """The same with other tensors in the order of `tensors`; with None only the structure is kept."""
        values, matrix, shift, *of_updates, senders, receivers, extra = tensors
        remaining = iter(of_updates)
        updates = tuple(
            EdgeUpdate(*update[:2], next(remaining), next(remaining), tuple(next(remaining) for _ in update.others))
            for update in self.edges.updates
        )
        extra = GatheredRows(extra, self.extra.index) if isinstance(self.extra, GatheredRows) else extra
        edges = replace(self.edges, values=values, matrix=matrix, shift=shift, updates=updates)
        return EdgeInputs(edges, senders, receivers, extra)

    def parts(self, num_edges: int) -> list[list[EdgeInputs]]:
        """The inputs of chunks, see `Edges.parts`."""
        rows = self.edges.parts(num_edges, self.senders, self.receivers, self.extra)
        return [[EdgeInputs(*part) for part in parts] for parts in rows]


EdgeFunction = Callable[[Edges, Tensor | None, Tensor | None, Tensor | GatheredRows | None], Tensor]
"""`EdgeInputs` in order -> something per receiver, [B, R, ...] or [R, ...], or per edge."""


Shape = Callable[[Edges], torch.Size]
"""A block -> the leading sizes of a function's result."""


@dataclass(frozen=True)
class ChunkPlan:
    """Whether messages of a block of edges are computed at once, or in chunks that stay in cache.

    Attributes:
        num_edges: edges in a chunk, whose intermediate results are not kept for the backward pass but computed again;
            None: all of them, and everything is kept.
        materialize: keep updated edge features; else the updates are done again wherever they are read, with new
            dropout inside their MLPs.
    """

    num_edges: int | None = None
    materialize: bool = True

    @classmethod
    def plan(cls, num_edges: int, edge_bytes: int, num_kept: int, device: torch.device) -> ChunkPlan:
        """All at once where what the backward pass needs fits the budget, else in chunks of half of `tensor_bytes`.

        Args:
            num_edges: edges of all networks.
            edge_bytes: bytes of one feature vector.
            num_kept: feature vectors per edge that a backward pass would keep.
            device: where the features are.
        """
        size, budget = num_edges * edge_bytes, kept_bytes(device)
        if torch.compiler.is_compiling() or size * num_kept <= budget:
            return cls()
        return cls(tensor_bytes(device) // 2 // edge_bytes, materialize=8 * size <= budget)

    def features(self, edges: Edges) -> Tensor:
        """Features of a block with all updates done, [B, R, S, D] or [E, D]."""
        return self.of_edges(_features, EdgeInputs(edges), [])

    def of_edges(self, function: EdgeFunction, inputs: EdgeInputs, parameters: Iterable[Tensor]) -> Tensor:
        """What a function gives for each edge of a block, [B, R, S, D] or [E, D]; arguments as in `messages`."""
        return self._map(function, lambda part: part.values.shape[:-1], inputs, parameters)

    def messages(self, function: EdgeFunction, inputs: EdgeInputs, parameters: Iterable[Tensor]) -> Tensor:
        """What a function gives to the receivers of a block, [B, R, D] or [R, D].

        Args:
            function: called for each chunk.
            inputs: what it reads, the whole block.
            parameters: other tensors with gradients that it reads.
        """
        return self._map(function, lambda part: part.receivers_shape, inputs, parameters)

    def _map(self, function: EdgeFunction, shape: Shape, inputs: EdgeInputs, parameters: Iterable[Tensor]) -> Tensor:
        """`function` of the whole block, whose leading sizes are those that `shape` tells."""
        if self.num_edges is None:
            return function(*inputs)
        parameters = list(parameters)
        for update in inputs.edges.updates:
            parameters += update.module.parameters()
        work = _Work(function, shape, inputs, self.num_edges)
        tensors = (*inputs.tensors(), *dict.fromkeys(parameters))
        return CheckpointedChunks.apply(work, *tensors)  # type: ignore[no-untyped-call]  # torch gives it no types


def _features(
    edges: Edges, senders: Tensor | None, receivers: Tensor | None, extra: Tensor | GatheredRows | None
) -> Tensor:
    """The features of a chunk of a block."""
    return edges.features()


@dataclass(frozen=True)
class _Work:
    """A function that is applied to a block chunk by chunk."""

    function: EdgeFunction
    shape: Shape
    inputs: EdgeInputs
    num_edges: int

    def cut(self, rows: Tensor, parts: Sequence[Sequence[EdgeInputs]]) -> list[Tensor]:
        """The rows of the result that belong to each part."""
        chunks = []
        for some, row in zip(parts, rows.split([self.shape(row[0].edges)[0] for row in parts]), strict=True):
            columns = [self.shape(part.edges)[1] for part in some] if len(some) > 1 else [row.shape[1]]
            chunks += row.split(columns, dim=1)
        return chunks


class CheckpointedChunks(torch.autograd.Function):
    """Applies a function chunk by chunk and keeps only its inputs: the backward pass computes each chunk again.

    It does what `torch.utils.checkpoint` does for every chunk, but writes results and gradients into tensors of the
    whole block. So all memory that a chunk allocates is free before the next chunk starts, which then gets the same
    memory; tensors that stayed would fragment it. There are no second derivatives, and hooks on parameters are called
    with the gradient of each chunk.
    """

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor | None) -> Tensor:
        """The function of the whole block; `tensors` are those of the inputs, then the parameters."""
        inputs = work.inputs
        device = inputs.edges.values.device
        ctx.work = replace(work, inputs=inputs.holding([None] * len(inputs.tensors())))
        ctx.device = device.type
        ctx.autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        ctx.cpu_state, (ctx.devices, ctx.states) = torch.get_rng_state(), get_device_states(inputs.edges.values)
        ctx.save_for_backward(*tensors)
        parts = inputs.parts(work.num_edges)
        result, chunks = None, []
        with _autocast(ctx):
            for index, part in enumerate(chain(*parts)):
                chunk = work.function(*part)
                if result is None:
                    lead = work.shape(inputs.edges)
                    result = chunk.new_empty(*lead, *chunk.shape[len(lead) :])
                    chunks = work.cut(result, parts)
                chunks[index].copy_(chunk)
        assert result is not None  # a block has at least one part
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs and parameters that need one."""
        work, tensors, needed = ctx.work, ctx.saved_tensors, ctx.needs_input_grad[1:]
        sums = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if need else x
            for x, need in zip(tensors, needed, strict=True)
        ]
        count = len(work.inputs.tensors())
        parts, of_parts = (work.inputs.holding(x[:count]).parts(work.num_edges) for x in (tensors, sums))
        gradients = work.cut(gradient, parts)
        parameters, of_parameters = (list(compress(x[count:], needed[count:])) for x in (tensors, sums))
        with torch.random.fork_rng(ctx.devices):
            torch.set_rng_state(ctx.cpu_state)
            set_device_states(ctx.devices, ctx.states)
            for part, of_part, of_result in zip(chain(*parts), chain(*of_parts), gradients, strict=True):
                leaves = [
                    x if x is None else x.detach().requires_grad_(need)
                    for x, need in zip(part.tensors(), needed, strict=False)  # the inputs come first
                ]
                with torch.enable_grad(), _autocast(ctx):
                    result = work.function(*part.holding(leaves))
                if not result.requires_grad:  # it reads none of the parameters that need gradients
                    continue
                wanted = [*compress(leaves, needed), *parameters]
                totals = [*compress(of_part.tensors(), needed), *of_parameters]
                new = torch.autograd.grad(result, wanted, of_result, allow_unused=True)
                for total, added in zip(totals, new, strict=True):
                    if added is not None:
                        total += added
        of_all = zip(sums, tensors, needed, strict=True)
        return None, *(total.to(x.dtype) if need else None for total, x, need in of_all)


def _autocast(ctx: Any) -> torch.autocast:
    """The mixed precision of the forward pass, without a cache of casts: before PyTorch's pull request 165068 the cache
    gave casts that were made without gradients to operations that need gradients."""
    enabled, dtype = ctx.autocast
    return torch.autocast(ctx.device, dtype, enabled, cache_enabled=False)
