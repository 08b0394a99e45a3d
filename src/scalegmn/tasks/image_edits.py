"""Edits of images, by name: one function per style, all images at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import grey_dilation

TILES = 3
"""Tiles along each axis of adaptive histogram equalisation."""

_RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = _RGB_TO_XYZ.sum(1)  # D65


@dataclass(frozen=True)
class Style:
    """An edit of images.

    Attributes:
        edit: [n, height, width, channels] in [0, 1] -> the same.
        channels: of the images that it is for.
    """

    edit: Callable[[NDArray], NDArray]
    channels: int


def dilate(images: NDArray) -> NDArray:
    """Thicker strokes: the maximum over 3x3 pixels of each image, [n, height, width, 1]."""
    return grey_dilation(images, size=(1, 3, 3, 1))


def increase_contrast(images: NDArray) -> NDArray:
    """Contrast-limited adaptive equalisation (Zuiderveld, 1994) of CIE lightness, sRGB [n, height, width, 3].

    3x3 tiles, clip limit 1, on 8 bits of lightness, as the published code asks OpenCV for; colour stays.
    """
    lab = _srgb_to_lab(images)
    lightness = np.rint(np.clip(lab[..., 0], 0, 100) * 2.55).astype(np.uint8)
    lab[..., 0] = _equalise(lightness) / 2.55
    return _lab_to_srgb(lab)


STYLES = {"dilate": Style(dilate, 1), "increase_contrast": Style(increase_contrast, 3)}
"""Name -> style. A new edit is one function and a line here."""


def _equalise(values: NDArray) -> NDArray:
    """CLAHE of [n, height, width] bytes: each tile's clipped histogram gives a map, interpolated between tiles."""
    num, height, width = values.shape
    padding = [(0, -size % TILES) for size in (height, width)]
    padded = np.pad(values, [(0, 0), *padding], mode="reflect")
    rows, columns = (size // TILES for size in padded.shape[1:])
    tiles = padded.reshape(num, TILES, rows, TILES, columns).swapaxes(2, 3).reshape(num * TILES**2, -1)
    area = tiles.shape[1]
    flat = tiles + 256 * np.arange(len(tiles))[:, None]
    counts = np.bincount(flat.ravel(), minlength=256 * len(tiles)).reshape(-1, 256)
    limit = max(area // 256, 1)
    excess = np.maximum(counts - limit, 0).sum(1)
    counts = np.minimum(counts, limit) + (excess // 256)[:, None]
    rest = (excess % 256)[:, None]  # one more in every `step`-th bin, until it is spent
    step = np.maximum(256 // np.maximum(rest, 1), 1)
    bins = np.arange(256)
    counts += (bins % step == 0) & (bins // step < rest)
    maps = np.clip(np.rint(counts.cumsum(1) * (255 / area)), 0, 255).reshape(num, TILES, TILES, 256)

    def neighbours(size: int, tile: int) -> tuple[NDArray, NDArray, NDArray]:
        position = np.arange(size) / tile - 0.5
        first = np.floor(position)
        return np.clip(first, 0, None).astype(int), np.clip(first + 1, None, TILES - 1).astype(int), position - first

    top, bottom, down = neighbours(height, rows)
    left, right, across = neighbours(width, columns)
    image = np.arange(num)[:, None, None]

    def mapped(row: NDArray, column: NDArray) -> NDArray:
        return maps[image, row[:, None], column, values]

    upper = mapped(top, left) * (1 - across) + mapped(top, right) * across
    lower = mapped(bottom, left) * (1 - across) + mapped(bottom, right) * across
    return np.rint(upper * (1 - down[:, None]) + lower * down[:, None])


def _srgb_to_lab(images: NDArray) -> NDArray:
    """sRGB in [0, 1] -> CIE L*a*b* under D65."""
    linear = np.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _RGB_TO_XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _lab_to_srgb(lab: NDArray) -> NDArray:
    """The inverse of `_srgb_to_lab`, clipped to [0, 1]."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ np.linalg.inv(_RGB_TO_XYZ).T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
