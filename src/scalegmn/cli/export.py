"""`scalegmn export --checkpoint RUN --out BUNDLE`: a trained model as one folder to pass on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.experiments.bundles import write_bundle
from scalegmn.explore.content import of_run
from scalegmn.explore.page import page

NETWORKS = 200
"""Networks on a bundle's page."""


def run(words: Sequence[str]) -> None:
    """Writes the bundle."""
    parser = Arguments("scalegmn export", "Write a trained model as a bundle, one folder to pass on.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the bundle's folder, which is made")
    parser.add_argument(
        "--page",
        action="store_true",
        help=f"add a page that shows {NETWORKS} test networks of the run's zoo, and their weights",
    )
    values = parser.read(words)
    if values.out.exists():
        raise ValueError(f"--out: {values.out} exists already; choose another")
    shown = page([of_run(values.checkpoint, NETWORKS)]) if values.page else None
    write_bundle(values.checkpoint, values.out, shown)
    print(f"{values.out}: read it with --checkpoint {values.out}")
