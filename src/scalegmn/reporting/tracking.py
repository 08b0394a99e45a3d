"""Loggers for experiment trackers: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scalegmn.reporting.loggers import Logger


@dataclass(frozen=True)
class WandbConfig:
    """Place of a run in Weights & Biases; used only with `--wandb True`."""

    project: str = "scalegmn"
    """Name of the wandb project."""

    entity: str | None = None
    """User or team; null: your default."""

    group: str | None = None
    """Group that the run belongs to."""

    name: str | None = None
    """Name of the run; null: the last two parts of the run folder's path."""

    tags: tuple[str, ...] = ()
    """Tags of the run."""


class TensorBoard(Logger):
    """Event files in the folder `tensorboard`: `tensorboard --logdir runs` displays all runs.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(_missing("tensorboard")) from None
        self._open = SummaryWriter

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Opens an event file, and writes the configuration as text."""
        self._folder, self._config = str(folder / "tensorboard"), f"```\n{json.dumps(config, indent=2)}\n```"
        self._begin(None)

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes a scalar per number, at the row's epoch."""
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def rewind(self, num_epochs: int) -> None:
        """Opens another event file, which hides the later epochs of the files before it."""
        self._writer.close()
        self._begin(num_epochs)

    def _begin(self, purge_step: int | None) -> None:
        self._writer = self._open(self._folder, purge_step=purge_step)
        self._writer.add_text("config", self._config)

    def finish(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Writes the summary's numbers as `final/<name>`, and the figures."""
        for name, value in summary.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"final/{name}", value)
        for path in figures:
            image = np.asarray(Image.open(path).convert("RGB"))
            self._writer.add_image(f"figures/{path.stem}", image, dataformats="HWC")
        self._writer.close()


class Wandb(Logger):
    """Weights & Biases.

    Args:
        config: project, name, ...

    Raises:
        ValueError: wandb is not installed, or refuses to start.
    """

    def __init__(self, config: WandbConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(_missing("wandb")) from None
        self._wandb, self._config = wandb, config

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begins a wandb run with its files in the run folder, or goes on with the run whose files are there."""
        name = self._config.name or "/".join(folder.parts[-2:])
        ids = [path.name.rpartition("-")[2] for path in folder.glob("wandb/*run-*")]
        options = {**asdict(self._config), "name": name, "tags": list(self._config.tags), "resume": "allow"}
        options |= {"id": ids[0]} if ids else {}
        try:
            self._run = self._wandb.init(dir=str(folder), config=dict(config), **options)
        except self._wandb.errors.Error as error:
            remedy = "`wandb login`, or set WANDB_MODE=offline, or leave --wandb False"
            raise ValueError(f"wandb: {error}; {remedy}") from None

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends a row; wandb ignores an epoch that was sent before the run stopped."""
        self._run.log(dict(row), step=row["epoch"])

    def finish(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Sends the figures, and the summary as `final/<name>`."""
        self._run.log({f"figures/{path.stem}": self._wandb.Image(str(path)) for path in figures})
        self._run.summary.update({f"final/{name}": value for name, value in summary.items()})
        self._run.finish()


def _missing(package: str) -> str:
    """The error about a package that is not installed."""
    return f"{package}: not installed; `pip install {package}` or leave --{package} False"
