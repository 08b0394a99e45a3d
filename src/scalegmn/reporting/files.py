"""Files that are written completely or not at all; versions and commit of the software that wrote them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new content (temporary file, fsync, rename)."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")  # other processes may be writing the same file
    with removed_on_failure(temporary, path):
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def removed_on_failure(path: Path, target: Path | None = None) -> Iterator[None]:
    """Removes a file or folder when the block fails; an OSError is raised again with its name and a remedy.

    Args:
        path: what is removed.
        target: what it becomes, for messages; None: `path`.
    """
    named = target or path
    try:
        yield
    except BaseException as error:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "free space, or choose another folder" if full else "choose another folder"
            raise OSError(f"{named.parent}: {named.name} cannot be written ({error.strerror}); {advice}") from None
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON, atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    installed = {"python": sys.version.split()[0]}
    for name in ("scalegmn", "torch", "lightning", "numpy", "safetensors"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def git_commit() -> str | None:
    """The commit of the source tree, with `-dirty` if it has changes; None outside a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts `net_2` before `net_10`."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
