"""The published INRs of MNIST (Navon et al., ICML 2023, https://arxiv.org/abs/2301.12780)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scalegmn.zoos.convert import Listing, NothingThereError, checksum
from scalegmn.zoos.published.inrs import InrDataset, InrFile, SirenOptions, inr_listing, read_splits
from scalegmn.zoos.registry import register_dataset

if TYPE_CHECKING:
    from scalegmn.zoos.loader import DataConfig

NUM_TRAIN_IMAGES = 60_000
"""MNIST's training images; its test images are numbered after them."""

_FOLDER = re.compile(r"mnist_png_(training|testing)_(.+)_(\d+)")


class MnistInrs(InrDataset):
    """`mnist_png_{training,testing}_<label>_<image>/checkpoints/model_final.pth` at any depth; splits in
    `mnist_splits.json`, or else drawn."""

    zoo_name = "labeled_mnist_inr"
    settings = ("split_path",)

    def choice(self, config: DataConfig) -> dict[str, Any]:
        """The splits, and how networks are evaluated."""
        splits = self._splits(config)
        return {"splits": "drawn" if splits is None else checksum(splits), **super().choice(config)}

    def listing(self, config: DataConfig) -> Listing:
        """The networks that the splits name."""
        return mnist_listing(config.root, self._splits(config), self.options_of(config))

    def _splits(self, config: DataConfig) -> Path | None:
        """The JSON of splits; None: there is none, and no setting names one."""
        path = config.file(config.split_path, "mnist_splits.json")
        return None if config.split_path is None and not path.exists() else path


register_dataset(MnistInrs("labeled_mnist_inr", "a SIREN per MNIST image"))
register_dataset(MnistInrs("mnist_inr_edit", "the same SIRENs, as published configurations for editing name them"))


def mnist_listing(root: Path, splits: Path | None, options: SirenOptions) -> Listing:
    """The networks in folders `mnist_png_{training,testing}_<label>_<image>` anywhere below `root`.

    Args:
        root: the dataset's folder.
        splits: JSON, split -> {"path", "label"}; paths may be those of another machine. None: `mnist_splits(root)`.
        options: how networks are evaluated.
    """
    folders = _mnist_folders(root)
    if not folders:
        raise NothingThereError(_no_mnist(root))
    content = mnist_splits(root) if splits is None else read_splits(splits)
    files: list[InrFile] = []
    problems: list[str] = []
    for split, entries in content.items():
        labels: Any = entries.get("label") or [None] * len(entries["path"])
        if not isinstance(labels, list) or len(labels) != len(entries["path"]):
            raise ValueError(f"{splits}: {split}: label: expected a list, one for each of {len(entries['path'])} paths")
        for path, label in zip(entries["path"], labels, strict=True):
            match = next((match for part in re.split(r"[\\/]", path) if (match := _FOLDER.fullmatch(part))), None)
            if match is None or match[0] not in folders:
                problems.append(f"{splits}: {split}: {path}: no such network in {root}")
                continue
            part, true_label, image = match.groups()
            if str(true_label if label is None else label) != true_label:
                problems.append(f"{splits}: {split}: {path}: label {label!r}, but the folder's name says {true_label}")
                continue
            number = int(image) + (NUM_TRAIN_IMAGES if part == "testing" else 0)
            files.append(InrFile(folders[match[0]] / "checkpoints" / "model_final.pth", split, true_label, number))
    return inr_listing(files, problems, splits or root, {"images": "mnist", "image_shape": [28, 28, 1]}, options)


def mnist_splits(root: Path, val_size: int = 5000, seed: int = 0) -> dict[str, dict[str, list[str]]]:
    """Splits of the MNIST INRs: all `testing` networks to test, `val_size` random ones of the others to validate.

    Args:
        root: the dataset's folder.
        val_size: networks for validation.
        seed: seed of their choice.

    Returns:
        Split -> {"path": relative to `root`, "label": as text}, the published JSON's content.

    Raises:
        ValueError: there are no networks, or not more than `val_size` for training.
    """
    folders = _mnist_folders(root)
    if not folders:
        raise NothingThereError(_no_mnist(root))
    parts: dict[str, list[str]] = {"training": [], "testing": []}
    for name in sorted(folders, key=lambda name: int(name.rpartition("_")[2])):
        parts[name.split("_")[2]].append(name)
    train = parts["training"]
    if not 0 < val_size < len(train):
        raise ValueError(
            f"{root}: {len(train)} training networks leave none to train on after {val_size} for validation; draw "
            f"splits with `scalegmn zoo splits {root} --val_size N`"
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    names = {
        "train": [train[k] for k in sorted(order[val_size:])],
        "val": [train[k] for k in sorted(order[:val_size])],
        "test": parts["testing"],
    }
    return {
        split: {
            "path": [(folders[n] / "checkpoints" / "model_final.pth").relative_to(root).as_posix() for n in of_split],
            "label": ["_".join(n.split("_")[3:-1]) for n in of_split],
        }
        for split, of_split in names.items()
    }


def _no_mnist(root: Path) -> str:
    """The error of a folder without networks."""
    return f"{root}: no folders mnist_png_training_<label>_<image> below it, expected the published INRs of MNIST"


def _mnist_folders(root: Path) -> dict[str, Path]:
    """Name -> folder of each network below `root`; raises ValueError when two have one name."""
    folders: dict[str, Path] = {}
    for path in _walk(root):
        other = folders.setdefault(path.name, path)
        if other != path:
            raise ValueError(f"{root}: two folders of one name, {other} and {path}; remove one")
    return folders


def _walk(folder: Path) -> Iterator[Path]:
    """The folders of networks below a folder."""
    seen: set[str] = set()  # links may lead in circles
    for parent, names, _ in os.walk(folder, followlinks=True):
        networks = {name for name in names if _FOLDER.fullmatch(name)}
        if os.path.realpath(parent) in seen:
            names.clear()
            continue
        seen.add(os.path.realpath(parent))
        yield from (Path(parent, name) for name in networks)
        names[:] = [name for name in names if name not in networks]
