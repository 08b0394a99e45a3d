"""The network of an ONNX file as a PyTorch module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.interop.onnx.graph import OnnxGraph
from scalegmn.interop.onnx.values import Step, is_number, is_parameter


@dataclass(frozen=True)
class _Stored:
    """Where a module keeps a constant of the file."""

    key: str
    is_transposed: bool = False
    shape: torch.Size | None = None
    """The shape that it is expanded to."""


class OnnxNetwork(nn.Module):
    """The network of an ONNX file, which computes what the file says.

    Args:
        source: its steps.

    Attributes:
        names: parameter of this module -> constant of the file.
    """

    def __init__(self, source: OnnxGraph) -> None:
        super().__init__()
        self.source = source
        self.names: dict[str, str] = {}
        self._register()

    def forward(self, x: Tensor) -> Tensor:
        """The network's output."""
        values: dict[str, Any] = {self.source.input: x}
        for index, step in enumerate(self.source.steps):
            module = self.get_submodule(f"step_{index}")
            results = module(*(self._operand(step, name, values) for name in step.inputs))
            results = results if isinstance(results, list | tuple) else [results]
            values |= zip(step.outputs, results, strict=False)
        output: Tensor = values[self.source.output]
        return output

    def _register(self) -> None:
        """Makes steps submodules, and constants that they read parameters or, where they are masks, buffers."""
        self._stored: dict[str, _Stored] = {}
        embeddings: list[str] = []
        for index, step in enumerate(self.source.steps):
            self.add_module(f"step_{index}", step.module)
            for name in step.inputs:
                value = self.source.values.constant(name)
                if value is None or name in self._stored or name in self.source.values.producers:
                    continue
                if is_number(step.operator, value):
                    continue
                same = [other for other in embeddings if self._is_transposed(other, value)]
                if step.operator in ("MatMul", "Gemm") and same:  # a tied head, which the exporter stored again
                    self._stored[name] = replace(self._stored[same[0]], is_transposed=True)
                    continue
                self._stored[name] = self._store(name, value, step.operator)
                if step.operator == "Gather":
                    embeddings.append(name)

    def _store(self, name: str, value: Tensor, operator: str) -> _Stored:
        """Registers a constant."""
        stored = _Stored(f"parameter_{len(self.names)}")
        if operator == "Concat" and len(value) > 1 and bool((value == value[:1]).all()):
            stored, value = replace(stored, shape=value.shape), value[:1]  # a token, repeated for the batch
        if is_parameter(value) and not _is_mask(value):
            self.register_parameter(stored.key, nn.Parameter(value.clone(), requires_grad=False))
        else:
            self.register_buffer(stored.key, value.clone())
        self.names[stored.key] = name
        return stored

    def _is_transposed(self, embedding: str, value: Tensor) -> bool:
        """Whether a matrix is the transpose of an embedding."""
        other = self.source.values.value(embedding)
        return value.ndim == other.ndim == 2 and value.shape == other.mT.shape and torch.equal(value, other.mT)

    def _operand(self, step: Step, name: str, values: dict[str, Any]) -> Any:
        """An input of a step while the module runs."""
        if name in values or not name:
            return values.get(name)
        if name not in self._stored:
            return self.source.values.value(name).item()
        stored = self._stored[name]
        tensor = getattr(self, stored.key)
        if stored.is_transposed:
            return tensor.mT
        return tensor if stored.shape is None else tensor.expand(stored.shape)


def _is_mask(value: Tensor) -> bool:
    """Whether a constant only masks attention scores."""
    return bool(((value == 0) | (value <= -1e4)).all()) and bool((value < 0).any())
