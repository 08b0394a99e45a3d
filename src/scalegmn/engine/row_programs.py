"""Programs of rowwise operations: rows pass through several modules in one call, tile by tile, while they are in cache.

A `RowProgram` is written once per module, operation by operation, and run by `row_programs.cpp`, with its gradient.
Numbers are those of the parameters, double or single precision; under autocast to bfloat16, on processors that multiply
such numbers, matrix products are in bfloat16, all else in single precision.

Shape letters: B networks, R receivers, S senders, D features; rows of nodes are blocks with S = 1.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from scalegmn.engine import native
from scalegmn.engine.derivatives import once_differentiable

LANES = 16
"""Widths are multiples of it."""

WIDEST = 512
"""The largest width."""

POINTS = {torch.float32: 10, torch.float64: 16}
"""Rows of a table between which a value is interpolated, as in row_programs.cpp."""

FILLING = 32
"""The most rows that a tile is filled up with, as in row_programs.cpp."""

NUM_STATISTICS = 6
"""Sum, sum of squares, minimum, how many have it, maximum, how many have it."""

Value = int
"""A value of a program: rows [B, R, S, width], by number."""


class Nodes(NamedTuple):
    """Whose statistics a program of a plan computes."""

    index: Tensor  # type: ignore[assignment]  # not the method of tuples
    """[R] long, the node of each receiver."""

    num_nodes: int
    """N."""


class Pointer(NamedTuple):
    """An address that is known when programs run."""

    base: int
    """Which of the addresses that are given then."""

    offset: int
    """How many bytes from there."""


Address = int | Pointer


class GradientPlace(NamedTuple):
    """Where an input's gradient is."""

    address: Address = 0
    """0: it is not needed."""

    is_half: bool = False
    """Whether it is in bfloat16."""

    adds: int = 0
    """0: it is written; 1: added; 2: added by all threads, since networks share the input."""

    strides: tuple[int, ...] = (0, 0, 0)
    """Numbers between networks, receivers and senders; 0 where they share rows."""

    size: int = 0
    """How many numbers it has."""


class InputPlace(NamedTuple):
    """Where an input's rows are."""

    address: Address
    width: int
    strides: tuple[int, ...]
    """As of `GradientPlace`."""

    is_half: bool
    """Whether they are in bfloat16."""

    index: Address = 0  # type: ignore[assignment]  # not the method of tuples
    """0: rows are not indexed."""

    num_rows: int = 0
    """Of an indexed input."""

    gradient: GradientPlace = GradientPlace()


class ResultPlace(NamedTuple):
    """Where a program's result is, and its gradient."""

    address: Address
    is_half: bool
    """Whether it is in bfloat16."""

    strides: tuple[int, ...]
    """As of `GradientPlace`; the gradient's are the same."""

    gradient: Address = 0
    gradient_is_half: bool = False


class Numbers(NamedTuple):
    """How a program computes."""

    dtype: torch.dtype
    halves: bool
    """Whether products are in bfloat16."""

    num_threads: int


class Vector(NamedTuple):
    """A vector, or a matrix, that a program reads: by number."""

    number: int
    rows: int
    columns: int


class _Code(IntEnum):
    """As in row_programs.cpp."""

    LOAD = 0
    LINEAR = 1
    ADD = 2
    SUBTRACT = 3
    MULTIPLY = 4
    MODULATE = 5
    GATE = 6
    SCALE = 7
    SILU_BOTH = 8
    NORM_SILU = 9
    NORM_SILU_BOTH = 10
    SILU = 11
    INTERPOLATE = 12
    AGGREGATE = 13
    JOIN = 14
    STORE = 15
    SUM = 16
    STATISTICS = 17


class _Kind(IntEnum):
    """As in row_programs.cpp."""

    TENSOR = 0
    PRODUCT = 1
    SHIFTED = 2
    STACKED = 3


def available(x: Tensor) -> bool:
    """Whether programs can run on rows like x."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap and its like run operations one by one
        and native.library() is not None
    )


def multiplies_halves(dtype: torch.dtype) -> bool:
    """Whether the products of numbers of a type are in bfloat16 now."""
    return (
        dtype == torch.float32
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and native.multiplies_halves()
    )


class RowProgram:
    """Operations on the rows of a block, and what they read: inputs, rows that broadcast to [B, R, S, D], in the order
    of `load`; tensors that are given with each run; and parameters of modules.

    Args:
        keeps: what `tape_width` counts for the backward pass, which else computes it again.
    """

    def __init__(self, keeps: bool = True) -> None:
        self.keeps = keeps
        self.num_inputs = 0
        self.num_given = 0
        self.extra_width = 0
        self.extras: list[ref[nn.Linear]] = []
        self.num_kept = self.num_moments = 0
        self.tensors: list[tuple[ref[nn.Module], str] | None] = []
        self._places: dict[tuple[int, str], int] = {}
        self._parameters: list[tuple[_Kind, int, int, int, int, int, int]] = []
        self._operations: list[tuple[int, int, int, int, int, int, int]] = []
        self._widths: list[int] = []

    # Parameters

    def parameter(self, module: nn.Module, name: str, start: int = 0, stop: int | None = None) -> Vector:
        """A parameter of a module; of a matrix, its columns from `start` to `stop`."""
        tensor = getattr(module, name)
        key = (id(module), name)
        if key not in self._places:
            self._places[key] = len(self.tensors)
            self.tensors.append((ref(module), name))
        return self._tensor(self._places[key], tensor.shape, start, stop)

    def given(self, shape: Sequence[int]) -> Vector:
        """A tensor that is given with each run, in this order and before the parameters."""
        assert len(self.tensors) == self.num_given
        self.num_given += 1
        self.tensors.append(None)
        return self._tensor(len(self.tensors) - 1, shape, 0, None)

    def product(self, first: Vector, second: Vector) -> Vector:
        """The product of two matrices."""
        return self._parameter(_Kind.PRODUCT, first.rows, second.columns, first.number, second.number)

    def shifted(self, first: Vector | None, matrix: Vector, second: Vector, factor: int) -> Vector:
        """a + factor M b; without a, factor M b."""
        number = -1 if first is None else first.number
        return self._parameter(_Kind.SHIFTED, 1, matrix.rows, number, matrix.number, second.number, factor)

    def stacked(self, first: Vector, second: Vector) -> Vector:
        """The rows of two matrices, or the numbers of two vectors."""
        rows, columns = first.rows + second.rows, first.columns
        if first.rows == second.rows == 1:
            rows, columns = 1, first.columns + second.columns
        return self._parameter(_Kind.STACKED, rows, columns, first.number, second.number)

    def _tensor(self, place: int, shape: Sequence[int], start: int, stop: int | None) -> Vector:
        rows, columns = (1, shape[0]) if len(shape) == 1 else shape
        return self._parameter(_Kind.TENSOR, rows, (columns if stop is None else stop) - start, place, start)

    def _parameter(self, kind: _Kind, rows: int, columns: int, first: int, *more: int) -> Vector:
        second, third, factor = (*more, 0, 0, 0)[:3]
        self._parameters.append((kind, rows, columns, first, second, third, factor))
        return Vector(len(self._parameters) - 1, rows, columns)

    # Operations

    def extra(self, linear: nn.Linear) -> Value:
        """What a Linear, with its bias, makes of the last `extra_width` columns of its input, which are the extras of
        each run: computed before it, for they are the same for many rows."""
        self.extras.append(ref(linear))
        return self.load(linear.out_features)

    def load(self, width: int) -> Value:
        """The rows of the next input."""
        self.num_inputs += 1
        return self._operation(_Code.LOAD, width, self.num_inputs - 1)

    def load_sum(self, width: int) -> Value:
        """The sum of the rows of the next two inputs."""
        self.num_inputs += 2
        return self._operation(_Code.LOAD, width, self.num_inputs - 2, self.num_inputs - 1)

    def load_joined(self, widths: Sequence[int]) -> Value:
        """The rows of the next inputs, side by side."""
        self.num_inputs += len(widths)
        return self._operation(_Code.JOIN, sum(widths), self.num_inputs - len(widths), len(widths))

    def linear(self, x: Value, weight: Vector, bias: Vector | None = None) -> Value:
        """W x + b."""
        assert self._widths[x] == weight.columns
        self.num_kept += weight.rows
        return self._operation(_Code.LINEAR, weight.rows, x, -1, weight.number, -1 if bias is None else bias.number)

    def add(self, x: Value, y: Value) -> Value:
        """x + y."""
        return self._operation(_Code.ADD, self._widths[x], x, y)

    def multiply(self, x: Value, y: Value) -> Value:
        """x * y."""
        return self._operation(_Code.MULTIPLY, self._widths[x], x, y)

    def modulate(self, x: Value, y: Value) -> Value:
        """gamma * y + beta for x = [gamma, beta]."""
        assert self._widths[x] == 2 * self._widths[y]
        return self._operation(_Code.MODULATE, self._widths[y], x, y)

    def gate(self, x: Value, y: Value) -> Value:
        """sigmoid(x) * y."""
        return self._operation(_Code.GATE, self._widths[x], x, y)

    def interpolate(self, x: Value, table: Vector) -> Value:
        """The value at f, from 0 to 1, for x = (k, f): of the polynomial through rows k to k + p - 1 of a table, p
        being `POINTS`, between the two in their middle. x has no gradient."""
        return self._operation(_Code.INTERPOLATE, table.columns, x, -1, table.number)

    def aggregate(self, x: Value, share: Value, least_variance: float) -> Value:
        """[mean, minimum, maximum, standard deviation] from `NUM_STATISTICS` of n rows and 1 / n; smaller variances
        are 0."""
        width = 4 * self._widths[x] // NUM_STATISTICS
        return self._operation(_Code.AGGREGATE, width, x, share, more=bits(least_variance))

    def scale(self, x: Value, factor: Value) -> Value:
        """x times a factor of width 1."""
        return self._operation(_Code.SCALE, self._widths[x], x, factor)

    def norm_silu(self, x: Value, norm: nn.LayerNorm) -> Value:
        """SiLU(LayerNorm(x))."""
        scale, shift = (self.parameter(norm, name).number for name in ("weight", "bias"))
        self.num_moments += 2  # mean and deviation
        return self._operation(_Code.NORM_SILU, self._widths[x], x, -1, scale, shift, bits(norm.eps))

    def silu_of_both_signs(self, vector: Vector, x: Value, norm: nn.LayerNorm | None) -> Value:
        """SiLU(LayerNorm(v + x)) + SiLU(LayerNorm(v - x)); without a norm, SiLU(v + x) + SiLU(v - x)."""
        if norm is None:
            return self._operation(_Code.SILU_BOTH, self._widths[x], x, vector.number)
        scale, shift = (self.parameter(norm, name).number for name in ("weight", "bias"))
        self.num_moments += 3  # mean, and the deviation of each sign
        return self._operation(_Code.NORM_SILU_BOTH, self._widths[x], x, vector.number, scale, shift, bits(norm.eps))

    def silu(self, x: Value) -> Value:
        """SiLU(x)."""
        return self._operation(_Code.SILU, self._widths[x], x)

    def store(self, x: Value, halves: bool = False) -> RowProgram:
        """The program, whose result is x, [B, R, S, D]; with `halves`, in bfloat16 where its products are."""
        return self._end(_Code.STORE, x, halves)

    def sum(self, x: Value) -> RowProgram:
        """The program, whose result is the sum of x over senders, [B, R, D]."""
        return self._end(_Code.SUM, x, False)

    def statistics(self, x: Value) -> RowProgram:
        """The program, whose result is `NUM_STATISTICS` of x over each node's receivers, [B, N, 6, D], zeros where
        there are none; gradients of minima and maxima are shared among the rows that have them."""
        return self._end(_Code.STATISTICS, x, False)

    def _operation(
        self, code: _Code, width: int, first: int, second: int = -1, p: int = -1, q: int = -1, more: int = 0
    ) -> Value:
        self._operations.append((code, len(self._widths), first, second, p, q, more))
        self._widths.append(width)
        return len(self._widths) - 1

    def _end(self, code: _Code, x: Value, halves: bool) -> RowProgram:
        self._operations.append((code, -1, x, -1, -1, -1, 0))
        self.end, self.rounds, self.width = code, halves, self._widths[x]
        self._tail = [word for operation in self._operations for word in operation] + self._widths
        return self

    @property
    def ends_with_rows(self) -> bool:
        """Whether the result has a row for each of a block, [B, R, S, D]."""
        return self.end == _Code.STORE

    # Running

    @property
    def is_alive(self) -> bool:
        """Whether there are still all modules whose parameters it reads."""
        return all(place is None or place[0]() is not None for place in self.tensors)

    def __call__(
        self,
        shape: Sequence[int],
        inputs: Sequence[Tensor],
        given: Sequence[Tensor] = (),
        extra: Tensor | None = None,
    ) -> Tensor:
        """The program's result for a block [B, R, S]; `extra` broadcasts to [B, R, S, extra_width]. Statistics are for
        plans alone.

        Raises:
            ValueError: inputs or parameters do not fit.
        """
        assert self.end != _Code.STATISTICS
        if extra is not None:
            inputs = [*inputs, *(_of_extra(linear(), extra) for linear in self.extras)]
        parameters = [*given]
        for place in self.tensors[self.num_given :]:
            assert place is not None
            module = place[0]()
            assert module is not None  # the program is kept no longer than its module
            parameters.append(getattr(module, place[1]))
        dtype, shape, blocks = parameters[0].dtype, tuple(shape), []
        for x in inputs:
            rows = x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x
            if rows.dtype != dtype and (rows.dtype != torch.bfloat16 or rows.shape[-1] % LANES):
                rows = rows.to(dtype)
            blocks.append(rows if rows.stride(-1) == 1 else rows.contiguous())
        if not all(
            n in (1, m) for x in blocks for n, m in zip(x.shape, shape, strict=False)
        ):  # of rows, also their width
            raise ValueError(f"inputs of shapes {[[*x.shape] for x in blocks]} do not fit a block {[*shape]}")
        result: Tensor = _Run.apply(self, shape, torch.is_grad_enabled(), *blocks, *parameters)  # type: ignore[no-untyped-call]
        return result

    def execute(
        self,
        shape: tuple[int, ...],
        tensors: Sequence[Tensor],
        result: Tensor,
        tape: Tensor | None,
        halves: bool,
        num_threads: int,
        gradient: Tensor | None = None,
        needed: Sequence[bool] | None = None,
    ) -> list[Tensor | None]:
        """Computes the result or, from its gradient, those inputs' and parameters' that are needed.

        Raises:
            ValueError: the tensors are none that the program can run on.
        """
        dtype, count = tensors[-1].dtype, self.num_inputs
        gradients: list[Tensor | None] = [None] * len(tensors)
        inputs = []
        for index, tensor in enumerate(tensors[:count]):
            size = tensor.shape
            place = InputPlace(tensor.data_ptr(), size[3], _strides(tensor), tensor.dtype == torch.bfloat16)
            if needed is not None and needed[index]:
                is_whole = size[:3] == shape
                of_it = torch.empty(size, dtype=tensor.dtype) if is_whole else torch.zeros(size, dtype=dtype)
                adds = 0 if is_whole else 2 if size[0] == 1 < shape[0] else 1
                is_half, gradients[index] = of_it.dtype == torch.bfloat16, of_it
                of_input = GradientPlace(of_it.data_ptr(), is_half, adds, _strides(of_it), of_it.numel())
                place = place._replace(gradient=of_input)
            inputs.append(place)
        if needed is not None:
            for index in range(count, len(tensors)):
                if needed[index]:
                    gradients[index] = torch.zeros(tensors[index].shape, dtype=dtype)
        shapes = [tensor.shape for tensor in tensors[count:]]
        self.check_parameters(shapes)
        addresses = [
            (tensor.data_ptr(), 0 if found is None else found.data_ptr())
            for tensor, found in zip(tensors[count:], gradients[count:], strict=True)
        ]
        strides = _strides(result if self.ends_with_rows else result.unsqueeze(2))
        place_of_result = ResultPlace(result.data_ptr(), result.dtype == torch.bfloat16, strides)
        if gradient is not None:
            is_half = gradient.dtype == torch.bfloat16
            place_of_result = place_of_result._replace(gradient=gradient.data_ptr(), gradient_is_half=is_half)
        words = self.words(
            Numbers(dtype, halves, num_threads),
            shape,
            inputs,
            list(zip(shapes, addresses, strict=True)),
            place_of_result,
            0 if tape is None else tape.data_ptr(),
            self.flags(needed) if needed is not None else None,
        )
        packed = array("q", words)
        library = native.library()
        assert library is not None
        if library.run_program(ctypes.c_void_p(packed.buffer_info()[0]), ctypes.c_int64(needed is not None)):
            widths = [tensor.shape[-1] for tensor in tensors[:count]]
            raise ValueError(f"inputs of widths {widths} do not fit their program")
        return gradients

    def check_parameters(self, shapes: Sequence[torch.Size]) -> None:
        """Raises ValueError if parameters, in order, do not have the shapes that they had."""
        for kind, rows, columns, first, start, _, _ in self._parameters:
            if kind == _Kind.TENSOR:
                shape = shapes[first]
                if shape.numel() != rows * shape[-1] or start + columns > shape[-1]:
                    raise ValueError(f"found a parameter of shape {[*shape]}, expected {rows} rows of {columns}")

    def words(
        self,
        numbers: Numbers,
        shape: Sequence[int],
        inputs: Sequence[InputPlace],
        parameters: Sequence[tuple[torch.Size, tuple[Address, Address]]],
        result: ResultPlace,
        tape: Address,
        flags: Sequence[bool] | None,
        nodes: Nodes | None = None,
    ) -> list[Any]:
        """What row_programs.cpp reads.

        Args:
            numbers: their types.
            shape: (B, R, S).
            inputs: where they are.
            parameters: shape of each, where it is, and where its gradient is, or 0.
            result: where it is.
            tape: where it is, or 0.
            flags: as `flags` says; None: forward.
            nodes: of statistics.
        """
        dtype, halves, num_threads = numbers
        words: list[Any] = [dtype == torch.float64, halves, *shape]
        words += [self.num_inputs, len(self._parameters), len(self._operations), len(self._widths)]
        words += [num_threads, result.address, result.is_half, *result.strides, tape, self.tape_width(halves)]
        words += [result.gradient, result.gradient_is_half]
        words += [0, 0] if nodes is None else [nodes.index.data_ptr(), nodes.num_nodes]
        for place in inputs:
            words += (place.address, place.width, *place.strides, place.is_half, place.index, place.num_rows)
            words += (*place.gradient[:3], *place.gradient.strides, place.gradient.size)
        for kind, rows, columns, first, second, third, factor in self._parameters:
            if kind != _Kind.TENSOR:
                words += (0, rows, columns, 0, 0, kind, first, second, third, factor)
                continue
            of_parameter, (address, gradient) = parameters[first]
            address, gradient = (_after(start, second * dtype.itemsize) for start in (address, gradient))
            words += (address, rows, columns, of_parameter[-1], gradient, kind, 0, 0, 0, 0)
        words += self._tail
        words += [0] * len(self._widths) if flags is None else flags
        return words

    def flags(self, needed: Sequence[bool]) -> list[bool]:
        """Whether the gradient of each value is needed, for those of inputs and parameters that are."""
        parameters = any(needed[self.num_inputs :])
        flags: list[bool] = []
        for code, _, first, second, _, _, _ in self._operations[:-1]:
            if code == _Code.LOAD:
                flags.append(needed[first] or (second >= 0 and needed[second]))
            elif code == _Code.JOIN:
                flags.append(any(needed[first : first + second]))
            else:
                flags.append(parameters or flags[first] or (_Code.ADD <= code <= _Code.SCALE and flags[second]))
        return flags

    def allocate(
        self, shape: tuple[int, ...], dtype: torch.dtype, halves: bool, keeps: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Memory of the result, and of what the backward pass reads."""
        kept = torch.bfloat16 if halves else dtype
        if self.end == _Code.SUM:
            output = torch.empty(*shape[:2], self.width, dtype=dtype)
        else:
            output = torch.empty(*shape, self.width, dtype=kept if self.rounds else dtype)
        size = self.tape_size(shape, halves, torch.get_num_threads())
        return output, torch.empty(size, dtype=dtype) if keeps and size else None

    def tape_width(self, halves: bool) -> int:
        """How many numbers of each row are kept: moments of norms and the results of linear maps; with products in
        bfloat16, which take less time than to write and read their results, moments alone."""
        return (self.num_moments + (0 if halves else self.num_kept)) if self.keeps else 0

    def tape_size(self, shape: Sequence[int], halves: bool, num_threads: int) -> int:
        """How many numbers a tape has: tiles are filled up, the last one of each thread too."""
        return (shape[0] * shape[1] * shape[2] + FILLING * num_threads) * self.tape_width(halves)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Numbers between networks, receivers and senders of rows [B, R, S, D]; 0 where there is one of them."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape[:3], x.stride(), strict=False))


def _after(address: Address, num_bytes: int) -> Address:
    """So many bytes after an address; 0 stays."""
    if isinstance(address, Pointer):
        return Pointer(address.base, address.offset + num_bytes)
    return address and address + num_bytes


def _of_extra(linear: nn.Linear | None, extra: Tensor) -> Tensor:
    """See `RowProgram.extra`."""
    assert linear is not None  # the program is kept no longer than its module
    with torch.autocast("cpu", enabled=False):
        columns = linear.weight[:, linear.in_features - extra.shape[-1] :]
        return nn.functional.linear(extra.to(columns.dtype), columns, linear.bias)


def bits(number: float) -> int:
    """A double as a word."""
    word: int = struct.unpack("q", struct.pack("d", number))[0]
    return word


class _Run(torch.autograd.Function):
    """Runs a program. There are no second derivatives."""

    @staticmethod
    def forward(ctx: Any, program: RowProgram, shape: tuple[int, ...], grad: bool, *tensors: Tensor) -> Tensor:
        """The program's result, of its inputs and parameters."""
        ctx.dtype = dtype = tensors[program.num_inputs].dtype
        keeps = grad and any(ctx.needs_input_grad)
        halves = multiplies_halves(dtype)
        output, tape = program.allocate(shape, dtype, halves, keeps)
        num_threads = torch.get_num_threads()  # the tape is written and read in the same tiles
        program.execute(shape, _contiguous(program, tensors, dtype), output, tape, halves, num_threads)
        if keeps:
            ctx.program, ctx.shape, ctx.how = program, shape, (halves, num_threads)
            ctx.save_for_backward(tape, *tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs and parameters that need one."""
        tape, *tensors = ctx.saved_tensors
        program, gradient = ctx.program, gradient.contiguous()
        cast = _contiguous(program, tensors, ctx.dtype)
        gradients = program.execute(ctx.shape, cast, gradient, tape, *ctx.how, gradient, ctx.needs_input_grad[3:])
        return (
            None,
            None,
            None,
            *(g if g is None or g.dtype == x.dtype else g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True)),
        )


def _contiguous(program: RowProgram, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Inputs as they are, parameters of one type and row by row."""
    count = program.num_inputs
    parameters = (x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous() for x in tensors[count:])
    return [*tensors[:count], *parameters]
