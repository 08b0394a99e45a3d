"""What the tasks on a zoo's networks have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork
from scalegmn.networks import MultiArchBatch, NetParams, NetSpec
from scalegmn.zoos.loader import DataConfig, augmented, load_splits, reading, symmetries_to_remove

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

    name: ClassVar[str]
    """What a run's summary calls the task."""

    def __init__(self, data: DataConfig, column: str, batch_size: int, debug: bool) -> None:
        self.zoo, self.splits = load_splits(data, column, DEBUG_NETWORKS if debug else None)
        self.data, self.batch_size = data, batch_size
        self.steps_per_epoch = math.ceil(len(self.splits["train"]) / batch_size)

    def announce(self) -> None:
        """Prints what is read, and how."""
        sizes = ", ".join(f"{len(nets):,} {name}" for name, nets in self.splits.items())
        num, covering = len(self.architectures), NetSpec.envelope(self.architectures)
        kinds = str(covering) if num == 1 else f"{num:,} architectures within {covering}"
        print(f"{self.zoo.path}: {sizes} networks, {kinds}, {reading(self.data, self.zoo)}")

    @property
    def spec(self) -> NetSpec:
        """The architecture of the zoo's networks; raises ValueError when there are several."""
        return self.zoo.spec

    @property
    def architectures(self) -> dict[NetSpec, int]:
        """The zoo's architectures, and how many training networks have them."""
        return self.zoo.architectures

    def prepare(self, model: Metanetwork) -> None:
        """Input normalisation from the training split, for models that have it."""
        model.fit_normalization(part for params, _ in self.splits["train"].batches() for part in params.parts)

    @property
    def data_id(self) -> str:
        """The zoo's checksum."""
        return self.zoo.sha256

    def shuffle(self, generator: torch.Generator) -> Sequence[Tensor]:
        """One epoch: the rows of the training split in each batch, [B]; the last may be smaller."""
        nets = self.splits["train"]
        return [nets.grouped(rows) for rows in torch.randperm(len(nets), generator=generator).split(self.batch_size)]

    def target(self, labels: Tensor) -> Tensor:
        """What the loss compares with, [B, ...], of a batch's labels [B]."""
        return labels

    def train_batches(
        self, batches: Sequence[Tensor], generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[NetParams | MultiArchBatch, Tensor]]:
        """Training batches (networks, targets) of these rows on a device, augmented."""
        for params, labels in self.splits["train"].batches(batches, device):
            yield augmented(self.data, params, self.target(labels), generator)

    @torch.no_grad()
    def per_network(
        self,
        model: nn.Module,
        split: str,
        device: torch.device,
        measure: Callable[[NetParams | MultiArchBatch, Tensor], Tensor],
    ) -> Tensor:
        """`measure` of the networks and labels of a split, [M, ...] on the CPU, in batches, the model evaluating.

        Processes that train together share the batches and get the same result, that of a single process.
        """
        model.eval()
        batches, rank, world_size = torch.arange(len(self.splits[split])).split(self.batch_size), 0, 1
        together = torch.distributed.is_initialized()
        if together:
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        first, last = (len(batches) * end // world_size for end in (rank, rank + 1))
        found = [measure(*batch).cpu() for batch in self.splits[split].batches(batches[first:last], device)]
        shares = [found]
        if together:
            shares = [None] * world_size
            torch.distributed.all_gather_object(shares, found)
        return torch.cat([part for share in shares for part in share])

    def identity(self) -> dict[str, Any]:
        """Which task it is, which zoo was read, and how: `canonical`, the symmetries that its networks had removed;
        `spec` covers all its architectures."""
        return {
            "task": self.name,
            "zoo": str(self.zoo.path),
            "sha256": self.zoo.sha256,
            "read": reading(self.data, self.zoo),
            "canonical": [*self.zoo.canonical, *symmetries_to_remove(self.data, self.zoo)],
            "networks": {name: len(nets) for name, nets in self.splits.items()},
            "architectures": len(self.architectures),
            "spec": NetSpec.envelope(self.architectures).to_dict(),
        }
