"""Batches of networks with their labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scalegmn.data.zoo_format import Zoo, open_zoo
from scalegmn.spec import NetParams
from scalegmn.symmetry.canonicalize import canonicalize


@dataclass(frozen=True)
class DataConfig:
    """The networks to learn from."""

    dataset_path: str = "data/digits_inr"
    """Folder of the zoo, as made by `python -m scalegmn.zoos`."""

    switch_to_canon: bool = True
    """Read canonical networks; false: as stored, which in a zoo made by `python -m scalegmn.canonicalize` is canonical
    too."""

    canonicalize: tuple[Literal["phase", "scale"], ...] = ("phase",)
    """The symmetries that canonical networks have removed: `phase` of sine layers, `scale` of relu layers."""


@dataclass(frozen=True)
class LabelledNets:
    """One split of a zoo in memory.

    Attributes:
        params: M networks.
        labels: [M].
    """

    params: NetParams
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[NetParams, Tensor]]:
        """Batches in order, or shuffled by `generator`; the last may be smaller. A batch is an indexed read."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in order.split(batch_size):
            yield self.params[rows], self.labels[rows]


def symmetries_to_remove(config: DataConfig, zoo: Zoo) -> tuple[str, ...]:
    """What is left to do when the zoo is read, so that canonical copies are read to the bit as they are stored."""
    return tuple(name for name in config.canonicalize if config.switch_to_canon and name not in zoo.canonical)


def reading(config: DataConfig, zoo: Zoo) -> str:
    """In words, how the zoo's networks are read: without which symmetries, or as they are stored."""
    if config.switch_to_canon and config.canonicalize:
        return f"canonical ({', '.join((*zoo.canonical, *symmetries_to_remove(config, zoo)))})"
    return "as stored" + (f" (canonical: {', '.join(zoo.canonical)})" if zoo.canonical else "")


def load_splits(config: DataConfig, column: str, limit: int | None = None) -> tuple[Zoo, dict[str, LabelledNets]]:
    """The zoo and its splits with a column as labels.

    Args:
        config: which zoo, canonical or not.
        column: the column that the labels come from.
        limit: at most so many networks per split.

    Raises:
        ValueError: the zoo cannot be read, or lacks the column or a split.
    """
    zoo = open_zoo(Path(config.dataset_path))
    if column not in zoo.columns:
        raise ValueError(f"{zoo.path}: no column {column!r}, found {', '.join(zoo.columns)}")
    missing = [name for name in ("train", "val", "test") if not len(zoo.splits.get(name, ()))]
    if missing:
        raise ValueError(f"{zoo.path}: no networks in split {', '.join(missing)}; make a larger zoo")
    splits = {}
    for name, rows in zoo.splits.items():
        rows = rows[:limit]
        params = canonicalize(zoo.params[rows], symmetries_to_remove(config, zoo))
        splits[name] = LabelledNets(params, zoo.columns[column][rows])
    return zoo, splits
