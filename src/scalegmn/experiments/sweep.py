"""Sweeps: runs with different settings, to find those that are best on the validation split.

Trials are chosen and judged by Optuna (Akiba et al., 2019), whose study is a file in the sweep's folder: the same
command goes on where it stopped. `--export wandb` writes the sweep for Weights & Biases instead of running it.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from scalegmn.configuration.parsing import NO_OPTION
from scalegmn.experiments.file_kinds import refuse_other_kinds
from scalegmn.experiments.processes import (
    POLL_SECONDS,
    RESERVED_KEYS,
    last_line,
    only_here,
    program,
    started,
    word,
    words,
)
from scalegmn.reporting.files import write_atomic
from scalegmn.reporting.rows import read_rows, write_csv

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial


@dataclass(frozen=True)
class SweepConfig:
    """Which runs to try, and what is best."""

    script: str = "inr_classification.py"
    """What starts every trial: a task, a published script (its task is trained where there is no such file), or a
    script of your own."""

    base: tuple[str, ...] = ()
    """Configuration files of every trial, later ones before earlier ones."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of every trial, by dotted key, such as train_args.num_epochs: 5."""

    parameters: dict[str, Any] = field(default_factory=dict)
    """What differs, by dotted key: a list of values, or {uniform: [low, high]}, {log_uniform: [low, high]},
    {int: [low, high]}, ends included."""

    metric: str = "val_accuracy"
    """The validation metric to judge by, as in summary.json and metrics.jsonl."""

    maximize: bool = True
    """Whether larger is better."""

    method: Literal["tpe", "random", "grid"] = "tpe"
    """How values are chosen: near good ones (Bergstra et al., 2011); at random; all combinations of lists."""

    num_trials: int = 20
    """Trials in all; a grid has as many as combinations."""

    prune: bool = True
    """Stop a trial whose metric is worse than the median of earlier trials at the same epoch; never the first five."""

    seed: int = 0
    """Seed of the choice of values; train_args.seed is a setting of each run."""

    out: str = "sweeps/sweep"
    """Folder for the study, the trials' runs and the tables of results; files may call it `folder`."""

    export: Literal["wandb"] | None = None
    """Write the sweep for Weights & Biases to <out>/wandb.yml instead of running it."""

    imports: tuple[str, ...] = field(default=(), metadata=NO_OPTION)
    """Modules of the user that every trial imports first."""

    def __post_init__(self) -> None:
        problems = [] if self.num_trials >= 1 else [f"num_trials: found {self.num_trials}, expected at least 1"]
        if not self.metric.startswith("val_"):
            problems.append(f"metric: found {self.metric}, expected one of the validation split, such as val_accuracy")
        if not self.parameters:
            problems.append("parameters: found none, expected at least one key with its values")
        for key, values in self.parameters.items():
            problems += [f"parameters.{key}: {problem}" for problem in _problems(values)]
            if self.method == "grid" and not isinstance(values, list):
                problems.append(f"parameters.{key}: found {values}, but a grid needs a list")
            if key in self.settings:
                problems.append(f"{key}: found in settings and in parameters, expected in one of them")
        problems += [f"{key}: not in a sweep" for key in RESERVED_KEYS if key in {**self.settings, **self.parameters}]
        if problems:
            raise ValueError("; ".join(problems))

    def command(self, values: dict[str, Any]) -> list[str]:
        """The words after `python` that start a run with these values of the parameters."""
        return [*program(self.script), *words(self.base, {**self.settings, **values}, self.imports)]


def renamed_folder(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of a sweep's file, in which `out` may be called `folder`; no remarks."""
    refuse_other_kinds(content, "scalegmn sweep", {"folder", *(item.name for item in fields(SweepConfig))})
    if "folder" not in content:
        return content, []
    if "out" in content:
        raise ValueError("found both out and folder, which mean the same; keep out")
    return {"out" if key == "folder" else key: value for key, value in content.items()}, []


def _problems(values: Any) -> list[str]:
    """What is wrong with a parameter's values."""
    if isinstance(values, list):
        return [] if values else ["found an empty list"]
    expected = "expected a list, or one of uniform, log_uniform, int with [low, high]"
    if not isinstance(values, dict) or len(values) != 1:
        return [f"found {values}, {expected}"]
    ((kind, ends),) = values.items()
    if kind not in DISTRIBUTIONS or not isinstance(ends, list) or len(ends) != 2:
        return [f"found {values}, {expected}"]
    try:
        low, high = _ends(kind, ends)
    except (TypeError, ValueError):
        return [f"found {ends}, expected two {'whole ' if kind == 'int' else ''}numbers"]
    if not low < high or (kind == "log_uniform" and not low > 0) or not math.isfinite(high - low):
        return [f"found {ends}, expected the lower {'above 0 and ' if kind == 'log_uniform' else ''}first"]
    return []


def _ends(kind: str, ends: Sequence[Any]) -> list[Any]:
    """Both ends as numbers; YAML reads 1e-4 as a word."""
    return [int(end) if kind == "int" else float(end) for end in map(str, ends)]


def _choices(values: list[Any]) -> list[Any]:
    """The values of a list as Optuna keeps them: lists and mappings as JSON."""
    return [json.dumps(value) if isinstance(value, (list, dict)) else value for value in values]


DISTRIBUTIONS = {"uniform": "uniform", "log_uniform": "log_uniform_values", "int": "int_uniform"}
"""Kinds of distributions, and what Weights & Biases calls them."""


def suggested(config: SweepConfig, trial: Trial) -> dict[str, Any]:
    """A trial's value of each parameter."""
    suggestion = {}
    for key, values in config.parameters.items():
        if isinstance(values, list):
            suggestion[key] = trial.suggest_categorical(key, _choices(values))
            continue
        ((kind, ends),) = values.items()
        low, high = _ends(kind, ends)
        if kind == "int":
            suggestion[key] = trial.suggest_int(key, low, high)
        else:
            suggestion[key] = trial.suggest_float(key, low, high, log=kind == "log_uniform")
    return suggestion


def wandb_sweep(config: SweepConfig) -> dict[str, Any]:
    """The sweep as `wandb sweep` reads it."""
    parameters: dict[str, dict[str, Any]] = {}
    for key, values in config.parameters.items():
        if isinstance(values, list):
            parameters[key] = {"values": _choices(values)}
        else:
            ((kind, ends),) = values.items()
            low, high = _ends(kind, ends)
            parameters[key] = {"distribution": DISTRIBUTIONS[kind], "min": low, "max": high}
    start, settings = program(config.script), config.command({})[len(program(config.script)) :]
    own_file = start == [config.script]
    command = ["${env}", "${interpreter}", *(["${program}"] if own_file else start)]
    sweep: dict[str, Any] = {
        "program": config.script,
        "method": {"tpe": "bayes"}.get(config.method, config.method),
        "metric": {"name": config.metric, "goal": "maximize" if config.maximize else "minimize"},
        "parameters": parameters,
        "command": [*command, *settings, "--wandb=True", "${args}"],
    }
    if config.method != "grid":
        sweep["run_cap"] = config.num_trials
    return sweep | ({"early_terminate": {"type": "hyperband", "min_iter": 3}} if config.prune else {})


def write_wandb_sweep(config: SweepConfig, path: Path) -> Path:
    """Writes `wandb_sweep` as YAML; returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, yaml.safe_dump(wandb_sweep(config), sort_keys=False))
    return path


def run_sweep(config: SweepConfig) -> None:
    """Runs the trials that are missing; results.csv and results.jsonl in the folder are written after each.

    Raises:
        ValueError: Optuna or the script is missing, the script refuses the settings, or the folder holds another sweep.
    """
    try:
        import optuna
    except ImportError:
        raise ValueError("optuna: not installed; `pip install optuna`, or --export wandb") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    program(config.script)  # before anything is written
    folder = Path(config.out)
    with only_here(folder, "sweep"):
        _check_plan(config, folder)
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name="sweep",
            direction="maximize" if config.maximize else "minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner() if config.prune else optuna.pruners.NopPruner(),
        )
        seed = config.seed + len(study.trials)  # else a sweep that goes on would choose the same again
        samplers = optuna.samplers
        study.sampler = (samplers.TPESampler if config.method == "tpe" else samplers.RandomSampler)(seed=seed)
        num_trials = config.num_trials
        if config.method == "grid":
            grid = list(itertools.product(*map(_choices, config.parameters.values())))
            num_trials = len(grid)
            for values in grid:
                study.enqueue_trial(dict(zip(config.parameters, values, strict=True)), skip_if_exists=True)
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # interrupted
            study.enqueue_trial(trial.params, user_attrs={"folder": _folder_of(trial)})
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        while len(rows := results(config, study)) < num_trials:
            run_trial(config, study.ask(), study)
            _write(folder, rows := results(config, study))
            print(_line(config, rows[-1]), flush=True)
            if all(row["state"] == "failed" for row in rows):
                raise ValueError(f"{folder}: {rows[-1]['error']}; the same command goes on with the next trial")
    _write(folder, rows)
    finished = [row for row in rows if row["state"] == "finished"]
    if not finished:
        raise ValueError(
            f"{folder}: all trials failed; {folder}/results.csv says why, a larger --num_trials tries others"
        )
    best = (max if config.maximize else min)(finished, key=lambda row: row[config.metric])
    print(f"best: {_line(config, best)}")
    print(f"results: {folder}/results.csv; scalegmn report {folder} compares the runs")


def _check_plan(config: SweepConfig, folder: Path) -> None:
    """Stores the settings of a new sweep, once the script has accepted them, or compares with those that are stored."""
    plan = {
        key: value for key, value in asdict(config).items() if key not in ("num_trials", "out", "export", "imports")
    }
    text = yaml.safe_dump(json.loads(json.dumps(plan)), sort_keys=False)
    path = folder / "sweep.yml"
    if path.exists():
        if path.read_text() != text:
            raise ValueError(f"{folder} holds another sweep ({path}); choose another --out")
        return
    example = {}
    for key, values in config.parameters.items():
        example[key] = values[0] if isinstance(values, list) else _ends(*next(iter(values.items())))[0]
    command = [sys.executable, *config.command(example), "--print_config"]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode != 0:
        raise ValueError(f"{config.script}: {last_line(tried.stderr)}")
    write_atomic(path, text)


def _folder_of(trial: Trial | FrozenTrial) -> str:
    """The name of a trial's run folder, which an interrupted trial keeps."""
    return trial.user_attrs.get("folder", f"trial-{trial.number:03d}")


def run_trial(config: SweepConfig, trial: Trial, study: Study) -> None:
    """Runs the script, tells the study each epoch's metric and the result; stops it when the study says so.

    Raises:
        ValueError: the run has no such metric.
    """
    from optuna.trial import TrialState

    run = Path(config.out) / _folder_of(trial)
    values, log = suggested(config, trial), run.with_name(f"{run.name}.log")
    epochs = -1
    if not (run / "summary.json").exists():  # it does when the sweep was killed right after
        with started([*config.command(values), f"--run_dir={run}", "--resume=auto"], log) as process:
            over = False
            while not over:
                over = process.poll() is not None
                for row in _rows(run)[epochs + 1 :]:
                    epochs += 1
                    trial.report(_metric(config, row, run / "metrics.jsonl"), epochs)
                    if not over and trial.should_prune():
                        study.tell(trial, state=TrialState.PRUNED)
                        return
                time.sleep(0 if over else POLL_SECONDS)
        if process.returncode != 0:
            trial.set_user_attr("error", last_line(log.read_text()))  # which interrupted trials lack
            study.tell(trial, state=TrialState.FAIL)
            return
    summary = json.loads((run / "summary.json").read_text())
    value = _metric(config, summary, run / "summary.json")
    numbers = {key: summary[key] for key in summary if key.startswith("test_") or key in ("best_epoch", "seconds")}
    trial.set_user_attr("results", numbers)
    study.tell(trial, value)


def _rows(run: Path) -> list[dict[str, Any]]:
    """The epochs of a run, none before it has begun."""
    path = run / "metrics.jsonl"
    return read_rows(path) if path.exists() else []


def _metric(config: SweepConfig, values: dict[str, Any], path: Path) -> float:
    """The sweep's metric among others."""
    if config.metric not in values:
        known = ", ".join(name for name in values if name.startswith("val_"))
        raise ValueError(f"metric: no {config.metric} in {path}, found {known}")
    return values[config.metric]


STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
"""Optuna's name of a trial's state -> ours."""


def results(config: SweepConfig, study: Study) -> list[dict[str, Any]]:
    """A row per trial that is over: its state, metric, values, test metrics; without those that were interrupted."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name not in STATES or (trial.state.name == "FAIL" and "error" not in trial.user_attrs):
            continue
        row = {"trial": _folder_of(trial), "state": STATES[trial.state.name], config.metric: trial.value}
        row |= {**trial.params, **trial.user_attrs.get("results", {})}
        rows.append(row | ({"error": trial.user_attrs["error"]} if "error" in trial.user_attrs else {}))
    return rows


def _write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Both tables of results."""
    write_csv(folder / "results.csv", rows)
    write_atomic(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _line(config: SweepConfig, row: dict[str, Any]) -> str:
    """A trial as a line of text."""
    values = "  ".join(f"--{key}={word(row[key])}" for key in config.parameters if key in row)
    value = "" if row[config.metric] is None else f"  {config.metric} {row[config.metric]:.4f}"
    return f"{row['trial']}  {row['state']}{value}  {row.get('error', values)}"
