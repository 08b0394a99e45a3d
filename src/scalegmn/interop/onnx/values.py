"""Values of an ONNX graph, and the steps that compute them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scalegmn.interop.onnx.activations import ELEMENTWISE
from scalegmn.interop.onnx.operators import FLOATS, Function, Node, check_size


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


class GraphValues:
    """Constants of a graph, examples of its other values on the device meta, and the step that computes each.

    Args:
        initial: constants; in place of one that cannot be read, why.
        num_uses: how many nodes read each value.
        output: the name of the graph's output.

    Attributes:
        producers: value -> the step that computes it.
    """

    def __init__(self, initial: Mapping[str, Tensor | ValueError], num_uses: Counter[str], output: str) -> None:
        self._values = dict(initial)
        self.num_uses, self.output = num_uses, output
        self.producers: dict[str, Step] = {}

    def value(self, name: str) -> Tensor:
        """A constant, or an example of another value; raises ValueError where it could not be read."""
        value = self._values.get(name, ValueError(f"{name}: no such value in the file"))
        if isinstance(value, ValueError):
            raise value
        return value

    def constant(self, name: str) -> Tensor | None:
        """The value of an input that does not depend on the network's input."""
        value = self.value(name) if name else None
        return None if value is None or value.is_meta else value

    def example(self, operator: str, name: str) -> Any:
        """An input of a node as its function gets it, on the device meta."""
        value = self.constant(name)
        if value is None:
            return self.value(name) if name else None
        return value.item() if is_number(operator, value) else value.to("meta")

    def set(self, name: str, value: Tensor | ValueError) -> None:
        """Keeps a value, or why it could not be read."""
        self._values[name] = value

    def set_outputs(self, outputs: tuple[str, ...], result: Any) -> None:
        """Keeps a node's outputs."""
        results = result if isinstance(result, list | tuple) else [result]
        for name, tensor in zip(outputs, results, strict=False):
            if not tensor.is_meta:
                check_size(tensor.shape)
            self._values[name] = tensor

    def unwrapped(self, name: str) -> str:
        """The value that casts and identities hand on."""
        step = self.producers.get(name)
        while step is not None and step.operator in ("Cast", "CastLike", "Identity", "Dropout"):
            name = step.inputs[0]
            step = self.producers.get(name)
        return name


def is_parameter(value: Tensor) -> bool:
    """Whether a constant may be a layer's parameter."""
    return value.dtype in FLOATS and value.numel() > 0


def is_number(operator: str, value: Tensor) -> bool:
    """Whether a node takes a constant as a number."""
    return value.numel() == 1 and operator in ELEMENTWISE | {"Where"}
