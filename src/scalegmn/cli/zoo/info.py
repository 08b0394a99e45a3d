"""`scalegmn zoo info ZOO`: what a zoo holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.reporting.words import counted
from scalegmn.zoos.zoo_format import Zoo, open_zoo

SHOWN = 10
"""The number of architectures that are listed."""


def run(words: Sequence[str]) -> None:
    """Prints what a zoo holds."""
    parser = Arguments("scalegmn zoo info", "Print what a zoo holds.")
    parser.add_argument("zoo", type=Path, help="its folder")
    print(describe(open_zoo(parser.read(words).zoo)))


def describe(zoo: Zoo) -> str:
    """Size, architectures, columns, splits and provenance of a zoo, a line each."""
    size = (zoo.path / "zoo.safetensors").stat().st_size
    lines = [f"{zoo.path}: {counted(len(zoo), 'network')}, {size / 1e6:,.1f} MB, sha256 {zoo.sha256}"]
    for params in zoo.nets[:SHOWN]:
        dtype = str(params.biases[0].dtype).removeprefix("torch.")
        lines.append(f"  {len(params):,} x {params.spec}, {params.spec.num_parameters:,} parameters, {dtype}")
    rest = zoo.nets[SHOWN:]
    if rest:
        number = counted(sum(map(len, rest)), "network")
        lines.append(f"  {number} of {counted(len(rest), 'more architecture')}")
    for name, column in sorted(zoo.columns.items()):
        low, high = (f"{value:.4g}" for value in (column.min().item(), column.max().item()))
        lines.append(f"  column {name}: {low} to {high}")
    if zoo.classes is not None:
        lines.append(f"  classes, from 0: {', '.join(zoo.classes)}")
    for name, rows in zoo.splits.items():
        lines.append(f"  split {name}: {counted(len(rows), 'network')}")
    lines.append(f"  provenance: {json.dumps(zoo.provenance)}")
    return "\n".join(lines)
