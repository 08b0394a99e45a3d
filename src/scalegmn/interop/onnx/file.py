"""ONNX files as data: nothing in them is executed, and they lead to no file outside of their folder."""

from __future__ import annotations

import math
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
        model = onnx.load_model_from_string(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # whatever a hostile or broken file leads to
        raise ValueError(f"{path}: refused, not an ONNX file ({one_line(error)})") from None
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _read_external(tensor, path)
    return model.graph


def _read_external(tensor: Any, path: Path) -> None:
    """Reads the numbers of a tensor from a file beside the ONNX file.

    Raises:
        ValueError: the file is elsewhere, missing or too short; names it.
    """
    from onnx import TensorProto, helper

    place = {item.key: item.value for item in tensor.external_data}
    found = place.get("location", "nothing")
    file = path.parent / found
    is_beside = found.removeprefix("./") == file.name != path.name
    if not is_beside or file.is_symlink() or not file.is_file():
        raise ValueError(f"{path}: {tensor.name!r} is in the file {found!r}, expected a file in {path.parent}")
    size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    try:
        offset, length = (int(place.get(key, default)) for key, default in (("offset", 0), ("length", size)))
    except ValueError as error:
        raise ValueError(f"{path}: {tensor.name!r} is in {found!r} at no number ({one_line(error)})") from None
    if length != size or offset < 0 or offset + length > file.stat().st_size:
        raise ValueError(f"{file}: too short for {tensor.name!r} of {path}: expected {size:,} bytes from {offset:,} on")
    with open(file, "rb") as content:
        content.seek(offset)
        tensor.raw_data = content.read(size)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def tensor_of(proto: Any) -> Tensor:
    """The numbers of an ONNX tensor, those of types that numpy lacks (bfloat16, float8) in single precision; raises
    ValueError where they do not fit its shape, or a constant's are in another file."""
    from onnx import TensorProto, numpy_helper

    if proto.data_location == TensorProto.EXTERNAL or proto.external_data:
        raise ValueError(f"{proto.name!r} keeps its data in another file; save the network as one file")
    try:
        array = numpy_helper.to_array(proto)
        return torch.from_numpy(array.astype("float32") if array.dtype.kind == "V" else array.copy())
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
