"""Published datasets become zoos of ours on first use, next to the original or in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from scalegmn.data.shards import Shards
from scalegmn.data.zoo_format import Networks, Zoo, open_zoo
from scalegmn.log import versions

SHARD = 1024
"""Networks in a shard of a conversion."""

SAMPLE = 64
"""Files whose content identifies a dataset."""

EDGE = 2**16
"""Bytes at both ends of a file that identify it, together with its size."""


@dataclass(frozen=True)
class Listing:
    """What a published dataset holds, in the order that its zoo will have; nothing but names is read yet.

    Attributes:
        files: those with the networks.
        num_networks: how many there are.
        read: the networks of a slice, and their columns.
        splits: `train`, `val`, `test` -> numbers of networks.
        provenance: what they are, in plain JSON types.
    """

    files: Sequence[Path]
    num_networks: int
    read: Callable[[slice], Networks]
    splits: Mapping[str, Tensor]
    provenance: Mapping[str, Any]


def converted(
    dataset: str,
    root: Path,
    choice: Mapping[str, Any],
    listing: Callable[[], Listing],
    cache_dir: Path | None = None,
) -> Zoo:
    """The zoo of a published dataset, converted unless it has been; says on stdout when it converts.

    A conversion is found again by the dataset's name and the choice made from it; it is made anew when the content of
    the files it came from has changed. An interrupted one goes on where it stopped, and of several processes one
    converts while the others wait.

    Args:
        dataset: the published name.
        root: the dataset's folder.
        choice: all else that decides which networks the zoo holds, and in which splits; plain JSON types.
        listing: goes through the folder.
        cache_dir: where zoos go; None: `root`, or where that is read-only the user's cache folder.

    Raises:
        ValueError: a file is missing, refused or not what it should be; names it. Nothing is left of it.
    """
    key = _digest(json.dumps(dict(choice), sort_keys=True).encode())
    folders = [root, _user_cache() / _digest(str(root.resolve()).encode())] if cache_dir is None else [cache_dir]
    for folder in folders:
        out = folder / f"scalegmn-{dataset}-{key}"
        if (out / "zoo.json").exists():
            zoo = open_zoo(out)
            changed = [
                name for name, found in zoo.provenance["recipe"]["files"].items() if _changed(root / name, found)
            ]
            if not changed:
                return zoo
            print(f"{root / changed[0]} has changed since {out} was made from it: converting again")
            shutil.rmtree(out)
    found = listing()
    out = next((folder for folder in folders if _writable(folder)), folders[-1]) / f"scalegmn-{dataset}-{key}"
    sample = found.files[:: max(1, -(-len(found.files) // SAMPLE))]
    identity = {os.path.relpath(file, root): file_identity(file) for file in sample}
    plan = {"dataset": dataset, "choice": dict(choice), "files": identity}
    parts = [slice(start, start + SHARD) for start in range(0, found.num_networks, SHARD)]
    try:
        shards = Shards(out, plan, len(parts))
    except ValueError:  # what is left of an attempt on other files
        shutil.rmtree(out.with_name(out.name + ".partial"))
        shards = Shards(out, plan, len(parts))
    with shards.lock(lambda: print(f"{out}: another process is converting; waiting for it")):
        if not shards.finished:
            print(f"{root}: converting {found.num_networks:,} networks to {out}")
            missing = shards.missing()
            bar = tqdm(total=found.num_networks, unit=" networks", desc="converting", disable=None)
            bar.update(found.num_networks - sum(len(range(*parts[k].indices(found.num_networks))) for k in missing))
            try:
                with bar:
                    for number in missing:
                        networks = found.read(parts[number])
                        shards.write(number, *networks.nets, **networks.columns)
                        bar.update(len(networks))
            except ValueError:
                shards.discard()
                raise
            shards.merge(found.splits, {**found.provenance, "versions": versions()})
    return open_zoo(out)


def file_identity(path: Path) -> str:
    """A checksum of a file's size, its beginning and its end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        content = file.read(EDGE)
        file.seek(max(0, size - EDGE))
        content += file.read(EDGE)
    return _digest(size.to_bytes(8, "little") + content)


def _changed(path: Path, identity: str) -> bool:
    """Whether a file is there and is another one than before."""
    return path.exists() and file_identity(path) != identity


def checksum(path: Path) -> str:
    """The checksum of a whole file; raises ValueError when it is missing."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return _digest(path.read_bytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _user_cache() -> Path:
    """Where programs keep what they can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalegmn"


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    probe = folder / f".scalegmn-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
