"""The operators of ONNX in terms of PyTorch's operations. A new operator is one function, registered by its name.

The operations are then read as those of any module (`interop.torch_modules.operators`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scalegmn.interop.onnx.file import tensor_of
from scalegmn.registry import Registry

MAX_ELEMENTS = 2**26
"""The largest constant that a file may compute."""

FLOATS = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Node:
    """One node of a graph, for its operator's function."""

    attributes: dict[str, Any]
    constants: tuple[Tensor | None, ...]
    """Per input its value, None where it depends on the network's input."""

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute; numbers, which files hold in single precision, as their shortest decimals."""
        value = self.attributes.get(name, default)
        if isinstance(value, float):
            return float(str(np.float32(value)))
        return value.decode() if isinstance(value, bytes) else value

    def ints(self, name: str, index: int | None = None) -> list[int] | None:
        """Whole numbers from an attribute or, as in newer files, from an input."""
        if name in self.attributes:
            return list(self.attributes[name])
        value = self.constants[index] if index is not None and index < len(self.constants) else None
        return None if value is None else [int(number) for number in value.flatten().tolist()]


Function = Callable[..., Any]
"""(node, *inputs) -> output, or several: tensors, None for inputs that are left out."""

ONNX_OPERATORS: Registry[Function] = Registry("ONNX operator")


def onnx_operator(*names: str) -> Callable[[Function], Function]:
    """A decorator that registers the function of operators of these names."""

    def register(function: Function) -> Function:
        for name in names:
            ONNX_OPERATORS.register(name, function)
        return function

    return register


# Layers


def _check_weight(weight: Tensor, axes: Sequence[int]) -> None:
    if weight.dtype not in FLOATS or weight.ndim not in axes:
        raise ValueError(f"a weight {weight.dtype} {tuple(weight.shape)}, expected floats with {axes[0]} axes")


@onnx_operator("Gemm")
def gemm(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W + b, or x W^T + b; `graph` multiplies alpha and beta into the parameters."""
    _check_weight(weight, (2,))
    if node.get("transA", 0):
        raise ValueError("transA is set, expected weights on the right")
    weight = weight if node.get("transB", 0) else weight.mT
    _check_width(x, weight.shape[1])
    return functional.linear(x, weight, bias)


@onnx_operator("MatMul")
def matmul(node: Node, x: Tensor, y: Tensor) -> Tensor:
    """x W with a parameter W, or a product of two activations."""
    if x.dtype != y.dtype:
        raise ValueError(f"multiplies numbers of {x.dtype} and {y.dtype}, expected one type")
    if y.ndim == 2:
        _check_width(x, len(y))
    return x @ y


def _check_width(x: Tensor, width: int) -> None:
    if x.shape[-1] != width:
        found = f"found {x.shape[-1]}; where the file leaves the size of its input open, give input_shape"
        raise ValueError(f"reads {width} values, {found}")


@onnx_operator("Conv")
def convolution(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution along one axis or over images."""
    _check_weight(weight, (4, 3))
    axes = weight.ndim - 2
    stride, dilation = node.ints("strides") or [1] * axes, node.ints("dilations") or [1] * axes
    x, padding = _padded(node, x, list(weight.shape[2:]), stride, dilation)
    function = functional.conv2d if axes == 2 else functional.conv1d
    return function(x, weight, bias, stride, padding, dilation, node.get("group", 1))


def _padded(
    node: Node, x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """The padding on both sides of each axis, and the input with what one side has more.

    The excess is zeros, also before a pooling, where ONNX leaves it out: no parameter depends on that.
    """
    axes, mode = len(kernel), node.get("auto_pad", "NOTSET")
    pads = node.ints("pads") or [0] * (2 * axes)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        sizes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
        totals = [max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size) for size, k, s, d in sizes]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = [*small, *large] if mode == "SAME_UPPER" else [*large, *small]
    both = [min(pair) for pair in zip(pads[:axes], pads[axes:], strict=True)]
    extra = [pads[axis + side * axes] - both[axis] for axis in reversed(range(axes)) for side in (0, 1)]
    return (functional.pad(x, extra) if any(extra) else x), both


@onnx_operator("BatchNormalization")
def batch_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """A batch norm as it evaluates."""
    if node.get("training_mode", 0):
        raise ValueError("a batch norm in training mode; export the network in evaluation mode")
    return functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, node.get("epsilon", 1e-5))


@onnx_operator("LayerNormalization")
def layer_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A layer norm."""
    axis = node.get("axis", -1) % x.ndim
    return functional.layer_norm(x, list(x.shape[axis:]), weight, bias, node.get("epsilon", 1e-5))


@onnx_operator("RMSNormalization")
def rms_norm(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    """A root mean square norm."""
    axis = node.get("axis", -1) % x.ndim
    return functional.rms_norm(x, list(x.shape[axis:]), weight, node.get("epsilon", 1e-5))


@onnx_operator("GroupNormalization")
def group_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A group norm."""
    return functional.group_norm(x, node.get("num_groups"), weight, bias, node.get("epsilon", 1e-5))


@onnx_operator("InstanceNormalization")
def instance_norm(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A norm over the positions of each channel, as a group norm; exporters spell group norms by it.

    In these x is [N, groups, values], and scale and shift are 1 and 0.
    """
    scale, shift = node.constants[1:3]
    if scale is None or shift is None or not (bool((scale == 1).all()) and bool((shift == 0).all())):
        raise ValueError("an instance norm, expected one that spells a group norm")
    return functional.group_norm(x, x.shape[1], None, None, node.get("epsilon", 1e-5))


# Activations


for _name, _function in {
    "Relu": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Erf": torch.erf,
    "Neg": torch.neg,
    "Sqrt": torch.sqrt,
    "Exp": torch.exp,
    "Log": torch.log,
    "Abs": torch.abs,
    "Mish": functional.mish,
    "Softplus": functional.softplus,
    "HardSwish": functional.hardswish,
    "Reciprocal": torch.reciprocal,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
}.items():
    ONNX_OPERATORS.register(_name, lambda node, x, function=_function: function(x))


@onnx_operator("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """max(x, alpha x)."""
    return functional.leaky_relu(x, node.get("alpha", 0.01))


@onnx_operator("PRelu")
def prelu(node: Node, x: Tensor, slope: Any) -> Tensor:
    """max(x, 0) + slope min(x, 0), of one slope."""
    if isinstance(slope, Tensor):
        raise ValueError(f"{slope.numel()} slopes, expected one")
    return functional.leaky_relu(x, float(str(np.float32(slope))))


@onnx_operator("Elu")
def elu(node: Node, x: Tensor) -> Tensor:
    """x, or below zero alpha (exp(x) - 1)."""
    return functional.elu(x, node.get("alpha", 1.0))


@onnx_operator("Selu")
def selu(node: Node, x: Tensor) -> Tensor:
    """gamma x, or below zero gamma alpha (exp(x) - 1)."""
    alpha, gamma = node.get("alpha", _SELU[0]), node.get("gamma", _SELU[1])
    is_standard = abs(alpha - _SELU[0]) < 1e-6 and abs(gamma - _SELU[1]) < 1e-6
    return functional.selu(x) if is_standard else gamma * functional.elu(x, alpha)


_SELU = (1.6732632423543772, 1.0507009873554805)
"""alpha and gamma."""


@onnx_operator("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """alpha x + beta between 0 and 1."""
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return functional.hardsigmoid(x)
    return (alpha * x + beta).clamp(0, 1)


@onnx_operator("Clip")
def clip(node: Node, x: Tensor, lowest: Any = None, highest: Any = None) -> Tensor:
    """Values between two numbers."""
    bounds = [node.get("min") if lowest is None else lowest, node.get("max") if highest is None else highest]
    numbers = [bound.item() if isinstance(bound, Tensor) and not bound.is_meta else bound for bound in bounds]
    if numbers == [None, None]:
        return x
    if any(isinstance(bound, Tensor) for bound in numbers):
        raise ValueError("bounds that are computed, expected numbers")
    return x.clamp(*numbers)


def _extreme(name: str) -> Function:
    """The largest ("max") or smallest ("min") of several values, of which some may be numbers."""

    def function(node: Node, *values: Any) -> Tensor:
        first, *others = sorted(values, key=lambda value: not isinstance(value, Tensor))
        for other in others:
            bound = {"min" if name == "max" else "max": other}
            first = getattr(torch, f"{name}imum")(first, other) if isinstance(other, Tensor) else first.clamp(**bound)
        return first

    return function


for _name in ("Max", "Min"):
    ONNX_OPERATORS.register(_name, _extreme(_name.lower()))


@onnx_operator("Gelu")
def gelu(node: Node, x: Tensor) -> Tensor:
    """x times the normal distribution function of x, exact or approximated."""
    return functional.gelu(x, approximate=node.get("approximate", "none"))


@onnx_operator("Swish")
def swish(node: Node, x: Tensor) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(node.get("alpha", 1.0) * x)


@onnx_operator("Softmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    """Of attention scores, or of the network's output."""
    return functional.softmax(x, node.get("axis", -1))


@onnx_operator("LogSoftmax")
def log_softmax(node: Node, x: Tensor) -> Tensor:
    """Log-probabilities, the network's output."""
    return functional.log_softmax(x, node.get("axis", -1))


@onnx_operator("Attention")
def attention(node: Node, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *past: Any) -> Tensor:
    """softmax(q k^T scale + mask) v of each head; heads stand beside each other in inputs with three axes."""
    heads = node.get("q_num_heads", query.shape[1]), node.get("kv_num_heads", key.shape[1])
    if heads[0] != heads[1]:
        raise ValueError(f"{heads[0]} heads of queries and {heads[1]} of keys, expected equally many")
    if node.get("softcap", 0.0) != 0 or any(item is not None for item in past):
        raise ValueError("softcap or past keys, expected none")
    is_flat = query.ndim == 3
    if is_flat:
        query, key, value = (x.unflatten(-1, (heads[0], -1)).transpose(1, 2) for x in (query, key, value))
    causal, scale = bool(node.get("is_causal", 0)), node.get("scale")
    result = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    return result.transpose(1, 2).flatten(2) if is_flat else result


# Arithmetic

for _name, _binary in {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": torch.pow,
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "And": torch.logical_and,
    "Or": torch.logical_or,
}.items():
    ONNX_OPERATORS.register(_name, lambda node, x, y, function=_binary: _apply(function, x, y))


def _apply(function: Function, x: Any, y: Any) -> Tensor:
    """A function of two tensors or numbers; quotients of whole numbers are whole."""
    if function is torch.div and isinstance(x, Tensor) and not x.is_floating_point():
        return torch.div(x, y, rounding_mode="trunc")
    if not isinstance(x, Tensor):
        x = torch.as_tensor(x, dtype=y.dtype, device=y.device) if function in (torch.pow, torch.lt) else x
        if function in (torch.add, torch.mul):
            return function(y, x)  # the number second, as modules have it
        if function is torch.sub:
            return torch.rsub(y, x)
        if function is torch.div:
            return torch.reciprocal(y) * x
    result: Tensor = function(x, y)
    return result


@onnx_operator("Where")
def where(node: Node, condition: Tensor, x: Any, y: Any) -> Tensor:
    """A choice, such as a mask of attention scores."""
    return torch.where(condition, x, y)


# Pooling


def _pooling(name: str) -> Function:
    """The function of an operator that pools."""

    def function(node: Node, x: Tensor) -> Any:
        kernel = node.ints("kernel_shape") or []
        stride, dilation = node.ints("strides") or [1] * len(kernel), node.ints("dilations") or [1] * len(kernel)
        x, padding = _padded(node, x, kernel, stride, dilation)
        is_image, ceil = len(kernel) == 2, bool(node.get("ceil_mode", 0))
        if name == "MaxPool":
            largest: Function = functional.max_pool2d if is_image else functional.max_pool1d
            return largest(x, kernel, stride, padding, dilation, ceil)
        average: Function = functional.avg_pool2d if is_image else functional.avg_pool1d
        return average(x, kernel, stride, padding, ceil, bool(node.get("count_include_pad", 0)))

    return function


for _name in ("MaxPool", "AveragePool"):
    ONNX_OPERATORS.register(_name, _pooling(_name))


@onnx_operator("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    """The mean over all positions."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@onnx_operator("GlobalMaxPool")
def global_max_pool(node: Node, x: Tensor) -> Tensor:
    """The largest value over all positions."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@onnx_operator("ReduceMean")
def reduce_mean(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """The mean over some axes."""
    return x.mean(node.ints("axes", 1) or list(range(x.ndim)), keepdim=bool(node.get("keepdims", 1)))


@onnx_operator("ReduceMax")
def reduce_max(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """The largest value over some axes."""
    return x.amax(node.ints("axes", 1) or list(range(x.ndim)), keepdim=bool(node.get("keepdims", 1)))


@onnx_operator("Pad")
def pad(node: Node, x: Tensor, pads: Tensor | None = None, value: Any = None, axes: Tensor | None = None) -> Tensor:
    """More positions."""
    amounts, places = node.ints("pads", 1) or [], node.ints("axes", 3) or list(range(x.ndim))
    sides = {axis % x.ndim: (amounts[i], amounts[i + len(places)]) for i, axis in enumerate(places)}
    first = min((axis for axis, pair in sides.items() if any(pair)), default=x.ndim)
    flat = [amount for axis in reversed(range(first, x.ndim)) for amount in sides.get(axis, (0, 0))]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(node.get("mode", "constant"))
    if mode is None:
        raise ValueError(f"mode: found {node.get('mode')}, expected constant, reflect or edge")
    number = node.constants[2] if len(node.constants) > 2 else None
    if mode == "constant":
        return functional.pad(x, flat, value=0.0 if number is None else float(number))
    return functional.pad(x, flat, mode=mode)


@onnx_operator("Resize")
def resize(node: Node, x: Tensor, region: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    """More or fewer positions of images or sequences."""
    mode, factors = node.get("mode", "nearest"), node.constants[2] if len(node.constants) > 2 else None
    shape = node.ints("sizes", 3)
    if mode not in ("nearest", "linear") or x.ndim not in (3, 4):
        raise ValueError(f"mode: found {mode} of {x.ndim - 2} axes, expected nearest or linear, of one or two")
    if not shape:
        if factors is None:
            raise ValueError("neither sizes nor scales are constant")
        shape = [int(size * factor) for size, factor in zip(x.shape, factors.tolist(), strict=True)]
    if mode == "nearest":
        return functional.interpolate(x, shape[2:])
    aligned = node.get("coordinate_transformation_mode", "half_pixel") == "align_corners"
    return functional.interpolate(x, shape[2:], mode="linear" if x.ndim == 3 else "bilinear", align_corners=aligned)


# Views


@onnx_operator("Identity", "Dropout")
def identity(node: Node, x: Tensor, *rest: Any) -> Tensor:
    """The input itself."""
    return x


@onnx_operator("Reshape")
def reshape(node: Node, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """The same elements in another shape."""
    sizes = node.ints("shape", 1) or []
    if not node.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


@onnx_operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    """Two axes."""
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.flatten(axis) if axis == 1 else x.reshape(x.shape[:axis].numel(), -1)


@onnx_operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    """The axes in another order."""
    return x.permute(node.ints("perm") or list(range(x.ndim))[::-1])


@onnx_operator("Squeeze")
def squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without axes of size 1."""
    places = node.ints("axes", 1)
    places = [axis for axis, size in enumerate(x.shape) if size == 1] if places is None else places
    for axis in sorted((axis % x.ndim for axis in places), reverse=True):
        x = x.squeeze(axis)
    return x


@onnx_operator("Unsqueeze")
def unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """With axes of size 1."""
    places = node.ints("axes", 1) or []
    for axis in sorted(axis % (x.ndim + len(places)) for axis in places):
        x = x.unsqueeze(axis)
    return x


@onnx_operator("Concat")
def concatenate(node: Node, *inputs: Tensor) -> Tensor:
    """Several tensors along an axis."""
    return torch.cat(inputs, node.get("axis"))


@onnx_operator("Split")
def split(node: Node, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    """Parts along an axis."""
    axis, parts = node.get("axis", 0), node.ints("split", 1)
    if parts is None:
        number = node.get("num_outputs")
        size = -(-x.shape[axis] // number)
        return list(x.split(size, axis))
    return list(x.split(parts, axis))


@onnx_operator("Slice")
def slice_(node: Node, x: Tensor, *rest: Any) -> Tensor:
    """A range along some axes."""
    starts, ends = node.ints("starts", 1) or [], node.ints("ends", 2) or []
    axes, steps = node.ints("axes", 3) or list(range(len(starts))), node.ints("steps", 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise ValueError(f"steps: found {step}, expected at least 1")
        x = torch.ops.aten.slice.Tensor(x, axis, start, min(end, 2**62), step)
    return x


@onnx_operator("Gather")
def gather(node: Node, x: Tensor, index: Tensor) -> Tensor:
    """Entries along an axis: one of them, or the vectors of an embedding."""
    axis, constant = node.get("axis", 0), node.constants[1]
    if constant is not None and constant.ndim == 0:
        return x.select(axis, int(constant))
    if axis == 0 and x.ndim == 2 and x.is_floating_point():
        return functional.embedding(index, x)
    places = index.flatten()
    return x.index_select(axis, places).unflatten(axis, index.shape) if index.ndim > 1 else x.index_select(axis, places)


@onnx_operator("Expand")
def expand(node: Node, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """Broadcast."""
    sizes = torch.broadcast_shapes(x.shape, node.ints("shape", 1) or [])
    check_size(sizes)
    return x.expand(sizes)


@onnx_operator("Tile")
def tile(node: Node, x: Tensor, repeats: Tensor | None = None) -> Tensor:
    """Repeated along some axes."""
    counts = node.ints("repeats", 1) or []
    check_size([size * count for size, count in zip(x.shape, counts, strict=True)])
    return x.repeat(counts)


@onnx_operator("Cast")
def cast(node: Node, x: Tensor) -> Tensor:
    """Another type."""
    from onnx import helper

    dtype = torch.from_numpy(np.zeros(0, helper.tensor_dtype_to_np_dtype(node.get("to")))).dtype
    return x if x.dtype == dtype or (x.is_floating_point() and dtype in FLOATS) else x.to(dtype)


@onnx_operator("CastLike")
def cast_like(node: Node, x: Tensor, other: Tensor) -> Tensor:
    """The type of another value."""
    return x if x.is_floating_point() and other.dtype in FLOATS else x.to(other.dtype)


# Constants


def check_size(shape: Sequence[int]) -> None:
    """Raises ValueError for a constant that would fill the memory."""
    if min(shape, default=0) < 0 or torch.Size(shape).numel() > MAX_ELEMENTS:
        raise ValueError(f"a tensor of shape {tuple(shape)}, expected at most {MAX_ELEMENTS} elements")


@onnx_operator("Constant")
def constant(node: Node) -> Tensor:
    """A number, or several."""
    if "value" in node.attributes:
        return tensor_of(node.attributes["value"])
    for name in ("value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            return torch.tensor(node.attributes[name])
    raise ValueError("no numbers")


@onnx_operator("ConstantOfShape")
def constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    """One number everywhere."""
    sizes = node.ints("shape", 0) or []
    check_size(sizes)
    number = tensor_of(node.attributes["value"]) if "value" in node.attributes else torch.zeros(1)
    return number.expand(sizes).clone()


@onnx_operator("Range")
def range_(node: Node, *limits: Any) -> Tensor:
    """Numbers in a row."""
    start, end, step = (number for number in node.constants if number is not None)
    check_size([abs(int((end - start) / step))])
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@onnx_operator("Trilu")
def trilu(node: Node, x: Tensor, k: Any = None) -> Tensor:
    """The upper or lower triangle."""
    diagonal = int(node.constants[1]) if len(node.constants) > 1 and node.constants[1] is not None else 0
    return torch.triu(x, diagonal) if node.get("upper", 1) else torch.tril(x, diagonal)
