"""Several models on one zoo and over seeds: results, and what each model costs.

Every model gets the same budget: the same seeds, and the same small grid of settings, of which it keeps those that are
best on the validation split with the first seed. The same command goes on where it stopped. All numbers are read from
the run folders.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch

from scalegmn.configuration.files import leaves
from scalegmn.configuration.parsing import NO_OPTION
from scalegmn.experiments.comparison_page import write_page
from scalegmn.experiments.config import Config, changed_keys, read_config
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
from scalegmn.experiments.report import read_run
from scalegmn.experiments.study import (
    add_other_zoos,
    add_p_values,
    conditions,
    last_part,
    networks_of,
    results,
    row,
    summary_of,
    table,
    with_controls,
    write_curves,
)
from scalegmn.reporting.figures import results_and_costs
from scalegmn.reporting.files import write_atomic
from scalegmn.reporting.rows import write_csv
from scalegmn.zoos.zoo_format import is_zoo

PUBLISHED = "published"
"""In a model's entry: what its paper reports."""

HOW_READ = ("switch_to_canon", "canonicalize", "augment")
"""Of the section `data`, what may differ between models; the others say which networks there are."""


@dataclass(frozen=True)
class CompareConfig:
    """Which models to compare, and how much each may try."""

    script: str = "inr_classification.py"
    """What starts every run: a task, a published script (its task is trained where there is no such file), or a script
    of your own."""

    models: dict[str, Any] = field(default_factory=dict)
    """Name of a model: {conf: FILE}, and settings of this model alone, which win; `published`, a text such as 96 % of
    55,000 networks, stands beside its result, marked as of other data."""

    only: tuple[str, ...] = ()
    """Names of the models to compare; none: all."""

    common: dict[str, Any] = field(default_factory=dict)
    """Settings of all models, such as train_args.num_epochs: 5; they win over the files."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each model for each seed."""

    tune: dict[str, Any] = field(default_factory=dict)
    """Lists of values by dotted key: each model keeps the combination that is best on the validation split with the
    first seed."""

    train_networks: tuple[int, ...] = ()
    """Learning curves: with the settings that it keeps, each model is also trained on so many of the training networks
    (data.train_networks), with all seeds."""

    controls: bool = False
    """Also show the test metric on networks that were moved along their orbits, the work per network, and simple models
    on the same networks, in learning curves too: of queried points, of flattened weights, of statistics."""

    test_zoos: tuple[str, ...] = ()
    """Folders of other zoos: also show the test metric on their test networks, such as wider ones, on which no model is
    trained."""

    page: str | None = None
    """A Markdown file to write too: tables, figures beside it, and the command."""

    processes: int = 1
    """Runs at the same time, each with its share of the cores."""

    out: str = "comparisons/comparison"
    """Folder for table.md, table.csv, figure.png, tuning.csv and the runs."""

    imports: tuple[str, ...] = field(default=(), metadata=NO_OPTION)
    """Modules of the user that every run imports first."""

    def __post_init__(self) -> None:
        problems = [] if self.models else ["models: found none, expected at least one, as NAME: {conf: FILE}"]
        unknown = [name for name in self.only if name not in self.models]
        problems += [f"only: found {name}, expected some of {', '.join(self.models)}" for name in unknown]
        for name, entry in self.models.items():
            if not re.fullmatch(r"[\w+-][\w.+ -]*", str(name)):
                problems.append(f"models.{name}: found a name that is no folder's, expected letters, digits, . + - _")
            if not isinstance(entry, dict) or not isinstance(entry.get("conf"), str):
                problems.append(f"models.{name}: found {entry}, expected {{conf: FILE}} and settings")
                continue
            settings = self.settings(name)
            problems += [f"{key}: not in a comparison" for key in RESERVED_KEYS if key in settings]
            problems += ["train_args.seed: not in a comparison, use seeds"] if "train_args.seed" in settings else []
            both = [key for key in self.tune if key in settings]
            problems += [f"{key}: found in tune and in the settings of {name}, expected in one of them" for key in both]
        for key, values in self.tune.items():
            if not isinstance(values, list) or not values or len({*map(word, values)}) < len(values):
                problems.append(f"tune.{key}: found {values}, expected a list of different values")
        if not self.seeds or min(self.seeds) < 0 or len({*self.seeds}) < len(self.seeds):
            problems.append(f"seeds: found {list(self.seeds)}, expected different numbers from 0 on")
        if any(number < 1 for number in self.train_networks):
            problems.append(f"train_networks: found {list(self.train_networks)}, expected numbers from 1 on")
        if self.processes < 1:
            problems.append(f"processes: found {self.processes}, expected at least 1")
        if problems:
            raise ValueError("; ".join(dict.fromkeys(problems)))

    @property
    def threads(self) -> int:
        """The threads of each run: a share of those that this process may use (its cores, or OMP_NUM_THREADS)."""
        return max(1, torch.get_num_threads() // self.processes)

    @property
    def names(self) -> tuple[str, ...]:
        """The models to compare."""
        return self.only or tuple(self.models)

    def settings(self, name: str) -> dict[str, Any]:
        """A model's settings by dotted key, but for those that are tuned."""
        of_model = {key: value for key, value in self.models[name].items() if key not in ("conf", PUBLISHED)}
        return {**dict(leaves(self.common)), **dict(leaves(of_model))}


@dataclass(frozen=True)
class PlannedRun:
    """A run that a comparison may need."""

    model: str
    """Name of the model."""

    tuned: dict[str, Any]
    """Values of the keys that are tuned."""

    config: Config
    """The run's configuration, with its seed and folder."""

    train_networks: int | None
    """The point of the learning curve; None: all training networks of the configuration."""

    command: list[str]
    """The words after `python` that start the run."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.folder

    @property
    def is_finished(self) -> bool:
        """Whether the run has its results."""
        return (self.folder / "summary.json").exists()


def plan(config: CompareConfig) -> list[PlannedRun]:
    """Each model with each combination of what is tuned, each seed, and each number of training networks.

    Raises:
        ValueError: the script is missing, settings are refused, or models read different networks.
    """
    start = program(config.script)
    runs: list[PlannedRun] = []
    problems = [
        f"test_zoos: found {path}, expected the folder of a zoo" for path in config.test_zoos if not is_zoo(Path(path))
    ]
    names = Counter(Path(path).name for path in config.test_zoos)
    problems += [
        f"test_zoos: found {number} folders called {name}, expected other names"
        for name, number in names.items()
        if number > 1
    ]
    for name in config.names:
        entry = config.models[name]
        for values in itertools.product(*config.tune.values()):
            tuned = dict(zip(config.tune, values, strict=True))
            settings = words([entry["conf"]], {**config.settings(name), **tuned}, config.imports)
            try:
                base: Config = read_config(settings)
            except ValueError as error:  # settings are words on a command line that the user has not written
                problems.append(f"models.{name}: {str(error).replace('command line: ', '')}")
                continue
            folder = Path(config.out, name, _name(tuned))
            for number, seed in itertools.product((None, *config.train_networks), config.seeds):
                run_dir = str(folder / ("" if number is None else f"networks_{number}") / f"seed_{seed}")
                content = replace(base, train_args=replace(base.train_args, seed=seed), run_dir=run_dir)
                ending = [f"--train_args.seed={seed}", f"--run_dir={run_dir}", "--resume=auto"]
                if number is not None:
                    content = replace(content, data=replace(base.data, train_networks=number))
                    ending.append(f"--data.train_networks={number}")
                runs.append(PlannedRun(name, tuned, content, number, [*start, *settings, *ending]))
    first = asdict(runs[0].config.data) if runs else {}
    for run in [run for run in runs if run.train_networks is None]:
        for key, value in asdict(run.config.data).items():
            if value != first[key] and key not in HOW_READ:
                problems.append(f"models.{run.model}: data.{key}: found {value}, {runs[0].model} has {first[key]}")
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return runs


def _name(tuned: Mapping[str, Any]) -> str:
    """The folder of a combination of values; none when nothing is tuned."""
    return ",".join(f"{last_part(key)}={word(value)}" for key, value in tuned.items()).replace("/", "_")


def compare(config: CompareConfig) -> list[Path]:
    """Trains what is missing, writes the tables and the figure, prints the table.

    Returns:
        The folders of runs that failed.

    Raises:
        ValueError: as `plan`; the folder holds runs of other configurations or networks, or is in use.
    """
    runs, out = plan(config), Path(config.out)
    with only_here(out, "comparison"):
        for run in runs:
            _check(run)
        curves = [run for run in runs if run.train_networks is not None]
        runs = [run for run in runs if run.train_networks is None]
        trials = [run for run in runs if run.config.train_args.seed == config.seeds[0]]
        failed = train(config, trials)
        chosen = {name: choose([run for run in trials if run.model == name]) for name in config.names}
        if config.tune:
            write_csv(out / "tuning.csv", [_trial(run, run.tuned == chosen[run.model]) for run in trials])
        runs = [run for run in runs if run.tuned == chosen[run.model]]
        failed += train(config, [run for run in runs if run not in trials])
        runs = [run for run in runs if run.is_finished]
        if not runs:
            return failed
        networks = networks_of(runs)
        rows = [row(name, chosen[name] or {}, [run for run in runs if run.model == name]) for name in config.names]
        add_p_values(rows, runs)
        for model_row in rows:
            published = config.models[model_row["model"]].get(PUBLISHED)
            model_row |= {} if published is None else {PUBLISHED: published}
        add_other_zoos(rows, runs, config.test_zoos)
        of_models = rows
        if config.controls:
            rows = with_controls(rows, runs)
        text = f"{table(rows)}\n\n{conditions(config, runs, networks)}\n"
        write_csv(out / "table.csv", rows)
        write_atomic(out / "table.md", text)
        metric = next(key for model_row in rows for key in model_row if key.startswith("test_"))
        points = {
            model_row["model"]: (model_row["seconds"], model_row[metric], model_row[f"{metric}_std"] or 0.0)
            for model_row in of_models
            if model_row["seeds"]
        }
        results_and_costs(out / "figure.png", points, metric.replace("_", " ", 1))
        curves = [run for run in curves if run.tuned == chosen[run.model]]
        failed += train(config, curves)
        if curves:
            write_curves(out, [run for run in curves if run.is_finished] + runs, metric, config.controls)
        if config.page is not None:
            write_page(Path(config.page), out, text)
    print(f"\n{text}\nresults: {out}")
    return failed


def _check(run: PlannedRun) -> None:
    """Raises ValueError when the run's folder holds a run of another configuration."""
    if (run.folder / "config.yml").exists():
        read_run(run.folder, run.model)  # names damaged files
        changed = changed_keys(run.config, run.folder / "config.yml")
        if changed:
            remedy = "leave it so, or choose another --out"
            raise ValueError(f"{run.folder} was trained with {', '.join(changed)}; {remedy}")


def train(config: CompareConfig, runs: Sequence[PlannedRun]) -> list[Path]:
    """Trains the runs that are not finished, `processes` at a time; returns the folders of those that failed."""
    waiting, failed = [run for run in runs if not run.is_finished], []
    running: list[tuple[PlannedRun, Popen[Any], Path]] = []
    with ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < config.processes:
                run = waiting.pop(0)
                log = run.folder.with_name(f"{run.folder.name}.log")
                log.parent.mkdir(parents=True, exist_ok=True)
                starting = started(run.command, log, OMP_NUM_THREADS=str(config.threads))
                running.append((run, stack.enter_context(starting), log))
            time.sleep(POLL_SECONDS)
            for run, process, log in [entry for entry in running if entry[1].poll() is not None]:
                running.remove((run, process, log))
                if process.returncode == 0:
                    values = results(read_run(run.folder, run.model))
                    shown = [f"{key} {values[key]:.4f}" for key in values if key.startswith(("test_", "val_"))]
                    print(f"{run.folder}: {', '.join(shown)}, {values['seconds']:.0f} s", flush=True)
                else:
                    failed.append(run.folder)
                    reason = last_line(log.read_text())
                    text = f"{run.folder}: failed, exit code {process.returncode}: {reason}"
                    print(text, file=sys.stderr, flush=True)
    return failed


def choose(trials: Sequence[PlannedRun]) -> dict[str, Any] | None:
    """The tuned values of the trial that is best on the validation split; None when there are several and none has
    finished."""
    if len(trials) == 1:
        return trials[0].tuned

    def value(trial: PlannedRun) -> float:
        run = read_run(trial.folder, trial.model)
        monitor = summary_of(run)["monitor"]
        metric = results(run)[f"val_{monitor['name']}"]
        return -math.inf if math.isnan(metric) else metric if monitor["maximize"] else -metric

    finished = [trial for trial in trials if trial.is_finished]
    return max(finished, key=value).tuned if finished else None


def _trial(run: PlannedRun, is_chosen: bool) -> dict[str, Any]:
    """A row of tuning.csv: a trial's settings, and its results on the validation split."""
    values = results(read_run(run.folder, run.model)) if run.is_finished else {}
    values = {key: value for key, value in values.items() if key.startswith("val_") or key == "seconds"}
    return {"model": run.model, **run.tuned, "seed": run.config.train_args.seed, "chosen": is_chosen, **values}
