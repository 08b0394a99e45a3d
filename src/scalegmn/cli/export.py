"""`scalegmn export --checkpoint RUN --out BUNDLE`: a trained model as one folder to pass on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.experiments.bundles import write_bundle


def run(words: Sequence[str]) -> None:
    """Writes the bundle."""
    parser = Arguments("scalegmn export", "Write a trained model as a bundle, one folder to pass on.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the bundle's folder, which is made")
    values = parser.read(words)
    write_bundle(values.checkpoint, values.out)
    print(f"{values.out}: read it with --checkpoint {values.out}")
