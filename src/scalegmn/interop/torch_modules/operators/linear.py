"""Linear layers, convolutions and embeddings: operations with a weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.operators.attention import multiply_values
from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import Elements, NetworkInput, Neurons

FAMILY = "layers with a weight"


def weighted_layer(call: Call, value: Any, axis: int, weight: Any, bias: Any, groups: int = 1) -> Neurons:
    """A linear layer or a convolution.

    Args:
        call: the operation.
        value: what the layer reads.
        axis: the axis of its channels.
        weight: [out, in / groups, ...].
        bias: [out] or None.
        groups: of a convolution.
    """
    trace = call.trace
    if not isinstance(weight, Elements) or not (bias is None or isinstance(bias, Elements)):
        trace.refuse("the weights are computed from other values, expected parameters")
    along, index = trace.channels_along(trace.as_neurons(value, axis), axis), weight.index
    reads = torch.tensor(list(dict.fromkeys(along.tolist())))
    if len(reads) < len(along):  # all positions of an image in a row
        places = [(along == neuron).nonzero()[:, 0] for neuron in reads]
        if len({*map(len, places)}) > 1 or groups > 1 or index.ndim > 2:
            trace.refuse("a layer reads some channels more often than others")
        num_positions = len(places[0])
        side = int(num_positions**0.5)
        kernel = (side, side) if side * side == num_positions else (1, num_positions)
        index = index[:, torch.stack(places)].unflatten(2, kernel)
    if index.ndim == 3:
        index = index.unsqueeze(2)  # a convolution along one axis
    if index.ndim not in (2, 4):
        trace.refuse("a convolution over volumes, expected one over images or sequences")
    options = {"groups": groups, "kernel": tuple(index.shape[2:]) or None}
    layer = trace.new_layer(len(index), reads, replace(weight, index=index), bias=bias, options=options)
    return trace.output_of(layer, axis, call.shape)


@operator(FAMILY, "linear")
def linear(call: Call, x: Any, weight: Any, bias: Any = None) -> Neurons:
    """W x + b."""
    return weighted_layer(call, x, -1, weight, bias)


@operator(FAMILY, "addmm")
def addmm(call: Call, bias: Any, x: Any, weight: Any) -> Neurons:
    """x W + b."""
    if isinstance(weight, Elements):
        weight = replace(weight, index=weight.index.mT)
    return weighted_layer(call, x, -1, weight, bias)


@operator(FAMILY, "conv1d", "conv2d")
def convolution(call: Call, x: Any, weight: Any, bias: Any = None, *rest: Any, **options: Any) -> Neurons:
    """A convolution of any stride, padding and dilation."""
    groups = options.get("groups", rest[3] if len(rest) > 3 else 1)
    if isinstance(weight, Elements) and len(call.shape) != weight.index.ndim:
        call.trace.refuse("a convolution reads an input without a batch axis")
    return weighted_layer(call, x, 1, weight, bias, groups)


@operator(FAMILY, "matmul", "mm", "bmm")
def matmul(call: Call, x: Any, y: Any) -> Any:
    """x W with a parameter W; products of two activations are attention."""
    if isinstance(y, Elements) and y.index.ndim == 2:
        return weighted_layer(call, x, -1, replace(y, index=y.index.mT), None)
    return multiply_values(call, x, y)


@operator(FAMILY, "embedding")
def embedding(call: Call, weight: Any, x: Any, *rest: Any, **options: Any) -> Neurons:
    """A vector per word of the input, or per constant position."""
    is_input = isinstance(x, NetworkInput)
    if not isinstance(weight, Elements) or not (is_input or isinstance(x, Tensor)):
        call.trace.refuse("an embedding of computed values, expected the input or constant positions")
    reads = call.trace.input_neurons(len(weight.index)) if is_input else None
    transposed = replace(weight, index=weight.index.mT)
    layer = call.trace.new_layer(
        weight.index.shape[1], reads, transposed, options={} if is_input else {"constant": True}
    )
    return call.trace.output_of(layer, -1, call.shape)
