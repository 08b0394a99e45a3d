"""What the published datasets of INRs have in common: a state dict per network, in files of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scalegmn.configuration.text import read_text
from scalegmn.interop.state_dicts import read_network as read_state_dict
from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.siren import OUTPUT_OFFSET
from scalegmn.reporting.files import natural_order
from scalegmn.zoos.convert import Listing, NothingThereError
from scalegmn.zoos.registry import ConvertedDataset
from scalegmn.zoos.zoo_format import Networks, first_not_finite

if TYPE_CHECKING:
    from scalegmn.zoos.loader import DataConfig

W0 = 30.0
"""The frequency of all published SIRENs, sin(w0 (W x + b))."""


MAX_CLASSES = 10**6
"""More than any dataset has; larger labels are damaged files."""


@dataclass(frozen=True)
class SirenOptions:
    """How the networks of a dataset of SIRENs are evaluated, which their files do not tell."""

    w0: float = W0
    """Frequency of the sines, sin(w0 (W x + b))."""

    first_w0: float | None = None
    """Frequency of the first layer; null: w0."""

    output_offset: float = OUTPUT_OFFSET
    """A pixel's value is the network's output + output_offset."""

    def spec(self, params: NetParams) -> NetSpec:
        """The architecture of networks with these frequencies."""
        first = float(self.w0 if self.first_w0 is None else self.first_w0)
        layers = (
            replace(layer, w0=float(self.w0) if index else first) if layer.activation == "sine" else layer
            for index, layer in enumerate(params.spec.layers)
        )
        return replace(params.spec, layers=tuple(layers))


class InrDataset(ConvertedDataset):
    """A published dataset of SIRENs; `data.dataset_args` has the fields of `SirenOptions`."""

    options = SirenOptions

    def problems(self, config: DataConfig) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = super().problems(config)
        for key, value in config.dataset_args.items() if not problems else ():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number and not (key == "first_w0" and value is None):
                problems.append(f"data.dataset_args.{key}: found {value!r}, expected a number")
            elif is_number and key != "output_offset" and not value > 0:
                problems.append(f"data.dataset_args.{key}: found {value}, expected above 0")
        return problems

    def choice(self, config: DataConfig) -> dict[str, Any]:
        """The options that are not the defaults, so that zoos from before there were any are found again."""
        return {key: value for key, value in config.dataset_args.items() if value != getattr(SirenOptions(), key)}


@dataclass(frozen=True)
class InrFile:
    """One network on disk.

    Attributes:
        path: its state dict.
        split: `train`, `val` or `test`.
        label: the class, a number or a name; None where it is an entry of the file.
        image: index of the image, counted through training, then test images; None where it is unknown.
    """

    path: Path
    split: str
    label: str | None
    image: int | None


def inr_listing(
    files: list[InrFile], problems: list[str], source: Path, provenance: dict[str, Any], options: SirenOptions
) -> Listing:
    """The listing of networks.

    Args:
        files: the networks.
        problems: what is wrong already, one sentence each.
        source: what names the networks, for messages.
        provenance: what they are, in plain JSON types.
        options: how they are evaluated.

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
    of_split = [file.split for file in files]
    rows = {name: torch.tensor([row for row, split in enumerate(of_split) if split == name]) for name in set(of_split)}
    splits = {name: rows.get(name, torch.arange(0)) for name in ("train", "val", "test")}
    layout = read_network(files[0].path)[0]
    if options.output_offset != OUTPUT_OFFSET:
        provenance = {**provenance, "output_offset": options.output_offset}
    classes = cache(partial(_class_names, files, provenance.get("classes", ())))
    read = partial(_read, files, [tuple(tensor.shape) for tensor in layout], options, classes)
    return Listing([file.path for file in files], len(files), read, splits, provenance, classes)


def _class_names(files: Sequence[InrFile], of_images: Sequence[str]) -> list[str] | None:
    """The names of the classes: those of the images if all labels are among them, else labels in their natural order;
    None where labels are numbers. Reads all files where the first has a name in it."""
    labels = {file.label for file in files if file.label is not None}
    if not labels and isinstance(read_network(files[0].path)[1], str):
        for file in files:
            label = read_network(file.path)[1]
            if not isinstance(label, str):
                expected = f"expected the name of a class, as in {files[0].path}"
                raise ValueError(f"{file.path}: label: found {label}, {expected}")
            labels.add(label)
    if all(label.isdecimal() for label in labels):
        return None
    return list(of_images) if labels <= {*of_images} else sorted(labels, key=natural_order)


def _read(
    files: Sequence[InrFile],
    shapes: Sequence[tuple[int, ...]],
    options: SirenOptions,
    class_names: Callable[[], Sequence[str] | None],
    part: slice,
) -> Networks:
    """The networks of some of the files, which all have the shapes of the first."""
    names, networks, labels = class_names(), [], []
    for file in files[part]:
        tensors, label = read_network(file.path)
        own_shapes = [tuple(tensor.shape) for tensor in tensors]
        if own_shapes != list(shapes):
            raise ValueError(f"{file.path}: found shapes {own_shapes}, expected {list(shapes)} as in {files[0].path}")
        networks.append(tensors)
        if file.label is not None:
            label = int(file.label) if names is None else file.label
        if names is not None and label in names:
            label = names.index(label)
        if not isinstance(label, int) or not 0 <= label < MAX_CLASSES:
            raise ValueError(
                f"{file.path}: label: found {label}, expected the number of a class, 0 to {MAX_CLASSES - 1}"
            )
        labels.append(label)
    stacked = [torch.stack(tensors).float() for tensors in zip(*networks, strict=True)]
    weights, biases = stacked[::2], stacked[1::2]
    bad = first_not_finite(stacked)
    if bad is not None:
        raise ValueError(f"{files[part][bad].path}: a weight or bias is NaN or infinite; leave it out of the splits")
    columns = {"label": torch.tensor(labels)}
    if files[0].image is not None:
        columns["image"] = torch.tensor([file.image for file in files[part]])
    try:
        params = NetParams.from_tensors(weights, biases, "sine", options.w0)
        params = params.replace(spec=options.spec(params))
    except ValueError as error:
        raise ValueError(f"{files[part][0].path}: {error}") from None
    return Networks((params,), columns)


def read_network(path: Path) -> tuple[list[Tensor], int | str | None]:
    """A chain of layers from a state dict, without executing anything.

    Returns:
        Weight [out, in] and bias [out] of each layer in turn; the entry `label`, if there is one: a number, or a name.

    Raises:
        ValueError: as `read_state_dict`, or `label` is not a class; names the file.
    """
    stored = read_state_dict(path)
    without_bias = [layer.name for layer in stored.layers if layer.bias is None]
    if without_bias:
        raise ValueError(f"{path}: {without_bias[0]} has no bias, expected one in every layer")
    label = stored.content.get("label")
    if isinstance(label, Tensor) and label.numel() == 1:
        label = label.item()
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    if not (label is None or type(label) is int or (isinstance(label, str) and label)):
        raise ValueError(f"{path}: label: found {label!r}, expected the number of a class, from 0, or its name")
    return stored.tensors(), label


def read_splits(path: Path) -> dict[str, dict[str, list[str]]]:
    """The JSON of published splits: `train`, `val` and `test` -> {"path": [...], ...}.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        content = json.loads(read_text(path))
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
