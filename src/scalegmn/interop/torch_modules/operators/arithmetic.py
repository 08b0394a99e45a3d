"""Sums, differences, products and quotients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.addition import add_elements, add_neurons
from scalegmn.interop.torch_modules.operators.attention import gated_by_head, with_constants
from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import (
    Elements,
    NetworkInput,
    Neurons,
    Scores,
    is_constant,
    is_constant_along,
    is_number,
    is_traced,
    size_along,
)

FAMILY = "arithmetic"


def prepared(call: Call, *values: Any) -> NoReturn:
    """Refuses the input with a parameter; with constants it is prepared."""
    problem = f"{call.name} of the network's input and a parameter, or of parameters alone"
    call.trace.refuse(f"{problem}, expected a layer first; make a fixed parameter a buffer")


def _is_uniform(value: Neurons, constant: Any) -> bool:
    """Whether a constant is the same for all channels of a value."""
    if is_number(constant):
        return True
    if not isinstance(constant, Tensor):
        return False
    shape = torch.broadcast_shapes(value.ids.shape, constant.shape)
    ids, constant = value.ids.expand(shape), constant.expand(shape)
    return all(is_constant_along(ids, axis) or is_constant_along(constant, axis) for axis in range(len(shape)))


@operator(FAMILY, "add", reads_input=False)
def add(call: Call, x: Any, y: Any, alpha: float = 1) -> Any:
    """A residual connection, a bias, a mask of attention, an offset of the output."""
    trace = call.trace
    if alpha != 1:
        y = multiply(call, y, alpha) if is_traced(y) else y * alpha
    values = [x, y]
    if any(isinstance(value, Scores) for value in values):
        return with_constants(call, *values)
    neurons = [value for value in values if isinstance(value, Neurons)]
    others = [value for value in values if not isinstance(value, Neurons)]
    if not neurons:
        for value, other in ((x, y), (y, x)):
            if isinstance(value, Elements) and is_number(other) and float(other) == 0:
                return value
        prepared(call, *values)
    if any(value.is_output for value in neurons):
        if not (others and is_constant(others[0])):
            trace.check_current(next(value for value in neurons if value.is_output))
        is_uniform = neurons[0].is_uniform and bool(others) and _is_uniform(neurons[0], others[0])
        return replace(neurons[0], is_uniform=is_uniform)
    if not others:
        result = add_neurons(trace, x, y, call.shape)
    elif isinstance(others[0], Elements):
        return add_elements(trace, neurons[0], others[0], call.shape)
    elif isinstance(others[0], NetworkInput):
        others = [trace.as_neurons(others[0], trace.channel_axis(neurons[0]))]
        result = add_neurons(trace, neurons[0], others[0], call.shape)
    elif isinstance(others[0], int | float | Tensor) and not torch.as_tensor(others[0]).any():  # a sum's start
        return replace(neurons[0], ids=neurons[0].ids.expand(*call.shape))
    else:
        return replace(neurons[0], is_output=True, is_uniform=_is_uniform(neurons[0], others[0]))
    terms = [value.value * value.factor for value in (*neurons, *others) if value.value is not None]
    trace.claimed = sum(terms[1:], terms[0]) if len(terms) == 2 else None
    return result


@operator(FAMILY, "sub", reads_input=False)
def subtract(call: Call, x: Any, y: Any, alpha: float = 1) -> Any:
    """The sum of the first value and a multiple of the second."""
    return add(call, x, y, -alpha)


@operator(FAMILY, "rsub", reads_input=False)
def subtract_from(call: Call, x: Any, y: Any, alpha: float = 1) -> Any:
    """The second value minus a multiple of the first."""
    return add(call, y, x, -alpha)


@operator(FAMILY, "neg", reads_input=False)
def negate(call: Call, x: Any) -> Any:
    """The factor -1."""
    return multiply(call, x, -1)


@operator(FAMILY, "mul", reads_input=False)
def multiply(call: Call, x: Any, y: Any) -> Any:
    """A constant factor, a scale per channel, a scale of attention scores."""
    trace = call.trace
    if isinstance(x, Scores) or isinstance(y, Scores):
        return with_constants(call, x, y)
    for value, other in ((x, y), (y, x)):
        if isinstance(value, Neurons) and value.is_output and is_constant(other):
            return replace(value, is_uniform=value.is_uniform and _is_uniform(value, other))
        if isinstance(value, Neurons | Elements) and is_number(other):
            factor = float(other)
            if isinstance(value, Elements):
                return replace(value, scale=value.scale * factor)
            return replace(value, factor=value.factor * factor) if factor != 0 else replace(value, is_output=True)
        if isinstance(value, Neurons) and isinstance(other, Elements):  # a scale per channel
            axis = trace.channel_axis(value)
            neurons = trace.as_neurons(value, axis)
            reads = trace.channels_along(neurons, axis)
            if other.index.numel() == len(reads) == size_along(other.index, axis - value.ids.ndim):
                weight = replace(other, index=other.index.reshape(-1, 1))
                layer = trace.new_layer(len(reads), reads, weight, options={"groups": len(reads)})
                if neurons.value is not None:
                    trace.claimed = neurons.value * trace.read(other)
                return trace.output_of(layer, axis, call.shape)
    if isinstance(x, Neurons) and isinstance(y, Neurons):
        return gated_by_head(call, *sorted((x, y), key=lambda value: -len(value.ids.unique())))
    if isinstance(x, Neurons) or isinstance(y, Neurons):
        if any(is_constant(value) or isinstance(value, NetworkInput) for value in (x, y)):
            trace.refuse(
                "an activation is multiplied by numbers that differ by position or channel, as in rotary embeddings"
            )
        trace.refuse("an activation is multiplied by another value (a gate), expected a number or a scale per channel")
    prepared(call, x, y)


@operator(FAMILY, "div", reads_input=False)
def divide(call: Call, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    """A constant factor."""
    if rounding_mode is not None:
        call.trace.refuse("a quotient is rounded to whole numbers")
    if isinstance(x, Scores):
        return with_constants(call, x, y)
    if isinstance(x, Neurons) and x.is_output and is_constant(y):
        return replace(x, is_uniform=x.is_uniform and _is_uniform(x, y))
    if not isinstance(x, Neurons | Elements) or is_traced(y):
        prepared(call, x, y)
    if not is_number(y):
        call.trace.refuse("an activation is divided by several numbers, expected one")
    return multiply(call, x, 1 / float(y))
