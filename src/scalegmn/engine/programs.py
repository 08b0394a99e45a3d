"""Modules as row programs: what `engine.modules` computes operation by operation, written once as a `RowProgram`.

A module has a program if all of its operations are those of programs; others are run as in `engine.modules`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from scalegmn.engine.dispatch import FastForms
from scalegmn.engine.row_programs import LANES, WIDEST, RowProgram, Value, Vector, available
from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, MLPLayer
from scalegmn.nn.invariant import InvariantLayer, SignInvariant
from scalegmn.nn.message_passing import MessagePassingLayer
from scalegmn.nn.messages import ConcatEdgeUpdate, ConcatMessage, ProductMessage, ScaleEdgeUpdate, ScaleMessage
from scalegmn.nn.mlp import MLP, Dropout


class Unwritable(Exception):
    """A module does something that programs cannot."""


def _unwritable(module: nn.Module, *_: Any) -> Value:
    raise Unwritable


write = FastForms(_unwritable)
"""write(module, program, role, x) adds a module's operations on rows of a role to a program: x, and the result, are
values."""

write_invariant = FastForms(_unwritable)
"""write_invariant(map, program, role, x, weight, bias) adds weight map(x) + bias."""

_Writer = Callable[[RowProgram], RowProgram]
_PROGRAMS: WeakKeyDictionary[nn.Module, dict[Hashable, RowProgram | None]] = WeakKeyDictionary()


def structure(module: nn.Module) -> tuple[Hashable, ...]:
    """What programs of a module depend on: which modules it consists of, their types, and what dropout zeroes now.

    Raises:
        Unwritable: a module has hooks, which programs do not call.
    """
    parts: list[nn.Module | None] = [module]
    for part in parts:  # which grow
        if part is not None:
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                raise Unwritable
            if part._modules:
                parts += part._modules.values()
    drops = [part.training and part.p for part in parts if isinstance(part, Dropout)]
    return (*map(id, parts), *map(type, parts), *drops)


def program_of(module: nn.Module, key: Hashable, x: Tensor, writer: _Writer, keeps: bool = True) -> RowProgram | None:
    """The program of a module that `writer` writes, once per key; None: it has none, or none can run on rows like x.

    Args:
        module: the module.
        key: what the program depends on beside it.
        x: the rows.
        writer: ends an empty program.
        keeps: as in `RowProgram`.
    """
    if not available(x):
        return None
    try:
        programs, key = _PROGRAMS.setdefault(module, {}), (key, structure(module))
    except Unwritable:
        return None
    program = programs.get(key)
    if key not in programs or (program is not None and not program.is_alive):
        try:
            program = writer(RowProgram(keeps))
        except Unwritable:
            program = None
        programs[key] = program
    return program


def _check(*widths: int) -> None:
    """Raises Unwritable if a width is not a multiple of `LANES`, or larger than `WIDEST`."""
    if any(width % LANES or width > WIDEST for width in widths):
        raise Unwritable


def weight_of(program: RowProgram, linear: nn.Linear, start: int = 0, stop: int | None = None) -> Vector:
    """Columns of the weight of a Linear."""
    if type(linear).forward is not nn.Linear.forward:
        raise Unwritable
    weight = program.parameter(linear, "weight", start, stop)
    _check(weight.rows, weight.columns)
    return weight


# MLPs


def _check_mlp(mlp: MLP) -> None:
    """Raises Unwritable if there is something between an MLP's Linears that programs do not compute, or dropout now."""
    dropout, norms = mlp.dropout, {type(norm) for norm in mlp.norms}
    is_known = (type(mlp), type(mlp.activation), type(dropout)) == (MLP, nn.SiLU, Dropout)
    if not is_known or norms - {nn.LayerNorm, nn.Identity} or (dropout.training and dropout.p):
        raise Unwritable


def write_hidden(mlp: MLP, program: RowProgram, z: Value) -> Value:
    """`modules.hidden_layers`: from the first Linear's output to the last Linear's input."""
    _check_mlp(mlp)
    for index, norm in enumerate(mlp.norms):
        if index:
            linear = mlp.linears[index]
            z = program.linear(z, weight_of(program, linear), program.parameter(linear, "bias"))
        z = program.norm_silu(z, norm) if isinstance(norm, nn.LayerNorm) else program.silu(z)
    return z


def write_after_first(mlp: MLP, program: RowProgram, z: Value) -> Value:
    """`modules.after_first_linear`: from the first Linear's output to the output."""
    last = mlp.linears[-1]
    return program.linear(write_hidden(mlp, program, z), weight_of(program, last), program.parameter(last, "bias"))


@write.register(MLPLayer)
def _write_mlp_layer(module: MLPLayer, program: RowProgram, role: str, x: Value) -> Value:
    first = module.mlp.linears[0]
    weight, bias = _first_linear(program, first, program.extra_width)
    z = program.linear(x, weight, bias)
    return write_after_first(module.mlp, program, z if bias is not None else program.add(z, program.extra(first)))


def _first_linear(program: RowProgram, first: nn.Linear, extra_width: int) -> tuple[Vector, Vector | None]:
    """Weight and bias for the leading part of the input; no bias where extras follow, which bring it."""
    weight = weight_of(program, first, 0, first.in_features - extra_width)
    return weight, None if extra_width else program.parameter(first, "bias")


# Invariant maps


@write_invariant.register(SignInvariant)
def write_sign(
    module: SignInvariant, program: RowProgram, role: str, x: Value, weight: Vector, bias: Vector | None
) -> Value:
    """weight (rho(x) + rho(-x)) + bias; None: without bias."""
    last, both = module.rho.linears[-1], _write_both_signs(module, program, x)
    joined = program.product(weight, weight_of(program, last))
    return program.linear(both, joined, program.shifted(bias, weight, program.parameter(last, "bias"), 2))


def _write_both_signs(module: SignInvariant, program: RowProgram, x: Value) -> Value:
    """What the last Linear of rho reads of x and of -x, added up."""
    _check_mlp(module.rho)
    if len(module.rho.norms) != 1:
        raise Unwritable
    norm = module.rho.norms[0] if isinstance(module.rho.norms[0], nn.LayerNorm) else None
    first = module.rho.linears[0]
    z = program.linear(x, weight_of(program, first))
    return program.silu_of_both_signs(program.parameter(first, "bias"), z, norm)


# Equivariant layers


@write.register(InvariantLayer)
def _write_invariant_layer(module: InvariantLayer, program: RowProgram, role: str, x: Value) -> Value:
    first = module.phi.linears[0]
    weight, bias = _first_linear(program, first, module.extra_dim)
    z = write_invariant(module.invariant, program, role, x, weight, bias)
    return write_after_first(module.phi, program, z if bias is not None else program.add(z, program.extra(first)))


@write.register(ByRole)
def _write_by_role(module: ByRole, program: RowProgram, role: str, x: Value) -> Value:
    return cast(Value, write(module.branches[module.index[role]], program, role, x))


@write.register(EquivariantLayer)
def _write_equivariant_layer(module: EquivariantLayer, program: RowProgram, role: str, x: Value) -> Value:
    product = program.linear(x, weight_of(program, module.linear))
    return program.multiply(product, write(module.factor, program, role, x))


@write.register(EquivariantNet)
def _write_equivariant_net(module: EquivariantNet, program: RowProgram, role: str, x: Value) -> Value:
    for index, layer in enumerate(module.layers):
        new = write(layer, program, role, x)
        if module.skips:
            new = program.add(program.linear(x, weight_of(program, module.skips[index])), new)
        x = new
    return x


# What the engine calls


def rows_program(module: nn.Module, role: str, x: Tensor, extra_width: int) -> RowProgram | None:
    """module(context, x) for rows x [B, R, S, D] of a role, with extras of a width (0: without)."""
    width = x.shape[-1]

    def writer(program: RowProgram) -> RowProgram:
        _check(width)
        program.extra_width = extra_width
        return program.store(write(module, program, role, program.load(width)))

    return program_of(module, ("rows", role, extra_width), x, writer)


def linear_after_program(module: SignInvariant, x: Tensor, weight: Tensor) -> RowProgram | None:
    """W map(x) + b for rows x [B, R, S, D], W and b given."""

    def writer(program: RowProgram) -> RowProgram:
        _check(x.shape[-1], *weight.shape)
        given = program.given(weight.shape), program.given(weight.shape[:1])
        return program.store(write_sign(module, program, "hidden", program.load(x.shape[-1]), *given))

    return program_of(module, ("linear", *weight.shape), x, writer)


def linear_program(linear: nn.Linear, x: Tensor, last: int | None = None) -> RowProgram | None:
    """A Linear of rows, or what the last columns of its weight, and its bias, make of rows of their number."""

    def writer(program: RowProgram) -> RowProgram:
        width = linear.in_features if last is None else last
        weight = weight_of(program, linear, linear.in_features - width)
        bias = None if linear.bias is None else program.parameter(linear, "bias")
        return program.store(program.linear(program.load(width), weight, bias))

    return program_of(linear, last, x, writer, keeps=False)


def update_program(
    layer: MessagePassingLayer, role: str, num_parts: int, x: Tensor, extra_width: int, drops: bool
) -> RowProgram | None:
    """New features of nodes of a role.

    Inputs: nodes and their messages, `num_parts` together, with extras of a width (0: without); nodes again, where the
    layer has a skip connection; and, if it drops some, factors of the new features.
    """
    width = x.shape[-1]

    def writer(program: RowProgram) -> RowProgram:
        _check(width)
        program.extra_width = extra_width
        new = write(layer.update, program, role, program.load_joined([width] * num_parts))
        if layer.skip is not None:
            new = program.add(new, program.linear(program.load(width), weight_of(program, layer.skip)))
        if drops:
            new = program.multiply(new, program.load(width))
        return program.store(new)

    return program_of(layer, ("update", role, num_parts, extra_width, drops), x, writer)


def edge_ends_program(update: ScaleEdgeUpdate, x: Tensor) -> RowProgram | None:
    """What an edge update reads of nodes as senders and, beside it, as receivers."""

    def writer(program: RowProgram) -> RowProgram:
        first, dim = update.phi.linears[0], update.linear.in_features
        if type(update.invariant) is not SignInvariant:
            raise Unwritable
        _check(dim, 2 * first.out_features)
        both = _write_both_signs(update.invariant, program, program.load(dim))
        last = update.invariant.rho.linears[-1]
        inner, shift = weight_of(program, last), program.parameter(last, "bias")
        sender, receiver = (weight_of(program, first, start, start + dim) for start in (0, dim))
        matrix = program.stacked(program.product(sender, inner), program.product(receiver, inner))
        bias = program.parameter(first, "bias")
        shifts = program.shifted(None, sender, shift, 2), program.shifted(bias, receiver, shift, 2)
        return program.store(program.linear(both, matrix, program.stacked(*shifts)))

    return program_of(update, "ends", x, writer)


def message_program(message: ScaleMessage, role: str, x: Tensor, form: str, extra_width: int) -> RowProgram | None:
    """The sum of messages to receivers of a role.

    Inputs, by form: `features`, edges e [B, R, S, D] and what `send` makes of senders, A x; `product`, B e and A x;
    `scaled`, where edges are one number times a vector, B vector, A x and the number.
    """

    def writer(program: RowProgram) -> RowProgram:
        program.extra_width = extra_width
        return program.sum(write(message.net, program, role, _product_message(message, program, form)))

    return program_of(message, (role, form, extra_width), x, writer)


def product_message_program(message: ProductMessage, x: Tensor, form: str) -> RowProgram | None:
    """The sum of messages. Inputs as of `message_program`."""

    def writer(program: RowProgram) -> RowProgram:
        return program.sum(_product_message(message, program, form))

    return program_of(message, form, x, writer)


def _product_message(message: ScaleMessage | ProductMessage, program: RowProgram, form: str) -> Value:
    """(A x) * (B e)."""
    edge = message.edge_linear
    _check(edge.in_features, edge.out_features)
    x = program.load(edge.in_features if form == "features" else edge.out_features)
    if form == "features":
        x = program.linear(x, weight_of(program, edge))
    x = program.multiply(x, program.load(edge.out_features))
    return program.scale(x, program.load(1)) if form == "scaled" else x


def edge_update_program(update: ScaleEdgeUpdate, x: Tensor, form: str) -> RowProgram | None:
    """New features of edges [B, R, S, D].

    Inputs: `edge_ends` of senders and of receivers, and, by form, `features`: edges e; `product`: C e; `scaled`, where
    edges are one number times a vector: C vector and the number.
    """

    def writer(program: RowProgram) -> RowProgram:
        first = update.phi.linears[0]
        _check(first.out_features, update.linear.in_features, update.linear.out_features)
        ends = program.add(program.load(first.out_features), program.load(first.out_features))
        if form == "scaled":
            edge = program.scale(program.load(update.linear.out_features), program.load(1))
        elif form == "product":
            edge = program.load(update.linear.out_features)
        else:
            edge = program.linear(program.load(update.linear.in_features), weight_of(program, update.linear))
        return program.store(program.multiply(edge, write_after_first(update.phi, program, ends)), halves=True)

    return program_of(update, form, x, writer)


def concat_message_program(message: ConcatMessage, x: Tensor, form: str) -> RowProgram | None:
    """The sum over senders of what goes into the last Linear of messages.

    Inputs: by form as of `edge_update_program`, and what `send` makes of senders.
    """

    def writer(program: RowProgram) -> RowProgram:
        first = message.mlp.linears[0]
        z = _first_of_edges(program, first, first.in_features // 2, form)
        z = write_hidden(message.mlp, program, program.add(z, program.load(first.out_features)))
        if not program.tensors:  # of which the type of numbers is
            raise Unwritable
        return program.sum(z)

    return program_of(message, form, x, writer)


def concat_update_program(update: ConcatEdgeUpdate, x: Tensor, form: str) -> RowProgram | None:
    """New features of edges [B, R, S, D]. Inputs: by form as of `edge_update_program`, and `edge_ends` of both ends."""

    def writer(program: RowProgram) -> RowProgram:
        first = update.phi.linears[0]
        z = _first_of_edges(program, first, first.in_features // 3, form)
        for _ in range(2):
            z = program.add(z, program.load(first.out_features))
        return program.store(write_after_first(update.phi, program, z), halves=True)

    return program_of(update, form, x, writer)


def _first_of_edges(program: RowProgram, first: nn.Linear, width: int, form: str) -> Value:
    """The leading columns of a Linear, times features of edges in a form."""
    _check(first.out_features, width)
    if form == "scaled":
        return program.scale(program.load(first.out_features), program.load(1))
    if form == "product":
        return program.load(first.out_features)
    return program.linear(program.load(width), weight_of(program, first, 0, width))
