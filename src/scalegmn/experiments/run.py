"""From a configuration to trained and tested models."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from scalegmn.experiments.config import RunConfig, ScriptConfig, start_run
from scalegmn.models.base import Metanetwork
from scalegmn.models.visibility import least_visible
from scalegmn.reporting.files import git_commit, versions, write_json
from scalegmn.reporting.words import counted
from scalegmn.tasks import ZooTask
from scalegmn.training.launch import NOT_FINITE, STOPPED, ending_together, launch
from scalegmn.training.memory import peak_memory
from scalegmn.training.task import Task
from scalegmn.training.trainer import Stopped, Trainer

if TYPE_CHECKING:
    from scalegmn.training.launch import Fabric

AnyConfig = TypeVar("AnyConfig", bound=ScriptConfig)
AnyRun = TypeVar("AnyRun", bound=RunConfig)
BuildTask = Callable[[Any], ZooTask]
Build = Callable[[Any], tuple[Task, nn.Module]]
Finished = Callable[[Any, Any, Any, dict[str, Any]], None]


def train(config: AnyConfig, build_task: BuildTask, finished: Finished | None = None) -> None:
    """`train_runs` of a metanetwork on a task.

    Args:
        config: a configuration with a `run_dir` (`with_run_dir`).
        build_task: the task of a configuration; may raise ValueError.
        finished: called with configuration, task, trained model and summary of each run, in the first process.
    """

    def build(config: AnyConfig) -> tuple[ZooTask, Metanetwork]:
        return _task_and_model(config, build_task)

    train_runs(config, build, lambda fabric: dry_run(fabric, config, build_task), finished)


def train_runs(
    config: RunConfig, build: Build, dry_run: Callable[[Fabric], None], finished: Finished | None = None
) -> None:
    """Trains and tests: once, for each of `config.seeds`, or not at all (`config.dry_run`).

    Ends the process with exit code 75 when a signal stopped a run, 3 when a loss or gradient was not finite.

    Args:
        config: a configuration with a `run_dir` (`with_run_dir`).
        build: the task of a configuration, and what is trained on it; may raise ValueError.
        dry_run: what is done instead where the configuration asks for it.
        finished: called with configuration, task, trained model and summary of each run, in the first process.

    Raises:
        ValueError: the configuration and the data do not fit, or a run cannot go on; nothing is written then.
    """
    config.train_args.check_device()
    fabric = launch(config.train_args.device, config.train_args.devices, config.precision)
    if config.dry_run:
        dry_run(fabric)
    elif config.seeds is not None:
        train_seeds(fabric, config, build, finished)
    else:
        train_once(fabric, config, build, finished)


def train_once(fabric: Fabric, config: RunConfig, build: Build, finished: Finished | None) -> None:
    """One run; results in its folder."""
    with ending_together(fabric):
        task, model = build(config)
        run = start_run(config) if fabric.is_global_zero else None
    try:
        summary = Trainer(fabric, task, model, config.train_args, config.optimization, run).fit()
    except (Stopped, FloatingPointError) as error:
        if not fabric.is_global_zero:
            raise SystemExit(0) from None  # the first process reports why
        print(f"{'stopped' if isinstance(error, Stopped) else 'error'}: {error}", file=sys.stderr)
        raise SystemExit(STOPPED if isinstance(error, Stopped) else NOT_FINITE) from None
    if finished is not None and summary is not None:
        finished(config, task, model, summary)


def _task_and_model(config: AnyConfig, build_task: BuildTask) -> tuple[ZooTask, Metanetwork]:
    task = build_task(config)
    if config.train_args.compile and len(task.architectures) > 1:
        found = f"{len(task.architectures):,} architectures"
        raise ValueError(f"train_args.compile: found True, expected False for {found}, which are not one graph")
    torch.manual_seed(config.train_args.seed)
    return task, config.model_config.build_for(task.architectures)


def train_seeds(fabric: Fabric, config: RunConfig, build: Build, finished: Finished | None) -> None:
    """A run per seed in `run_dir/seed_<seed>`, unless it is finished, from where it stopped; then
    `run_dir/summary.json`.

    Raises:
        ValueError: `run_dir` holds a single run, or a run with another configuration.
    """
    folder, runs = config.folder, each_seed(config)
    paths = [run.folder / "summary.json" for run in runs]
    with ending_together(fabric):
        if (folder / "config.yml").exists():
            raise ValueError(f"{folder} holds a single run; choose another --run_dir for --seeds")
        done = [path.exists() for path in paths]
        for run, path, is_finished in zip(runs, paths, done, strict=True):
            if is_finished and (path.parent / "config.yml").read_text() != run.to_yaml():
                raise ValueError(f"{path.parent} was trained with another configuration; choose another --run_dir")
    for run, path, is_finished in zip(runs, paths, done, strict=True):
        print(f"{path.parent}: {'finished already' if is_finished else 'training'}")
        if not is_finished:
            train_once(fabric, run, build, finished)
    if not fabric.is_global_zero:
        return
    metrics = over_seeds([json.loads(path.read_text()) for path in paths])
    seeds = [run.train_args.seed for run in runs]
    write_json(folder / "summary.json", {"seeds": seeds, **metrics, "versions": versions(), "git_commit": git_commit()})
    for name, values in metrics.items():
        spread = "" if values["std"] is None else f" +- {values['std']:.4f} (standard deviation)"
        print(f"{name.replace('_', ' ', 1)} {values['mean']:.4f}{spread}, {counted(len(seeds), 'seed')}")
    print(f"results: {folder}")


def each_seed(config: AnyRun) -> list[AnyRun]:
    """The configurations of the single runs, a folder each."""
    assert config.seeds is not None
    runs = []
    for seed in map(int, config.seeds.split(",")):
        folder, train_args = str(config.folder / f"seed_{seed}"), replace(config.train_args, seed=seed)
        runs.append(config.changed(seeds=None, run_dir=folder, resume="auto", train_args=train_args))
    return runs


def over_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Test metric -> `mean`, `std` (n - 1; None for one seed) and `values` over the summaries of runs."""
    metrics = {}
    for name in (name for name in summaries[0] if name.startswith("test_")):
        values = [summary[name] for summary in summaries]
        std = statistics.stdev(values) if len(values) > 1 else None
        metrics[name] = {"mean": statistics.fmean(values), "std": std, "values": values}
    return metrics


def dry_run(fabric: Fabric, config: AnyConfig, build_task: BuildTask) -> None:
    """Prints what would be read and trained, and measures the memory of one training step on the first batch; writes
    nothing."""
    with ending_together(fabric):
        task, model = _task_and_model(replace(config, data=replace(config.data, convert=False)), build_task)
    trainer = Trainer(fabric, task, model, config.train_args, config.optimization, None)
    generator = torch.Generator().manual_seed(config.train_args.seed)
    trainer.step(*next(task.train_batches(task.shuffle(generator)[:1], generator, fabric.device)))
    trainer.optimizer.step()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    epochs = config.train_args.num_epochs
    runs = "" if config.seeds is None else f", for each of {counted(len(each_seed(config)), 'seed')}"
    print(f"model: {type(model).__name__}, {parameters:,} parameters")
    print(f"sees: {least_visible(model, task.architectures)}")
    print(
        f"steps: {task.steps_per_epoch:,} per epoch of {counted(config.batch_size, 'network')} each, "
        f"{counted(epochs, 'epoch')} at most: {counted(epochs * task.steps_per_epoch, 'step')}{runs}"
    )
    print(
        f"memory: {peak_memory(fabric.device) / 1e9:.2f} GB, measured: the peak of "
        f"{'this process' if fabric.device.type == 'cpu' else 'torch on the GPU'} over one training step on real data"
    )
    print(f"results would go to {config.run_dir}; nothing was written")
