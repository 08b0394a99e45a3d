"""`scalegmn optimizers RUN...`: learned optimisers beside tuned hand-designed ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.experiments.compare_optimizers import SETTINGS, compare_optimizers


def run(words: Sequence[str]) -> None:
    """Prints a table per setting."""
    parser = Arguments(
        "scalegmn optimizers", "Train new networks with learned optimisers, with SGD and with Adam, and compare them."
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run of `scalegmn train optimizer`, of one seed or several"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps of each network (200)")
    parser.add_argument("--networks", type=int, default=5, help="networks of each optimiser (5)")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=["unseen"], help="problems that are compared (unseen)"
    )
    parser.add_argument("--out", type=Path, help="a folder for the numbers and a figure per setting")
    values = parser.read(words)
    for name in ("steps", "networks"):
        if getattr(values, name) < 1:
            raise ValueError(f"--{name}: found {getattr(values, name)}, expected at least 1")
    print(compare_optimizers(values.runs, values.steps, values.networks, values.settings, values.out))
