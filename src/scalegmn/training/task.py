"""What the training loop needs of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """A task: its batches, its loss, its metrics. The loop treats a batch's inputs as opaque."""

    @property
    def monitor(self) -> str:
        """The metric of the validation split that selects the model."""
        ...

    @property
    def maximize(self) -> bool:
        """Whether a larger `monitor` is better."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch."""
        ...

    @property
    def data_id(self) -> str:
        """A checksum of the data: a run is resumed on the same data only."""
        ...

    def prepare(self, model: Any) -> None:
        """Sets the parts of the model that depend on the training split, such as its input normalisation."""
        ...

    def shuffle(self, generator: torch.Generator) -> Sequence[Tensor]:
        """One epoch: the rows of the training split in each batch, [B], in an order that `generator` draws."""
        ...

    def train_batches(
        self, batches: Sequence[Tensor], generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[Any, Tensor]]:
        """The augmented batches (inputs, target) of these rows on a device. A batch draws from `generator` only when it
        is asked for."""
        ...

    def loss(self, model: nn.Module, inputs: Any, target: Tensor) -> Tensor:
        """The mean of the networks' losses, a scalar. Networks do not interact, since a batch may be computed in
        several micro-batches."""
        ...

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Metrics over a whole split, `loss` and `monitor` among them.

        Where several processes train, all of them call this, share the work, and return the same.

        Args:
            model: the model.
            split: `train`, `val` or `test`.
            device: where the model is.
            figures: a folder to draw PNG figures into; None: draw none.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What this process carries from step to step besides the model, by name; most tasks carry nothing."""
        ...

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state` returned."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the data are, for the run's summary, in plain JSON types."""
        ...
