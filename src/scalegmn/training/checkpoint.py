"""Checkpoint files: named tensors as safetensors, with metadata and a checksum over both. Reading runs no code."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from scalegmn.reporting.files import write_atomic
from scalegmn.reporting.run_folder import STATES

NUM_STATES = 2
"""Number of states of a run that are kept: the newest, and the one before in case the newest is damaged."""

REMEDY = "copy its folder again from where it is whole, or train again"
"""What to do about a damaged file."""

KEY = "facts"
"""The key of a file's metadata; changing it would make all checkpoints unreadable."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes named tensors and `metadata` (plain types), atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "sha256": _checksum(tensors, metadata)}
    write_atomic(path, save(tensors, {KEY: json.dumps(metadata)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata that `write_tensors` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, expected the parameters that a run or bundle keeps")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = json.loads(file.metadata()[KEY])
        expected = metadata.pop("sha256")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if _checksum(tensors, metadata) != expected:
        raise ValueError(f"{path}: damaged (its checksum differs)")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and values, and of the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Loads a `state_dict` that `write_tensors` wrote into a model, and returns the metadata.

    Raises:
        ValueError: the file is missing or damaged, or its parameters do not fit the model.
    """
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError:  # which names every parameter
        reason = _first_difference(model.state_dict(), tensors)
        remedy = "leave out settings of the model, or restore the configuration beside it"
        raise ValueError(f"{path}: of a model with another configuration ({reason}); {remedy}") from None
    return metadata


def _first_difference(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str:
    """The first parameter in which a file differs from a model."""
    for name, tensor in expected.items():
        if name not in stored:
            return f"it has no {name}"
        if stored[name].shape != tensor.shape:
            return f"{name}: found shape {tuple(stored[name].shape)}, expected {tuple(tensor.shape)}"
    return f"{next(name for name in stored if name not in expected)} is in the file alone"


def state_files(run: Path) -> list[Path]:
    """Files of the states that a run can go on from, the newest first."""
    return sorted(run.glob(STATES), reverse=True)


def write_state(run: Path, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes the state of a run after `step` steps, and removes old ones."""
    write_tensors(run / STATES.replace("*", f"{step:010d}"), tensors, metadata)
    for path in state_files(run)[NUM_STATES:]:
        path.unlink()


def read_state(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest undamaged state of a run, or None if there are none; damaged ones are named on stderr.

    Raises:
        ValueError: all states are damaged.
    """
    files = state_files(run)
    for path in files:
        try:
            return read_tensors(path)
        except ValueError as error:
            print(f"{error}; trying the state before", file=sys.stderr)
    if files:
        raise ValueError(f"{run}: all its states are damaged; start a new run")
    return None
