"""What every table of models owes beside their results: the same test networks moved along their orbits, and how much
work a model does per network."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scalegmn.experiments.config import read_config_file
from scalegmn.experiments.trained import load_model, read_summary
from scalegmn.models.base import Metanetwork
from scalegmn.networks import MultiArchBatch, NetParams, NetSpec
from scalegmn.reporting.files import write_json
from scalegmn.tasks import TASKS
from scalegmn.zoos.loader import LabelledNets

CONTROLS = "controls.json"
"""In a run's folder: what `controls` returns, and of which test."""

ORBIT = 0
"""The seed of the elements that move test networks."""


def controls(run: Path) -> dict[str, float]:
    """The controls of a finished run; they are kept in RUN/controls.json.

    - `moved_<metric>`: the monitored metric on the test networks after random permutations and scalars of their
      neurons, as their symmetries allow: they compute the same (`LabelledNets.orbit`).
    - `mflop`: `work_per_network`.

    Raises:
        ValueError: the folder is no finished run, or its zoo is gone or another one.
    """
    summary = read_summary(run)
    metric = summary["monitor"]["name"]
    tested = {"sha256": summary["data"]["sha256"], f"test_{metric}": summary[f"test_{metric}"]}
    path = run / CONTROLS
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["tested"] == tested:
            return {key: value for key, value in kept.items() if key != "tested"}
    config = read_config_file(run / "config.yml")
    with redirect_stdout(StringIO()):  # the run has said what it reads
        task = TASKS[summary["data"]["task"]].from_settings(config)
    if task.zoo.sha256 != summary["data"]["sha256"]:
        raise ValueError(f"{task.zoo.path} is not the zoo that {run} was trained on; make it again")
    model = load_model(config.model_config, run, NetSpec.from_dict(summary["data"]["spec"]))
    test = task.splits["test"]
    task.splits = {**task.splits, "test": replace(test, orbit=ORBIT)}
    moved = task.evaluate(model, "test", torch.device("cpu"))[metric]
    result = {f"moved_{metric}": moved, "mflop": work_per_network(model, test) / 1e6}
    write_json(path, {"tested": tested, **result})
    return result


@torch.no_grad()
def work_per_network(model: Metanetwork, nets: LabelledNets) -> float:
    """Operations of a forward pass that one more network costs, the first one of `nets`: two per multiply-add of matrix
    products and convolutions, as the equations are written (`engine: plain`)."""
    model = deepcopy(model).eval().requires_grad_(False)  # or counters follow parameters that modules are called with
    model.engine = "plain"
    operations = []
    for number in (1, 2):
        batch: NetParams | MultiArchBatch = nets.read(torch.zeros(number, dtype=torch.long))
        with FlopCounterMode(display=False) as counter:
            model(batch)
        operations.append(counter.get_total_flops())
    return float(operations[1] - operations[0])
