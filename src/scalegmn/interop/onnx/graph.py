"""The graph of an ONNX file: constants, and the steps from its input to its output."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scalegmn.interop.onnx.activations import ELEMENTWISE, GRID, ActivationStep, Elementwise, frequency_of
from scalegmn.interop.onnx.file import attempt, one_line, tensor_of
from scalegmn.interop.onnx.operators import FLOATS, ONNX_OPERATORS, Function, Node, check_size

OPEN_SIZE = 32
"""Height and width of images, or length of sequences, where a file leaves them open."""

_VIEWS = {"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Identity", "Split", "Expand"}
"""Operators that keep a parameter's identity: a weight and its transpose are one parameter."""


class OperatorStep(nn.Module):
    """One node of a graph."""

    def __init__(self, function: Function, node: Node) -> None:
        super().__init__()
        self.function, self.node = function, node

    def forward(self, *inputs: Any) -> Any:
        """The outputs of the node."""
        return self.function(self.node, *inputs)


@dataclass(frozen=True)
class Step:
    """One node of the network that depends on its input or only moves a parameter's elements."""

    place: str
    """For messages: `node 'conv1' (Conv)`."""

    operator: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OnnxGraph:
    """The steps of the network in an ONNX file.

    Constants are computed; operators that make up an activation are replaced by it; a node that cannot be read matters
    only if the output depends on it.

    Args:
        graph: the file's graph.
        input_shape: the shape of an input; None: that of the file.

    Raises:
        ValueError: the file has several inputs or outputs, or a node that cannot be read; names the node and operator.

    Attributes:
        input, output: the names of these values.
        example_input: zeros.
        activations: value -> the activation that it is the output of.
        producers: value -> the step that computes it.
        steps: what the output depends on, in order.
    """

    def __init__(self, graph: Any, input_shape: tuple[int, ...] | None = None) -> None:
        self._values: dict[str, Tensor | ValueError] = {}  # constants, and examples on the device meta of others
        for tensor in graph.initializer:
            self._values[tensor.name] = attempt(partial(tensor_of, tensor))
        inputs = [value.name for value in graph.input if value.name not in self._values]
        for kind, names in (("input", inputs), ("output", [value.name for value in graph.output])):
            if len(names) != 1:
                raise ValueError(f"{len(names)} {kind}s, expected one")
        (self.input,), self.output = inputs, graph.output[0].name
        self._elementwise: dict[str, Elementwise] = {}
        self.activations: dict[str, str] = {}
        self._num_uses = Counter(name for node in graph.node for name in node.input) + Counter([self.output])
        self.example_input = self._example_input(graph, input_shape)
        self._values[self.input] = self.example_input.to("meta")
        self.producers: dict[str, Step] = {}
        for node in graph.node:
            result = attempt(partial(self._read, node))
            if isinstance(result, ValueError):
                self._values |= dict.fromkeys(node.output, result)
        self.steps = self._needed_steps()

    def _read(self, proto: Any) -> None:
        """Computes a node's outputs where they are constant, else adds a step; raises ValueError with its place."""
        from onnx.helper import get_attribute_value

        place = f"node {proto.name or next(iter(proto.output), '')!r} ({proto.op_type})"
        examples = [None if not name else self.value(name) for name in proto.input]
        try:
            if proto.domain not in ("", "ai.onnx"):
                raise ValueError(f"an operator of {proto.domain}, which is not read")
            if proto.op_type not in ONNX_OPERATORS and proto.op_type not in ("Shape", "Size"):
                raise ValueError("is not a known operator")
            attributes = {item.name: get_attribute_value(item) for item in proto.attribute}
            self._add(place, proto, attributes, examples)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        except Exception as error:  # whatever a hostile or broken file leads to
            raise ValueError(f"{place}: its inputs do not fit ({one_line(error)})") from None

    def value(self, name: str) -> Tensor:
        """A constant, or an example of another value; raises ValueError where it could not be read."""
        value = self._values.get(name, ValueError(f"{name}: no such value in the file"))
        if isinstance(value, ValueError):
            raise value
        return value

    def _add(self, place: str, proto: Any, attributes: dict[str, Any], examples: list[Tensor | None]) -> None:
        """As `_read`, of attributes and examples of the inputs."""
        operator, outputs = proto.op_type, tuple(proto.output)
        if operator in ("Shape", "Size"):
            shape = examples[0].shape[attributes.get("start", 0) : attributes.get("end")]  # type: ignore[union-attr]
            self._values[outputs[0]] = torch.tensor(list(shape) if operator == "Shape" else shape.numel())
            return
        if all(example is None or not example.is_meta for example in examples):
            self._compute(place, operator, attributes, tuple(proto.input), outputs)
            return
        inputs = self._with_factors(operator, tuple(proto.input), attributes)
        step = (
            self._layer_with_bias(operator, inputs, outputs)
            or self._group_norm(place, operator, inputs, outputs, attributes)
            or self._rms_norm(place, operator, inputs, outputs)
        )
        if step is None:
            node = Node(attributes, tuple(self.constant(name) for name in inputs))
            function = ONNX_OPERATORS[operator]
            if self._is_activation(place, operator, node, inputs, outputs):
                return
            step = Step(place, operator, OperatorStep(function, node), inputs, outputs)
        self._set(outputs, step.module(*(self._example(step.operator, name) for name in step.inputs)))
        self.producers |= dict.fromkeys(outputs, step)

    def _compute(
        self, place: str, operator: str, attributes: dict[str, Any], inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        """Sets a node's outputs, which are constant; views of a parameter stay views of it."""
        constants = tuple(self.constant(name) for name in inputs)
        node, function = Node(attributes, constants), ONNX_OPERATORS[operator]
        self._set(outputs, function(node, *constants))
        if operator in _VIEWS and constants[0] is not None and is_parameter(constants[0]):
            step = Step(place, operator, OperatorStep(function, node), inputs, outputs)
            self.producers |= dict.fromkeys(outputs, step)

    def _set(self, outputs: tuple[str, ...], result: Any) -> None:
        """Keeps a node's outputs."""
        results = result if isinstance(result, list | tuple) else [result]
        for name, tensor in zip(outputs, results, strict=False):
            if not tensor.is_meta:
                check_size(tensor.shape)
            self._values[name] = tensor

    def constant(self, name: str) -> Tensor | None:
        """The value of an input that does not depend on the network's input."""
        value = self.value(name) if name else None
        return None if value is None or value.is_meta else value

    def _example(self, operator: str, name: str) -> Any:
        """An input of a node as its function gets it, on the device meta."""
        value = self.constant(name)
        if value is None:
            return self.value(name) if name else None
        return value.item() if is_number(operator, value) else value.to("meta")

    # Parameters of layers

    def _with_factors(self, operator: str, inputs: tuple[str, ...], attributes: dict[str, Any]) -> tuple[str, ...]:
        """The inputs of a Gemm, with alpha and beta multiplied into its parameters and an entry of bias per neuron."""
        if operator != "Gemm":
            return inputs
        changed = list(inputs)
        for index, key in ((1, "alpha"), (2, "beta")):
            factor, name = attributes.pop(key, 1.0), inputs[index] if index < len(inputs) else ""
            constant = self.constant(name) if name else None
            if constant is None and factor != 1 and name:
                raise ValueError(f"{key}: found {factor:g} beside a computed value, expected 1")
            if constant is None:
                continue
            if index == 2:
                weight = self.value(inputs[1])
                constant = _per_neuron(constant, weight.shape[0 if attributes.get("transB", 0) else 1])
            if factor != 1 or constant is not self.value(name):
                changed[index] = f"{name} (of {inputs[0]})"
                self._values[changed[index]] = constant * factor
        return tuple(changed)

    def _layer_with_bias(self, operator: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Step | None:
        """The layer whose output a constant is added to, with the constant in its bias; None: it is no such sum."""
        if operator != "Add":
            return None
        for name, other in (inputs, inputs[::-1]):
            layer, added = self.producers.get(name), self.constant(other)
            if layer is None or added is None or layer.operator not in ("Gemm", "MatMul", "Conv"):
                continue
            weight = self.constant(layer.inputs[1])
            if weight is None or self._num_uses[name] > 1 or not isinstance(layer.module, OperatorStep):
                continue
            is_convolution = layer.operator == "Conv"
            size = self.value(name).shape[1 if is_convolution else -1]
            shape = (size, *[1] * (weight.ndim - 2)) if is_convolution else (size,)
            if added.numel() > 1 and _without_ones(added.shape, len(shape)) != shape:
                continue
            bias, (x, parameter, *rest) = _per_neuron(added.reshape(-1), size), layer.inputs
            if rest and rest[0]:
                first = self.constant(rest[0])
                if first is None:
                    continue
                bias = first + bias
            module: nn.Module = layer.module
            if layer.operator == "MatMul":
                module = OperatorStep(_matmul_with_bias, layer.module.node)
            bias_name = f"{other} (of {name})"
            self._values[bias_name] = bias
            return Step(layer.place, layer.operator, module, (x, parameter, bias_name), outputs)
        return None

    def _group_norm(
        self, place: str, operator: str, inputs: tuple[str, ...], outputs: tuple[str, ...], attributes: dict[str, Any]
    ) -> Step | None:
        """The group norm that exporters spell as an instance norm of [N, groups, values]; None: it is none."""
        reshaped = self.producers.get(inputs[0])
        if operator != "InstanceNormalization" or reshaped is None or reshaped.operator != "Reshape":
            return None
        scale, shift = (self.constant(name) for name in inputs[1:3])
        source, shape = self.value(reshaped.inputs[0]), self.value(inputs[0]).shape
        is_plain = scale is not None and shift is not None and bool((scale == 1).all()) and bool((shift == 0).all())
        if not is_plain or len(shape) != 3 or shape[0] != source.shape[0] or source.shape[1] % shape[1]:
            return None
        return Step(
            place,
            operator,
            OperatorStep(group_norm_of_values, Node(attributes, ())),
            (reshaped.inputs[0], inputs[1]),
            outputs,
        )

    def _rms_norm(self, place: str, operator: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Step | None:
        """The RMS norm that exporters spell as x / sqrt(mean(x^2) + epsilon); None: it is none."""
        if operator not in ("Mul", "Div"):
            return None
        for x, other in (inputs, inputs[::-1]) if operator == "Mul" else (inputs,):
            root = self._unwrapped(other)
            if operator == "Mul":
                inverse = self.producers.get(root)
                if inverse is None or inverse.operator not in ("Reciprocal", "Div"):
                    continue
                above = self.constant(inverse.inputs[0]) if inverse.operator == "Div" else torch.ones(1)
                if above is None or above.numel() != 1 or above.item() != 1:
                    continue
                root = self._unwrapped(inverse.inputs[-1])
            found = self._mean_of_squares(root, self._unwrapped(x))
            if found is not None:
                node = Node({"epsilon": found[1], "axes": found[0]}, ())
                return Step(place, "RMSNormalization", OperatorStep(rms_norm_of_values, node), (x,), outputs)
        return None

    def _mean_of_squares(self, root: str, x: str) -> tuple[int, float] | None:
        """Over how many of the last axes `root` is sqrt(mean(x^2) + epsilon), and epsilon; None: it is not."""
        steps: list[Step] = []
        for operators in (("Sqrt",), ("Add",), ("ReduceMean",), ("Pow", "Mul")):
            step = self.producers.get(root)
            if step is None or step.operator not in operators:
                return None
            computed = [self._unwrapped(name) for name in step.inputs if name and self.constant(name) is None]
            if len({*computed}) != 1:
                return None
            steps.append(step)
            root = computed[0]
        _, added, mean, square = steps
        epsilon, exponent = (
            [value for name in step.inputs if (value := self.constant(name)) is not None] for step in (added, square)
        )
        is_square = not exponent if square.operator == "Mul" else [item.item() for item in exponent] == [2]
        rank = self.value(mean.inputs[0]).ndim
        kept = self.value(mean.outputs[0]).shape
        if root != x or not is_square or epsilon[0].numel() != 1 or len(kept) != rank:
            return None
        shape = self.value(mean.inputs[0]).shape
        axes = sorted(axis for axis in range(rank) if kept[axis] != shape[axis])
        is_last = bool(axes) and axes == [*range(rank - len(axes), rank)]
        return (len(axes), epsilon[0].item()) if is_last else None

    def _unwrapped(self, name: str) -> str:
        """The value that casts and identities hand on."""
        step = self.producers.get(name)
        while step is not None and step.operator in ("Cast", "CastLike", "Identity", "Dropout"):
            name = step.inputs[0]
            step = self.producers.get(name)
        return name

    # Activations

    def _is_activation(
        self, place: str, operator: str, node: Node, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> bool:
        """Follows elementwise operators; replaces them where they make up a known activation, and says whether."""
        if operator not in ELEMENTWISE:
            return False
        computed = [name for name in inputs if self.constant(name) is None]
        parts = [self._elementwise.get(name, Elementwise(name, GRID)) for name in computed]
        constants = [value for value in map(self.constant, inputs) if value is not None]
        if len({part.base for part in parts}) > 1 or any(value.numel() != 1 for value in constants):
            return False
        by_name = dict(zip(computed, parts, strict=True))
        operands = (by_name[name].values if name in by_name else self.value(name).item() for name in inputs)
        frequency = frequency_of(parts[0].values) if operator == "Sin" else parts[0].frequency
        value = Elementwise(parts[0].base, ONNX_OPERATORS[operator](node, *operands), frequency)
        self._elementwise[outputs[0]] = value
        name = value.activation()
        if name is None or parts[0].base == self.input:
            return False
        step = Step(place, operator, ActivationStep(name, value.frequency), (value.base,), outputs)
        self._set(outputs, self.value(value.base))
        self.producers |= dict.fromkeys(outputs, step)
        self.activations[outputs[0]] = name
        return True

    # What the output needs

    def _needed_steps(self) -> list[Step]:
        """The steps that the output depends on, in order."""
        needed: list[Step] = []
        seen: set[int] = set()
        self.value(self.output)  # raises where it could not be read
        stack = [(self.output, False)]
        while stack:
            name, is_done = stack.pop()
            step = self.producers.get(name)
            if step is None:
                if name:
                    self.value(name)
                continue
            if is_done:
                needed.append(step)
            elif id(step) not in seen:
                seen.add(id(step))
                stack.append((name, True))
                stack += [(source, False) for source in reversed(step.inputs)]
        return needed

    def _example_input(self, graph: Any, shape: tuple[int, ...] | None) -> Tensor:
        """Zeros in the shape of an input; sizes that the file leaves open are guessed, 2 for batches."""
        (proto,) = (value for value in graph.input if value.name == self.input)
        kind = proto.type.tensor_type
        floats = [value for value in self._values.values() if isinstance(value, Tensor) and value.dtype in FLOATS]
        is_integer = kind.elem_type in (6, 7)  # int32, int64
        dtype = torch.long if is_integer else floats[0].dtype if floats else torch.float32
        if shape is None and kind.HasField("shape"):
            sizes = [dim.dim_value for dim in kind.shape.dim]
            shape = tuple(size or (OPEN_SIZE if axis else 2) for axis, size in enumerate(sizes))
        return torch.zeros(shape or self._guessed_shape(graph), dtype=dtype)

    def _guessed_shape(self, graph: Any) -> tuple[int, ...]:
        """The shape of an input that the first layer reads."""
        names = {self.input}
        for node in graph.node:
            if not names & set(node.input):
                continue
            weight = self._values.get(node.input[1]) if len(node.input) > 1 else None
            if isinstance(weight, Tensor) and weight.ndim > 1 and node.op_type in ("Gemm", "MatMul", "Conv"):
                attributes = {item.name: item.i for item in node.attribute}
                if node.op_type == "Conv":
                    return (2, weight.shape[1] * attributes.get("group", 1), *[OPEN_SIZE] * (weight.ndim - 2))
                return (2, weight.shape[1 if attributes.get("transB", 0) else 0])
            names |= set(node.output)
        raise ValueError("the file does not say the shape of its input: give it as input_shape")


def _matmul_with_bias(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b."""
    return functional.linear(x, weight.mT, bias)


def rms_norm_of_values(node: Node, x: Tensor) -> Tensor:
    """An RMS norm without scale over the last axes."""
    return functional.rms_norm(x, x.shape[-node.get("axes") :], None, node.get("epsilon"))


def group_norm_of_values(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    """A group norm without scale and shift, as [N, groups, values]."""
    groups = scale.numel()
    return functional.group_norm(x, groups, None, None, node.get("epsilon", 1e-5)).reshape(len(x), groups, -1)


def _per_neuron(constant: Tensor, size: int) -> Tensor:
    """A bias as [n]."""
    if constant.numel() == size and constant.ndim == 1:
        return constant
    if constant.numel() not in (1, size):
        raise ValueError(f"a bias {tuple(constant.shape)}, expected ({size},)")
    return constant.flatten().expand(size).clone()


def _without_ones(shape: torch.Size, num_axes: int) -> tuple[int, ...]:
    """A shape without its first axes, while these are 1 and too many."""
    sizes = tuple(shape)
    while len(sizes) > num_axes and sizes[0] == 1:
        sizes = sizes[1:]
    return sizes


def is_parameter(value: Tensor) -> bool:
    """Whether a constant may be a layer's parameter."""
    return value.dtype in FLOATS and value.numel() > 0


def is_number(operator: str, value: Tensor) -> bool:
    """Whether a node takes a constant as a number."""
    return value.numel() == 1 and operator in ELEMENTWISE | {"Where"}
