"""What the scripts have in common: from a configuration to trained and tested models."""

from __future__ import annotations

import json
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from scalegmn.config import ScriptConfig, start_run, with_run_dir
from scalegmn.log import git_commit, versions, write_json
from scalegmn.models.base import Metanetwork
from scalegmn.train.optim import build_optimizer
from scalegmn.train.task import Task
from scalegmn.train.trainer import backward_in_parts, fit

AnyConfig = TypeVar("AnyConfig", bound=ScriptConfig)
Build = Callable[[AnyConfig], Task]
Finished = Callable[[AnyConfig, Task, Metanetwork, dict[str, Any]], None]


def train(config: AnyConfig, build_task: Build, finished: Finished | None = None) -> None:
    """Trains and tests: once, for each of `config.seeds`, or not at all (`config.dry_run`).

    Args:
        config: a configuration; without `run_dir` it gets one by name and time.
        build_task: the task of a configuration; may raise ValueError.
        finished: called with configuration, task, trained model and summary of each run.

    Raises:
        ValueError: the configuration and the data do not fit; nothing is written then.
    """
    config = with_run_dir(config)
    config.train_args.check_device()
    if config.dry_run:
        dry_run(config, build_task)
    elif config.seeds is not None:
        train_seeds(config, build_task, finished)
    else:
        train_once(config, build_task, finished)


def train_once(config: AnyConfig, build_task: Build, finished: Finished | None) -> None:
    """One run; results in its folder."""
    task, model = _task_and_model(config, build_task)
    run = start_run(config)
    try:
        summary = fit(task, model, config.train_args, config.optimization, run)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None
    if finished is not None:
        finished(config, task, model, summary)


def _task_and_model(config: AnyConfig, build_task: Build) -> tuple[Task, Metanetwork]:
    task = build_task(config)
    torch.manual_seed(config.train_args.seed)
    return task, config.scalegmn_args.build(task.spec)


def train_seeds(config: AnyConfig, build_task: Build, finished: Finished | None) -> None:
    """A run per seed in `run_dir/seed_<seed>`, unless it is finished; then `run_dir/summary.json`.

    Raises:
        ValueError: `run_dir` holds a single run, or a run with another configuration.
    """
    folder, runs = Path(config.run_dir), each_seed(config)
    if (folder / "config.yml").exists():
        raise ValueError(f"{folder} holds a single run; choose another --run_dir for --seeds")
    paths = [Path(one.run_dir) / "summary.json" for one in runs]
    done = [path.exists() for path in paths]
    for one, path, there in zip(runs, paths, done, strict=True):
        if there and (path.parent / "config.yml").read_text() != one.to_yaml():
            raise ValueError(f"{path.parent} was trained with another configuration; choose another --run_dir")
    for one, path, there in zip(runs, paths, done, strict=True):
        print(f"{path.parent}: {'finished already' if there else 'training'}")
        if not there:
            train_once(one, build_task, finished)
    found = over_seeds([json.loads(path.read_text()) for path in paths])
    seeds = [one.train_args.seed for one in runs]
    write_json(folder / "summary.json", {"seeds": seeds, **found, "versions": versions(), "git_commit": git_commit()})
    for name, values in found.items():
        spread = "" if values["std"] is None else f" +- {values['std']:.4f} (standard deviation)"
        print(f"{name.replace('_', ' ', 1)} {values['mean']:.4f}{spread}, {len(seeds)} seeds")
    print(f"results: {folder}")


def each_seed(config: AnyConfig) -> list[AnyConfig]:
    """The configurations of the single runs, a folder each."""
    found = []
    for seed in dict.fromkeys(map(int, config.seeds.split(","))):
        folder, own = str(Path(config.run_dir) / f"seed_{seed}"), replace(config.train_args, seed=seed)
        found.append(replace(config, seeds=None, run_dir=folder, train_args=own))
    return found


def over_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Test metric -> `mean`, `std` (n - 1; None for one seed) and `values` over the summaries of runs."""
    found = {}
    for name in (name for name in summaries[0] if name.startswith("test_")):
        values = [summary[name] for summary in summaries]
        std = statistics.stdev(values) if len(values) > 1 else None
        found[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return found


def dry_run(config: AnyConfig, build_task: Build) -> None:
    """Prints what would be read and trained, and measures the memory of one training step on the first batch; writes
    nothing."""
    task, model = _task_and_model(replace(config, data=replace(config.data, convert=False)), build_task)
    name = config.train_args.device
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    task.prepare(model)
    model.to(device)
    optimizer, _ = build_optimizer(config.optimization, model.parameters(), task.steps_per_epoch)
    inputs, target = next(task.train_batches(torch.Generator().manual_seed(config.train_args.seed), device))
    backward_in_parts(partial(task.loss, model), inputs, target, model.networks_at_once(device))
    optimizer.step()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = config.train_args.num_epochs
    runs = "" if config.seeds is None else f", for each of {len(each_seed(config))} seeds"
    print(f"model: {type(model).__name__}, {parameters:,} parameters")
    print(
        f"steps: {task.steps_per_epoch:,} per epoch of {config.batch_size:,} networks each, "
        f"{epochs:,} epochs at most: {epochs * task.steps_per_epoch:,} steps{runs}"
    )
    print(
        f"memory: {peak_memory(device) / 1e9:.2f} GB, measured: the peak of "
        f"{'this process' if device.type == 'cpu' else 'torch on the GPU'} over one training step on real data"
    )
    print(f"results would go to {config.run_dir}; nothing was written")


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once: on a GPU by torch, else by this process in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
