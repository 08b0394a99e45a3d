"""An example of the input of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.onnx.operators import FLOATS

OPEN_SIZE = 32
"""Height and width of images, or length of sequences, where a file leaves them open."""


def example_input(
    graph: Any, name: str, constants: Mapping[str, Tensor | ValueError], shape: tuple[int, ...] | None
) -> Tensor:
    """Zeros in the shape of an input; sizes that the file leaves open are guessed, 2 for batches."""
    (proto,) = (value for value in graph.input if value.name == name)
    kind = proto.type.tensor_type
    floats = [value for value in constants.values() if isinstance(value, Tensor) and value.dtype in FLOATS]
    is_integer = kind.elem_type in (6, 7)  # int32, int64
    dtype = torch.long if is_integer else floats[0].dtype if floats else torch.float32
    if shape is None and kind.HasField("shape"):
        sizes = [dim.dim_value for dim in kind.shape.dim]
        shape = tuple(size or (OPEN_SIZE if axis else 2) for axis, size in enumerate(sizes))
    return torch.zeros(shape or _guessed_shape(graph, name, constants), dtype=dtype)


def _guessed_shape(graph: Any, name: str, constants: Mapping[str, Tensor | ValueError]) -> tuple[int, ...]:
    """The shape of an input that the first layer reads."""
    names = {name}
    for node in graph.node:
        if not names & set(node.input):
            continue
        weight = constants.get(node.input[1]) if len(node.input) > 1 else None
        if isinstance(weight, Tensor) and weight.ndim > 1 and node.op_type in ("Gemm", "MatMul", "Conv"):
            attributes = {item.name: item.i for item in node.attribute}
            if node.op_type == "Conv":
                return (2, weight.shape[1] * attributes.get("group", 1), *[OPEN_SIZE] * (weight.ndim - 2))
            return (2, weight.shape[1 if attributes.get("transB", 0) else 0])
        names |= set(node.output)
    raise ValueError("the file does not say the shape of its input: give it as input_shape")
