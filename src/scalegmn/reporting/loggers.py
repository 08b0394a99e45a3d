"""Loggers that every run has: a table on stdout, metrics.jsonl, metrics.csv."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalegmn.reporting.files import write_atomic
from scalegmn.reporting.rows import read_rows, write_csv


class Logger:
    """A destination of a run's metrics. Subclasses override the methods in which they do something."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Called before the first row.

        Args:
            folder: of the run.
            config: the complete configuration, in plain types.
        """

    def log(self, row: Mapping[str, Any]) -> None:
        """Called with the row of an epoch: name -> number."""

    def rewind(self, num_epochs: int) -> None:
        """Removes the rows after the first `num_epochs`: these epochs will be logged again."""

    def finish(self, summary: Mapping[str, Any], figures: Sequence[Path]) -> None:
        """Called after the last row, with the run's summary and the paths of its PNG figures."""


class Console(Logger):
    """A table on stdout; the names in the first row give the widths of its columns."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Prints nothing: the first row gives the header."""
        self._widths: dict[str, int] = {}

    def log(self, row: Mapping[str, Any]) -> None:
        """Prints epoch, losses, metrics and speed, and a header above the first row."""
        if not self._widths:
            shown = [name for name in row if name.startswith(("epoch", "train_", "val_", "networks_per_"))]
            self._widths = {name: max(len(name), 6) for name in shown}
            print("  ".join(f"{name:>{width}}" for name, width in self._widths.items()))
        cells = ((row.get(name, ""), width) for name, width in self._widths.items())
        print("  ".join(f"{_short(value):>{width}}" for value, width in cells), flush=True)


def _short(value: Any) -> str:
    """A number in few digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}"
    return str(value)


class JsonLines(Logger):
    """metrics.jsonl, one line per row."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Creates the file if it does not exist."""
        self._path = folder / "metrics.jsonl"
        self._path.touch()

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends a line."""
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, num_epochs: int) -> None:
        """Keeps the first `num_epochs` lines."""
        write_atomic(self._path, "".join(self._path.read_text().splitlines(keepends=True)[:num_epochs]))


class Csv(Logger):
    """metrics.csv, a copy of metrics.jsonl for spreadsheets; each row rewrites it, because a row may add columns."""

    def start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Writes nothing: the first row gives the columns."""
        self._folder = folder

    def log(self, row: Mapping[str, Any]) -> None:
        """Copies all rows, after `JsonLines` has added this one."""
        write_csv(self._folder / "metrics.csv", read_rows(self._folder / "metrics.jsonl"))
