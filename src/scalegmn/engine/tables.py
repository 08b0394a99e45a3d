"""Fourier features of single numbers, from a table.

Of a number w, each feature cos(a w) or sin(a w), and so each linear map f of all of them, has no frequencies above the
largest a. On a grid with many points in each of its waves, polynomials through the points next to w equal f(w) up to
rounding (`RowProgram.interpolate`). The grid needs far fewer points than there are edges in a batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from scalegmn.engine.row_programs import POINTS
from scalegmn.nn.fourier import Encoder, FourierFeatures

ANGLE = {torch.float32: 0.45, torch.float64: 0.34}
"""The largest angle t between two points of a grid. Polynomials through p of them, `POINTS`, miss a cosine by at most
t^p (1 3 5 .. p-1)^2 / (2^p p!): 8e-8 and 1e-13."""

_MOST_BYTES = 1 << 26
"""Of a table of Fourier features. Its rows have exact numbers in single precision, too."""

_NUM_KEPT = 4
"""Tables of Fourier features per module."""


class Lookup(NamedTuple):
    """Numbers, and the table between whose rows the features of their edges are."""

    places: Tensor
    """[B, E, 2], what `RowProgram.interpolate` reads."""

    table: Tensor
    """[rows, out]."""


class _Grid(NamedTuple):
    """Fourier features at the points of a grid."""

    frequencies: Tensor
    """The module's, when they were computed."""

    features: Tensor
    """[directions, points, 2 m]."""


_GRIDS: WeakKeyDictionary[FourierFeatures, dict[tuple[object, ...], _Grid]] = WeakKeyDictionary()


def lookup(encoder: Encoder, after: nn.Linear, values: Tensor, directions: Tensor) -> Lookup | None:
    """after(encoder(w u)) of numbers w and for each of some vectors u.

    Args:
        encoder, after: the modules.
        values: w, [B, E].
        directions: u, [D, k].

    Returns:
        Of [B, D E, 2] places, those of one vector after those of another; None: it would not be exact or not pay, or
        `values` or frequencies need gradients.
    """
    fourier, dtype = encoder.fourier, values.dtype
    if not isinstance(fourier, FourierFeatures) or len(encoder.linears) > 1 or dtype not in ANGLE:
        return None
    if values.requires_grad or fourier.frequencies.requires_grad or not values.numel():
        return None
    frequencies = 2 * math.pi * directions.double() @ fourier.frequencies.double().T
    step = ANGLE[dtype] / max(frequencies.abs().max().item(), 1e-9)
    steps = values.double() / step
    most = steps.abs().max().item()
    least_points = 2 * most + POINTS[dtype]
    most_points = min(values.numel() / 2, _MOST_BYTES / (2 * frequencies.numel() * values.element_size()))
    if not least_points < most_points:  # nor where a number is not finite
        return None
    half = _rounded_up(math.ceil(most))
    grid = _grid(fourier, directions, frequencies * step, half, dtype)
    num_points, row = grid.shape[1], steps.floor()
    places = values.new_empty(len(values), len(directions), values.shape[1], 2)
    places[..., 0] = (row + half)[:, None] + num_points * torch.arange(len(directions))[:, None]
    places[..., 1] = (steps - row)[:, None]
    (last,) = cast("list[nn.Linear]", list(encoder.linears))
    with torch.autocast("cpu", enabled=False):
        table = linear(grid.flatten(0, 1), after.weight @ last.weight, after(last.bias))
    return Lookup(places.flatten(1, 2), table)


def _rounded_up(number: int) -> int:
    """To three binary digits after the first, so that few grids do for all batches."""
    unit = 1 << max(number.bit_length() - 4, 0)
    return -(-number // unit) * unit


@torch.inference_mode(False)  # what is kept serves training, too
def _grid(fourier: FourierFeatures, directions: Tensor, angles: Tensor, half: int, dtype: torch.dtype) -> Tensor:
    """Fourier features [D, points, 2 m] at a grid's points from -half on, and as many more as polynomials need, for
    angles between two points [D, m]."""
    grids = _GRIDS.setdefault(fourier, {})
    key = (half, dtype, tuple(directions.flatten().tolist()))
    if key not in grids or not torch.equal(grids[key].frequencies, fourier.frequencies):
        points = torch.arange(2 * half + POINTS[dtype]).double() - (half + POINTS[dtype] // 2 - 1)
        at_points = points[:, None] * angles[:, None]
        features = torch.cat([at_points.cos(), at_points.sin()], dim=-1).to(dtype)
        if len(grids) >= _NUM_KEPT:
            del grids[next(iter(grids))]
        grids[key] = _Grid(fourier.frequencies.clone(), features)
    return grids[key].features
