"""Contrast-limited adaptive histogram equalisation (CLAHE) of the lightness of colour images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_TILES = 3
"""Tiles along each axis of an image."""

CLIP_LIMIT = 1
"""How many times the mean count of a bin a bin of a tile's histogram may have."""

NUM_BINS = 256
"""Bins of a histogram: lightness has 8 bits."""

_RGB_TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = _RGB_TO_XYZ.sum(1)  # D65


def equalize_lightness(images: NDArray) -> NDArray:
    """CLAHE (Zuiderveld, 1994) of the CIE lightness of sRGB images [n, height, width, 3]; colours stay.

    3x3 tiles and clip limit 1, on 8 bits of lightness: what the published code asks OpenCV for.
    """
    lab = _srgb_to_lab(images)
    lightness = np.rint(np.clip(lab[..., 0], 0, 100) * 2.55).astype(np.uint8)
    lab[..., 0] = clahe(lightness) / 2.55
    return _lab_to_srgb(lab)


def clahe(values: NDArray) -> NDArray:
    """CLAHE of images of bytes, [n, height, width]: each tile's clipped histogram gives a map from old values to new
    ones; a pixel's new value is interpolated between the maps of the four nearest tiles."""
    num, height, width = values.shape
    padding = [(0, -size % NUM_TILES) for size in (height, width)]
    padded = np.pad(values, [(0, 0), *padding], mode="reflect")
    tile_height, tile_width = (size // NUM_TILES for size in padded.shape[1:])
    tiles = padded.reshape(num, NUM_TILES, tile_height, NUM_TILES, tile_width).swapaxes(2, 3)
    maps = _maps(tiles.reshape(num * NUM_TILES**2, -1)).reshape(num, NUM_TILES, NUM_TILES, NUM_BINS)
    top, bottom, down = _neighbours(height, tile_height)
    left, right, across = _neighbours(width, tile_width)
    image = np.arange(num)[:, None, None]

    def mapped(row: NDArray, column: NDArray) -> NDArray:
        return maps[image, row[:, None], column, values]

    upper = mapped(top, left) * (1 - across) + mapped(top, right) * across
    lower = mapped(bottom, left) * (1 - across) + mapped(bottom, right) * across
    return np.rint(upper * (1 - down[:, None]) + lower * down[:, None])


def _maps(tiles: NDArray) -> NDArray:
    """Tiles [m, pixels] of bytes -> the new value of each byte, [m, 256]: the tile's cumulative clipped histogram."""
    area = tiles.shape[1]
    flat = tiles + NUM_BINS * np.arange(len(tiles))[:, None]
    counts = np.bincount(flat.ravel(), minlength=NUM_BINS * len(tiles)).reshape(-1, NUM_BINS)
    limit = max(CLIP_LIMIT * area // NUM_BINS, 1)
    excess = np.maximum(counts - limit, 0).sum(1)
    counts = np.minimum(counts, limit) + (excess // NUM_BINS)[:, None]
    rest = (excess % NUM_BINS)[:, None]  # one more in every `step`-th bin, until it is spent
    step = np.maximum(NUM_BINS // np.maximum(rest, 1), 1)
    bins = np.arange(NUM_BINS)
    counts += (bins % step == 0) & (bins // step < rest)
    return np.clip(np.rint(counts.cumsum(1) * (255 / area)), 0, 255)


def _neighbours(size: int, tile_size: int) -> tuple[NDArray, NDArray, NDArray]:
    """For each pixel along an axis: the tile whose centre is before it, the one after, the share of the latter."""
    position = np.arange(size) / tile_size - 0.5
    first = np.floor(position)
    before, after = np.clip(first, 0, None).astype(int), np.clip(first + 1, None, NUM_TILES - 1).astype(int)
    return before, after, position - first


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
