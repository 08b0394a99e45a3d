"""Plans: row programs one after the other, prepared once and run by one call of the library.

A program alone takes longer to prepare, in Python and in PyTorch, than small models compute in it. A `Plan` is written
once per shape of a batch: which program reads and writes which rows. Results that only programs read are parts of one
tensor, gradients of parameters are parts of another; each run gives the library the addresses of these, of inputs and
of parameters.

Shape letters: B networks, R receivers, S senders, D features.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Hashable, Sequence
from itertools import chain, zip_longest
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from scalegmn.engine import native
from scalegmn.engine.derivatives import once_differentiable
from scalegmn.engine.graph_norms import NormProgram
from scalegmn.engine.programs import Unwritable
from scalegmn.engine.row_programs import (
    NUM_STATISTICS,
    Address,
    GradientPlace,
    InputPlace,
    Nodes,
    Numbers,
    Pointer,
    ResultPlace,
    RowProgram,
)

MOST_PLANS = 32
"""Of a model: the oldest is forgotten."""

ALIGNMENT = 64
"""Bytes: of the parts of a tensor."""

ARENA = 7 << 20
"""Bytes of a tensor of which others are parts, unless one alone is larger. The C library gives
back 8 MB and more to the system when they are freed (`scalegmn.training.memory`)."""


class Region(NamedTuple):
    """Rows [B, R, S, D] of a tensor of a plan, which broadcast to blocks where a size is 1."""

    tensor: int
    """By number."""

    shape: tuple[int, int, int]
    width: int
    strides: tuple[int, int, int]
    """Numbers between networks, receivers and senders."""

    start: int = 0
    """The number at which they start."""

    index: Tensor | None = None  # type: ignore[assignment]  # not the method of tuples
    """[R] long: the row of each receiver of a block; None: that of its number."""

    def at(self, index: Tensor) -> Region:
        """The row of each receiver of a block, for an index [R] long.

        Raises:
            ValueError: it is none that the library reads.
        """
        _check_index(index, len(index))
        return self._replace(index=index)

    def receivers(self, start: int, stop: int) -> Region:
        """Those of some receivers."""
        b, r, s = self.shape
        assert 0 <= start < stop <= r
        assert self.index is None
        return self._replace(shape=(b, stop - start, s), start=self.start + start * self.strides[1])

    def columns(self, start: int, stop: int) -> Region:
        """Those numbers of each row."""
        assert 0 <= start < stop <= self.width
        return self._replace(width=stop - start, start=self.start + start)

    def turned(self) -> Region:
        """With receivers as senders."""
        (b, r, s), (of_b, of_r, of_s) = self.shape, self.strides
        return self._replace(shape=(b, s, r), strides=(of_b, of_s, of_r))

    @property
    def places(self) -> tuple[int, ...]:
        """The strides, 0 where a size is 1."""
        return tuple(0 if n == 1 else stride for n, stride in zip(self.shape, self.strides, strict=True))

    @property
    def block(self) -> tuple[int, int, int]:
        """The sizes of what broadcasts to blocks."""
        b, r, s = self.shape
        return b, r if self.index is None else len(self.index), s


class _Tensor(NamedTuple):
    """What regions are parts of."""

    size: int
    dtype: torch.dtype
    given: int | None = None
    """Which of the tensors that are given with each run; None: a result."""


class _Step(NamedTuple):
    """One run of a program."""

    program: RowProgram | NormProgram
    halves: bool
    shape: tuple[int, int, int]
    inputs: tuple[Region, ...]
    given: tuple[Region, ...]
    """Whole tensors that are parameters."""

    nodes: Nodes | None
    """Of statistics."""

    result: Region
    parameters: tuple[int, ...]
    """Which of the plan's."""


class Plan:
    """Programs that run one after the other.

    Args:
        dtype: of numbers.
        halves: whether products are in bfloat16.
    """

    def __init__(self, dtype: torch.dtype, halves: bool) -> None:
        self.dtype, self.halves = dtype, halves
        self.outputs: list[Region] = []
        self._tensors: list[_Tensor] = []
        self._num_given = 0
        self._steps: list[_Step] = []
        self._parameters: list[tuple[ref[nn.Module], str, torch.Size]] = []
        self._numbers: dict[tuple[int, str], int] = {}
        self._forward: dict[tuple[bool, int], _Words] = {}
        self._backward: dict[tuple[tuple[bool, ...], int], _Words] = {}

    # Writing

    def given(self, shape: Sequence[int]) -> Region:
        """Rows [B, R, S, D], or fewer sizes before D, of a tensor of this shape that is given with each run."""
        self._num_given += 1
        return self._region([1] * (4 - len(shape)) + [*shape], self.dtype, self._num_given - 1)

    def rows(self, shape: Sequence[int], width: int, dtype: torch.dtype | None = None) -> Region:
        """Rows [B, R, S, D] that programs write."""
        return self._region([*shape, width], dtype or self.dtype, None)

    def _region(self, shape: Sequence[int], dtype: torch.dtype, given: int | None) -> Region:
        b, r, s, width = shape
        self._tensors.append(_Tensor(b * r * s * width, dtype, given))
        return Region(len(self._tensors) - 1, (b, r, s), width, (r * s * width, s * width, width))

    def run(
        self,
        program: RowProgram | NormProgram,
        shape: tuple[int, int, int],
        inputs: Sequence[Region],
        result: Region | None = None,
        halves: bool = True,
        given: Sequence[Region] = (),
        nodes: Nodes | None = None,
    ) -> Region:
        """The result of a program on a block [B, R, S], written to new rows or to `result`.

        Args:
            program: it.
            shape: of the block.
            inputs: its rows.
            result: where to; None: new rows. Statistics of a node are one row.
            halves: False: none of its products are in bfloat16.
            given: its given tensors.
            nodes: of statistics.

        Raises:
            ValueError: inputs or nodes do not fit the block.
        """
        assert program.num_given == len(given)
        halves = halves and self.halves
        of_result, width = shape if program.ends_with_rows else (*shape[:2], 1), program.width
        if not all(n in (1, m) for x in inputs for n, m in zip(x.block, shape, strict=True)):
            raise ValueError(f"rows of shapes {[[*x.block] for x in inputs]} do not fit a block {[*shape]}")
        if nodes is not None:
            _check_index(nodes.index, shape[1])
            of_result, width = (shape[0], nodes.num_nodes, 1), NUM_STATISTICS * width
        if result is None:
            result = self.rows(of_result, width, torch.bfloat16 if program.rounds and halves else None)
        assert (result.shape, result.width) == (of_result, width)
        parameters = tuple(self._parameter(*place) for place in program.tensors if place is not None)
        self._steps.append(_Step(program, halves, shape, tuple(inputs), tuple(given), nodes, result, parameters))
        return result

    def _parameter(self, module: ref[nn.Module], name: str) -> int:
        """The number of a parameter."""
        owner = module()
        assert owner is not None
        key = (id(owner), name)
        if key not in self._numbers:
            self._numbers[key] = len(self._parameters)
            self._parameters.append((module, name, getattr(owner, name).shape))
        return self._numbers[key]

    # Running

    @property
    def is_alive(self) -> bool:
        """Whether there are still all modules whose parameters it reads."""
        return all(module() is not None for module, _, _ in self._parameters)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, [B, R, S, D] each, for the tensors that are given.

        Raises:
            ValueError: a tensor or a parameter does not have the shape for which the plan was written.
        """
        parameters = []
        for module, name, shape in self._parameters:
            parameter = getattr(module(), name)
            if parameter.shape != shape:
                raise ValueError(f"found a parameter of shape {[*parameter.shape]}, expected {[*shape]}")
            parameters.append(parameter)
        sizes = [tensor.size for tensor in self._tensors if tensor.given is not None]
        if [x.numel() for x in tensors] != sizes:
            raise ValueError(f"inputs of shapes {[[*x.shape] for x in tensors]} do not have {sizes} numbers")
        grad = torch.is_grad_enabled()
        results = _RunPlan.apply(self, grad, *tensors, *parameters)  # type: ignore[no-untyped-call]  # torch gives it no types
        return list(results)

    def forward(self, keeps: bool, num_threads: int) -> _Words:
        """The words of the forward pass, which `keeps` what the backward pass reads."""
        key = (keeps, num_threads)
        if key not in self._forward:
            self._forward[key] = _words(self, num_threads, keeps, None)
        return self._forward[key]

    def backward(self, needed: tuple[bool, ...], num_threads: int) -> _Words:
        """The words of the backward pass, for those given tensors and parameters whose gradients are needed."""
        key = (needed, num_threads)
        if key not in self._backward:
            self._backward[key] = _words(self, num_threads, True, needed)
        return self._backward[key]

    @property
    def num_parameters(self) -> int:
        """How many tensors parameters are."""
        return len(self._parameters)

    @property
    def num_given(self) -> int:
        """How many tensors are given."""
        return self._num_given


def _check_index(index: Tensor, size: int) -> None:
    """Raises ValueError if an index is not [size] long as the library reads it."""
    if index.shape != (size,) or index.dtype != torch.long or not index.is_contiguous():
        found = f"{str(index.dtype).removeprefix('torch.')} {[*index.shape]} with strides {[*index.stride()]}"
        raise ValueError(f"found an index of type and shape {found}, expected int64 [{size}] in one piece")


class _Words:
    """What the library reads: words, pointers among them, and the sizes of the memory that these point to.

    Bases are, in this order: given tensors; outputs; parameters; backward, the gradients of given tensors, of outputs
    and of parameters (one tensor for all); and arenas, in turns of results, of gradients that start at zero, and of
    others.

    Args:
        num_bases: before those of arenas.
    """

    def __init__(self, num_bases: int) -> None:
        self.words = array("q")
        self.starts = array("q")
        self.places = array("q")
        self.results, self.zeroed, self.others = (_Arenas(num_bases + kind, 3) for kind in range(3))
        self.written: list[bool] = []
        """Of each given tensor, whether all of its gradient is written before anything is added."""

    def add(self, words: Sequence[int | Pointer]) -> None:
        """Those of a program."""
        start = len(self.words)
        self.starts.append(start)
        for number, word in enumerate(words):
            if isinstance(word, Pointer):
                self.places.extend((start + number, word.base, word.offset))
        self.words.extend(0 if isinstance(word, Pointer) else word for word in words)

    def run(self, tensors: Sequence[Tensor | None], arenas: Sequence[Sequence[Tensor]], backward: bool) -> None:
        """Runs the programs, with what is before arenas, and arenas of each kind."""
        library = native.library()
        assert library is not None
        bases = [0 if x is None else x.data_ptr() for x in chain(tensors, *zip_longest(*arenas))]
        words, starts, places = ((_address(x), ctypes.c_int64(len(x))) for x in (self.words, self.starts, self.places))
        addresses = array("q", bases)
        places = places[0], ctypes.c_int64(len(self.places) // 3)
        if library.run_programs(*words, *starts, *places, _address(addresses), ctypes.c_int64(backward)):
            raise ValueError("inputs, or what they are indexed by, do not fit their program")


class _Arenas:
    """Tensors of bytes that others are parts of.

    Args:
        base: number of the first.
        step: from one to the next.
    """

    def __init__(self, base: int, step: int) -> None:
        self.base, self.step = base, step
        self.sizes: list[int] = []

    def part(self, size: int) -> Pointer:
        """The next part, of so many bytes."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        if not self.sizes or self.sizes[-1] + size > ARENA:
            self.sizes.append(0)
        self.sizes[-1] += size
        return Pointer(self.base + self.step * (len(self.sizes) - 1), self.sizes[-1] - size)

    def new(self, zeroed: bool = False) -> list[Tensor]:
        """The tensors."""
        return [(torch.zeros if zeroed else torch.empty)(size, dtype=torch.uint8, device="cpu") for size in self.sizes]


def _address(words: array[int]) -> ctypes.c_void_p:
    return ctypes.c_void_p(words.buffer_info()[0])


def _words(plan: Plan, num_threads: int, keeps: bool, needed: tuple[bool, ...] | None) -> _Words:
    """The words of a plan; `needed`: as in `Plan.backward`, None: forward."""
    tensors, steps = plan._tensors, plan._steps
    num_given, num_outputs = plan.num_given, len(plan.outputs)
    of_parameters = num_given + num_outputs
    of_given = of_parameters + plan.num_parameters
    of_outputs = of_given + num_given
    gradient_of_parameters = of_outputs + num_outputs
    new = _Words(gradient_of_parameters + 1)
    outputs = {region.tensor: index for index, region in enumerate(plan.outputs)}

    bases: list[Pointer] = []  # of each tensor
    for number, tensor in enumerate(tensors):
        if tensor.given is not None:
            bases.append(Pointer(tensor.given, 0))
        elif number in outputs:
            bases.append(Pointer(num_given + outputs[number], 0))
        else:
            bases.append(new.results.part(tensor.size * tensor.dtype.itemsize))
    tapes: list[Address] = []
    for step in steps:
        size = step.program.tape_size(step.shape, step.halves, num_threads) if keeps else 0
        tapes.append(new.results.part(size * plan.dtype.itemsize) if size else 0)

    need = [needed is not None and tensor.given is not None and needed[tensor.given] for tensor in tensors]
    of_steps: list[list[bool]] = []  # which inputs and parameters of each step need gradients
    for step in steps:
        of_step = [need[x.tensor] for x in (*step.inputs, *step.given)]
        of_step += [needed is not None and needed[num_given + k] for k in step.parameters]
        need[step.result.tensor] |= any(of_step)
        of_steps.append(of_step)

    written: set[int] = set()
    seen: set[int] = set()
    adds: dict[tuple[int, int], int] = {}  # of each step and input
    for index, step in reversed(list(enumerate(steps))) if needed is not None else ():
        for number, x in enumerate(step.inputs):
            if need[x.tensor]:
                is_whole = (
                    x.index is None and x.shape == step.shape and prod(x.shape) * x.width == tensors[x.tensor].size
                )
                is_whole &= [y.tensor for y in step.inputs].count(x.tensor) == 1
                if is_whole and x.tensor not in seen:
                    written.add(x.tensor)
                    adds[index, number] = 0
                else:
                    adds[index, number] = 2 if x.shape[0] == 1 < step.shape[0] else 1
                seen.add(x.tensor)
    new.written = [number in written for number, tensor in enumerate(tensors) if tensor.given is not None]
    gradients: list[Address] = []  # of each tensor
    for number, tensor in enumerate(tensors):
        size = tensor.size * plan.dtype.itemsize
        if not need[number]:
            gradients.append(0)
        elif tensor.given is not None:
            gradients.append(Pointer(of_given + tensor.given, 0))
        elif number in outputs:
            assert number not in seen  # nothing in the plan reads outputs
            gradients.append(Pointer(of_outputs + outputs[number], 0))
        else:
            gradients.append((new.others if number in written else new.zeroed).part(size))
    starts, total = [], 0  # of parameters' gradients
    for number, (_, _, shape) in enumerate(plan._parameters):
        starts.append(total)
        total += shape.numel() * plan.dtype.itemsize if needed is not None and needed[num_given + number] else 0

    for index, (step, of_step) in enumerate(zip(steps, of_steps, strict=True)):
        if needed is not None and not any(of_step):
            continue
        inputs = []
        for number, x in enumerate(step.inputs):
            tensor = tensors[x.tensor]
            place = InputPlace(_at(bases[x.tensor], x, tensor.dtype), x.width, x.places, tensor.dtype == torch.bfloat16)
            if x.index is not None:
                place = place._replace(index=x.index.data_ptr(), num_rows=x.shape[1])
            if of_step[number]:
                address = _at(gradients[x.tensor], x, plan.dtype)
                # from the first number to the last: threads have copies of gradients that they share
                size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)) + x.width - 1
                place = place._replace(gradient=GradientPlace(address, False, adds[index, number], x.places, size))
            inputs.append(place)
        parameters = [(torch.Size((x.shape[2], x.width)), (bases[x.tensor], gradients[x.tensor])) for x in step.given]
        for k in step.parameters:
            of_it = needed is not None and needed[num_given + k]
            gradient: Address = Pointer(gradient_of_parameters, starts[k]) if of_it else 0
            parameters.append((plan._parameters[k][2], (Pointer(of_parameters + k, 0), gradient)))
        assert step.nodes is None or step.result.tensor not in outputs  # the backward pass reads statistics
        dtype = tensors[step.result.tensor].dtype
        place_of_result = ResultPlace(
            _at(bases[step.result.tensor], step.result, dtype),
            dtype == torch.bfloat16,
            step.result.places,
            _at(gradients[step.result.tensor], step.result, plan.dtype),
        )
        flags = None if needed is None else step.program.flags(of_step)
        numbers = Numbers(plan.dtype, step.halves, num_threads)
        places = step.shape, inputs, parameters, place_of_result, tapes[index]
        new.add(step.program.words(numbers, *places, flags, step.nodes))
    return new


def _at(address: Address, region: Region, dtype: torch.dtype) -> Address:
    """Where a region starts in a tensor."""
    if isinstance(address, Pointer):
        return address._replace(offset=address.offset + region.start * dtype.itemsize)
    return address


class _RunPlan(torch.autograd.Function):
    """Runs a plan. There are no second derivatives."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, grad: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The plan's outputs, of its given tensors and parameters."""
        keeps, num_threads = grad and any(ctx.needs_input_grad), torch.get_num_threads()
        read = _as_read(plan, tensors)
        words = plan.forward(keeps, num_threads)
        results = words.results.new()
        outputs = [torch.empty(*region.shape, region.width, dtype=plan.dtype, device="cpu") for region in plan.outputs]
        bases = [*read[: plan.num_given], *outputs, *read[plan.num_given :]]
        no_gradients = [None] * (plan.num_given + len(outputs) + 1)
        words.run([*bases, *no_gradients], [results, [], []], backward=False)
        if keeps:
            ctx.plan, ctx.num_threads = plan, num_threads
            ctx.save_for_backward(*tensors, *results)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of all given tensors and parameters that need one."""
        plan, needed = ctx.plan, ctx.needs_input_grad[2:]
        saved = ctx.saved_tensors  # once: checkpoints compute it
        tensors, results = saved[: len(needed)], saved[len(needed) :]
        count, dtype = plan.num_given, plan.dtype
        words, read = plan.backward(needed, ctx.num_threads), _as_read(plan, tensors)
        gradients = [
            (torch.empty if written else torch.zeros)(x.shape, dtype=dtype, device="cpu") if need else None
            for x, need, written in zip(tensors, needed, words.written, strict=False)
        ]
        learned = [x for x, need in zip(read[count:], needed[count:], strict=True) if need]
        of_parameters = torch.zeros(sum(x.numel() for x in learned), dtype=dtype, device="cpu")
        arenas = [results, words.zeroed.new(zeroed=True), words.others.new()]
        up = [gradient.contiguous() for gradient in of_outputs]
        bases = [*read[:count], *([None] * len(up)), *read[count:], *gradients, *up, of_parameters]
        words.run(bases, arenas, backward=True)
        parts = iter(torch._C._nn.unflatten_dense_tensors(of_parameters, learned))
        gradients += [next(parts) if need else None for need in needed[count:]]
        return (
            None,
            None,
            *(g if g is None or g.dtype == x.dtype else g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True)),
        )


def _as_read(plan: Plan, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one type and row by row."""
    return [x if x.dtype == plan.dtype and x.is_contiguous() else x.to(plan.dtype).contiguous() for x in tensors]


_PLANS: WeakKeyDictionary[nn.Module, dict[Hashable, Plan | None]] = WeakKeyDictionary()


def plan_of(module: nn.Module, key: Hashable, write: Callable[[], Plan]) -> Plan | None:
    """The plan of a module that `write` writes, once per key; None: it raised `Unwritable`."""
    plans = _PLANS.setdefault(module, {})
    plan = plans.get(key)
    if key not in plans or (plan is not None and not plan.is_alive):
        if len(plans) >= MOST_PLANS:
            plans.pop(list(plans)[0], None)  # other threads may do the same  # noqa: RUF015
        try:
            plan = write()
        except Unwritable:
            plan = None
        plans[key] = plan
    return plan
