"""Losses of many relu networks that classify images, and their gradients, by `relu_classifiers.cpp`.

Shape letters: B networks, P parameters, M images.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scalegmn.engine import native


def is_compiled(parameters: Tensor, images: Tensor) -> bool:
    """Whether there is a compiled form for such tensors: single precision on a CPU, and images of each network."""
    on_cpu = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (parameters, images))
    return on_cpu and images.ndim == 3 and native.library() is not None


def losses_and_gradients(
    parameters: Tensor, widths: Sequence[int], images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of each network, [B], and its gradient, [B, P].

    Args:
        parameters: [B, P], weight [n_l, n_{l-1}] and bias [n_l] of each layer in turn; relu between layers.
        widths: n_0, n_1, ..., the number of classes.
        images: [B, M, n_0].
        labels: [B, M], long.

    Raises:
        ValueError: shapes do not fit, or labels are no classes.
    """
    num_networks, num_images = labels.shape
    size = sum(outputs * (inputs + 1) for inputs, outputs in pairwise(widths))
    for name, tensor, shape in (
        ("parameters", parameters, (num_networks, size)),
        ("images", images, (num_networks, num_images, widths[0])),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: found shape {[*tensor.shape]}, expected {[*shape]}")
    if labels.dtype != torch.long or (labels.numel() and not 0 <= labels.min() <= labels.max() < widths[-1]):
        found = f"{labels.dtype} from {labels.min()} to {labels.max()}" if labels.numel() else labels.dtype
        raise ValueError(f"labels: found {found}, expected whole numbers (long) from 0 to {widths[-1] - 1}")
    library = native.library()
    assert library is not None
    losses, gradients = parameters.new_empty(len(parameters)), torch.empty_like(parameters.contiguous())
    tensors = [parameters.contiguous(), images.contiguous(), labels.contiguous(), losses, gradients]
    sizes = (ctypes.c_int64 * len(widths))(*widths)
    words = [len(parameters), labels.shape[1], parameters.shape[1], len(widths) - 1, torch.get_num_threads()]
    words += [*(tensor.data_ptr() for tensor in tensors), ctypes.addressof(sizes)]
    library.relu_classifiers((ctypes.c_int64 * len(words))(*words))
    return losses, gradients
