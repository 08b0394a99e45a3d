"""Linear layers, convolutions and embeddings: operations with a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scalegmn.interop.torch_modules.computed_weights import Roles, join_roles, roles_of
from scalegmn.interop.torch_modules.cutting import MAX_CELLS
from scalegmn.interop.torch_modules.operators.attention import multiply_values
from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.pinning import pin
from scalegmn.interop.torch_modules.values import (
    ComputedParameters,
    ComputedWeights,
    Elements,
    NetworkInput,
    Neurons,
    Opaque,
    is_constant_along,
    is_number,
)

FAMILY = "layers with a weight"

Evaluate = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, weight, bias) -> the layer's values."""


def weighted_layer(
    call: Call,
    value: Any,
    axis: int,
    weight: Any,
    bias: Any,
    groups: int = 1,
    evaluate: Evaluate = functional.linear,
) -> Neurons:
    """A linear layer or a convolution.

    Args:
        call: the operation.
        value: what the layer reads.
        axis: the axis of its channels.
        weight: [out, in / groups, ...].
        bias: [out] or None.
        groups: of a convolution.
        evaluate: what the layer computes.
    """
    trace = call.trace
    roles: Roles | None = None
    if isinstance(weight, ComputedParameters | ComputedWeights) and call.recomputed is not None:
        computed = ComputedWeights(weight.parts)
        roles = roles_of(trace, computed, partial(call.recomputed, weight), groups)
        weight = roles.main
    if not isinstance(weight, Elements) or not (bias is None or isinstance(bias, Elements)):
        trace.refuse("the weights are computed from other values, expected parameters")
    if isinstance(value, Neurons) and value.factor != 1 and not trace.can_settle(value):  # W (c x) = (c W) x
        weight, value = replace(weight, scale=weight.scale * value.factor), replace(value, factor=1.0)
    neurons = trace.as_neurons(value, axis)
    along, index, x = trace.channels_along(neurons, axis), weight.index, neurons.value
    reads = torch.tensor(list(dict.fromkeys(along.tolist())))
    if len(reads) < len(along):  # all positions of an image in a row
        places = [(along == neuron).nonzero()[:, 0] for neuron in reads]
        if len({*map(len, places)}) > 1 or groups > 1 or index.ndim > 4:
            trace.refuse("a layer reads some channels more often than others")
        positions = torch.stack(places)
        index = index[:, positions]
        index = index.unflatten(2, _image_size(positions.shape[1])) if index.ndim == 3 else index.flatten(2, 3)
    if x is not None:
        trace.claimed = evaluate(x, trace.read(weight), trace.read_if_any(bias))
    if index.ndim == 3:
        index = index.unsqueeze(2)  # a convolution along one axis
    if index.ndim == 5:
        index = index.flatten(3)  # a convolution over volumes
    if index.ndim not in (2, 4):
        trace.refuse("weights with more axes than those of a convolution over volumes")
    options = {"groups": groups, "kernel": tuple(index.shape[2:]) or None}
    layer = trace.new_layer(len(index), reads, replace(weight, index=index), bias=bias, options=options)
    output = trace.output_of(layer, axis, call.shape)
    if roles is not None:
        join_roles(trace, layer, roles, groups)
    return output


def _image_size(num_positions: int) -> tuple[int, int]:
    """Height and width of the image that a layer reads all positions of, where only their number is known."""
    side = int(num_positions**0.5)
    return (side, side) if side * side == num_positions else (1, num_positions)


@operator(FAMILY, "linear")
def linear(call: Call, x: Any, weight: Any, bias: Any = None) -> Neurons:
    """W x + b."""
    if isinstance(weight, Neurons) and bias is None:
        return multiply_values(call, x, replace(weight, ids=weight.ids.mT))
    return weighted_layer(call, x, -1, weight, bias)


@operator(FAMILY, "addmm")
def addmm(call: Call, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Neurons:
    """alpha x W + beta b."""
    if isinstance(weight, Elements):
        weight = replace(weight, index=weight.index.mT, scale=weight.scale * alpha)
    if isinstance(bias, Elements):
        bias = replace(bias, scale=bias.scale * beta)
    if 0 in (alpha, beta):
        call.trace.refuse("a product with the factor 0")
    return weighted_layer(call, x, -1, weight, bias)


@operator(FAMILY, "conv1d", "conv2d", "conv3d")
def convolution(call: Call, x: Any, weight: Any, bias: Any = None, *rest: Any, **options: Any) -> Neurons:
    """A convolution of any stride, padding and dilation."""
    groups = options.get("groups", rest[3] if len(rest) > 3 else 1)
    if isinstance(weight, Elements) and len(call.shape) != weight.index.ndim:
        call.trace.refuse("a convolution reads an input without a batch axis; call the module with a batch of one")
    return weighted_layer(
        call, x, 1, weight, bias, groups, lambda x, weight, bias: call.function(x, weight, bias, *rest, **options)
    )


@operator(FAMILY, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call, x: Any, weight: Any, bias: Any = None, *rest: Any, **options: Any) -> Neurons:
    """A transposed convolution, whose weight is [in, out / groups, ...]."""
    groups = options.get("groups", rest[3] if len(rest) > 3 else 1)

    def transposed(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    if isinstance(weight, Elements):
        weight = replace(weight, index=weight.index.transpose(0, 1) if groups == 1 else transposed(weight.index))
        if len(call.shape) != weight.index.ndim:
            call.trace.refuse("a convolution reads an input without a batch axis; call the module with a batch of one")

    def evaluate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = call.function(x, transposed(weight), bias, *rest, **options)
        return result

    return weighted_layer(call, x, 1, weight, bias, groups, evaluate)


@operator(FAMILY, "matmul", "mm", "bmm", "mv")
def matmul(call: Call, x: Any, y: Any) -> Any:
    """x W or W x with a parameter W; products of two activations are attention."""
    x, y = map(_as_matrix, (x, y))
    if isinstance(x, Elements) and not x.is_buffer and x.index.ndim == 2 and _has_channels_in_columns(y):
        if len(call.shape) == 1:
            return weighted_layer(call, y, -1, x, None)
        return weighted_layer(call, y, -2, x, None, evaluate=lambda columns, weight, _: weight @ columns)
    if isinstance(y, Elements) and y.index.ndim == 2:
        return weighted_layer(call, x, -1, replace(y, index=y.index.mT), None)
    if isinstance(y, Elements) and y.index.ndim == 1 and isinstance(x, Neurons | NetworkInput | Opaque):
        return single_neuron(call, x, replace(y, index=y.index[None]))
    if (
        isinstance(y, Elements)
        and not y.is_buffer
        and y.index.ndim == 3
        and isinstance(x, Neurons | NetworkInput | Opaque)
    ):
        return layers_side_by_side(call, x, y)
    return multiply_values(call, x, y)


def _as_matrix(value: Any) -> Any:
    """A matrix that is repeated over a batch, as one; others as they are."""
    if not isinstance(value, Elements) or value.is_buffer or value.index.ndim < 3:
        return value
    if not all(is_constant_along(value.index, axis) for axis in range(value.index.ndim - 2)):
        return value
    return replace(value, index=value.index[(0,) * (value.index.ndim - 2)])


def _has_channels_in_columns(value: Any) -> bool:
    """Whether what W is multiplied by has channels in its columns, not positions."""
    if isinstance(value, Neurons):
        return not is_constant_along(value.ids, max(-2, -value.ids.ndim))
    return isinstance(value, NetworkInput | Opaque)


def layers_side_by_side(call: Call, x: Any, weight: Elements) -> Neurons:
    """x_e W_e with weights [E, n_{l-1}, n_l], such as of E experts: a layer with a group for each; without groups where
    all read the same; a layer for each where they read one layer, or the input, at different places."""
    trace = call.trace
    if isinstance(x, Neurons) and x.factor != 1:
        x = trace.settled(x)
    if _differs_by_place(x):
        return _layer_for_each(call, x, weight)
    neurons = trace.as_neurons(x, -1)
    ids = neurons.ids.expand(*call.shape[:-1], neurons.ids.shape[-1])
    axes = [axis for axis in range(ids.ndim) if axis - ids.ndim not in (-3, -1)]
    if not all(is_constant_along(ids, axis) for axis in axes):
        trace.refuse("channels lie along other axes than those of the weights")
    for axis in axes:
        ids = ids.narrow(axis, 0, 1)
    rows = ids.reshape(-1, ids.shape[-1])
    is_same = bool((rows == rows[0]).all())
    reads = rows[0] if is_same else rows.flatten()
    if len(reads.unique()) < len(reads):
        trace.refuse("products with several matrices share channels")
    if neurons.value is not None:
        trace.claimed = neurons.value @ trace.read(weight)
    index = weight.index.mT.flatten(0, 1)
    options = {"groups": 1 if is_same else len(rows)}
    layer = trace.new_layer(len(index), reads, replace(weight, index=index), options=options)
    trace.add_layer(layer)
    nodes = layer.nodes.reshape(len(rows), 1, -1).expand(*call.shape)
    return Neurons(nodes, {len(trace.layers) - 1: 0})


def _differs_by_place(x: Neurons | NetworkInput | Opaque) -> bool:
    """Whether values [..., E, T, channels] of the same channels differ along the axis E."""
    if x.value is None or x.value.ndim < 3 or is_constant_along(x.value, -3):
        return False
    return not isinstance(x, Neurons) or is_constant_along(x.ids, -3)


def _layer_for_each(call: Call, x: Any, weight: Elements) -> Neurons:
    """x_e W_e as a layer for each e."""
    nodes, versions = [], dict[int, int]()
    if len(weight.index) > MAX_CELLS:
        call.trace.refuse(f"products with {len(weight.index)} matrices")
    for place, matrix in enumerate(weight.index):
        value = x.value.select(-3, place)
        part = replace(x, ids=x.ids.select(-3, place), value=value) if isinstance(x, Neurons) else Opaque(value)
        at_place = replace(call, result=call.result.select(-3, place))
        layer = weighted_layer(at_place, part, -1, replace(weight, index=matrix.mT), None)
        nodes.append(layer.ids)
        versions |= layer.versions
    call.trace.claimed = x.value @ call.trace.read(weight)
    return Neurons(torch.stack(nodes, -3), versions)


def single_neuron(call: Call, x: Any, weight: Elements) -> Neurons:
    """x w with a vector w, whose result has no axis for its single channel."""
    with_axis = replace(call, result=call.result.unsqueeze(-1))
    output = weighted_layer(with_axis, x, -1, weight, None)
    if call.trace.claimed is not None:
        call.trace.claimed = call.trace.claimed.squeeze(-1)
    return replace(output, ids=output.ids.squeeze(-1))


@operator(FAMILY, "embedding")
def embedding(call: Call, weight: Any, x: Any, *rest: Any, **options: Any) -> Neurons:
    """A vector per word of the input, or per position that is constant or that no symmetry changes."""
    is_input = isinstance(x, NetworkInput) and not x.is_prepared
    is_position = isinstance(x, Tensor | Opaque) or (isinstance(x, NetworkInput) and x.is_prepared)
    if not isinstance(weight, Elements) or not (is_input or is_position):
        call.trace.refuse("an embedding of computed values, expected the input or constant positions")
    reads = call.trace.input_neurons(len(weight.index)) if is_input else None
    numbers = x.value if isinstance(x, NetworkInput | Opaque) else x
    if numbers is not None and not is_number(numbers):
        call.trace.claimed = call.trace.read(weight)[numbers]
    transposed = replace(weight, index=weight.index.mT)
    layer = call.trace.new_layer(
        weight.index.shape[1], reads, transposed, options={} if is_input else {"constant": True}
    )
    return call.trace.output_of(layer, -1, call.shape)


@operator(FAMILY, "embedding_bag")
def embedding_bag(
    call: Call, weight: Any, x: Any, offsets: Any = None, scaled: bool = False, mode: int = 0, *rest: Any
) -> Any:
    """The sum, the mean or the largest of the vectors of a bag of words."""
    if any(isinstance(value, Neurons | Elements | Opaque) for value in (offsets, *rest)):
        call.trace.refuse("an embedding with computed weights of words")
    bags = embedding(call, weight, x)
    call.trace.claimed = None
    if mode == 2:
        call.trace.layers[-1].options["maximum"] = True
    return [bags, *call.result[1:]]


@operator(FAMILY, "bilinear")
def bilinear(call: Call, x: Any, y: Any, weight: Any, bias: Any = None) -> Neurons:
    """x W_k y + b_k for each neuron k, as a layer that reads x, whose weights have as many positions as y has channels,
    which are pinned."""
    trace = call.trace
    if not isinstance(weight, Elements) or not isinstance(x, Neurons) or isinstance(y, Elements):
        trace.refuse("a bilinear layer of what no layer computes")
    neurons = trace.as_neurons(x, -1)
    pin(trace, [y], "channels that a bilinear layer multiplies by others")
    options = {"kernel": (1, weight.index.shape[2])}
    index = weight.index.unsqueeze(2)
    reads = trace.channels_along(neurons, -1)
    layer = trace.new_layer(len(index), reads, replace(weight, index=index), bias=bias, options=options)
    return trace.output_of(layer, len(call.shape) - 1, call.shape)
