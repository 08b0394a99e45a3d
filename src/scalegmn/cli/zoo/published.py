"""`scalegmn zoo published ZOO --out DIR`: a zoo of CNNs in the published layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.zoos.published.cnns import write_published
from scalegmn.zoos.zoo_format import open_zoo


def run(words: Sequence[str]) -> None:
    """Writes the zoo's npy and csv files."""
    parser = Arguments("scalegmn zoo published", "Write a zoo of CNNs in the published layout: npy and csv files.")
    parser.add_argument("zoo", type=Path, help="its folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the files")
    values = parser.read(words)
    write_published(open_zoo(values.zoo), values.out)
    print(f"{values.out}: read it with --data.dataset cifar10 --data.dataset_path {values.out}")
