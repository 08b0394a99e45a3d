"""`python -m scalegmn.check --conf ... | --checkpoint RUN`: does a model keep the symmetries that it claims?

For each symmetry, the largest change of the output over random group elements, relative to the spread between different
networks, in float32 and float64; beside a control outside every group. Exit code 1 if a claimed symmetry is broken.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scalegmn.cli import parse, split_arguments
from scalegmn.config import Config
from scalegmn.data.loader import load_splits
from scalegmn.log import user_errors
from scalegmn.official import translate_file
from scalegmn.spec import MIXED, NetParams
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.symmetry.checks import relative_change
from scalegmn.symmetry.groups import GroupElement, PhaseShift
from scalegmn.train.checkpoint import load_checkpoint

NETWORKS, DRAWS = 32, 5
TOLERANCE = 1e-9
"""The largest relative change in float64 at which a symmetry counts as kept; float32 is shown, not judged."""


@dataclass(frozen=True)
class CheckConfig(Config):
    """Check the symmetries of a model on networks of its zoo."""

    checkpoint: str | None = None
    """A run folder: check its best checkpoint, with its configuration; null: a model as it is at the start."""


def moves(params: NetParams, generator: torch.Generator) -> dict[str, NetParams]:
    """The networks, moved by one random element of each group, and by one of none (`control`)."""
    scaled = GroupElement.sample(params, generator, permute=False, decades=3.0)
    outside = replace(scaled, scales=tuple(torch.full_like(q, -1.7) for q in scaled.scales))
    found = {"permutation": GroupElement.sample(params, generator, scale=False).act(params)}
    if any((q != 1).any() for q in scaled.scales):
        found[params.spec.symmetries[0]] = scaled.act(params)
    phase = PhaseShift.sample(params, generator)
    if any(k.any() for k in phase.turns):
        found["phase"] = phase.act(params)
    return found | {"control": outside.act(params)}


@torch.no_grad()
def report(model: Callable[[NetParams], Tensor], params: NetParams, generator: torch.Generator) -> dict[str, float]:
    """Per move, the largest change of the output over `DRAWS` draws, relative to the spread between networks."""
    outputs = model(params)
    moved: dict[str, list[Tensor]] = {}
    for _ in range(DRAWS):
        for name, networks in moves(params, generator).items():
            moved.setdefault(name, []).append(model(networks))
    return {name: relative_change(torch.stack(found), outputs) for name, found in moved.items()}


def main() -> None:
    """Reads a configuration or a run, prints the table."""
    with user_errors():
        files, words = split_arguments()
        runs = [word.partition("=")[2] for word in words if word.startswith("--checkpoint=")]
        files = [str(Path(run) / "config.yml") for run in runs] + files
        words = [*(f"--conf={file}" for file in files), *words]
        config = parse(CheckConfig, words, "python -m scalegmn.check", translate_file)
        zoo, splits = load_splits(replace(config.data, switch_to_canon=False), "label")
        torch.manual_seed(config.train_args.seed)
        model = config.scalegmn_args.build(zoo.spec).eval()
        if config.scalegmn_args.output != "vector":
            raise ValueError("scalegmn_args.output: found parameters, expected vector")
        model.fit_normalization(splits["train"].params)
        if config.checkpoint is not None:
            load_checkpoint(Path(config.checkpoint) / "checkpoints" / "best.safetensors", model)
    removed = config.data.canonicalize if config.data.switch_to_canon else ()

    def read(params: NetParams) -> Tensor:
        return model(canonicalize(params, removed))

    params = splits["test"].params[:NETWORKS]
    symmetry = config.scalegmn_args.symmetry
    claimed = {"permutation", symmetry, *removed} | ({"sign", "scale"} if symmetry == MIXED else set())
    table = {}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        table[dtype] = report(read, params.to(dtype), torch.Generator().manual_seed(0))
    print(f"{'':<16}{'claimed':>8}{'float32':>10}{'float64':>10}   change / spread between {len(params)} networks")
    broken = []
    for name, error in table[torch.float64].items():
        kept = error <= TOLERANCE
        verdict = "" if name not in claimed else "   kept" if kept else "   BROKEN"
        broken += [name] if "BROKEN" in verdict else []
        claim, single = "yes" if name in claimed else "no", table[torch.float32][name]
        print(f"{name:<16}{claim:>8}{single:>10.1e}{error:>10.1e}{verdict}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
