"""The folder of a run: configuration, metrics, checkpoints, figures, summary."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scalegmn.reporting.files import git_commit, versions, write_atomic, write_json
from scalegmn.reporting.loggers import Console, Csv, JsonLines, Logger
from scalegmn.reporting.rows import read_rows

STATES = "checkpoints/state-*.safetensors"
"""Files of states that an unfinished run can go on from, in its folder."""

RUN_FILES = ("config.yml", "metrics.jsonl", "metrics.csv", "checkpoints", "figures", "tensorboard", "wandb")
"""Files and folders of a run, which a run that begins anew removes."""


class Run:
    """The folder of a run.

    `config.yml` (complete), `metrics.jsonl` and `metrics.csv` (one line per epoch), `summary.json` (written last: a
    folder that has it is finished), `checkpoints/`, `figures/`.

    Args:
        folder: created if it does not exist, and begun anew if it holds an unfinished run without a state.
        config: the complete configuration, as YAML text and as plain types.
        loggers: destinations of metrics besides stdout and these files.
        resume: keeps the state of an unfinished run, to go on from it.

    Raises:
        ValueError: the folder holds a finished run, an unfinished run whose state would be lost, or files of something
            else; another process is training in it; or it cannot be written.
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
        if not has_state and not (folder / ".lock").exists():  # each run has one until it is finished
            foreign = [name for name in RUN_FILES if (folder / name).exists()]
            if foreign:
                raise ValueError(f"{folder} holds {', '.join(foreign)} of something else; choose another --run_dir")
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
            for name in RUN_FILES:  # of an unfinished run
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
        """Gives the metrics of an epoch to all loggers."""
        for logger in self._loggers:
            logger.log(row)

    def rewind(self, num_epochs: int) -> None:
        """Removes what was logged after the first `num_epochs` epochs, to log it again."""
        for logger in self._loggers:
            logger.rewind(num_epochs)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return read_rows(self.folder / "metrics.jsonl")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, with versions and git commit, which marks the run as finished, and ends the loggers."""
        write_json(self.folder / "summary.json", {**summary, "versions": versions(), "git_commit": self._commit})
        (self.folder / ".lock").unlink(missing_ok=True)
        self._lock.release(force=True)
        figures = sorted((self.folder / "figures").glob("*.png"))
        for logger in self._loggers:
            logger.finish(summary, figures)
