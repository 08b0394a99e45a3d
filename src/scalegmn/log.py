"""Run folders, metrics and messages: what a run leaves for people to look at."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

STATES = "checkpoints/state-*.safetensors"
"""What an unfinished run can go on from, in its folder."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError or OSError about the user's input into one line on stderr and exit code 2; Ctrl-C into 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is finished", file=sys.stderr)
        raise SystemExit(130) from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part (temporary file, fsync, rename)."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")  # other processes may be writing the same file
    with removed_on_failure(temporary):
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Removes a file or folder when the block fails; an OSError then names it and says what helps."""
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
            raise OSError(f"{path.parent}: {path.name} cannot be written ({error.strerror}); {advice}") from None
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`content` as indented JSON, written atomically."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": sys.version.split()[0]}
    for name in ("scalegmn", "torch", "lightning", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of the source tree, with `-dirty` when it has changes; None outside a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


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
    """Name of the run; null: the run folder's."""

    tags: tuple[str, ...] = ()
    """Tags of the run."""


class Run:
    """One run's folder.

    `config.yml` (complete), `metrics.jsonl` (one line per epoch), `summary.json` (written last: a folder that has it is
    finished), `checkpoints/`, `figures/`.

    Args:
        folder: where results go; made when missing, begun anew when it holds an unfinished run without a state.
        config: the complete configuration, as YAML text and as plain types.
        wandb: None, or where the run goes in Weights & Biases.
        resume: keep an unfinished run's state, to go on from it.

    Raises:
        ValueError: the folder holds a finished run, or an unfinished one whose state would be lost, or another process
            is training in it.
    """

    def __init__(
        self,
        folder: Path,
        config_yaml: str,
        config: Mapping[str, Any],
        wandb: WandbConfig | None,
        resume: bool = False,
    ) -> None:
        if (folder / "summary.json").exists():
            raise ValueError(f"{folder} holds a finished run, which is never overwritten; choose another --run_dir")
        has_state = any(folder.glob(STATES))
        if has_state and not resume:
            remedy = f"go on with --resume {folder}, or choose another --run_dir"
            raise ValueError(f"{folder} holds an unfinished run; {remedy}")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock", is_singleton=True)  # the system frees it when the process dies
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{folder}: another process is training there") from None
        self.folder = folder
        self._commit = git_commit()
        if not has_state:
            for name in ("checkpoints", "figures"):
                shutil.rmtree(folder / name, ignore_errors=True)  # of an unfinished run
                (folder / name).mkdir()
            write_atomic(folder / "config.yml", config_yaml)
            write_atomic(folder / "metrics.jsonl", "")
        for path in folder.glob("checkpoints/*.tmp"):  # of a process that was killed while it wrote
            path.unlink()
        self._wandb = None
        if wandb is not None:
            self._wandb = _start_wandb(folder, config, wandb)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl (and sends it to wandb)."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self._wandb is not None:
            self._wandb.log(dict(metrics))

    def rewind(self, num_epochs: int) -> None:
        """Forgets what was logged after so many epochs, to log it again."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        write_atomic(self.folder / "metrics.jsonl", "".join(lines[:num_epochs]))

    def metrics(self) -> list[dict[str, Any]]:
        """What has been logged so far."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, with versions and git commit, which marks the run as finished (and sends figures to
        wandb)."""
        write_json(self.folder / "summary.json", {**summary, "versions": versions(), "git_commit": self._commit})
        (self.folder / ".lock").unlink(missing_ok=True)
        self._lock.release(force=True)
        if self._wandb is not None:
            from wandb import Image

            figures = sorted((self.folder / "figures").glob("*.png"))
            self._wandb.log({f"figures/{path.stem}": Image(str(path)) for path in figures})
            self._wandb.summary.update({f"final/{key}": value for key, value in summary.items()})
            self._wandb.finish()


def _start_wandb(folder: Path, config: Mapping[str, Any], where: WandbConfig) -> Any:
    """A wandb run that keeps its files in the run folder.

    Raises:
        ValueError: wandb is not installed, or refuses to start.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb: not installed; `pip install wandb` or leave --wandb False") from None
    options = {**asdict(where), "name": where.name or folder.name, "tags": list(where.tags)}
    try:
        return wandb.init(dir=str(folder), config=dict(config), **options)
    except wandb.errors.Error as error:
        remedy = "`wandb login`, or set WANDB_MODE=offline, or leave --wandb False"
        raise ValueError(f"wandb: {error}; {remedy}") from None
