"""What the training loop needs to know of a task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """A task: its batches, its loss, its metrics. A batch is (NetParams, target).

    Attributes:
        monitor: the metric of the validation split that selects the model.
        maximize: whether larger is better.
        steps_per_epoch: batches per epoch.
    """

    monitor: str
    maximize: bool
    steps_per_epoch: int

    def prepare(self, model: nn.Module) -> None:
        """Sets what the model takes from the training split, such as its input normalisation."""
        ...

    def train_batches(self, generator: torch.Generator, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
        """One epoch of shuffled training batches on a device."""
        ...

    def loss(self, model: nn.Module, inputs: Any, target: Tensor) -> Tensor:
        """The mean over networks of each one's own loss, a scalar: batches are passed in parts."""
        ...

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Metrics over the whole split, `loss` and `monitor` among them; PNG figures into the folder `figures`."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the data are, for the run's summary."""
        ...
