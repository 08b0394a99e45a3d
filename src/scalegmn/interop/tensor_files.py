"""Files of tensors: `.safetensors`, and what torch.save writes. Nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from scalegmn.reporting.files import write_atomic

INDEX = ".safetensors.index.json"
"""The ending of the file that says which entry of a network is in which of several .safetensors files."""

SAVED_BY_TORCH = (".pth", ".pt", ".ckpt", ".bin", ".pth.tar", ".pt.tar")
"""Endings of files that torch.save writes."""

_NUMPY_SCALARS = re.compile(r"numpy\.(_?core\.multiarray\.scalar|dtype|dtypes\.\w+DType)")
"""What single numbers of numpy consist of."""

_NESTED = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "ema", "ema_state_dict", "params"),
    "checkpoint",
)
"""Entries of checkpoints that hold a network, in the order of preference."""


def ending(path: Path) -> str | None:
    """The ending of a file's name by which `read_tensors` knows it, in lower case; None for other files."""
    name = path.name.lower()
    return next((end for end in (INDEX, ".safetensors", *SAVED_BY_TORCH) if name.endswith(end)), None)


def read_tensors(path: Path) -> dict[str, Any]:
    """The content of a file, or of all files of an index, without executing anything.

    Raises:
        ValueError: the file is missing, would run code, is damaged, or holds no dictionary; names it, and of what would
            run code the entry and the type.
    """
    try:
        if ending(path) == INDEX:
            return _read_index(path)
        if ending(path) == ".safetensors":
            return dict(load_file(path))
        content = _load(path)
    except _IndexError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # whatever a hostile or broken file leads to
        raise refusal(path, error) from None
    if not isinstance(content, dict):
        remedy = "write torch.save(module.state_dict(), FILE)"
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a state dict; {remedy}")
    return content


def entries_of_network(content: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The state dict in a checkpoint, and the entry that it stands in (`model.ema`); None if it is the content itself.

    A dictionary that holds tensors is a state dict; of one that holds none, the first of `_NESTED` is looked into.
    """
    place: list[str] = []
    while not any(isinstance(value, Tensor) for value in content.values()):
        name = next((name for name in _NESTED if isinstance(content.get(name), dict)), None)
        if name is None:
            break
        place.append(name)
        content = content[name]
    return content, ".".join(place) or None


def check_size(path: Path, state: Mapping[str, Any]) -> None:
    """Raises ValueError when the tensors of a state dict claim more numbers than its file, or its files, hold."""
    files = {path, *_files_of(path).values()} if ending(path) == INDEX else {path}
    tensors = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > sum(map(os.path.getsize, files)):
        raise ValueError(f"{path}: claims more numbers than the file holds")


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """The inverse of `read_tensors`, atomically."""
    if ending(path) == ".safetensors":
        data = save({name: tensor.contiguous() for name, tensor in content.items()})
    else:
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        data = buffer.getvalue()
    write_atomic(path, data)


def refusal(path: Path, error: Exception) -> ValueError:
    """What to say of a file that torch or safetensors could not read, in one line."""
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{path}: no such file")
    culprit = _first_object(path)
    if culprit is not None:
        entry, kind = culprit
        where = "" if entry is None else f"entry {entry!r} "
        return ValueError(
            f"{path}: {where}holds a {kind}, whose code would have to be run; expected tensors, numbers and texts: "
            "write torch.save(module.state_dict(), FILE)"
        )
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    reason = text.splitlines()[0][:120] if text else type(error).__name__
    if isinstance(error, KeyError):  # of torch's reader, for an operation that no pickle has
        reason = "not written by torch.save"
    elif "weights_only" in text:
        reason = (
            "a pickle, or of torch.save's old format, and may run code: write torch.save(module.state_dict(), FILE)"
        )
    return ValueError(f"{path}: refused, not a file of plain tensors ({reason})")


# Parts


class _IndexError(Exception):
    """What is wrong with an index of files."""


def _load(path: Path) -> Any:
    """What torch.save wrote: tensors, plain values, and single numbers of numpy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of a file that is refused
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        is_numpy = bool(names) and all(_NUMPY_SCALARS.fullmatch(name) for name in names)
        with torch.serialization.safe_globals(_numpy_scalars(names) if is_numpy else []):
            return torch.load(path, map_location="cpu", weights_only=True)


def _numpy_scalars(names: Sequence[str]) -> list[Any]:
    """What single numbers of numpy are made with: types of numbers, and the function that pickles call by `names`."""
    import numpy as np

    function = np.float64(0).__reduce__()[0]  # numpy 1 and 2 have it at different places
    scalars = [(function, name) for name in names if name.endswith(".scalar")]
    return [
        np.dtype,
        *(type(np.dtype(kind)) for kind in np.typecodes["AllFloat"] + np.typecodes["AllInteger"] + "?"),
        *scalars,
    ]


def _first_object(path: Path) -> tuple[str | None, str] | None:
    """Of a pickle in a zip file, the entry and the type of the first object that is neither a tensor nor plain."""
    try:
        unsafe = {*torch.serialization.get_unsafe_globals_in_checkpoint(path)}
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            entry: str | None = None
            texts: list[str] = []
            for operation, value, _ in pickletools.genops(archive.read(name)):
                if operation.name in ("GLOBAL", "STACK_GLOBAL"):
                    kind = ".".join(texts[-2:]) if value is None else str(value).replace(" ", ".")
                    if kind in unsafe and not _NUMPY_SCALARS.fullmatch(kind):
                        return entry, kind
                elif isinstance(value, str):
                    entry, texts = value, [*texts[-1:], value]
    except Exception:  # no zip file, or no pickle in it
        return None
    return None


def _read_index(path: Path) -> dict[str, Any]:
    """All entries of the files that an index names."""
    content: dict[str, Any] = {}
    files = _files_of(path)
    for file in dict.fromkeys(files.values()):
        content |= load_file(file)
    missing = [name for name in files if name not in content]
    if missing:
        raise _IndexError(f"entry {missing[0]!r} is in none of its files")
    return {name: content[name] for name in files}


def _files_of(path: Path) -> dict[str, Path]:
    """Entry -> file, of an index; raises _IndexError unless all files are in its folder."""
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"]
        files = {str(entry): str(file) for entry, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _IndexError('expected JSON with "weight_map", entry -> file') from None
    for file in files.values():
        if file != Path(file).name or not (path.parent / file).is_file():
            raise _IndexError(f"names {file!r}, expected a file in {path.parent}")
    return {entry: path.parent / file for entry, file in files.items()}
