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

from scalegmn.experiments.config import Config
from scalegmn.experiments.trained import load, read_summary
from scalegmn.models.base import Metanetwork
from scalegmn.networks import MultiArchBatch, NetParams, NetSpec
from scalegmn.reporting.files import write_json
from scalegmn.tasks import TASKS
from scalegmn.tasks.zoo_task import ZooTask
from scalegmn.zoos.loader import LabelledNets

CONTROLS = "controls.json"
"""In a run's folder: what `controls` returns, and of which test."""

ORBIT = 0
"""The seed of the elements that move test networks."""


MOVED_BY = "permutations, scalars, half-turns"
"""What moves them; kept controls of other moves are computed again."""


def controls(run: Path) -> dict[str, float]:
    """The controls of a finished run; they are kept in RUN/controls.json.

    - `moved_<metric>`: the monitored metric on the test networks after random permutations, scalars and half-turns of
      their neurons, as their symmetries allow: they compute the same (`LabelledNets.orbit`).
    - `mflop`: `work_per_network`.

    Raises:
        ValueError: the folder is no finished run, or its zoo is gone or another one.
    """
    summary = read_summary(run)
    metric = summary["monitor"]["name"]
    tested = {"sha256": summary["data"]["sha256"], f"test_{metric}": summary[f"test_{metric}"], "moved_by": MOVED_BY}
    path = run / CONTROLS
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["tested"] == tested:
            return {key: value for key, value in kept.items() if key != "tested"}
    trained = load(run)
    task = _task(trained.config, trained.task)
    if task.zoo.sha256 != summary["data"]["sha256"]:
        raise ValueError(f"{task.zoo.path} is not the zoo that {run} was trained on; make it again")
    model, test = trained.metanetwork(trained.spec), task.splits["test"]
    task.splits = {**task.splits, "test": replace(test, orbit=ORBIT)}
    moved = task.evaluate(model, "test", torch.device("cpu"))[metric]
    result = {f"moved_{metric}": moved, "mflop": work_per_network(model, test) / 1e6}
    write_json(path, {"tested": tested, **result})
    return result


def tested_on(run: Path, folder: str) -> float:
    """The monitored metric of a finished run's model on the test networks of another zoo, such as one of wider networks
    that store the same images; kept in RUN/tested_on_<name of the zoo>.json.

    Raises:
        ValueError: the folder is no finished run, the zoo cannot be read, or the model cannot read its networks.
    """
    trained = load(run)
    metric = trained.summary["monitor"]["name"]
    data = replace(trained.config.data, dataset_path=folder, split_path=None)
    task = _task(replace(trained.config, data=data), trained.task)
    tested = {"sha256": task.zoo.sha256, f"test_{metric}": trained.summary[f"test_{metric}"]}
    path = run / f"tested_on_{Path(folder).name}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["tested"] == tested:
            return float(kept[metric])
    model = trained.metanetwork(NetSpec.envelope(task.architectures))
    value = task.evaluate(model, "test", torch.device("cpu"))[metric]
    write_json(path, {"tested": tested, metric: value})
    return value


def _task(config: Config, name: str) -> ZooTask:
    """A task that prints nothing: the run has said what it reads."""
    with redirect_stdout(StringIO()):
        return TASKS[name].from_settings(config)


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
