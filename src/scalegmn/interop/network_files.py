"""Networks in files of all kinds that are read: state dicts, ONNX files, and modules that code makes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from scalegmn.interop.onnx import from_onnx
from scalegmn.interop.state_dicts import StoredAdapter, read_network
from scalegmn.interop.tensor_files import INDEX, SAVED_BY_TORCH, ending, files_of_index
from scalegmn.interop.torch_modules import FACTORY, ExampleInput, from_factory
from scalegmn.networks import NetParams
from scalegmn.reporting.files import natural_order
from scalegmn.reporting.words import kinds_counted

KINDS = f"{', '.join(SAVED_BY_TORCH)}, .safetensors, *{INDEX} or .onnx"
"""The endings of files that are read."""


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        name: a file, or `package.module:factory`.
        target: a file for a changed network, in the folder of all.
    """

    name: str
    target: Path

    @property
    def is_state_dict(self) -> bool:
        """Whether it is a file of tensors."""
        return ending(Path(self.name)) is not None


@dataclass(frozen=True)
class InputOptions:
    """What files of networks do not tell.

    Attributes:
        activation: of state dicts; None: it is not known.
        w0: of their sines.
        example: an input of modules, and of ONNX files that leave its shape open.
        layers: the layers of state dicts in their order; None: it follows from the file.
    """

    activation: str | None
    w0: float
    example: ExampleInput = field(default_factory=ExampleInput)
    layers: tuple[str, ...] | None = None


def head_files(path: Path, heads: int) -> list[Path]:
    """The files of the networks that k heads make of one: `path`, or for several its name with `_head0` to
    `_head<k - 1>`."""
    return [path] if heads == 1 else [path.with_stem(f"{path.stem}_head{head}") for head in range(heads)]


def find_sources(names: Sequence[str]) -> tuple[list[Source], list[str]]:
    """The networks that a command names, and what was passed over, a sentence per folder.

    A folder stands for all files of networks below it, in their natural order; files that an index names are parts of
    its network.
    """
    sources, notes = [], []
    for path in map(Path, names):
        if not path.is_dir():
            sources.append(_source(path, path.parent))
            continue
        files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
        parts = {part for file in files if ending(file) == INDEX for part in _parts(file)}
        chosen = [
            file for file in files if (file.suffix.lower() == ".onnx" or ending(file) is not None) and file not in parts
        ]
        others = {*files} - {*chosen} - parts
        kinds = Counter(file.suffix or "without a suffix" for file in others)
        if kinds:
            notes.append(f"{path}: not read: {kinds_counted(kinds)}")
        if not chosen:
            raise ValueError(f"{path}: no network in this folder, expected files {KINDS}")
        sources += [_source(file, path) for file in sorted(chosen, key=lambda file: natural_order(str(file)))]
    return sources, notes


def _parts(index: Path) -> list[Path]:
    """The files that an index names; none if it is damaged, which is said when it is read."""
    try:
        return [*files_of_index(index).values()]
    except ValueError:
        return []


def read_source(name: str, options: InputOptions) -> tuple[NetParams, tuple[str, ...]]:
    """One network in single precision, as a batch of size 1, and what was assumed about it.

    Raises:
        ValueError: it cannot be read; starts with its name.
    """
    path = Path(name)
    notes: tuple[str, ...] = ()
    if ending(path) is not None:
        stored = read_network(path, options.layers)
        if options.activation is None and not isinstance(stored, StoredAdapter):
            raise ValueError(f"{name}: a state dict does not tell its activation; set --activation")
        try:
            params, notes = stored.params(options.activation or "identity", options.w0), stored.notes
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    elif path.suffix.lower() == ".onnx":
        params = from_onnx(path, options.example.shape)
    elif re.fullmatch(FACTORY, name):
        params = from_factory(name, options.example)
    else:
        raise ValueError(f"{name}: expected a file {KINDS}, a folder of them, or package.module:factory")
    params = params.map(Tensor.float)
    for tensor in params.tensors():
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: a weight or bias is too large for single precision")
    return params, notes


def _source(path: Path, folder: Path) -> Source:
    """A file below a folder, or code."""
    target = path.relative_to(folder)
    if ending(path) in (None, INDEX):
        target = target.with_name(f"{target.name.replace(':', '.')}.safetensors")
    return Source(str(path), target)
