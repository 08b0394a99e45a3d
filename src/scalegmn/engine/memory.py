"""How much memory intermediate results may take."""

import torch

TENSOR = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Bytes of one feature tensor, of which there are ten or so at a time, that make full use of a kind of device."""


def tensor_bytes(device: torch.device) -> int:
    """The size of a feature tensor that makes full use of the device."""
    return TENSOR.get(device.type, TENSOR["cpu"])


def kept_bytes(device: torch.device) -> int:
    """Bytes of intermediate results that a forward pass may keep for its backward pass."""
    return torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else 960 << 20
