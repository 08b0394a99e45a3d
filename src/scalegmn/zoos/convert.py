"""Datasets in other layouts become zoos on first use, next to the original or in a cache folder."""

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

from scalegmn.reporting.files import versions
from scalegmn.reporting.words import counted
from scalegmn.zoos.shards import Shards, lock
from scalegmn.zoos.zoo_format import Networks, Zoo, open_zoo

SHARD = 1024
"""Networks in a shard of a conversion."""

SAMPLE = 64
"""Files whose content identifies a dataset."""

EDGE = 2**16
"""Bytes at both ends of a file that identify it, together with its size."""


class NothingThereError(ValueError):
    """A folder holds no network of a dataset at all."""


@dataclass(frozen=True)
class Listing:
    """The networks of a dataset, in the order that its zoo will have. Only names have been read.

    Attributes:
        files: the files with the networks.
        num_networks: the number of networks.
        read: slice of the networks -> these networks, and their columns.
        splits: `train`, `val`, `test` -> numbers of networks.
        provenance: what is known of their origin, in plain JSON types.
        classes: the names of the classes, None of numbers; asked for when the networks are read, since it may read
            files, too. None: `provenance` tells.
    """

    files: Sequence[Path]
    num_networks: int
    read: Callable[[slice], Networks]
    splits: Mapping[str, Tensor]
    provenance: Mapping[str, Any]
    classes: Callable[[], Sequence[str] | None] | None = None

    def identity(self, root: Path) -> dict[str, Any]:
        """Identifies the files: a checksum of all names, and of the content of up to `SAMPLE` files.

        Raises:
            ValueError: one of these is missing.
        """
        names = [os.path.relpath(file, root) for file in self.files]
        step = max(1, -(-len(names) // SAMPLE))
        sample = {name: _file_identity(file) for name, file in zip(names[::step], self.files[::step], strict=True)}
        return {"number": len(names), "names": digest("\n".join(names)), "sample": sample}

    def check_files(self) -> None:
        """Raises ValueError when a file is missing, or stands under two names."""
        names: dict[str, Path] = {}
        for file in self.files:
            if not file.is_file():
                raise ValueError(f"{file} is missing; get it again, or leave it out of the splits")
            other = names.setdefault(os.path.realpath(file), file)
            if other != file:
                raise ValueError(f"{file} is the same file as {other}; name it once")


def converted(
    dataset: str,
    root: Path,
    choice: Mapping[str, Any],
    listing: Callable[[], Listing],
    cache_dir: Path | None = None,
    convert: bool = True,
) -> Zoo:
    """The zoo of a dataset, which is converted unless that has been done; prints when it converts.

    A conversion is found again by the dataset's name and the choice made from it, and made anew when its files have
    changed (`Listing.identity`). When all of them are gone it is read as it is. An interrupted conversion goes on
    where it stopped, and of several processes one converts while the others wait.

    Args:
        dataset: its name.
        root: the dataset's folder.
        choice: all else that decides which networks the zoo holds, and in which splits; plain JSON types.
        listing: goes through the folder; raises `NothingThereError` when it holds none.
        cache_dir: where zoos go; None: `root`, or where that is read-only the user's cache folder.
        convert: whether it may be converted.

    Raises:
        ValueError: a file is missing, refused or not what it should be; names it. Nothing is left of it. Or the dataset
            has not been converted, and may not be.
    """
    asked = json.dumps([dataset, dict(choice)], sort_keys=True)
    name = f"scalegmn-{dataset}-"
    elsewhere = (cache_dir or _user_cache()) / (name + digest(asked + str(root.resolve())))
    places = [elsewhere] if cache_dir else [root / (name + digest(asked)), elsewhere]
    made = next((place for place in places if (place / "zoo.json").exists()), None)
    try:
        listed = listing()
    except NothingThereError:
        if made is None:
            raise
        print(f"{root}: the files that {made} was made from are gone; reading it as it is")
        return open_zoo(made)
    plan = {"dataset": dataset, "choice": dict(choice), "files": listed.identity(root)}
    if made is not None:
        zoo = open_zoo(made)
        if zoo.provenance["recipe"] == plan:
            leftover = made.with_name(made.name + ".partial")  # of a process that was killed at the end
            shutil.rmtree(leftover, ignore_errors=True)
            return zoo
    listed.check_files()
    if not convert:
        raise ValueError(
            f"{root}: not converted yet, which --dry_run and --data.convert False leave undone; leave these out"
        )
    out = made or next((place for place in places if _writable(place.parent)), places[-1])
    with lock(out, lambda: print(f"{out}: another process is converting; waiting for it")):
        _convert(out, root, plan, listed)
    return open_zoo(out)


def _convert(out: Path, root: Path, plan: Mapping[str, Any], listing: Listing) -> None:
    """Writes the zoo, unless another process has; deletes one that was made from other files."""
    parts = [slice(start, start + SHARD) for start in range(0, listing.num_networks, SHARD)]
    try:
        shards = Shards(out, plan, len(parts))
    except ValueError:
        if (out / "zoo.json").exists():
            print(f"{root} has changed since {out} was made from it: converting again")
        for old in (out, out.with_name(out.name + ".partial")):
            shutil.rmtree(old, ignore_errors=True)
        shards = Shards(out, plan, len(parts))
    if shards.finished:
        return
    print(f"{root}: converting {counted(listing.num_networks, 'network')} to {out}")
    missing = shards.missing()
    bar = tqdm(total=listing.num_networks, unit=" networks", desc="converting", disable=None)
    bar.update(listing.num_networks - sum(len(range(*parts[k].indices(listing.num_networks))) for k in missing))
    try:
        with bar:
            for number in missing:
                networks = listing.read(parts[number])
                shards.write(number, *networks.nets, **networks.columns)
                bar.update(len(networks))
    except ValueError:
        shards.discard()
        raise
    names = None if listing.classes is None else listing.classes()
    classes = {} if names is None else {"classes": list(names)}
    shards.merge(listing.splits, {**listing.provenance, **classes, "versions": versions()})


def _file_identity(path: Path) -> str:
    """A checksum of a file's size, its beginning and its end."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            content = file.read(EDGE)
            file.seek(max(0, size - EDGE))
            content += file.read(EDGE)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; get it again, or leave it out of the splits") from None
    except (OSError, ValueError) as error:  # a folder, or a name with characters that no file has
        raise ValueError(f"{str(path)!r} is no file that can be read ({error}); leave it out of the splits") from None
    return hashlib.sha256(size.to_bytes(8, "little") + content).hexdigest()[:12]


def checksum(path: Path) -> str:
    """The checksum of a whole file of splits; raises ValueError when it is missing."""
    if not path.is_file():
        raise ValueError(f"data.split_path: {path}: no such file")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def digest(text: str) -> str:
    """A short checksum of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _user_cache() -> Path:
    """The user's folder for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scalegmn"


def _writable(folder: Path) -> bool:
    """Whether files can be written in a folder; makes the folder if it is missing."""
    probe = folder / f".scalegmn-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
