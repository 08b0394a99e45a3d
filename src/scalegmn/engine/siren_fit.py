"""Residuals of many SIRENs on their images and the gradients of their mean squares, by `siren_fit.cpp`."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from scalegmn.engine import native

_LANES = 16
"""Numbers of a vector register; rows of points are padded to multiples of it."""


def padded(points: Tensor) -> Tensor:
    """Points [P, n_0] as `residuals_and_gradients` reads them: [n_0, at least P], zeros behind them."""
    return torch.nn.functional.pad(points.mT, (0, -len(points) % _LANES)).contiguous()


def residuals_and_gradients(
    inputs: Tensor,
    targets: Tensor,
    frequencies: Sequence[float],
    matrices: Sequence[Tensor],
    residuals: Tensor,
    gradients: Sequence[Tensor],
) -> None:
    """r = f(points) - targets, and the gradients of each network's mean r^2 by its matrices.

    Args:
        inputs: `padded` points, the same for all networks.
        targets: [B, n_L, P].
        frequencies: w0 of each hidden layer.
        matrices: [W | b] of each layer, [B, n_l, n_{l-1} + 1]; contiguous, as all tensors here.
        residuals: r, as targets; written.
        gradients: as matrices; written.
    """
    widths = [inputs.shape[0], *(matrix.shape[1] for matrix in matrices)]
    words = [len(targets), targets.shape[2], inputs.shape[1], len(matrices)]
    words += [tensor.data_ptr() for tensor in (inputs, targets, residuals)]
    words += [*widths, *(struct.unpack("q", struct.pack("d", w0))[0] for w0 in (*frequencies, 0.0))]
    words += [tensor.data_ptr() for tensor in (*matrices, *gradients)]
    library = native.library()
    assert library is not None
    library.fit_sirens((ctypes.c_int64 * len(words))(*words))
