"""Runs as separate processes: how they are started, watched and ended."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scalegmn.tasks import TASKS

POLL_SECONDS = 0.2
"""Between two looks at a process."""

RESERVED_KEYS = ("run_dir", "resume", "seeds", "dry_run", "checkpoint")
"""Settings that sweeps and comparisons make themselves, or with which a script does more or less than one run."""

PUBLISHED_SCRIPTS = {
    "inr_classification.py": "classification",
    "inr_editing.py": "editing",
    "predicting_generalization.py": "generalization",
}
"""Published script -> the task that it trains."""


def program(script: str) -> list[str]:
    """The words after `python` that start a script: its file or, where there is none, `scalegmn train TASK`.

    Args:
        script: a file, the name of a published script, or a task.

    Raises:
        ValueError: it is none of them.
    """
    if Path(script).is_file():
        return [script]
    task = PUBLISHED_SCRIPTS.get(script, script)
    if task not in TASKS:
        raise ValueError(f"script: {script}: no such file, and no task; tasks are {', '.join(TASKS)}")
    return ["-m", "scalegmn", "train", task]


def words(files: Sequence[str], settings: Mapping[str, Any], imports: Sequence[str] = ()) -> list[str]:
    """Modules to import, configuration files, and settings by dotted key, as words of a command line."""
    modules = [f"--import={module}" for module in imports]
    options = [f"--{key}={word(value)}" for key, value in settings.items()]
    return [*modules, *(f"--conf={file}" for file in files), *options]


def word(value: Any) -> str:
    """A value as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def started(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A process that ends with the block; and, on Linux, with this process, however that ends.

    Args:
        command: what follows `python`.
        log: file for its output and errors, in the order of printing.
        environment: variables in place of this process's.
    """
    before = None
    if sys.platform == "linux":
        before = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            preexec_fn=before,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def last_line(text: str) -> str:
    """The last line of an output, in which errors are."""
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "no output"


@contextmanager
def only_here(folder: Path, what: str) -> Iterator[None]:
    """Makes the folder and keeps other processes from working there at the same time.

    Raises:
        ValueError: another process is; `what` it runs is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"{folder}: another process runs this {what}") from None
