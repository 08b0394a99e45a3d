"""Sums, differences, products and quotients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from scalegmn.interop.torch_modules.operators.attention import check_masks
from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import Elements, NetworkInput, Neurons, Scores, is_number, size_along

FAMILY = "arithmetic"


def prepare_input(call: Call, x: Any, y: Any) -> NetworkInput:
    """The input, shifted or scaled by constants before anything reads it."""
    for value, other in ((x, y), (y, x)):
        is_fixed = isinstance(other, int | float | Tensor) or getattr(other, "is_buffer", False)
        if isinstance(value, NetworkInput) and is_fixed and value.index.shape == call.shape:
            return value
    call.trace.refuse(
        f"{call.name} of the network's input or of a parameter, expected only constants of the input's shape"
    )


@operator(FAMILY, "add")
def add(call: Call, x: Any, y: Any, alpha: float = 1) -> Any:
    """A residual connection, a bias, a mask of attention, an offset of the output."""
    trace = call.trace
    if alpha != 1:
        trace.refuse(f"the multiple {alpha:g} x of a value x is added")
    values = [x, y]
    for value in values:
        if isinstance(value, Scores):
            check_masks(call, values)
            return value
    neurons = [value for value in values if isinstance(value, Neurons)]
    others = [value for value in values if not isinstance(value, Neurons)]
    if not neurons:
        return prepare_input(call, *values)
    if not others:
        return trace.add(x, y, call.shape)
    if isinstance(others[0], Elements):
        return trace.add_elements(neurons[0], others[0], call.shape)
    if isinstance(others[0], NetworkInput):
        read = trace.as_neurons(others[0], trace.channel_axis(neurons[0]))
        return trace.add(neurons[0], read, neurons[0].ids.shape)
    return replace(neurons[0], is_output=True)


@operator(FAMILY, "sub")
def subtract(call: Call, x: Any, y: Any) -> Any:
    """An offset of the output, the preparation of the input."""
    if isinstance(y, int | float | Tensor) or not isinstance(x, Neurons):
        return add(call, x, y)
    call.trace.refuse("one activation is subtracted from another")


@operator(FAMILY, "mul")
def multiply(call: Call, x: Any, y: Any) -> Any:
    """A constant factor, a scale per channel, a scale of attention scores."""
    trace = call.trace
    for value, other in ((x, y), (y, x)):
        if isinstance(value, Scores):
            check_masks(call, [other])
            return value
        if isinstance(value, Neurons) and is_number(other):
            return replace(value, factor=value.factor * float(other))
        if isinstance(value, Neurons) and isinstance(other, Elements):  # a scale per channel
            axis = trace.channel_axis(value)
            reads = trace.channels_along(trace.as_neurons(value, axis), axis)
            if other.index.numel() == len(reads) == size_along(other.index, axis - value.ids.ndim):
                weight = replace(other, index=other.index.reshape(-1, 1))
                layer = trace.new_layer(len(reads), reads, weight, options={"groups": len(reads)})
                return trace.output_of(layer, axis, call.shape)
    if isinstance(x, Neurons) or isinstance(y, Neurons):
        trace.refuse("an activation is multiplied by another value (a gate), expected a number or a scale per channel")
    return prepare_input(call, x, y)


@operator(FAMILY, "div")
def divide(call: Call, x: Any, y: Any) -> Any:
    """A constant factor."""
    if isinstance(x, Scores):
        check_masks(call, [y])
        return x
    if not isinstance(x, Neurons):
        return prepare_input(call, x, y)
    if not is_number(y):
        call.trace.refuse("an activation is divided by another value, expected a number")
    return multiply(call, x, 1 / float(y))
