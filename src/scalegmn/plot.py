"""Figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    from matplotlib.figure import Figure  # takes a second to import, which notebooks need not wait for

    return Figure(figsize=(width, height), layout="constrained")


def learning_curves(path: Path, rows: Sequence[Mapping[str, Any]], best_epoch: int) -> None:
    """Train and validation curves over epochs, one panel per metric, the best epoch marked.

    Args:
        path: the PNG.
        rows: lines of metrics.jsonl, with `epoch`, `train_<metric>` and `val_<metric>`.
        best_epoch: the epoch whose checkpoint was kept.
    """
    names = [key.removeprefix("val_") for key in rows[0] if key.startswith("val_")]
    figure = _figure(5 * len(names), 3.6)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        for split in ("train", "val"):
            if f"{split}_{name}" in rows[0]:
                axes.plot([r["epoch"] for r in rows], [r[f"{split}_{name}"] for r in rows], "o-", ms=3, label=split)
        axes.axvline(best_epoch, color="grey", lw=0.8, ls=":", label="best")
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.legend()
    figure.savefig(path, dpi=120)


def confusion_matrix(path: Path, counts: np.ndarray) -> None:
    """Counts [true class, predicted class] as an image with numbers."""
    size = 2 + 0.45 * len(counts)
    figure = _figure(size, size)
    axes = figure.subplots()
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(rates, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if rates[row, column] > 0.5 else "black"
            axes.text(column, row, int(count), ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="predicted", ylabel="true", xticks=range(len(counts)), yticks=range(len(counts)))
    axes.set_title(f"accuracy {np.trace(counts) / max(counts.sum(), 1):.3f}")
    figure.savefig(path, dpi=120)


def reconstructions(path: Path, originals: np.ndarray, fits: np.ndarray, psnr: np.ndarray) -> None:
    """Images [n, height, width, channels] above their fits, and a histogram of the PSNR of all networks."""
    figure = _figure(max(4.0, len(originals)), 4.5)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2, 2.2])
    for row, images in zip(top.subplots(2, len(originals), squeeze=False), (originals, fits), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.clip(0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
    axes = bottom.subplots()
    axes.hist(psnr, bins=60)
    axes.set(xlabel="PSNR [dB]", ylabel="networks", title=f"median {np.median(psnr):.1f} dB")
    figure.savefig(path, dpi=120)
