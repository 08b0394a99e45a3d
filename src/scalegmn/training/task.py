"""What the training loop needs to know of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """A task: its batches, its loss, its metrics. A batch is (NetParams, target)."""

    @property
    def monitor(self) -> str:
        """The metric of the validation split that selects the model."""
        ...

    @property
    def maximize(self) -> bool:
        """Whether a larger metric is better."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        ...

    @property
    def data_id(self) -> str:
        """The name of the data; a run is resumed only with the same data."""
        ...

    def prepare(self, model: Any) -> None:
        """Sets what the model takes from the training split, such as its input normalisation."""
        ...

    def shuffle(self, generator: torch.Generator) -> Sequence[Tensor]:
        """One epoch: the rows of the training split, [B] per batch, in an order that `generator` draws."""
        ...

    def train_batches(
        self, batches: Sequence[Tensor], generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[Any, Tensor]]:
        """The batches of these rows on a device, augmented; `generator` is drawn from only as each one is asked for."""
        ...

    def loss(self, model: nn.Module, inputs: Any, target: Tensor) -> Tensor:
        """The mean over networks of each one's own loss, a scalar: batches are passed in parts."""
        ...

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Metrics over the whole split, `loss` and `monitor` among them; PNG figures into the folder `figures`.

        Where several processes train, all of them call it, share the work, and get the same.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """What the data are, for the run's summary."""
        ...
