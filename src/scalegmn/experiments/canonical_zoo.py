"""Canonical copies of zoos.

The copy is a zoo like any other, read with `--data.dataset_path`; its provenance names the zoo that it was made from
and the symmetries that were removed. Reading it gives the same numbers as removing them on the fly from the original.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from scalegmn.experiments.config import Config
from scalegmn.networks import NetParams
from scalegmn.reporting.files import versions
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.zoos.loader import BLOCK, open_data, symmetries_to_remove
from scalegmn.zoos.shards import Shards, lock
from scalegmn.zoos.zoo_format import Zoo, in_single, open_zoo


@dataclass(frozen=True)
class CanonicalizeConfig(Config):
    """Write a canonical copy of a configuration's zoo, without the symmetries in data.canonicalize."""

    out: str | None = None
    """Folder of the copy; null: that of the zoo, with `_canon` appended."""


def blocks(zoo: Zoo) -> list[tuple[NetParams, slice]]:
    """The zoo's networks in blocks of one architecture, each with its place among all networks."""
    result, first = [], 0
    for params in zoo.nets:
        for start in range(0, len(params), BLOCK):
            part = params[start : start + BLOCK]
            result.append((part, slice(first + start, first + start + len(part))))
        first += len(params)
    return result


def num_changed(zoo: Zoo, copy: Zoo) -> int:
    """The number of networks of a zoo that differ in its copy."""
    pairs = zip(blocks(zoo), blocks(copy), strict=True)
    return sum(int((a.flatten() != b.flatten()).any(1).sum()) for (a, _), (b, _) in pairs)


def write_canonical_copy(config: CanonicalizeConfig) -> None:
    """Writes the canonical copy of a configuration's zoo, unless it is there.

    Raises:
        ValueError: the zoo cannot be read, nothing is to be removed from it, or the folder holds something else.
    """
    zoo = open_data(config.data)
    out = zoo.path.with_name(zoo.path.name + "_canon") if config.out is None else Path(config.out)
    names = symmetries_to_remove(replace(config.data, switch_to_canon=True), zoo)
    if not names:
        already = f", which has removed {', '.join(zoo.canonical)} already" if zoo.canonical else ""
        raise ValueError(f"data.canonicalize: nothing to remove from {zoo.path}{already}")
    canonical = (*zoo.canonical, *names)
    description = f"canonical ({', '.join(canonical)}) copy of {zoo.path}"
    parts = blocks(zoo)
    shards = Shards(out, {"canonical_copy_of": zoo.sha256, "without": list(names)}, len(parts))
    if shards.finished:
        print(f"{out}: the {description} is there already")
        return
    with lock(out):
        for number in shards.missing():
            params, rows = parts[number]
            columns = {key: column[rows] for key, column in zoo.columns.items()}
            shards.write(number, canonicalize(in_single(params), names), **columns)
    source = {"path": str(zoo.path), "sha256": zoo.sha256, "provenance": zoo.provenance}
    rest = {key: value for key, value in zoo.provenance.items() if key != "recipe"}
    shards.merge(zoo.splits, {**rest, "canonical": list(canonical), "source": source, "versions": versions()})
    print(f"{out}: {description}, {num_changed(zoo, open_zoo(out)):,} of {len(zoo):,} networks changed")
