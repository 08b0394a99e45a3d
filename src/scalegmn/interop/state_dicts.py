"""Single networks as state dicts: a `.pth` (by torch) or `.safetensors` file each. Nothing in them is executed."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from scalegmn.networks import NetParams
from scalegmn.reporting.files import write_atomic


def from_state_dict(tensors: Mapping[str, Any], activation: str, w0: float = 30.0) -> NetParams:
    """A chain of linear and convolutional layers from its state dict, whatever its entries are called.

    Args:
        tensors: name -> tensor, in the order of the layers; which are read, `layer_names` says.
        activation: the hidden activation.
        w0: the frequency of sine layers, sin(w0 (W x + b)).

    Returns:
        A batch of one network.

    Raises:
        ValueError: a layer has no bias (which counts as zeros: add them), or the layers are no chain, or a value is
            not finite.
    """
    names = layer_names(tensors)
    batch = [tensors[name][None] for name in names]
    try:
        return NetParams.from_tensors(batch[::2], batch[1::2], activation, w0)
    except ValueError as error:
        raise ValueError(f"{error}; its layers are {', '.join(map(str, names[::2]))}, in this order") from None


def layer_names(state: Mapping[str, Any]) -> list[str]:
    """The entries with a weight and a bias for each layer in turn, in the order of the state dict.

    Those are the entries with `weight` or `bias` in their names. Where no name says either, tensors with one axis are
    biases, those with more are weights.

    Raises:
        ValueError: they are not floating point tensors, one of each per layer.
    """
    weights = [key for key in state if "weight" in str(key)]
    biases = [key for key in state if "bias" in str(key) and key not in weights]
    if not weights and not biases:
        axes = {key: value.ndim for key, value in state.items() if isinstance(value, Tensor)}
        weights, biases = [k for k, n in axes.items() if n > 1], [k for k, n in axes.items() if n == 1]
    if not weights or len(weights) != len(biases):
        remedy = "; a layer without a bias counts as one with zeros: add them" if len(weights) > len(biases) else ""
        raise ValueError(f"{len(weights)} weights and {len(biases)} biases, expected one of each per layer{remedy}")
    for key in (*weights, *biases):
        tensor = state[key]
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_nested
        if not plain or not tensor.is_floating_point() or tensor.ndim == 0 or tensor.device.type == "meta":
            raise ValueError(f"{key} is not a dense tensor of floating point numbers")
    return [key for pair in zip(weights, biases, strict=True) for key in pair]


def read_state_dict(path: Path) -> dict[str, Any]:
    """The content of a file, without executing anything.

    Raises:
        ValueError: the file is missing, would run code, or is damaged; names it.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
            return {name: content[name] for name in sorted(content, key=_natural)}  # the file's order is its own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a file that is refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or broken file leads to
        raise refusal(path, error) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a state dict")
    return content


def refusal(path: Path, error: Exception) -> ValueError:
    """What to say of a file that torch or safetensors could not read, in one line."""
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{path}: no such file")
    reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    if isinstance(error, KeyError):  # of torch's reader, for an operation that no pickle has
        reason = "not written by torch.save"
    return ValueError(f"{path}: refused, not a file of plain tensors ({reason})")


def read_layers(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The content of a file, and its `layer_names`; raises ValueError as `read_state_dict` and `names_in_file`."""
    state = read_state_dict(path)
    return state, names_in_file(path, state)


def names_in_file(path: Path, state: Mapping[str, Any]) -> list[str]:
    """The `layer_names` of a state dict that was read from a file.

    Raises:
        ValueError: as `layer_names`, or the tensors claim more numbers than the file holds; names the file.
    """
    try:
        names = layer_names(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if sum(state[name].numel() * state[name].element_size() for name in names) > os.path.getsize(path):
        raise ValueError(f"{path}: claims more numbers than the file holds")
    return names


def write_state_dict(path: Path, state: Mapping[str, Any]) -> None:
    """The inverse of `read_state_dict`, atomically."""
    if path.suffix == ".safetensors":
        content = save({name: tensor.contiguous() for name, tensor in state.items()})
    else:
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
    write_atomic(path, content)


def state_dict_of(params: NetParams, row: int) -> dict[str, Tensor]:
    """Network `row` of B as a state dict: `seq.<l>.weight` [out, in, ...] and `seq.<l>.bias` [out]."""
    state: dict[str, Tensor] = {}
    for layer, (weight, bias) in enumerate(zip(params.weights, params.biases, strict=True)):
        state |= {f"seq.{layer}.weight": weight[row].clone(), f"seq.{layer}.bias": bias[row].clone()}
    return state


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts `seq.2` before `seq.10`."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
