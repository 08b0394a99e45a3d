"""`scalegmn sweep --conf sweeps/digits_cls.yml --out DIR`: a search of hyper-parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.configuration.parsing import parse
from scalegmn.experiments.sweep import SweepConfig, renamed_folder, run_sweep, write_wandb_sweep


def run(words: Sequence[str]) -> None:
    """Runs the sweep, or exports it for Weights & Biases."""
    config = parse(SweepConfig, words, "scalegmn sweep", renamed_folder)
    if config.export is None:
        run_sweep(config)
    else:
        path = write_wandb_sweep(config, Path(config.out) / "wandb.yml")
        print(f"{path}: start it with `wandb sweep {path}`")
