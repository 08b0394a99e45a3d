"""Runs of the scripts as processes of their own: how they are started, watched and ended."""

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

POLL_SECONDS = 0.2
"""Between two looks at a process."""

OUR_KEYS = ("run_dir", "resume", "seeds", "dry_run", "checkpoint")
"""What whoever starts runs says to the script itself, or what makes no single run of it."""


def words(files: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Configuration files and settings by dotted key, on the command line."""
    return [*(f"--conf={file}" for file in files), *(f"--{key}={word(value)}" for key, value in settings.items())]


def word(value: Any) -> str:
    """A value on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def started(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A process that ends with the block; and, on Linux, with this process, however that ends.

    Args:
        command: what follows `python`.
        log: file for what it prints, errors too, in the order of printing.
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
