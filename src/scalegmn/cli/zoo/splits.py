"""`scalegmn zoo splits FOLDER`: splits of the published MNIST INRs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.reporting.files import write_atomic
from scalegmn.zoos.published.mnist_inrs import mnist_splits


def run(words: Sequence[str]) -> None:
    """Draws the splits and writes them as JSON."""
    parser = Arguments("scalegmn zoo splits", "Draw the splits of the published MNIST INRs, and write them as JSON.")
    parser.add_argument("dataset_path", type=Path, help="the folder of the INRs")
    parser.add_argument("--out", type=Path, help="JSON file; default: mnist_splits.json in dataset_path")
    parser.add_argument("--val_size", type=int, default=5000, help="training networks to validate with (5000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their choice (0)")
    values = parser.read(words)
    out = values.out or values.dataset_path / "mnist_splits.json"
    if out.exists():
        raise ValueError(f"--out: {out} exists already; choose another")
    splits = mnist_splits(values.dataset_path, values.val_size, values.seed)
    write_atomic(out, json.dumps(splits))
    print(f"{out}: " + ", ".join(f"{len(split['path']):,} {name}" for name, split in splits.items()))
