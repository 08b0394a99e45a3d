"""The published datasets of INRs, one file per network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.state_dicts import read_layers
from scalegmn.networks import NetParams
from scalegmn.zoos.published.convert import Listing, NothingThereError
from scalegmn.zoos.zoo_format import Networks, first_not_finite

W0 = 30.0
"""The frequency of all published SIRENs, sin(w0 (W x + b))."""

NUM_TRAIN_IMAGES = 60_000
"""MNIST's training images; its test images are numbered after them."""

_MNIST_FOLDER = re.compile(r"mnist_png_(training|testing)_(\d+)_(\d+)")
_CIFAR_FOLDER = re.compile(r"randinit_smaller(?:_aug(\d+))?_(\d+)s")


@dataclass(frozen=True)
class InrFile:
    """One network on disk.

    Attributes:
        path: its state dict.
        split: `train`, `val` or `test`.
        label: the class; None where the file itself says it.
        image: identity of the image, its index in the order of training, then test images; None where unknown.
    """

    path: Path
    split: str
    label: int | None
    image: int | None


def mnist_listing(root: Path, splits: Path | None) -> Listing:
    """The MNIST INRs (Navon et al., ICML 2023): `mnist_png_{training,testing}_<label>_<image>` anywhere below `root`.

    Args:
        root: the dataset's folder.
        splits: JSON, split -> {"path", "label"}; paths may be those of another machine. None: `mnist_splits(root)`.
    """
    folders = _mnist_folders(root)
    if not folders:
        raise NothingThereError(_no_mnist(root))
    content = mnist_splits(root) if splits is None else _read_splits(splits)
    files, problems = [], []
    for split, entries in content.items():
        labels = entries.get("label") or [None] * len(entries["path"])
        if not isinstance(labels, list) or len(labels) != len(entries["path"]):
            raise ValueError(f"{splits}: {split}: label: expected a list, one for each of {len(entries['path'])} paths")
        for path, label in zip(entries["path"], labels, strict=True):
            name = next((part for part in re.split(r"[\\/]", path) if _MNIST_FOLDER.fullmatch(part)), None)
            if name not in folders:
                problems.append(f"{splits}: {split}: {path}: no such network in {root}")
                continue
            part, own, image = _MNIST_FOLDER.fullmatch(name).groups()
            if str(label if label is not None else own) != own:
                problems.append(f"{splits}: {split}: {path}: label {label!r}, but the folder's name says {own}")
                continue
            number = int(image) + (NUM_TRAIN_IMAGES if part == "testing" else 0)
            files.append(InrFile(folders[name] / "checkpoints" / "model_final.pth", split, int(own), number))
    return _listing(files, problems, splits or root, {"images": "mnist", "image_shape": [28, 28, 1]})


def mnist_splits(root: Path, val_size: int = 5000, seed: int = 0) -> dict[str, dict[str, list[str]]]:
    """Splits of the MNIST INRs: all `testing` networks to test, `val_size` random ones of the others to validate.

    Args:
        root: the dataset's folder.
        val_size: networks for validation.
        seed: of the choice.

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
        parts[_MNIST_FOLDER.fullmatch(name)[1]].append(name)
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
            "path": [(folders[n] / "checkpoints" / "model_final.pth").relative_to(root).as_posix() for n in found],
            "label": [_MNIST_FOLDER.fullmatch(n)[2] for n in found],
        }
        for split, found in names.items()
    }


def fmnist_listing(root: Path, splits: Path) -> Listing:
    """The Fashion-MNIST INRs: `{train,val,test}/model_<n>.pth`, each with its own `label`.

    Args:
        root: the dataset's folder.
        splits: JSON, split -> paths, or split -> {"path": paths}; the last two parts of a path count.
    """
    files, problems = [], []
    if not any((root / part).is_dir() for part in ("train", "val", "test")):
        raise NothingThereError(f"{root}: no folders train, val, test; set --data.dataset_path")
    for split, entries in _read_splits(splits).items():
        for path in entries["path"]:
            found = root.joinpath(*re.split(r"[\\/]", path)[-2:])
            files.append(InrFile(found, split, None, None))
    return _listing(files, problems, splits, {"images": "fashion_mnist", "image_shape": [28, 28, 1]})


def cifar_listing(root: Path, split_points: Sequence[int], extra_aug: int) -> Listing:
    """The CIFAR-10 INRs (Zhou et al., NeurIPS 2023): `randinit_smaller_<label>s/net<image>.pth`.

    Args:
        root: the dataset's folder.
        split_points: images below the first train, those below the second validate, the others test.
        extra_aug: use so many more fits of each training image, `randinit_smaller_aug<k>_<label>s`, k < extra_aug.
    """
    if not root.is_dir():
        raise NothingThereError(f"{root}: no such folder; set --data.dataset_path")
    files, found_augs = [], set()
    for folder in sorted(root.iterdir()):
        match = _CIFAR_FOLDER.fullmatch(folder.name)
        if not match or (match[1] and int(match[1]) >= extra_aug):
            continue
        found_augs |= {int(match[1])} if match[1] else set()
        for entry in os.scandir(folder):
            number = re.fullmatch(r"net(\d+)\.pth", entry.name)
            if not number:
                continue
            image = int(number[1])
            split = "train" if image < split_points[0] else "val" if image < split_points[1] else "test"
            if not match[1] or split == "train":
                files.append(InrFile(folder / entry.name, split, int(match[2]), image))
    missing = sorted(set(range(extra_aug)) - found_augs)
    if files and missing:
        raise ValueError(
            f"data.extra_aug: found {extra_aug}, but {root} has no randinit_smaller_aug{missing[0]}_<label>s; "
            f"download them or use --data.extra_aug {missing[0]}"
        )
    files.sort(key=lambda file: (file.image, file.path.as_posix()))
    return _listing(files, [], root, {"images": "cifar10", "image_shape": [32, 32, 3]})


def _listing(files: list[InrFile], problems: list[str], source: Path, provenance: dict[str, Any]) -> Listing:
    """The listing of networks, none of them and none of their images in two splits."""
    seen: dict[Path | int, str] = {}
    for file in files:
        if file.path in seen:
            problems.append(f"{source}: {file.path} is in split {seen[file.path]} and again in {file.split}")
        seen[file.path] = file.split
        if file.image is not None and seen.setdefault(file.image, file.split) != file.split:
            problems.append(f"{source}: {file.path} of split {file.split}: its image is in {seen[file.image]} too")
    if problems:
        more = f" (and {len(problems) - 1:,} more like it)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    if not files:
        raise NothingThereError(f"{source}: no networks there; set --data.dataset_path")
    files = [file for split in ("train", "val", "test") for file in files if file.split == split]
    names = [file.split for file in files]
    rows = {name: torch.tensor([row for row, own in enumerate(names) if own == name]).long() for name in set(names)}
    splits = {name: rows.get(name, torch.arange(0)) for name in ("train", "val", "test")}
    layout = read_network(files[0].path)[0]
    read = partial(_read, files, [tuple(tensor.shape) for tensor in layout])
    return Listing([file.path for file in files], len(files), read, splits, provenance)


def _read(files: Sequence[InrFile], shapes: Sequence[tuple[int, ...]], part: slice) -> Networks:
    """The networks of some of the files, which all have the shapes of the first; labels are 0 to 9."""
    networks, labels = [], []
    for file in files[part]:
        tensors, label = read_network(file.path)
        found = [tuple(tensor.shape) for tensor in tensors]
        if found != list(shapes):
            raise ValueError(f"{file.path}: shapes {found}, but {files[0].path} has {list(shapes)}")
        networks.append(tensors)
        labels.append(label if file.label is None else file.label)
        if labels[-1] not in range(10):
            raise ValueError(f"{file.path}: label {labels[-1]}, expected 0 to 9")
    stacked = [torch.stack(tensors).float() for tensors in zip(*networks, strict=True)]
    weights, biases = stacked[::2], stacked[1::2]
    bad = first_not_finite(stacked)
    if bad is not None:
        raise ValueError(f"{files[part][bad].path}: a weight or bias is NaN or infinite")
    columns = {"label": torch.tensor(labels)}
    if files[0].image is not None:
        columns["image"] = torch.tensor([file.image for file in files[part]])
    try:
        params = NetParams.from_tensors(weights, biases, "sine", W0)
    except ValueError as error:
        raise ValueError(f"{files[part][0].path}: {error}") from None
    return Networks((params,), columns)


def read_network(path: Path) -> tuple[list[Tensor], int | None]:
    """A chain of layers from a state dict, without executing anything.

    Returns:
        Weight [out, in] and bias [out] of each layer in turn; the entry `label`, if there is one.

    Raises:
        ValueError: as `read_layers`, or `label` is not a class; names the file.
    """
    state, names = read_layers(path)
    label = state.get("label")
    if isinstance(label, Tensor) and label.numel() == 1:
        label = label.item()
    if not (label is None or type(label) is int or (isinstance(label, str) and label.isdecimal())):
        raise ValueError(f"{path}: label {label!r} is not a class")
    return [state[name] for name in names], None if label is None else int(label)


def _no_mnist(root: Path) -> str:
    """What is missing."""
    return f"{root}: no folders mnist_png_training_<label>_<image> below it; set --data.dataset_path"


def _mnist_folders(root: Path) -> dict[str, Path]:
    """Name -> folder of each network below `root`; raises ValueError when two have one name."""
    found: dict[str, Path] = {}
    for path in _walk(root):
        other = found.setdefault(path.name, path)
        if other != path:
            raise ValueError(f"{root}: two folders of one name, {other} and {path}; remove one")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    """The folders of networks below a folder."""
    seen = set()  # links may lead in circles
    for parent, names, _ in os.walk(folder, followlinks=True):
        networks = {name for name in names if _MNIST_FOLDER.fullmatch(name)}
        if os.path.realpath(parent) in seen:
            names.clear()
            continue
        seen.add(os.path.realpath(parent))
        yield from (Path(parent, name) for name in networks)
        names[:] = [name for name in names if name not in networks]


def _read_splits(path: Path) -> dict[str, dict[str, list]]:
    """A published JSON of splits, `train`, `val` and `test` -> {"path": [...], ...}."""
    try:
        content = json.loads(path.read_text())
        splits = {name: found if isinstance(found, dict) else {"path": found} for name, found in content.items()}
        good = all(isinstance(entries["path"], list) for entries in splits.values())
        good = good and all(isinstance(path, str) for entries in splits.values() for path in entries["path"])
    except OSError:
        raise ValueError(f"data.split_path: {path}: no such file") from None
    except (ValueError, AttributeError, KeyError, RecursionError):
        good = False
    if not good or set(splits) != {"train", "val", "test"}:
        raise ValueError(f'{path}: expected JSON with "train", "val" and "test", each with a list "path"')
    return splits
