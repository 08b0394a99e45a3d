"""The graph of an ONNX file: constants, and the steps from its input to its output."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.onnx import patterns
from scalegmn.interop.onnx.activations import ELEMENTWISE, GRID, ActivationStep, Elementwise, frequency_of
from scalegmn.interop.onnx.example_input import example_input
from scalegmn.interop.onnx.file import attempt, one_line, tensor_of
from scalegmn.interop.onnx.operators import ONNX_OPERATORS, Node
from scalegmn.interop.onnx.values import GraphValues, OperatorStep, Step, is_parameter

_VIEWS = {"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Identity", "Split", "Expand"}
"""Operators that keep a parameter's identity: a weight and its transpose are one parameter."""


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
        values: constants, examples of other values, and the step that computes each.
        steps: what the output depends on, in order.
    """

    def __init__(self, graph: Any, input_shape: tuple[int, ...] | None = None) -> None:
        constants = {tensor.name: attempt(partial(tensor_of, tensor)) for tensor in graph.initializer}
        inputs = [value.name for value in graph.input if value.name not in constants]
        for kind, names in (("input", inputs), ("output", [value.name for value in graph.output])):
            if len(names) != 1:
                raise ValueError(f"{len(names)} {kind}s, expected one")
        (self.input,), self.output = inputs, graph.output[0].name
        self._elementwise: dict[str, Elementwise] = {}
        self.activations: dict[str, str] = {}
        num_uses = Counter(name for node in graph.node for name in node.input) + Counter([self.output])
        self.example_input = example_input(graph, self.input, constants, input_shape)
        known = {**constants, self.input: self.example_input.to("meta")}
        self.values = GraphValues(known, num_uses, self.output)
        for node in graph.node:
            result = attempt(partial(self._read, node))
            if isinstance(result, ValueError):
                for name in node.output:
                    self.values.set(name, result)
        self.steps = self._needed_steps()

    def _read(self, proto: Any) -> None:
        """Computes a node's outputs where they are constant, else adds a step; raises ValueError with its place."""
        from onnx.helper import get_attribute_value

        place = f"node {proto.name or next(iter(proto.output), '')!r} ({proto.op_type})"
        examples = [None if not name else self.values.value(name) for name in proto.input]
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

    def _add(self, place: str, proto: Any, attributes: dict[str, Any], examples: list[Tensor | None]) -> None:
        """As `_read`, of attributes and examples of the inputs."""
        operator, outputs = proto.op_type, tuple(proto.output)
        if operator in ("Shape", "Size"):
            shape = examples[0].shape[attributes.get("start", 0) : attributes.get("end")]  # type: ignore[union-attr]
            self.values.set(outputs[0], torch.tensor(list(shape) if operator == "Shape" else shape.numel()))
            return
        if all(example is None or not example.is_meta for example in examples):
            self._compute(place, operator, attributes, tuple(proto.input), outputs)
            return
        inputs = patterns.with_factors(self.values, operator, tuple(proto.input), attributes)
        step = (
            patterns.layer_with_bias(self.values, operator, inputs, outputs)
            or patterns.group_norm(self.values, place, operator, inputs, outputs, attributes)
            or patterns.rms_norm(self.values, place, operator, inputs, outputs)
        )
        if step is None:
            node = Node(attributes, tuple(self.values.constant(name) for name in inputs))
            function = ONNX_OPERATORS[operator]
            if self._is_activation(place, operator, node, inputs, outputs):
                return
            step = Step(place, operator, OperatorStep(function, node), inputs, outputs)
        self.values.set_outputs(
            outputs, step.module(*(self.values.example(step.operator, name) for name in step.inputs))
        )
        self.values.producers |= dict.fromkeys(outputs, step)

    def _compute(
        self, place: str, operator: str, attributes: dict[str, Any], inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        """Sets a node's outputs, which are constant; views of a parameter stay views of it."""
        constants = tuple(self.values.constant(name) for name in inputs)
        node, function = Node(attributes, constants), ONNX_OPERATORS[operator]
        self.values.set_outputs(outputs, function(node, *constants))
        if operator in _VIEWS and constants[0] is not None and is_parameter(constants[0]):
            step = Step(place, operator, OperatorStep(function, node), inputs, outputs)
            self.values.producers |= dict.fromkeys(outputs, step)

    # Activations

    def _is_activation(
        self, place: str, operator: str, node: Node, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> bool:
        """Follows elementwise operators; replaces them where they make up a known activation, and says whether."""
        if operator not in ELEMENTWISE:
            return False
        computed = [name for name in inputs if self.values.constant(name) is None]
        parts = [self._elementwise.get(name, Elementwise(name, GRID)) for name in computed]
        constants = [value for value in map(self.values.constant, inputs) if value is not None]
        if len({part.base for part in parts}) > 1 or any(value.numel() != 1 for value in constants):
            return False
        by_name = dict(zip(computed, parts, strict=True))
        operands = (by_name[name].values if name in by_name else self.values.value(name).item() for name in inputs)
        frequency = frequency_of(parts[0].values) if operator == "Sin" else parts[0].frequency
        value = Elementwise(parts[0].base, ONNX_OPERATORS[operator](node, *operands), frequency)
        self._elementwise[outputs[0]] = value
        name = value.activation()
        if name is None or parts[0].base == self.input:
            return False
        step = Step(place, operator, ActivationStep(name, value.frequency), (value.base,), outputs)
        self.values.set_outputs(outputs, self.values.value(value.base))
        self.values.producers |= dict.fromkeys(outputs, step)
        self.activations[outputs[0]] = name
        return True

    # What the output needs

    def _needed_steps(self) -> list[Step]:
        """The steps that the output depends on, in order."""
        needed: list[Step] = []
        seen: set[int] = set()
        self.values.value(self.output)  # raises where it could not be read
        stack = [(self.output, False)]
        while stack:
            name, is_done = stack.pop()
            step = self.values.producers.get(name)
            if step is None:
                if name:
                    self.values.value(name)
                continue
            if is_done:
                needed.append(step)
            elif id(step) not in seen:
                seen.add(id(step))
                stack.append((name, True))
                stack += [(source, False) for source in reversed(step.inputs)]
        return needed
