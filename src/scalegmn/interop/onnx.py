"""Single networks as ONNX files. A file is data: nothing in it is executed, and it may not lead to other files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scalegmn.networks import ACTIVATIONS, NetParams, NetSpec

GRID = (torch.arange(96, dtype=torch.float64) - 47.5) / 8
"""Values before an activation, at which what the operators make of them tells which it is: none is 0, and all have few
digits, so that w0 z / z is w0."""

TOLERANCE = 1e-6
"""Of activations on the grid: files hold constants such as sqrt(2) in single precision."""

_UNARY: dict[str, Callable[..., Tensor]] = {
    "Relu": torch.relu,
    "LeakyRelu": lambda x, alpha=0.01: functional.leaky_relu(x, alpha),
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Erf": torch.erf,
    "Gelu": lambda x, approximate=b"none": functional.gelu(x, approximate=approximate.decode()),
    "Swish": lambda x, alpha=1.0: x * torch.sigmoid(alpha * x),
    "Neg": torch.neg,
}
"""Operator -> function of values and the node's attributes."""

_BINARY = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}
_POOLING = ("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean", "Pad")
_RESHAPING = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout")
_FLOATS = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class _Layer:
    """A layer as far as it has been read.

    Attributes:
        weight: [out, in] or [out, in, kh, kw].
        bias: [out]; None: there is none.
        activation: as in `LayerSpec`, once the next layer has been reached.
        w0: as in `LayerSpec`.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str = "identity"
    w0: float = 1.0


@dataclass(frozen=True)
class _Signal:
    """A value of the graph that depends on the network's input: f(W x + b) of the last of some layers.

    Attributes:
        layers: the chain that leads to it; none for the input itself.
        values: f on `GRID`, per neuron the same.
        w0: the frequency, where f is a sine.
        place: the last operator over positions that it has passed; two values can be combined in one place only.
        maximum: whether one of them took maxima.
    """

    layers: tuple[_Layer, ...] = ()
    values: Tensor = GRID
    w0: float = 1.0
    place: str = ""
    maximum: bool = False

    @property
    def activation(self) -> str | None:
        """The name of f; None: it has none."""
        candidates = ACTIVATIONS.items()
        close = (name for name, f in candidates if (f.function(GRID, self.w0) - self.values).abs().max() < TOLERANCE)
        return next(close, None)


def from_onnx(path: str | Path) -> NetParams:
    """A chain of layers from an ONNX file, with each layer's own activation.

    Read are Gemm, MatMul, Conv (any stride, padding and dilation, which have no parameters; one group), the additions
    of their biases, pooling and reshaping between layers, and activations, whatever operators spell them out: what
    these make of numbers says which activation it is (relu, leaky relu with slope 0.01, tanh, sigmoid, sin(w0 z), exact
    gelu, silu).

    Args:
        path: the file.

    Returns:
        A batch of one network, in the file's precision.

    Raises:
        ValueError: the `onnx` package or the file is missing, the file is damaged or keeps data elsewhere, or the
            network is no such chain; names the file, and the first node and operator that cannot be read.
    """
    path = Path(path)
    try:
        import onnx
    except ImportError:
        raise ValueError(f"{path}: onnx: not installed; `pip install 'scalegmn[onnx]'`") from None
    try:
        content = path.read_bytes()
        graph = onnx.load_model_from_string(content).graph
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # whatever a hostile or broken file leads to
        raise ValueError(f"{path}: refused, not an ONNX file ({' '.join(str(error).split())[:120]})") from None
    try:
        return _params(_Graph(graph).output())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _params(layers: Sequence[_Layer]) -> NetParams:
    """The layers as a batch of one network."""
    biases = [x.weight.new_zeros(1, len(x.weight)) if x.bias is None else x.bias[None] for x in layers]
    checked = NetParams.from_tensors([x.weight[None] for x in layers], biases, "identity")
    specs = (
        replace(spec, activation=layer.activation, w0=layer.w0, bias=layer.bias is not None)
        for spec, layer in zip(checked.spec.layers, layers, strict=True)
    )
    return checked.replace(spec=NetSpec(tuple(specs)))


class _Graph:
    """The values of an ONNX graph, node by node.

    A node that cannot be read matters only if the output depends on it: shapes are computed beside the network. So its
    value is the error, which is raised where it is used.
    """

    def __init__(self, graph: Any) -> None:
        self._values: dict[str, Tensor | _Signal | ValueError] = {}
        for tensor in graph.initializer:
            self._values[tensor.name] = _attempt(lambda tensor=tensor: _constant(tensor))
        inputs = [value.name for value in graph.input if value.name not in self._values]
        self._outputs = [value.name for value in graph.output]
        for kind, names in (("input", inputs), ("output", self._outputs)):
            if len(names) != 1:
                raise ValueError(f"{len(names)} {kind}s, expected one")
        self._values[inputs[0]] = _Signal()
        for node in graph.node:
            value = _attempt(lambda node=node: self._value_of(node))
            self._values |= dict.fromkeys(node.output, value)

    def output(self) -> tuple[_Layer, ...]:
        """The layers that the output is read from; raises ValueError unless the last has no activation."""
        found = self._get(self._outputs[0])
        if not isinstance(found, _Signal) or not found.layers:
            raise ValueError("its output does not depend on a layer")
        if found.activation != "identity":
            raise ValueError(
                f"the output has an activation, {found.activation or 'unknown'}; expected none: leave it out"
            )
        return found.layers

    def _get(self, name: str) -> Tensor | _Signal:
        value = self._values.get(name, ValueError(f"{name}: no such value in the file"))
        if isinstance(value, ValueError):
            raise value
        return value

    def _value_of(self, node: Any) -> Tensor | _Signal:
        """What a node makes of its inputs; raises ValueError with its name and operator."""
        from onnx.helper import get_attribute_value

        name = f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"
        operands = [self._get(key) if key else None for key in list(node.input)[: _num_read(node.op_type)]]
        try:
            attributes = {item.name: get_attribute_value(item) for item in node.attribute}
            if node.domain not in ("", "ai.onnx"):
                raise ValueError(f"an operator of {node.domain}")
            if any(isinstance(x, _Signal) for x in operands):
                return _of_signals(node, operands, attributes)
            return _of_constants(node.op_type, operands, attributes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        except Exception as error:  # whatever a hostile or broken file leads to
            raise ValueError(f"{name}: damaged ({' '.join(str(error).split())[:120]})") from None


def _attempt(read: Callable[[], Tensor | _Signal]) -> Tensor | _Signal | ValueError:
    """What `read` returns, or the ValueError that it raises."""
    try:
        return read()
    except ValueError as error:
        return error


def _num_read(operator: str) -> int | None:
    """How many of an operator's inputs are looked at; None: all. The others are shapes and sizes."""
    return 1 if operator in (*_RESHAPING, *_POOLING) and operator != "ReduceMean" else None


def _constant(tensor: Any) -> Tensor:
    """The numbers of an ONNX tensor."""
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise ValueError(f"{tensor.name!r} keeps its data in another file; save the network as one file")
    try:
        return torch.from_numpy(numpy_helper.to_array(tensor).copy())
    except Exception as error:  # whatever a hostile or broken file leads to
        raise ValueError(f"{tensor.name!r}: damaged ({' '.join(str(error).split())[:120]})") from None


def _of_constants(operator: str, operands: Sequence[Tensor | None], attributes: Mapping[str, Any]) -> Tensor:
    """What an operator makes of constants, such as a weight that is stored transposed."""
    if operator == "Constant" and "value" in attributes:
        return _constant(attributes["value"])
    if operator == "Constant" and "value_float" in attributes:
        return torch.tensor(attributes["value_float"])
    if operator == "Transpose" and operands[0].ndim == 2 and list(attributes.get("perm", (1, 0))) == [1, 0]:
        return operands[0].T
    if operator == "Identity":
        return operands[0]
    raise ValueError("is not read, of constants")


def _of_signals(node: Any, operands: Sequence[Any], attributes: Mapping[str, Any]) -> _Signal:
    """What an operator makes of values that depend on the input."""
    operator, (signal, *others) = node.op_type, operands
    if operator in _BINARY:
        return _binary(operator, *operands)
    if not isinstance(signal, _Signal) or any(isinstance(x, _Signal) for x in others):
        raise ValueError("joins paths, or multiplies from the left; expected a chain of layers")
    if operator in ("MatMul", "Gemm", "Conv"):
        return _Signal((*_activated(signal), _layer(operator, signal, others, attributes)))
    if operator == "Sin":
        factors = signal.values / GRID
        if (factors - factors[0]).abs().max() > TOLERANCE or factors[0] <= 0:
            raise ValueError("expected sin(w0 z), z what a layer says and w0 above 0")
        return replace(signal, values=torch.sin(factors[0] * GRID), w0=factors[0].item())
    if operator in _UNARY:
        return replace(signal, values=_UNARY[operator](signal.values, **attributes))
    if operator in _RESHAPING:
        if operator == "Flatten" and attributes.get("axis", 1) not in (1, -3):
            raise ValueError(f"axis: found {attributes['axis']}, expected 1")
        return signal
    if operator in _POOLING:
        if signal.layers and signal.layers[-1].weight.ndim != 4:
            raise ValueError("expected after a convolution")
        if operator == "ReduceMean":
            axes = attributes["axes"] if "axes" in attributes else others[0].tolist()
            if sorted(axis % 4 for axis in axes) != [2, 3]:
                raise ValueError(f"axes: found {list(axes)}, expected those of positions, 2 and 3")
        return replace(signal, place=node.output[0], maximum=signal.maximum or "Max" in operator)
    raise ValueError("is not read; expected Gemm, MatMul, Conv, their biases, activations, pooling and reshaping")


def _binary(operator: str, left: Tensor | _Signal, right: Tensor | _Signal) -> _Signal:
    """The sum, ... of two values in one place of a layer, or of one and a number; or a layer with its bias."""
    if isinstance(left, _Signal) and isinstance(right, _Signal):
        if left.layers is not right.layers or left.place != right.place:
            raise ValueError("joins two paths; expected a chain of layers")
        return replace(left, values=_BINARY[operator](left.values, right.values))
    signal, constant = (left, right) if isinstance(left, _Signal) else (right, left)
    if operator == "Add" and signal.layers and not signal.place and torch.equal(signal.values, GRID):
        *before, last = signal.layers
        axes = (1,) * (last.weight.ndim - 2)  # of positions
        bias = _per_neuron(constant, (len(last.weight), *axes))
        bias = bias if last.bias is None else last.bias + bias
        return replace(signal, layers=(*before, replace(last, bias=bias)))
    if constant.numel() != 1:
        raise ValueError(f"a constant {tuple(constant.shape)}, expected one number")
    number = constant.double().flatten()
    values = (signal.values, number) if signal is left else (number, signal.values)
    return replace(signal, values=_BINARY[operator](*values))


def _activated(signal: _Signal) -> tuple[_Layer, ...]:
    """The layers that lead to a value, the last with the activation that the value has."""
    name = signal.activation
    if not signal.layers:
        if name != "identity":
            raise ValueError("the network's input is changed before its first layer")
        return ()
    if name is None:
        raise ValueError("what comes between it and the layer before is no known activation")
    group = ACTIVATIONS[name].group
    if signal.maximum and group.signs and group.sign_exponent == 1:
        raise ValueError(f"maxima are taken before it, which {name} neurons with other signs would change")
    *before, last = signal.layers
    return (*before, replace(last, activation=name, w0=signal.w0 if name == "sine" else 1.0))


def _layer(operator: str, signal: _Signal, operands: Sequence[Tensor | None], attributes: Mapping[str, Any]) -> _Layer:
    """A new layer that reads a value."""
    weight, bias = (*operands, None)[:2]
    if weight.dtype not in _FLOATS or weight.ndim != (4 if operator == "Conv" else 2):
        raise ValueError(
            f"a weight {weight.dtype} {tuple(weight.shape)}, expected floats with as many axes as it needs"
        )
    if attributes.get("group", 1) != 1 or attributes.get("transA", 0):
        raise ValueError("group or transA are set; expected neither")
    if operator != "Conv" and not attributes.get("transB", 0):
        weight = weight.T
    weight = weight * attributes.get("alpha", 1.0)
    out_dim, in_dim = weight.shape[:2]
    size = len(signal.layers[-1].weight) if signal.layers else in_dim
    if in_dim != size:
        remedy = "pool positions before they are flattened"
        raise ValueError(f"reads {in_dim} values, but the layer before has {size} neurons or channels; {remedy}")
    if bias is not None:
        bias = _per_neuron(bias, (out_dim,)) * attributes.get("beta", 1.0)
    return _Layer(weight.contiguous(), bias)


def _per_neuron(constant: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A constant that is broadcast to `shape` (neurons, then an axis of size 1 per axis of positions), as [neurons]."""
    found = tuple(constant.shape)
    while len(found) > len(shape) and found[0] == 1:
        found = found[1:]
    if constant.numel() != 1 and found != shape:
        raise ValueError(f"a bias {tuple(constant.shape)}, expected {shape}")
    return constant.flatten().expand(shape[0]).clone()
