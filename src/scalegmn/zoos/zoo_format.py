"""The one on-disk zoo: a folder with `zoo.safetensors` and `zoo.json`.

The networks of a zoo are numbered through, architecture by architecture. `zoo.safetensors` holds their parameters, the
columns (label, image, psnr, ...) and the splits (`zoo_tensors`). `zoo.json` holds the format version, the `NetSpec`s,
counts, checksums and the provenance: recipe or source, versions. The folder appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from scalegmn.networks import MultiArchBatch, NetParams, NetSpec
from scalegmn.reporting.files import removed_on_failure
from scalegmn.zoos.zoo_tensors import Layout, check_splits, params_from_tensors

FORMAT_VERSION = 2

CHUNK = 2**24
"""Bytes of `zoo.safetensors` under one checksum."""

CHUNKS_ON_OPENING = 8
"""Checksums that opening a zoo verifies, evenly spread over the file; `verify_zoo` checks all."""

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What people call splits."""


@dataclass(frozen=True)
class Networks:
    """Networks of one or several architectures, numbered through, with columns of values.

    Attributes:
        nets: networks of one architecture in a row; in a zoo, all of an architecture.
        columns: per name, a tensor [networks, ...]: `label` (class), `image` (identity of the image), `psnr` (dB).
    """

    nets: tuple[NetParams, ...]
    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return sum(map(len, self.nets))

    @property
    def params(self) -> NetParams:
        """All networks.

        Raises:
            ValueError: they have several architectures.
        """
        if len(self.nets) != 1:
            first, second, *more = (str(params.spec) for params in self.nets)
            found = f"{first}, {second}{', ...' if more else ''}"
            raise ValueError(f"expected networks of one architecture, found {len(self.nets):,}: {found}")
        return self.nets[0]

    @property
    def spec(self) -> NetSpec:
        """The architecture of all networks; raises ValueError when there are several."""
        return self.params.spec

    @cached_property
    def starts(self) -> Tensor:
        """The number of each architecture's first network, and how many networks there are."""
        return torch.tensor([0, *map(len, self.nets)]).cumsum(0)

    def architecture(self, rows: Tensor) -> Tensor:
        """The numbers [M] of networks -> the numbers [M] of their architectures."""
        return torch.bucketize(rows, self.starts[1:], right=True)

    def take(self, rows: Tensor) -> NetParams | MultiArchBatch:
        """The networks of numbers [M], in this order; fastest if those of one architecture stand together."""
        architecture = self.architecture(rows)
        numbers, counts = architecture.unique_consecutive(return_counts=True)
        places = (rows - self.starts[architecture]).split(counts.tolist())
        return MultiArchBatch.of(
            self.nets[number][place] for number, place in zip(numbers.tolist(), places, strict=True)
        )


def joined(nets: Iterable[NetParams]) -> tuple[NetParams, ...]:
    """The same networks in the same order; neighbours of one architecture are one batch."""
    return tuple(NetParams.cat(list(equal)) for _, equal in groupby(nets, key=lambda params: params.spec))


@dataclass(frozen=True)
class Zoo(Networks):
    """A zoo that has been opened and verified; its tensors are memory-mapped, and read when they are used.

    Attributes:
        path: its folder.
        splits: `train`, `val`, `test` -> numbers of networks.
        sha256: checksum of tensors and description, the zoo's identity.
        provenance: how it was made.
    """

    path: Path
    splits: dict[str, Tensor]
    sha256: str
    provenance: dict[str, Any]

    @property
    def canonical(self) -> tuple[str, ...]:
        """The symmetries that the stored networks have removed."""
        return tuple(self.provenance.get("canonical", ()))

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes of the column `label`; None where they have none."""
        if "label" not in self.columns:
            return None
        return class_names(self.provenance.get("classes"), int(self.columns["label"].max()) + 1)

    @cached_property
    def architectures(self) -> dict[NetSpec, int]:
        """All architectures, and how many networks of the split `train` have them."""
        counts = self.architecture(self.splits["train"]).bincount(minlength=len(self.nets))
        num_training: dict[NetSpec, int] = {}
        for params, count in zip(self.nets, counts.tolist(), strict=True):
            num_training[params.spec] = num_training.get(params.spec, 0) + count
        return num_training


def write_zoo(
    path: Path,
    parts: Iterable[Networks],
    splits: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    draw: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a zoo folder atomically, in constant memory.

    Args:
        path: the folder.
        parts: the zoo's networks; iterated over twice, one part in memory at a time. With several architectures, the
            zoo's networks are in the order of architecture, then part.
        splits: name -> numbers of networks, counted through the parts.
        provenance: plain JSON types.
        draw: adds figures to the folder.

    Raises:
        ValueError: `path` exists, or the splits are not disjoint sets of the networks.
        OSError: the zoo cannot be written, and nothing is left of it.
    """
    if path.exists():
        raise ValueError(f"{path} exists already")
    staging = path.with_name(path.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    with removed_on_failure(staging):
        staging.mkdir(parents=True)
        file = staging / "zoo.safetensors"
        layout = Layout(parts, splits)
        layout.write(file, parts)
        content = {
            "format": "scalegmn zoo",
            "version": FORMAT_VERSION,
            "networks": list(layout.counts.values()),
            "specs": [spec.to_dict() for spec in layout.counts],
            "columns": layout.columns,
            "splits": {name: len(rows) for name, rows in splits.items()},
            "bytes": file.stat().st_size,
            "chunks_sha256": [_chunk_sha256(file, number) for number in range(_num_chunks(file.stat().st_size))],
            "provenance": dict(provenance),
        }
        content["sha256"] = _description_sha256(content)
        draw(staging)
        (staging / "zoo.json").write_text(json.dumps(content, indent=2) + "\n")
        for written in (*staging.iterdir(), staging):
            _sync(written)
        os.replace(staging, path)
        _sync(path.parent)


def is_zoo(path: Path) -> bool:
    """Whether a folder is that of a zoo, whole or damaged."""
    return (path / "zoo.json").is_file()


def open_zoo(path: Path) -> Zoo:
    """Opens a zoo folder and verifies it: its description, its size, and up to `CHUNKS_ON_OPENING` checksums.

    Raises:
        ValueError: there is none, it is truncated, edited or of another version; says which and what to do.
    """
    file, description = path / "zoo.safetensors", path / "zoo.json"
    missing = [part.name for part in (description, file) if not part.exists()]
    if missing:
        raise ValueError(
            f"{path}: no zoo there ({' and '.join(missing)} missing), expected a folder that `scalegmn zoo inr`, "
            "`scalegmn zoo cnn` or `scalegmn zoo import` made"
        )
    remedy = f"delete {path} and make it again"
    try:
        content = json.loads(description.read_text())
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"format version {content['version']}, expected {FORMAT_VERSION}")
        if content["sha256"] != _description_sha256(content):
            raise ValueError("its checksum differs: edited or damaged")
        counts, described = content["networks"], content["specs"]
        size, checksums = content["bytes"], content["chunks_sha256"]
        columns, splits, provenance = content["columns"], content["splits"], content["provenance"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{description}: not the description of a zoo ({_reason(error)}); {remedy}") from None
    try:
        specs = [NetSpec.from_dict(spec) for spec in described]
    except (ValueError, KeyError, TypeError) as error:  # it is as it was written: an activation is not known here
        raise ValueError(f"{description}: {error}") from None
    if file.stat().st_size != size:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, expected {size}: truncated or replaced; {remedy}")
    num_chunks = _num_chunks(size)
    step = max(1, -(-num_chunks // CHUNKS_ON_OPENING))
    for number in {*range(0, num_chunks, step), num_chunks - 1}:
        if _chunk_sha256(file, number) != checksums[number]:
            raise ValueError(f"{file}: checksum differs from zoo.json's: edited or damaged; {remedy}")
    try:
        tensors = load_file(file)
        nets = tuple(params_from_tensors(spec, tensors, group) for group, spec in enumerate(specs))
        if [len(params) for params in nets] != counts:
            raise ValueError(f"{[len(params) for params in nets]} networks, expected {counts}")
        columns = {name: tensors[f"column.{name}"] for name in columns}
        splits = {name: tensors[f"split.{name}"] for name in splits}
        check_splits(splits, sum(counts))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not the tensors that zoo.json describes ({error}); {remedy}") from None
    return Zoo(nets, columns, path, splits, content["sha256"], provenance)


def verify_zoo(path: Path) -> Zoo:
    """Opens a zoo and checks all of it: every checksum, and that every number is finite.

    Raises:
        ValueError: as `open_zoo`, or names the first bad network.
    """
    zoo = open_zoo(path)
    file, checksums = path / "zoo.safetensors", json.loads((path / "zoo.json").read_text())["chunks_sha256"]
    for number, checksum in enumerate(checksums):
        if _chunk_sha256(file, number) != checksum:
            at = f"bytes {number * CHUNK} to {(number + 1) * CHUNK}"
            raise ValueError(f"{file}: checksum of {at} differs: edited or damaged; delete {path} and make it again")
    first = 0
    for params in zoo.nets:
        bad = first_not_finite((*params.weights, *params.biases))
        if bad is not None:
            raise ValueError(f"{file}: network {first + bad} has NaN or infinite weights; make the zoo without it")
        first += len(params)
    return zoo


def class_names(stored: Any, num_classes: int) -> tuple[str, ...] | None:
    """The names of classes as JSON holds them; None unless they are a name for each of at least `num_classes`."""
    is_list = isinstance(stored, (list, tuple)) and all(isinstance(name, str) for name in stored)
    return tuple(stored) if is_list and len(stored) >= num_classes else None


def in_single(params: NetParams) -> NetParams:
    """Networks that are stored in half precision, in single; others as they are. Nothing is computed in half."""
    return params.map(Tensor.float) if params.biases[0].dtype == torch.float16 else params


def first_not_finite(tensors: Sequence[Tensor]) -> int | None:
    """The first index, along the first axis, at which a tensor has a NaN or infinity; None when there is none."""
    finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in tensors]).all(0)
    return None if finite.all() else int((~finite).nonzero()[0])


def split_by_group(groups: Tensor, fractions: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Splits networks so that all networks of one group (image) are in one split.

    Args:
        groups: [networks] identity of each network's image.
        fractions: split -> share of the groups; `train` takes what they leave.
        seed: of the shuffle.

    Returns:
        Split -> ascending numbers of networks.
    """
    identities = groups.unique()
    shuffled = identities[torch.randperm(len(identities), generator=torch.Generator().manual_seed(seed))]
    sizes = [round(fraction * len(identities)) for fraction in fractions.values()]
    parts = shuffled.split([len(identities) - sum(sizes), *sizes])
    names = ("train", *fractions)
    return {name: torch.isin(groups, part).nonzero()[:, 0] for name, part in zip(names, parts, strict=True)}


def _reason(error: Exception) -> str:
    """What is wrong with a description."""
    return f"{error} missing" if isinstance(error, KeyError) else str(error)


def _num_chunks(size: int) -> int:
    """How many checksums a file of so many bytes has."""
    return max(1, -(-size // CHUNK))


def _chunk_sha256(path: Path, number: int) -> str:
    """The checksum of one chunk of a file."""
    with open(path, "rb") as file:
        file.seek(number * CHUNK)
        return hashlib.sha256(file.read(CHUNK)).hexdigest()


def _description_sha256(content: Mapping[str, Any]) -> str:
    """The checksum of all else in a description, the tensors' checksums included: the zoo's identity."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
