"""What the published datasets of INRs have in common: a state dict per network, in files of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.state_dicts import read_network as read_state_dict
from scalegmn.networks import NetParams
from scalegmn.zoos.convert import Listing, NothingThereError
from scalegmn.zoos.zoo_format import Networks, first_not_finite

W0 = 30.0
"""The frequency of all published SIRENs, sin(w0 (W x + b))."""


@dataclass(frozen=True)
class InrFile:
    """One network on disk.

    Attributes:
        path: its state dict.
        split: `train`, `val` or `test`.
        label: the class; None where it is an entry of the file.
        image: index of the image, counted through training, then test images; None where it is unknown.
    """

    path: Path
    split: str
    label: int | None
    image: int | None


def inr_listing(files: list[InrFile], problems: list[str], source: Path, provenance: dict[str, Any]) -> Listing:
    """The listing of networks.

    Args:
        files: the networks.
        problems: what is wrong already, one sentence each.
        source: what names the networks, for messages.
        provenance: what they are, in plain JSON types.

    Raises:
        ValueError: there are problems, or a network or an image is in two splits.
        NothingThereError: there is no network.
    """
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
    rows = {name: torch.tensor([row for row, split in enumerate(names) if split == name]) for name in set(names)}
    splits = {name: rows.get(name, torch.arange(0)) for name in ("train", "val", "test")}
    layout = read_network(files[0].path)[0]
    read = partial(_read, files, [tuple(tensor.shape) for tensor in layout])
    return Listing([file.path for file in files], len(files), read, splits, provenance)


def _read(files: Sequence[InrFile], shapes: Sequence[tuple[int, ...]], part: slice) -> Networks:
    """The networks of some of the files, which all have the shapes of the first; labels are 0 to 9."""
    networks, labels = [], []
    for file in files[part]:
        tensors, label = read_network(file.path)
        own_shapes = [tuple(tensor.shape) for tensor in tensors]
        if own_shapes != list(shapes):
            raise ValueError(f"{file.path}: shapes {own_shapes}, but {files[0].path} has {list(shapes)}")
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
        ValueError: as `read_state_dict`, or `label` is not a class; names the file.
    """
    stored = read_state_dict(path)
    label = stored.content.get("label")
    if isinstance(label, Tensor) and label.numel() == 1:
        label = label.item()
    if not (label is None or type(label) is int or (isinstance(label, str) and label.isdecimal())):
        raise ValueError(f"{path}: label {label!r} is not a class")
    return stored.tensors(), None if label is None else int(label)


def read_splits(path: Path) -> dict[str, dict[str, list[str]]]:
    """The JSON of published splits: `train`, `val` and `test` -> {"path": [...], ...}.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text())
        splits = {name: entry if isinstance(entry, dict) else {"path": entry} for name, entry in content.items()}
        good = all(isinstance(entries["path"], list) for entries in splits.values())
        good = good and all(isinstance(path, str) for entries in splits.values() for path in entries["path"])
    except OSError:
        raise ValueError(f"data.split_path: {path}: no such file") from None
    except (ValueError, AttributeError, KeyError, RecursionError):
        good = False
    if not good or set(splits) != {"train", "val", "test"}:
        raise ValueError(f'{path}: expected JSON with "train", "val" and "test", each with a list "path"')
    return splits
