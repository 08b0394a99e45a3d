"""ONNX files as data: nothing in them is executed, and they may not lead to other files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_graph(path: Path) -> Any:
    """The graph of an ONNX file; raises ValueError where the package or the file is missing, or the file is damaged."""
    try:
        import onnx
    except ImportError:
        raise ValueError(f"{path}: onnx: not installed; `pip install 'scalegmn[onnx]'`") from None
    try:
        return onnx.load_model_from_string(path.read_bytes()).graph
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # whatever a hostile or broken file leads to
        raise ValueError(f"{path}: refused, not an ONNX file ({one_line(error)})") from None


def tensor_of(proto: Any) -> Tensor:
    """The numbers of an ONNX tensor; raises ValueError where they are in another file or do not fit its shape."""
    from onnx import TensorProto, numpy_helper

    if proto.data_location == TensorProto.EXTERNAL or proto.external_data:
        raise ValueError(f"{proto.name!r} keeps its data in another file; save the network as one file")
    try:
        return torch.from_numpy(numpy_helper.to_array(proto).copy())
    except Exception as error:  # whatever a hostile or broken file leads to
        raise ValueError(f"{proto.name!r}: damaged ({one_line(error)})") from None


def attempt(read: Callable[[], Any]) -> Any:
    """What `read` returns, or the ValueError that it raises: it matters only where the value is used."""
    try:
        return read()
    except ValueError as error:
        return error


def one_line(error: Exception) -> str:
    """The beginning of an error's message."""
    return " ".join(str(error).split())[:120] or type(error).__name__
