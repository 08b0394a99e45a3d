"""Run folders, metrics and messages: what a run leaves for people to look at."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from scalegmn.reporting.files import git_commit, versions, write_atomic, write_json

STATES = "checkpoints/state-*.safetensors"
"""What an unfinished run can go on from, in its folder."""

OURS = ("config.yml", "metrics.jsonl", "metrics.csv", "checkpoints", "figures", "tensorboard", "wandb")
"""What a run that begins removes from its folder."""


@dataclass(frozen=True)
class WandbConfig:
    """Where a run goes in Weights & Biases; read only with `--wandb True`."""

    project: str = "scalegmn"
    """Name of the wandb project."""

    entity: str | None = None
    """User or team; null: your default."""

    group: str | None = None
    """Group that the run belongs to."""

    name: str | None = None
    """Name of the run; null: the last two parts of the run folder's."""

    tags: tuple[str, ...] = ()
    """Tags of the run."""


class Logger:
    """Where a run's metrics go besides the others; a method that has nothing to do stays as it is."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Before the first row.

        Args:
            folder: the run's.
            config: the complete configuration, in plain types.
        """

    def log(self, row: Mapping[str, Any]) -> None:
        """One epoch: name -> number."""

    def rewind(self, num_epochs: int) -> None:
        """Forgets the rows after so many epochs, which will come again."""

    def finish(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """After the last row, with the run's summary and its PNG figures."""


class Console(Logger):
    """A table on stdout, as wide as the first row's names."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """No header until there is a row."""
        self._widths: dict[str, int] = {}

    def log(self, row: Mapping[str, Any]) -> None:
        """Epoch, losses, metrics and speed; the header above the first."""
        if not self._widths:
            shown = [name for name in row if name.startswith(("epoch", "train_", "val_", "networks_per_"))]
            self._widths = {name: max(len(name), 6) for name in shown}
            print("  ".join(f"{name:>{width}}" for name, width in self._widths.items()))
        cells = ((row.get(name, ""), width) for name, width in self._widths.items())
        print("  ".join(f"{_short(value):>{width}}" for value, width in cells), flush=True)


def _short(value: Any) -> str:
    """A number in a few digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}"
    return str(value)


class JsonLines(Logger):
    """metrics.jsonl, one line per row."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Makes the file where there is none."""
        self._path = folder / "metrics.jsonl"
        self._path.touch()

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends a line."""
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, num_epochs: int) -> None:
        """Keeps so many lines."""
        write_atomic(self._path, "".join(self._path.read_text().splitlines(keepends=True)[:num_epochs]))


class Csv(Logger):
    """metrics.csv, a copy of metrics.jsonl for spreadsheets, written anew with each row: it may have new columns."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Nothing is written until there is a row."""
        self._folder = folder

    def log(self, row: Mapping[str, Any]) -> None:
        """Copies all rows, after `JsonLines` has added this one."""
        write_csv(self._folder / "metrics.csv", read_rows(self._folder / "metrics.jsonl"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, without a last line that is still being written."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """NodeContext as CSV, written atomically: columns in the order of first appearance, empty where a row has none."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


class TensorBoard(Logger):
    """Event files in the folder `tensorboard`: `tensorboard --logdir runs` shows all runs.

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
        """Opens an event file, with the configuration as text."""
        self._folder, self._config = str(folder / "tensorboard"), f"```\n{json.dumps(config, indent=2)}\n```"
        self._begin(None)

    def log(self, row: Mapping[str, Any]) -> None:
        """A scalar per number, at the row's epoch."""
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def rewind(self, num_epochs: int) -> None:
        """Opens another event file, which hides later epochs of those before it."""
        self._writer.close()
        self._begin(num_epochs)

    def _begin(self, purge_step: int | None) -> None:
        self._writer = self._open(self._folder, purge_step=purge_step)
        self._writer.add_text("config", self._config)

    def finish(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """The summary's numbers as `final/<name>`, and the figures."""
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
        where: project, name, ...

    Raises:
        ValueError: wandb is not installed, or refuses to start.
    """

    def __init__(self, where: WandbConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(_missing("wandb")) from None
        self._wandb, self._where = wandb, where

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begins a wandb run that keeps its files in the run folder, or goes on with the one that has files there."""
        name = self._where.name or "/".join(folder.parts[-2:])
        before = [path.name.rpartition("-")[2] for path in folder.glob("wandb/*run-*")]
        options = {**asdict(self._where), "name": name, "tags": list(self._where.tags), "resume": "allow"}
        options |= {"id": before[0]} if before else {}
        try:
            self._run = self._wandb.init(dir=str(folder), config=dict(config), **options)
        except self._wandb.errors.Error as error:
            remedy = "`wandb login`, or set WANDB_MODE=offline, or leave --wandb False"
            raise ValueError(f"wandb: {error}; {remedy}") from None

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends a row, unless its epoch was sent before the run stopped."""
        self._run.log(dict(row), step=row["epoch"])

    def finish(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Sends the figures, and the summary as `final/<name>`."""
        self._run.log({f"figures/{path.stem}": self._wandb.Image(str(path)) for path in figures})
        self._run.summary.update({f"final/{name}": value for name, value in summary.items()})
        self._run.finish()


def _missing(package: str) -> str:
    """What to do about a package that is wanted and not installed."""
    return f"{package}: not installed; `pip install {package}` or leave --{package} False"


class Run:
    """One run's folder.

    `config.yml` (complete), `metrics.jsonl` and `metrics.csv` (one line per epoch), `summary.json` (written last: a
    folder that has it is finished), `checkpoints/`, `figures/`.

    Args:
        folder: where results go; made when missing, begun anew when it holds an unfinished run without a state.
        config: the complete configuration, as YAML text and as plain types.
        loggers: where metrics go besides stdout and these files.
        resume: keep an unfinished run's state, to go on from it.

    Raises:
        ValueError: the folder holds a finished run, or an unfinished one whose state would be lost, or another process
            is training in it, or files of something else are there, or it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config_yaml: str,
        config: Mapping[str, Any],
        loggers: Sequence[Logger] = (),
        resume: bool = False,
    ) -> None:
        if (folder / "summary.json").exists():
            raise ValueError(f"{folder} holds a finished run, which is never overwritten; choose another --run_dir")
        has_state = any(folder.glob(STATES))
        if has_state and not resume:
            remedy = f"go on with --resume {folder}, or choose another --run_dir"
            raise ValueError(f"{folder} holds an unfinished run; {remedy}")
        if not has_state and not (folder / ".lock").exists():  # which each run has until it is finished
            others = [name for name in OURS if (folder / name).exists()]
            if others:
                raise ValueError(f"{folder} holds {', '.join(others)} of something else; choose another --run_dir")
        self._lock = FileLock(folder / ".lock", is_singleton=True)  # the system frees it when the process dies
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{folder}: another process is training there") from None
        except OSError as error:
            raise ValueError(f"--run_dir: {folder} cannot be written ({error.strerror}); choose another") from None
        self.folder = folder
        self._commit = git_commit()
        if not has_state:
            for name in OURS:  # of an unfinished run
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "figures"):
                (folder / name).mkdir()
            write_atomic(folder / "config.yml", config_yaml)
        for path in [*folder.glob("*.tmp"), *folder.glob("checkpoints/*.tmp")]:  # of a process that was killed
            path.unlink()
        self._loggers = [Console(), JsonLines(), Csv(), *loggers]
        for logger in self._loggers:
            logger.start(folder, config)

    def log(self, row: Mapping[str, Any]) -> None:
        """One epoch's metrics, to all loggers."""
        for logger in self._loggers:
            logger.log(row)

    def rewind(self, num_epochs: int) -> None:
        """Forgets what was logged after so many epochs, to log it again."""
        for logger in self._loggers:
            logger.rewind(num_epochs)

    def metrics(self) -> list[dict[str, Any]]:
        """What has been logged so far."""
        return read_rows(self.folder / "metrics.jsonl")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, with versions and git commit, which marks the run as finished; tells the loggers."""
        write_json(self.folder / "summary.json", {**summary, "versions": versions(), "git_commit": self._commit})
        (self.folder / ".lock").unlink(missing_ok=True)
        self._lock.release(force=True)
        figures = sorted((self.folder / "figures").glob("*.png"))
        for logger in self._loggers:
            logger.finish(summary, figures)
