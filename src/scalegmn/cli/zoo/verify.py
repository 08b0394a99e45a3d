"""`scalegmn zoo verify ZOO`: every checksum and every weight of a zoo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.zoos.zoo_format import verify_zoo


def run(words: Sequence[str]) -> None:
    """Checks a zoo."""
    parser = Arguments("scalegmn zoo verify", "Check every checksum and every weight of a zoo.")
    parser.add_argument("zoo", type=Path, help="its folder")
    print(f"{verify_zoo(parser.read(words).zoo).path}: every checksum is right, every weight finite")
