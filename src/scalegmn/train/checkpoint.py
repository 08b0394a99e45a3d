"""Checkpoints: model parameters as safetensors, with the epoch and metrics beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from scalegmn.log import write_atomic


def save_checkpoint(path: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """The model's parameters and buffers, atomically; `facts` (epoch, metrics) as metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(path, save(tensors, {"facts": json.dumps(facts)}))


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Loads parameters and buffers into the model; returns the facts.

    Raises:
        ValueError: the file is missing, damaged, or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return json.loads(file.metadata()["facts"])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from None
    except RuntimeError as error:  # torch names every parameter
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{path}: of a model with another configuration ({reason})") from None
