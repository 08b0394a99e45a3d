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

from scalegmn.configuration.text import read_text
from scalegmn.reporting.files import write_atomic

SAVED_BY_TORCH = (".pth", ".pt", ".ckpt", ".bin", ".pth.tar", ".pt.tar")
"""Endings of files that torch.save writes."""

INDEX = ".index.json"
"""The ending of the file that says which entry of a network is in which of several files."""

_PART = re.compile(r".*-\d{5}-of-(\d{5})\.\w+")
"""Names of files that hold a part of a network."""

_NUMPY = re.compile(r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|dtypes\.\w+DType)")
"""What numbers and arrays of numpy consist of."""

_NESTED = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "ema", "ema_state_dict", "params"),
    "checkpoint",
)
"""Entries of checkpoints that hold a network, in the order of preference."""


def ending(path: Path) -> str | None:
    """The ending of a file's name by which `read_tensors` knows it, in lower case; None for other files."""
    name = path.name.lower()
    if name.endswith(INDEX):
        return INDEX if ending(Path(name.removesuffix(INDEX))) else None
    return next((end for end in (".safetensors", *SAVED_BY_TORCH) if name.endswith(end)), None)


def read_tensors(path: Path) -> dict[str, Any]:
    """The content of a file, or of all files of an index, without executing anything.

    Raises:
        ValueError: the file is missing, would run code, is damaged, or holds no dictionary; names it, and of what would
            run code the entry and the type.
    """
    if ending(path) == INDEX:
        return _read_index(path)
    part = _PART.fullmatch(path.name)
    if part is not None and int(part[1]) > 1:
        raise ValueError(f"{path}: a part of a network; name the file *{INDEX} that lists all parts")
    return _read_file(path)


def _read_file(path: Path) -> dict[str, Any]:
    """The content of one file of tensors; raises as `read_tensors`."""
    try:
        content = _load(path)
    except _KnownError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # whatever a hostile or broken file leads to
        raise refusal(path, error) from None
    if not isinstance(content, dict):
        remedy = "write torch.save(module.state_dict(), FILE)"
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a state dict; {remedy}")
    return content


def entries_of_network(content: dict[str, Any]) -> tuple[dict[str, Any], str | None, list[str]]:
    """The state dict in a checkpoint.

    A dictionary with matrices is looked for in the entries of `_NESTED`, in this order, then in any other but those of
    optimizers, if only one of them has matrices.

    Returns:
        The state dict; the entry that it stands in (`model.ema`), None if it is the content itself; and the entries
        beside this that have matrices too.

    Raises:
        ValueError: several other entries have matrices.
    """
    place: list[str] = []
    beside: list[str] = []
    while True:
        inner = [name for name, value in content.items() if _has_matrices(name, value)]
        chosen = next((name for name in _NESTED if name in inner), None)
        if chosen is None and any(_is_matrix(value) for value in content.values()):
            break
        if chosen is None and len(inner) > 1:
            example = f"content{''.join(f'[{name!r}]' for name in (*place, inner[0]))}"
            raise ValueError(
                f"no tensors: found the entries {', '.join(map(str, content))}, expected a state dict; save one alone, "
                f"as in torch.save({example}, FILE)"
            )
        if chosen is None and not inner:
            break
        name = inner[0] if chosen is None else chosen
        beside += [".".join(map(str, (*place, other))) for other in inner if other != name]
        place.append(name)
        content = content[name]
    return content, ".".join(map(str, place)) or None, beside


def check_size(path: Path, state: Mapping[str, Any]) -> None:
    """Raises ValueError when the tensors of a state dict claim more numbers than its file, or its files, hold."""
    files = {path, *files_of_index(path).values()} if ending(path) == INDEX else {path}
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
    reason = _kind_of(path)
    if reason is None:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
        reason = re.split(r"\n|\. ", text)[0][:120] if text else type(error).__name__
        if text.startswith("[enforce fail"):  # of a zip file's reader
            reason = "not written by torch.save"
        elif "weights_only" in text:
            reason = "holds more than tensors, numbers and texts: write torch.save(module.state_dict(), FILE)"
    return ValueError(f"{path}: refused, not a file of plain tensors ({reason})")


# Parts


class _KnownError(Exception):
    """What is wrong with a file, in full."""


class _Array:
    """Stands in for arrays of numpy: a pickle makes it, and none of its code is numpy's."""

    values: Any = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Version, shape, type, Fortran order, bytes."""
        import numpy as np

        _, shape, dtype, is_fortran, content = state
        if dtype.kind not in "biufcSU":
            raise _KnownError(f"holds an array of {dtype}, expected numbers or texts")
        self.values = np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C")


def _load(path: Path) -> Any:
    """What torch.save wrote, or a .safetensors file: tensors, plain values, and numbers and arrays of numpy."""
    if ending(path) == ".safetensors":
        return dict(load_file(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of a file that is refused
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        is_numpy = bool(names) and all(_NUMPY.fullmatch(name) for name in names)
        with torch.serialization.safe_globals(_of_numpy(names) if is_numpy else []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    return _with_arrays(content) if is_numpy else content


def _of_numpy(names: Sequence[str]) -> list[Any]:
    """What numbers and arrays of numpy are made with: types of numbers, and what pickles call by `names`."""
    import numpy as np

    function = np.float64(0).__reduce__()[0]  # numpy 1 and 2 have it at different places
    kinds = np.typecodes["AllFloat"] + np.typecodes["AllInteger"] + "?SUMm"
    scalars = [(function, name) for name in names if name.endswith(".scalar")]
    arrays = [(_Array, name) for name in names if name.endswith(("._reconstruct", ".ndarray"))]
    return [np.dtype, *(type(np.dtype(kind)) for kind in kinds), *scalars, *arrays]


def _with_arrays(value: Any) -> Any:
    """A value with arrays for their stand-ins."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, dict):
        return {key: _with_arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_with_arrays, value))
    return value


def _is_matrix(value: Any) -> bool:
    """Whether a value may be a weight."""
    return isinstance(value, Tensor) and value.ndim > 1


def _has_matrices(name: Any, value: Any, depth: int = 5) -> bool:
    """Whether an entry is a dictionary with matrices, at any depth, and not an optimizer's."""
    if not isinstance(value, dict) or "optim" in str(name).lower() or depth == 0:
        return False
    return any(_is_matrix(item) or _has_matrices(key, item, depth - 1) for key, item in value.items())


_BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` gets the file",
    b"<": "a web page: get the file again",
    b"\x89HDF": "HDF5: write torch.save(module.state_dict(), FILE)",
    b"\x80": "a pickle, or of torch.save's old format, and may run code: write torch.save(module.state_dict(), FILE)",
    b"\x1f\x8b": "gzipped: unpack it",
}
"""How files begin -> what they are."""


def _kind_of(path: Path) -> str | None:
    """What a file is that is none of tensors; None: nothing that is known."""
    if path.is_dir():
        return "a folder"
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError as error:
        return error.strerror
    if not start:
        return "empty"
    known = next((kind for beginning, kind in _BEGINNINGS.items() if start.startswith(beginning)), None)
    is_zip, is_safetensors = start.startswith(b"PK"), start[8:9] == b"{"
    if known is not None and not is_safetensors:
        return known
    if ending(path) == ".safetensors":
        return "written by torch.save: name it .pth" if is_zip else None
    return None if is_zip else "of safetensors: name it .safetensors" if is_safetensors else "not written by torch.save"


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
                    if kind.replace("__builtin__", "builtins") in unsafe and not _NUMPY.fullmatch(kind):
                        return entry, kind
                elif isinstance(value, str):
                    entry, texts = value, [*texts[-1:], value]
    except Exception:  # no zip file, or no pickle in it
        return None
    return None


def _read_index(path: Path) -> dict[str, Any]:
    """All entries of the files that an index names."""
    content: dict[str, Any] = {}
    files = files_of_index(path)
    for file in dict.fromkeys(files.values()):
        content |= _read_file(file)
    missing = [name for name in files if name not in content]
    if missing:
        raise ValueError(f"{path}: entry {missing[0]!r} is in none of its files")
    return {name: content[name] for name in files}


def files_of_index(path: Path) -> dict[str, Path]:
    """Entry -> file, of an index; raises ValueError unless all files are in its folder."""
    try:
        names = json.loads(read_text(path))["weight_map"]
        files = {str(entry): str(file) for entry, file in names.items()}
    except OSError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f'{path}: expected JSON with "weight_map", entry -> file') from None
    for file in files.values():
        if file != Path(file).name or not (path.parent / file).is_file() or ending(Path(file)) in (None, INDEX):
            raise ValueError(f"{path}: names {file!r}, expected a file of tensors in {path.parent}")
    return {entry: path.parent / file for entry, file in files.items()}
