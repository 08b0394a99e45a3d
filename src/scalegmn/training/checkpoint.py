"""Checkpoints: named tensors as safetensors, with metadata beside them and a checksum over both. Nothing in them runs."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from scalegmn.reporting.files import write_atomic
from scalegmn.reporting.run_folder import STATES

NUM_STATES = 2
"""States of a run that are kept: the newest, and the one before it should that be damaged."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Named tensors and `metadata` (plain types), atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "sha256": _checksum(tensors, metadata)}
    write_atomic(path, save(tensors, {"facts": json.dumps(metadata)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = json.loads(file.metadata()["facts"])
        expected = metadata.pop("sha256")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from None
    if _checksum(tensors, metadata) != expected:
        raise ValueError(f"{path}: missing or damaged (its checksum differs)")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of names, types, shapes and values, and of the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Loads a model's `state_dict`, as `write_tensors` wrote it, into the model; returns the metadata.

    Raises:
        ValueError: the file is missing, damaged, or of another model.
    """
    tensors, metadata = read_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # torch names every parameter
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{path}: of a model with another configuration ({reason})") from None
    return metadata


# States: all that a run needs to go on as if it had never stopped


def state_files(run: Path) -> list[Path]:
    """The states of a run, the newest first."""
    return sorted(run.glob(STATES), reverse=True)


def write_state(run: Path, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a run's state after so many steps, and removes old ones."""
    write_tensors(run / STATES.replace("*", f"{step:010d}"), tensors, metadata)
    for path in state_files(run)[NUM_STATES:]:
        path.unlink()


def read_state(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest state of a run that is whole, None where there is none at all; says on stderr which are damaged.

    Raises:
        ValueError: all are damaged.
    """
    files = state_files(run)
    for path in files:
        try:
            return read_tensors(path)
        except ValueError as error:
            print(f"{error}; trying the one before", file=sys.stderr)
    if files:
        raise ValueError(f"{run}: all its states are damaged; start a new run")
    return None


def split_names(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named `<prefix>.<name>`, by name."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


# Random number generators


def random_state(device: torch.device) -> dict[str, Tensor]:
    """This process's random number generators: Python's, NumPy's and torch's, on the CPU and on the device."""
    _, words, gauss = random.getstate()
    _, keys, *rest, cached = np.random.get_state()
    state = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), *rest]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets what `random_state` gave; the generator of a device that it knows nothing of stays."""
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
