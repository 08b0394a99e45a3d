"""What the tasks on a zoo's networks have in common."""

from __future__ import annotations

import math
from typing import Any

from scalegmn.data.loader import DataConfig, load_splits, reading
from scalegmn.models.base import Metanetwork
from scalegmn.spec import NetSpec

DEBUG_NETWORKS = 16
"""Networks per split in a debug run."""


class ZooTask:
    """The networks of a zoo and one of its columns, in batches.

    Args:
        data: which zoo, canonical or not.
        column: the column that targets come from.
        batch_size: networks per batch.
        debug: use only a few networks per split.

    Raises:
        ValueError: the zoo cannot be read.
    """

    def __init__(self, data: DataConfig, column: str, batch_size: int, debug: bool) -> None:
        self.zoo, self.splits = load_splits(data, column, DEBUG_NETWORKS if debug else None)
        self.data, self.batch_size = data, batch_size
        self.steps_per_epoch = math.ceil(len(self.splits["train"]) / batch_size)

    def announce(self) -> None:
        """Prints what is read, and how."""
        sizes = ", ".join(f"{len(nets):,} {name}" for name, nets in self.splits.items())
        print(f"{self.zoo.path}: {sizes} networks, {self.spec}, {reading(self.data, self.zoo)}")

    @property
    def spec(self) -> NetSpec:
        """The zoo's networks."""
        return self.zoo.spec

    def prepare(self, model: Metanetwork) -> None:
        """Input normalisation from the training split, for models that have it."""
        model.fit_normalization(params for params, _ in self.splits["train"].batches())

    def identity(self) -> dict[str, Any]:
        """Which zoo was read, and how."""
        return {
            "zoo": str(self.zoo.path),
            "sha256": self.zoo.sha256,
            "read": reading(self.data, self.zoo),
            "networks": {name: len(nets) for name, nets in self.splits.items()},
            "spec": self.spec.to_dict(),
        }
