"""Batches of networks with their labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scalegmn.networks import ACTIVATIONS, HETERO, MultiArchBatch, NetParams
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.symmetry.groups import GroupElement, PhaseShift
from scalegmn.zoos.augment import AugmentConfig, augment, check_augment
from scalegmn.zoos.published import DATASETS
from scalegmn.zoos.registry import FILE_SETTINGS, unread_settings
from scalegmn.zoos.zoo_format import Zoo, in_single, is_zoo, open_zoo


class UnreadSetting(UserWarning):
    """A setting is for another layout of data."""


BLOCK = 2048
"""Networks that are read at once; larger batches are read whole."""

SEVERAL = ""
"""In place of a name, for networks with several activations."""


MADE_BY = {
    "label": "classes are in zoos of `scalegmn zoo inr`, or of `scalegmn zoo import` with a column label",
    "image": "images are in zoos of `scalegmn zoo inr`",
    "test_accuracy": "accuracies are in zoos of `scalegmn zoo cnn`, or of `scalegmn zoo import` with a column score",
}
"""Column -> which zoos have it."""


@dataclass(frozen=True)
class DataConfig:
    """The networks to learn from."""

    dataset_path: str = "data/digits_inr"
    """Folder of the zoo (`scalegmn zoo inr` or `scalegmn zoo cnn` makes one) or of another dataset."""

    dataset: str = field(default="zoo", metadata={"names": DATASETS})
    """What dataset_path holds: a zoo, or a dataset in another layout, which is converted to a zoo on first use."""

    split_path: str | None = None
    """JSON of train, val and test networks (MNIST, Fashion-MNIST, CNN Wild Park); null: mnist_splits.json, splits.json
    or cnn_park_splits.json in dataset_path; without one, MNIST's are as `scalegmn zoo splits` draws them."""

    split_points: tuple[int, int] = (45_000, 50_000)
    """cifar_inr: images below the first train, those below the second validate, the others test."""

    extra_aug: int = 0
    """cifar_inr: train on so many more fits of each image."""

    activation_function: str | None = None
    """Predicting generalisation: only networks with this hidden activation, such as relu; null: all."""

    train_networks: int | None = None
    """Train on so many of the training networks, the same ones for every model and seed, and more of them for a larger
    number; null: all."""

    style_function: str = "dilate"
    """Editing: the edit of images. dilate: thicker strokes (one channel); increase_contrast (three channels)."""

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

    dataset_args: dict[str, Any] = field(default_factory=dict)
    """Options of a dataset of your own, by name."""

    cache_dir: str | None = None
    """Where converted datasets go; null: dataset_path, or where that is read-only the user's cache folder."""

    convert: bool = True
    """Convert a published dataset on first use; false: refuse one that has not been converted."""

    switch_to_canon: bool = True
    """Read canonical networks; false: as stored, which in a zoo made by `scalegmn zoo canonicalize` is canonical
    too."""

    canonicalize: tuple[Literal["phase", "scale", "even_scale"], ...] = ("phase",)
    """The symmetries that canonical networks have removed: `phase` of sine layers, `scale` of relu layers, by which
    every hidden neuron's incoming weights have norm 1, or `even_scale`, by which all layers have the same size."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the training networks."""

    def __post_init__(self) -> None:
        problems = DATASETS.require(self.dataset).problems(self)
        if self.train_networks is not None and self.train_networks < 1:
            problems.append(f"data.train_networks: found {self.train_networks}, expected at least 1, or null")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def root(self) -> Path:
        """`dataset_path`."""
        return Path(self.dataset_path).expanduser()

    def file(self, given: str | None, default: str) -> Path:
        """A file of the dataset: where a setting says it is, or else under its default name in `dataset_path`."""
        return self.root / default if given is None else Path(given).expanduser()


def open_data(config: DataConfig) -> Zoo:
    """The zoo of a configuration. A dataset in another layout is converted unless it has been; a zoo is opened as it
    is, whatever `dataset` says; settings that are for another layout, such as those of a published configuration, are
    warned of.

    Raises:
        ValueError: there is none, or a file of it is missing, refused or damaged.
    """
    if is_zoo(config.root):
        for problem in unread_settings(config, FILE_SETTINGS, f"the zoo {config.root}"):
            warnings.warn(problem, UnreadSetting, stacklevel=2)
        zoo = open_zoo(config.root)
    else:
        zoo = DATASETS[config.dataset].open(config)
    return zoo if config.activation_function is None else of_activation(zoo, config.activation_function)


def of_activation(zoo: Zoo, name: str) -> Zoo:
    """The networks of a zoo whose hidden layers all have one activation. A zoo that has others too is copied into
    memory.

    Args:
        zoo: the zoo.
        name: the activation.

    Raises:
        ValueError: no network has it.
    """
    activations = [hidden_activation(params) for params in zoo.nets]
    chosen = torch.from_numpy(np.concatenate(activations) == name)
    if not chosen.any():
        names = sorted({*np.concatenate(activations).tolist()} - {SEVERAL})
        expected = f"one of {', '.join(names)}" if names else "null, since every network has several,"
        raise ValueError(f"data.activation_function: found {name}, expected {expected} as in {zoo.path}")
    if chosen.all():
        return zoo
    kept = []
    for params, activation in zip(zoo.nets, activations, strict=True):
        rows = torch.from_numpy(activation == name)
        if rows.any():
            of_name = params[rows]
            kept.append(of_name.replace(spec=params.spec.with_activation(name), activation=None))
    place = chosen.cumsum(0) - 1
    splits = {split: place[rows[chosen[rows]]] for split, rows in zoo.splits.items()}
    return replace(zoo, nets=tuple(kept), columns={key: c[chosen] for key, c in zoo.columns.items()}, splits=splits)


def hidden_activation(params: NetParams) -> np.ndarray:
    """The name of the activation that all hidden layers of a network have, [B]; `SEVERAL` for networks with several."""
    fixed = [layer.activation for layer in params.spec.layers[:-1] if layer.activation != HETERO]
    names = np.full(len(params), fixed[0] if fixed else "identity", object)
    if params.activation is not None:
        names = np.array(params.spec.activations, object)[params.activation.numpy()]
    for name in fixed:
        names = np.where(names == name, names, SEVERAL)
    return names


@dataclass(frozen=True)
class LabelledNets:
    """Some networks of a zoo and how they are read: lazily, batch by batch.

    Attributes:
        zoo: all networks, where they are stored.
        rows: [M] their numbers in the zoo, those of one architecture together.
        labels: [M].
        removed: the symmetries to remove from each batch.
        orbit: None; or a seed: networks are first moved by random permutations and scalars of their neurons
            (`GroupElement.sample`) and half-turns of sine neurons (`PhaseShift.sample`), which do not change what they
            compute.
    """

    zoo: Zoo
    rows: Tensor
    labels: Tensor
    removed: tuple[str, ...]
    orbit: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: slice | Tensor, device: torch.device | str = "cpu") -> NetParams | MultiArchBatch:
        """Some of the networks on a device, in single or double precision, without the symmetries `removed`."""
        parts, removed = [in_single(part.to(device)) for part in self.zoo.take(self.rows[index]).parts], self.removed
        if self.orbit is not None:
            generator = torch.Generator().manual_seed(self.orbit)
            parts = [GroupElement.sample(part, generator).act(part) for part in parts]
            parts = [PhaseShift.sample(part, generator).act(part) for part in parts]
            removed = (*self.zoo.canonical, *removed)  # which stored networks no longer have
        return MultiArchBatch.of(canonicalize(part, removed) for part in parts)

    def grouped(self, index: Tensor) -> Tensor:
        """The same numbers of networks, [B], ordered so that those of one architecture stand together."""
        return index[self.zoo.architecture(self.rows[index]).argsort(stable=True)]

    def batches(
        self, batches: Sequence[Tensor] | int = BLOCK, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[NetParams | MultiArchBatch, Tensor]]:
        """Batches of networks and labels on a device. Several batches are read at once where all have one architecture.

        Args:
            batches: the numbers [B] of the networks in each batch; or the size of a batch, to read all in order.
            device: where networks and labels go.
        """
        of_batches = list(torch.arange(len(self)).split(batches) if isinstance(batches, int) else batches)
        at_once = max(1, BLOCK // len(of_batches[0])) if of_batches and len(self.zoo.nets) == 1 else 1
        for first in range(0, len(of_batches), at_once):
            read_together = of_batches[first : first + at_once]
            index, start = torch.cat(read_together), 0
            params, labels = self.read(index, device), self.labels[index].to(device)
            for batch in read_together:
                rows = slice(start, start := start + len(batch))
                yield params[rows], labels[rows]


def augmented(
    config: DataConfig, params: NetParams | MultiArchBatch, target: Tensor, generator: torch.Generator
) -> tuple[NetParams | MultiArchBatch, Tensor]:
    """A batch with the random changes of `config.augment`; made canonical again if networks are read as canonical."""
    if config.augment == AugmentConfig():
        return params, target
    targets = target.split([len(part) for part in params.parts])
    pairs = [augment(config.augment, *pair, generator) for pair in zip(params.parts, targets, strict=True)]
    removed = config.canonicalize if config.switch_to_canon else ()
    return MultiArchBatch.of(canonicalize(part, removed) for part, _ in pairs), torch.cat(
        [of_part for _, of_part in pairs]
    )


def symmetries_to_remove(config: DataConfig, zoo: Zoo) -> tuple[str, ...]:
    """The symmetries to remove from networks when they are read: those that are wanted, that activations have, and that
    the stored networks still have. So a canonical zoo is read bit by bit as it is stored."""
    activations = {layer.activation for params in zoo.nets for layer in params.spec.layers[:-1]}
    with_scales = {name for name in activations if name == HETERO or ACTIVATIONS[name].group.scales}
    activations_with = {"phase": {"sine", HETERO}, "scale": with_scales, "even_scale": with_scales}
    wanted = config.canonicalize if config.switch_to_canon else ()
    return tuple(name for name in wanted if name not in zoo.canonical and activations_with[name] & activations)


def reading(config: DataConfig, zoo: Zoo) -> str:
    """How the zoo's networks are read, in words: as canonical ones, or as they are stored."""
    removed = symmetries_to_remove(config, zoo)
    if removed or (config.switch_to_canon and config.canonicalize and zoo.canonical):
        return f"canonical ({', '.join((*zoo.canonical, *removed))})"
    return "as stored" + (f" (canonical: {', '.join(zoo.canonical)})" if zoo.canonical else "")


def load_splits(
    config: DataConfig, column: str | None = None, limit: int | None = None
) -> tuple[Zoo, dict[str, LabelledNets]]:
    """The zoo and its splits with a column as labels.

    Args:
        config: the zoo, and how its networks are read.
        column: the column that the labels come from; None: the networks' numbers.
        limit: the largest number of networks per split; None: all.

    Raises:
        ValueError: the zoo cannot be read, lacks the column or a split, or its networks cannot be augmented or made
            canonical so.
    """
    zoo = open_data(config)
    if column is not None and column not in zoo.columns:
        found = f"no column {column!r}, found {', '.join(zoo.columns) or 'none'}"
        remedy = MADE_BY.get(column, "choose a zoo that has it")
        raise ValueError(f"data.dataset_path: {zoo.path}: {found}; {remedy}")
    missing = [name for name in ("train", "val", "test") if not len(zoo.splits.get(name, ()))]
    if missing:
        raise ValueError(f"{zoo.path}: no networks in split {', '.join(missing)}; make a larger zoo")
    if config.augment.mixup and len(zoo.nets) > 1:
        found = f"found {config.augment.mixup}, expected 0 for networks of several architectures"
        raise ValueError(f"data.augment.mixup: {found}, which cannot be mixed, as in {zoo.path}")
    for params in zoo.nets:
        check_augment(config.augment, params.spec)
    removed = symmetries_to_remove(config, zoo)
    for params in zoo.nets:
        canonicalize(params[:1], removed)  # refused here, not in the first batch
    names = {name.removeprefix("even_") for name in config.canonicalize if config.switch_to_canon}
    undone = [name for name in config.augment.group if name in names]
    if undone:
        remedy = "use --data.switch_to_canon False or leave it out"
        raise ValueError(f"data.augment.group: {undone[0]} is removed again from networks read as canonical; {remedy}")
    splits = {}
    for name, rows in zoo.splits.items():
        if name == "train" and config.train_networks is not None:
            rows = _some(rows, config.train_networks, zoo)
        rows = rows[:limit]
        rows = rows[zoo.architecture(rows).argsort(stable=True)]
        splits[name] = LabelledNets(zoo, rows, rows if column is None else zoo.columns[column][rows], removed)
    return zoo, splits


def _some(rows: Tensor, number: int, zoo: Zoo) -> Tensor:
    """So many of the training networks, at random but always the same: a smaller number gives some of a larger's.

    Raises:
        ValueError: there are fewer.
    """
    if number > len(rows):
        raise ValueError(f"data.train_networks: found {number:,}, expected at most {len(rows):,}, as in {zoo.path}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[:number].sort().values]
