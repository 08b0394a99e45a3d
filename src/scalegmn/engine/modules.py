"""Fast forms of the modules that act on rows: invariant maps, equivariant layers, MLPs.

What is saved: products with the same matrix are done once; two Linears with nothing between them are joined; parts of a
concatenation go through their own columns of a Linear, once per node rather than once per edge; rows in two factors
(`ScaledRows`) are multiplied out as late as possible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.engine.dispatch import FastForms
from scalegmn.engine.programs import linear_after_program, rows_program
from scalegmn.engine.rows import (
    GatheredRows,
    Rows,
    ScaledRows,
    each,
    gathered,
    linear,
    linear_of_both_signs,
    multiplied_out,
    times,
)
from scalegmn.nn.context import ROLES
from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, MLPLayer, SineUpdate
from scalegmn.nn.invariant import AbsoluteValue, ByScalarGroup, InvariantLayer, ScaleInvariant, SignInvariant
from scalegmn.nn.mlp import MLP

AnyRows = Tensor | ScaledRows
"""What a module acts on; only the extras may be `GatheredRows`."""


def _plain(module: nn.Module, rows: Rows, x: AnyRows, *extras: Tensor | GatheredRows) -> Tensor:
    """A module in its plain form, on rows that are multiplied out and flattened."""
    x = multiplied_out(x)
    shape = x.shape[:-1]
    inputs = [x, *(gathered(extra).expand(*shape, extra.shape[-1]) for extra in extras)]
    new = module(rows.context(shape, x.device), *(rows.flatten(0, -2) for rows in inputs))
    return new.unflatten(0, shape)


def _as_block(x: Tensor) -> Tensor:
    """Rows [B, ..., D] or [n, D] as [B, rows, 1, D]."""
    return x.reshape(len(x), x.shape[1:-1].numel(), 1, x.shape[-1])


def _extra_block(extra: Tensor, ndim: int) -> Tensor:
    """Extras that broadcast to rows [B, n, D] or [n, D], as those of `_as_block`."""
    while extra.ndim < ndim:
        extra = extra[None]
    return extra[:, :, None] if ndim == 3 else extra[:, None, None]


def _plain_then_linear(module: nn.Module, rows: Rows, x: AnyRows, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(_plain(module, rows, x), weight, bias)


run = FastForms(_plain)
"""run(module, rows, x, *extras) is module(context, x, *extras) for x [B, ..., D] or [n, D] and broadcasting extras."""

invariant_then_linear = FastForms(_plain_then_linear)
"""invariant_then_linear(map, rows, x, weight, bias) is weight map(context, x) + bias, for a bias that broadcasts: the
Linear that follows is joined to the map's last one."""


# MLPs


def first_linear(mlp: MLP, *extras: Tensor | GatheredRows) -> tuple[Tensor, Tensor]:
    """Weight and bias of the first Linear for the leading part of its input, the others being given."""
    first = mlp.linears[0]
    if not extras:
        return first.weight, first.bias
    widths = [extra.shape[-1] for extra in extras]
    weight, *columns = first.weight.split([first.in_features - sum(widths), *widths], dim=1)
    bias: Tensor = first.bias
    for extra, column in zip(extras, columns, strict=True):
        bias = linear(extra, column, bias)
    return weight, bias


def hidden_layers(mlp: MLP, z: Tensor) -> Tensor:
    """From the first Linear's output to the last Linear's input."""
    for index, norm in enumerate(mlp.norms):
        if index:
            z = mlp.linears[index](z)
        z = mlp.dropout(mlp.activation(norm(z)))
    return z


def after_first_linear(mlp: MLP, z: Tensor) -> Tensor:
    """From the first Linear's output to the output."""
    return mlp.linears[-1](hidden_layers(mlp, z))


def run_mlp(mlp: MLP, x: AnyRows, *extras: Tensor | GatheredRows) -> Tensor:
    """mlp(x, *extras) for extras that broadcast: W [a, b] = W_a a + W_b b."""
    weight, bias = first_linear(mlp, *extras)
    return after_first_linear(mlp, linear(x, weight, bias))


# Invariant maps


@invariant_then_linear.register(SignInvariant)
def _sign(module: SignInvariant, rows: Rows, x: AnyRows, weight: Tensor, bias: Tensor) -> Tensor:
    if isinstance(x, Tensor) and bias.ndim == 1:
        program = linear_after_program(module, x, weight)
        if program is not None:
            block = _as_block(x)
            return program(block.shape[:3], [block], [weight, bias]).view(*x.shape[:-1], program.width)
    first, last = module.rho.linears[0], module.rho.linears[-1]
    plus, minus = linear_of_both_signs(x, first.weight, first.bias)
    both = hidden_layers(module.rho, plus) + hidden_layers(module.rho, minus)
    return linear(both, weight @ last.weight, bias + 2 * (weight @ last.bias))


@invariant_then_linear.register(AbsoluteValue)
def _absolute(module: AbsoluteValue, rows: Rows, x: AnyRows, weight: Tensor, bias: Tensor) -> Tensor:
    size = ScaledRows(each(x.values, torch.abs), x.scale.abs()) if isinstance(x, ScaledRows) else x.abs()
    return linear(size, weight, bias)


@invariant_then_linear.register(ScaleInvariant)
def _scale(module: ScaleInvariant, rows: Rows, x: AnyRows, weight: Tensor, bias: Tensor) -> Tensor:
    values, scale = (x.values, x.scale) if isinstance(x, ScaledRows) else (x, torch.ones_like(x[..., :1]))
    norms = each(values, lambda rows: torch.linalg.vector_norm(rows, dim=-1, keepdim=True))
    norm = gathered(norms) * scale.abs() + module.epsilon
    smallest = torch.finfo(norm.dtype).tiny ** 0.5  # the gradient holds 1 / norm^2
    return linear(ScaledRows(values, scale / torch.where(norm > smallest, norm, 1)), weight, bias)


def _by_group(forms: FastForms, module: ByScalarGroup, rows: Rows, x: AnyRows, *others: Any) -> Tensor:
    """Networks, or rows, of each group through their branch."""
    if isinstance(rows.sizes, Tensor):
        first, *later = [forms(branch, rows, x, *others) for branch in module.branches]
        group = rows.sizes.view(-1, *[1] * (first.ndim - 1))
        for index, branch in enumerate(later, 1):
            first = torch.where(group == index, branch, first)
        return first
    assert rows.sizes is not None
    parts, starts = x.split(rows.sizes), [sum(rows.sizes[:index]) for index in range(len(rows.sizes))]
    return torch.cat(
        [
            forms(branch, rows.part(start, start + size), part, *others)
            for branch, part, start, size in zip(module.branches, parts, starts, rows.sizes, strict=True)
            if size
        ]
    )


@invariant_then_linear.register(ByScalarGroup)
def _invariant_by_group(module: ByScalarGroup, rows: Rows, x: AnyRows, weight: Tensor, bias: Tensor) -> Tensor:
    return _by_group(invariant_then_linear, module, rows, x, weight, bias)


# Equivariant layers


@run.register(ByScalarGroup)
def _layer_by_group(module: ByScalarGroup, rows: Rows, x: AnyRows, *extras: Tensor) -> Tensor:
    return _by_group(run, module, rows, x)  # extras are not read where groups differ


@run.register(InvariantLayer)
def _invariant_layer(module: InvariantLayer, rows: Rows, x: AnyRows, *extras: Tensor | GatheredRows) -> Tensor:
    weight, bias = first_linear(module.phi, *(extras if module.extra_dim else ()))
    return after_first_linear(module.phi, invariant_then_linear(module.invariant, rows, x, weight, bias))


@run.register(ByRole)
def _by_role(module: ByRole, rows: Rows, *inputs: AnyRows | GatheredRows) -> Tensor | ScaledRows:
    return run(module.branches[module.index[rows.role]], rows, *inputs)


@run.register(MLPLayer)
def _mlp_layer(module: MLPLayer, rows: Rows, x: AnyRows, *extras: Tensor | GatheredRows) -> Tensor:
    return run_mlp(module.mlp, x, *extras)


@run.register(EquivariantLayer)
def _equivariant_layer(
    module: EquivariantLayer, rows: Rows, x: AnyRows, *extras: Tensor | GatheredRows
) -> Tensor | ScaledRows:
    return times(linear(x, module.linear.weight), run(module.factor, rows, x, *extras))


@run.register(EquivariantNet)
def _equivariant_net(
    module: EquivariantNet, rows: Rows, x: AnyRows, *extras: Tensor | GatheredRows
) -> Tensor | ScaledRows:
    if isinstance(x, Tensor) and len(extras) <= 1 and x.ndim in (2, 3):
        program = rows_program(module, rows.role, x, extras[0].shape[-1] if extras else 0)
        if program is not None:
            block = _as_block(x)
            extra = _extra_block(gathered(extras[0]), x.ndim) if extras else None
            return program(block.shape[:3], [block], extra=extra).view(*x.shape[:-1], program.width)
    for index, layer in enumerate(module.layers):
        new = run(layer, rows, x, *extras)
        if module.skips:
            new = new.product() if isinstance(new, ScaledRows) else new
            new = linear(x, module.skips[index].weight, new)
        x = new
    return x


@run.register(SineUpdate)
def _sine_update(module: SineUpdate, rows: Rows, x: Tensor) -> Tensor:
    if module.parts:
        parts = zip(module.parts, x.split(module.dim, -1), strict=True)
        x = sum(linear(part) for linear, part in parts)
    return torch.sin(30 * module.linear(x))


def roles_alike(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The roles of nodes in groups whose rows may go through `run(module, ...)` together."""
    if isinstance(module, EquivariantNet):
        layer = module.layers[0]
        by_role = layer if isinstance(layer, ByRole) else layer.factor
        if isinstance(by_role, ByRole):
            index = by_role.index
            branches = [
                [role for role in ROLES if index.get(role) == number] for number in range(len(by_role.branches))
            ]
            return tuple(tuple(roles) for roles in sorted(branches, key=lambda roles: roles[0] != "hidden"))
        return (ROLES,)
    return (ROLES,) if isinstance(module, MLPLayer | SineUpdate) else tuple((role,) for role in ROLES)
