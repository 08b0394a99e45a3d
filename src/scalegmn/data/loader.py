"""Batches of networks with their labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scalegmn.data.augment import AugmentConfig, augment, check_augment
from scalegmn.data.cnn_zoos import cnn_listing
from scalegmn.data.convert import checksum, converted
from scalegmn.data.inr_zoos import cifar_listing, fmnist_listing, mnist_listing
from scalegmn.data.wild_park import wild_park_listing
from scalegmn.data.zoo_format import Zoo, in_single, open_zoo
from scalegmn.spec import ACTIVATIONS, MIXED, NetParams
from scalegmn.symmetry.canonicalize import canonicalize

BLOCK = 2048
"""Networks that are read at once, or a batch if that is more."""


@dataclass(frozen=True)
class DataConfig:
    """The networks to learn from."""

    dataset_path: str = "data/digits_inr"
    """Folder of the zoo, as made by `python -m scalegmn.zoos`, or of the published dataset."""

    dataset: Literal[
        "zoo",
        "labeled_mnist_inr",
        "mnist_inr_edit",
        "labeled_fashion_mnist_inr",
        "cifar_inr",
        "cifar10",
        "svhn",
        "cnn_wild_park",
    ] = "zoo"
    """What is in dataset_path: a zoo of ours, or a published dataset by its published name, which is converted to a zoo
    on first use."""

    split_path: str | None = None
    """JSON of train, val and test networks (MNIST, Fashion-MNIST, CNN Wild Park); null: mnist_splits.json, splits.json
    or cnn_park_splits.json in dataset_path; without one, MNIST's are as `python -m scalegmn.data splits` draws them."""

    split_points: tuple[int, int] = (45_000, 50_000)
    """cifar_inr: images below the first train, those below the second validate, the others test."""

    extra_aug: int = 0
    """cifar_inr: train on so many more fits of each image."""

    activation_function: str | None = None
    """Predicting generalisation: only networks with this hidden activation, such as relu; null: all."""

    style_function: Literal["dilate", "increase_contrast"] = "dilate"
    """Editing: what the edited image is. dilate: thicker strokes (one channel); increase_contrast (three)."""

    images_path: str | None = None
    """Editing: where the images are that the INRs were fitted to; null: in dataset_path. Digits need none."""

    data_path: str | None = None
    """cifar10, svhn: the weights; null: weights.npy in dataset_path."""

    metrics_path: str | None = None
    """cifar10, svhn: the test accuracies; null: metrics.csv.gz in dataset_path."""

    layout_path: str | None = None
    """cifar10, svhn: which weights are which; null: layout.csv in dataset_path."""

    idcs_file: str | None = None
    """cifar10, svhn: the order that the splits are made in; null: <dataset>_split.csv in dataset_path."""

    cache_dir: str | None = None
    """Where converted datasets go; null: dataset_path, or where that is read-only the user's cache folder."""

    convert: bool = True
    """Convert a published dataset on first use; false: refuse one that has not been converted."""

    switch_to_canon: bool = True
    """Read canonical networks; false: as stored, which in a zoo made by `python -m scalegmn.canonicalize` is canonical
    too."""

    canonicalize: tuple[Literal["phase", "scale"], ...] = ("phase",)
    """The symmetries that canonical networks have removed: `phase` of sine layers, `scale` of relu layers."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the training networks."""

    def __post_init__(self) -> None:
        problems = []
        if self.extra_aug < 0:
            problems.append(f"data.extra_aug: found {self.extra_aug}, expected 0 or more")
        if not 0 < self.split_points[0] < self.split_points[1]:
            problems.append(f"data.split_points: found {self.split_points}, expected two ascending numbers above 0")
        if problems:
            raise ValueError("; ".join(problems))


def open_data(config: DataConfig) -> Zoo:
    """The zoo of a configuration; a published dataset is converted unless it has been.

    Raises:
        ValueError: there is none, or a file of it is missing, refused or damaged; says which.
    """
    root = Path(config.dataset_path).expanduser()
    if config.dataset == "zoo" or (root / "zoo.json").exists():
        zoo = open_zoo(root)
        return zoo if config.activation_function is None else of_activation(zoo, config.activation_function)

    def file(given: str | None, default: str) -> Path:
        return root / default if given is None else Path(given).expanduser()

    if config.dataset == "cifar_inr":
        name, choice = "cifar_inr", {"split_points": list(config.split_points), "extra_aug": config.extra_aug}
        listing = partial(cifar_listing, root, config.split_points, config.extra_aug)
    elif config.dataset in ("cifar10", "svhn"):
        files = (
            file(config.data_path, "weights.npy"),
            file(config.metrics_path, "metrics.csv.gz"),
            file(config.layout_path, "layout.csv"),
            file(config.idcs_file, f"{config.dataset}_split.csv"),
        )
        name, activation = "small_cnns", config.activation_function
        choice = {"files": [os.path.relpath(path, root) for path in files], "activation_function": activation}
        listing = partial(cnn_listing, *files, activation)
    elif config.dataset == "labeled_fashion_mnist_inr":
        splits = file(config.split_path, "splits.json")
        name, choice, listing = config.dataset, {"splits": checksum(splits)}, partial(fmnist_listing, root, splits)
    elif config.dataset == "cnn_wild_park":
        splits = file(config.split_path, "cnn_park_splits.json")
        name, choice, listing = config.dataset, {"splits": checksum(splits)}, partial(wild_park_listing, root, splits)
    else:
        splits = file(config.split_path, "mnist_splits.json")
        if config.split_path is None and not splits.exists():
            splits = None
        name, choice = "labeled_mnist_inr", {"splits": "drawn" if splits is None else checksum(splits)}
        listing = partial(mnist_listing, root, splits)
    cache_dir = config.cache_dir and Path(config.cache_dir).expanduser()
    return converted(name, root, choice, listing, cache_dir, config.convert)


def of_activation(zoo: Zoo, name: str) -> Zoo:
    """Those of a zoo's networks that have a hidden activation; of a zoo that mixes activations, copied into memory.

    Raises:
        ValueError: there are none.
    """
    params = zoo.params
    found = [layer.activation for layer in params.spec.layers[:-1]]
    own = torch.full((len(params),), found == [name] * len(found))
    if params.activation is not None:
        found = [ACTIVATIONS[index] for index in params.activation.unique()]
        own = params.activation == ACTIVATIONS.index(name) if name in found else own
    if not own.any():
        expected = ", ".join(sorted(set(found)))
        raise ValueError(f"data.activation_function: found {name}, expected one of {expected} as in {zoo.path}")
    if own.all():
        return zoo
    weights, biases = (tuple(tensor[own] for tensor in tensors) for tensors in (params.weights, params.biases))
    kept = NetParams(params.spec.with_activation(name), weights, biases)
    place = own.cumsum(0) - 1
    splits = {split: place[rows[own[rows]]] for split, rows in zoo.splits.items()}
    return replace(zoo, nets=(kept,), columns={key: c[own] for key, c in zoo.columns.items()}, splits=splits)


@dataclass(frozen=True)
class LabelledNets:
    """Some networks of a zoo and how they are read: lazily, batch by batch.

    Attributes:
        zoo: all networks, where they are stored.
        rows: [M] which of them.
        labels: [M].
        removed: the symmetries to remove from each batch.
    """

    zoo: Zoo
    rows: Tensor
    labels: Tensor
    removed: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: slice | Tensor, device: torch.device | str = "cpu") -> NetParams:
        """Some of the networks on a device, in single precision at least, canonical if they are read so."""
        return canonicalize(in_single(self.zoo.params[self.rows[index]].to(device)), self.removed)

    def batches(
        self, batches: Sequence[Tensor] | int = BLOCK, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[NetParams, Tensor]]:
        """Batches of networks and labels on a device; several come from one indexed read.

        Args:
            batches: the networks [B] of each batch; or how many a batch has, in order, the last maybe fewer.
            device: where they go.
        """
        if isinstance(batches, int):
            batches = torch.arange(len(self)).split(batches)
        at_once = max(1, BLOCK // len(batches[0])) if batches else 1
        for first in range(0, len(batches), at_once):
            together = batches[first : first + at_once]
            index, start = torch.cat(together), 0
            params, labels = self.read(index, device), self.labels[index].to(device)
            for batch in together:
                rows = slice(start, start := start + len(batch))
                yield params[rows], labels[rows]


def augmented(
    config: DataConfig, params: NetParams, target: Tensor, generator: torch.Generator
) -> tuple[NetParams, Tensor]:
    """A batch under `config.augment`, and canonical again if networks are read so: biases may leave their range."""
    if config.augment == AugmentConfig():
        return params, target
    params, target = augment(config.augment, params, target, generator)
    return canonicalize(params, config.canonicalize if config.switch_to_canon else ()), target


def symmetries_to_remove(config: DataConfig, zoo: Zoo) -> tuple[str, ...]:
    """What is left to do when the zoo is read: what its networks have and, so that canonical copies are read to the bit
    as they are stored, still have."""
    having = {"phase": {"sine", MIXED}, "scale": {"relu", "leaky_relu", "identity", MIXED}}
    found = {layer.activation for params in zoo.nets for layer in params.spec.layers[:-1]}
    wanted = config.canonicalize if config.switch_to_canon else ()
    return tuple(name for name in wanted if name not in zoo.canonical and having[name] & found)


def reading(config: DataConfig, zoo: Zoo) -> str:
    """In words, how the zoo's networks are read: without which symmetries, or as they are stored."""
    removed = symmetries_to_remove(config, zoo)
    if removed or (config.switch_to_canon and config.canonicalize and zoo.canonical):
        return f"canonical ({', '.join((*zoo.canonical, *removed))})"
    return "as stored" + (f" (canonical: {', '.join(zoo.canonical)})" if zoo.canonical else "")


def load_splits(config: DataConfig, column: str, limit: int | None = None) -> tuple[Zoo, dict[str, LabelledNets]]:
    """The zoo and its splits with a column as labels.

    Args:
        config: which zoo, canonical or not.
        column: the column that the labels come from.
        limit: at most so many networks per split.

    Raises:
        ValueError: the zoo cannot be read, lacks the column or a split, or its networks cannot be augmented so.
    """
    zoo = open_data(config)
    if column not in zoo.columns:
        raise ValueError(f"{zoo.path}: no column {column!r}, found {', '.join(zoo.columns)}")
    missing = [name for name in ("train", "val", "test") if not len(zoo.splits.get(name, ()))]
    if missing:
        raise ValueError(f"{zoo.path}: no networks in split {', '.join(missing)}; make a larger zoo")
    check_augment(config.augment, zoo.spec)
    removed = symmetries_to_remove(config, zoo)
    undone = [name for name in config.augment.group if config.switch_to_canon and name in config.canonicalize]
    if undone:
        remedy = "use --data.switch_to_canon False or leave it out"
        raise ValueError(f"data.augment.group: {undone[0]} is removed again from networks read as canonical; {remedy}")
    return zoo, {
        name: LabelledNets(zoo, rows[:limit], zoo.columns[column][rows[:limit]], removed)
        for name, rows in zoo.splits.items()
    }
