"""What comparisons say: tables of means over seeds, significance of differences, and curves over the number of training
networks."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scalegmn.experiments.controls import controls, tested_on
from scalegmn.experiments.processes import word
from scalegmn.experiments.report import RunRecord, read_run
from scalegmn.reporting.figures import networks_and_results
from scalegmn.reporting.rows import write_csv

if TYPE_CHECKING:
    from scalegmn.experiments.compare import CompareConfig, PlannedRun

RESAMPLES = 1000
"""Of the bootstrap."""

COLUMNS = {
    "networks_per_second": "networks/s",
    "memory_gb": "peak memory [GB]",
    "processor_seconds": "processor seconds",
    "mflop": "MFLOP per network",
    "p_value": "p",
    "published": "published, on other data",
}
"""Names of columns in table.md that are not those of table.csv."""

PREDICTIONS = "figures/predictions.csv"
"""In a run's folder: network, true and predicted value of each test network."""


def _tau(true: NDArray, predicted: NDArray) -> float:
    from scipy.stats import kendalltau  # takes a second to import

    return float(kendalltau(true, predicted).statistic)


SCORES: dict[str, Callable[[NDArray, NDArray], float]] = {
    "accuracy": lambda true, predicted: float((true == predicted).mean()),
    "tau": _tau,
}
"""Metric -> its value from true and predicted values, of which larger is better."""


def read_predictions(run: Path) -> NDArray | None:
    """Network, true and predicted value of each test network of a finished run, [n, 3] in the order of networks; None
    if the run has no such file."""
    path = run / PREDICTIONS
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        rows = [[float(line[key]) for key in ("network", "true", "predicted")] for line in csv.DictReader(file)]
    return np.array(sorted(rows))


def p_values(runs: Mapping[str, Sequence[Path]], metric: str, best: str) -> dict[str, float | None]:
    """How likely it is, by the paired bootstrap, that the best model owes its lead to chance.

    Seeds and test networks are drawn with replacement, the same for both models (Efron and Tibshirani, 1993, ch. 16);
    the result is the share of `RESAMPLES` draws in which the model's mean over seeds is at least the best model's.

    Args:
        runs: model -> the folders of its runs, one per seed, in the same order of seeds.
        metric: a key of `SCORES`; others give no result.
        best: the model that all are compared with.

    Returns:
        Model -> the share; None of the best model, of an unknown metric, and where predictions are missing or the
        models' runs are not on the same networks.
    """
    result: dict[str, float | None] = dict.fromkeys(runs)
    predictions = {name: [read_predictions(folder) for folder in folders] for name, folders in runs.items()}
    reference = predictions[best]
    for name, own in predictions.items():
        pairs = list(zip(reference, own, strict=False))
        comparable = len(own) == len(reference) and metric in SCORES and name != best
        if not comparable or any(a is None or b is None or not np.array_equal(a[:, :2], b[:, :2]) for a, b in pairs):
            continue
        result[name] = _p_value([(a, b) for a, b in pairs if a is not None and b is not None], SCORES[metric])
    return result


def _p_value(pairs: Sequence[tuple[NDArray, NDArray]], score: Callable[[NDArray, NDArray], float]) -> float:
    """The share of resamples in which the second of each pair scores at least as well as the first."""
    draw, reached = np.random.default_rng(0), 0
    num_networks = len(pairs[0][0])
    for _ in range(RESAMPLES):
        networks = draw.integers(num_networks, size=num_networks)
        lead = 0.0
        for seed in draw.integers(len(pairs), size=len(pairs)):
            best, other = (predictions[networks] for predictions in pairs[seed])
            lead += score(best[:, 1], best[:, 2]) - score(other[:, 1], other[:, 2])
        reached += not lead > 0  # or not a number
    return reached / RESAMPLES


# Tables and curves


def results(run: RunRecord) -> dict[str, float]:
    """What a finished run is compared by: its task's metric on both splits, and what it cost.

    `networks_per_second`: trained, over all epochs. `memory_gb`: the largest of all epochs. A metric that was never
    finite on the validation split is nan.
    """
    summary = summary_of(run)
    metric = summary["monitor"]["name"]
    return {
        **{f"{split}_{metric}": summary.get(f"{split}_{metric}", math.nan) for split in ("test", "val")},
        "parameters": summary["parameters"],
        "networks_per_second": statistics.harmonic_mean([epoch["networks_per_second"] for epoch in run.rows]),
        "memory_gb": max(epoch["memory_gb"] for epoch in run.rows),
        "seconds": summary["seconds"],
        "processor_seconds": summary.get("processor_seconds", math.nan),  # runs of earlier versions lack it
    }


def summary_of(run: RunRecord) -> Mapping[str, Any]:
    """The summary of a finished run."""
    assert run.summary is not None
    return run.summary


def row(model: str, tuned: Mapping[str, Any], runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """A model's row of the table, over its finished runs.

    The mean and, as `_std`, the standard deviation (n - 1) of the metric on both splits; mean networks per second and
    seconds of a run, the largest memory; the number of runs as `seeds`.
    """
    finished = [results(read_run(run.folder, model)) for run in runs]
    summary: dict[str, Any] = {"model": model, **tuned}
    for key in finished[0] if finished else ():
        values = [of_run[key] for of_run in finished]
        if key.startswith(("test_", "val_")):
            summary |= _mean_and_spread(key, values)
        else:
            summary[key] = max(values) if key in ("parameters", "memory_gb") else statistics.fmean(values)
    return {**summary, "seeds": len(finished)}


def _mean_and_spread(key: str, values: Sequence[float]) -> dict[str, float | None]:
    """The mean of runs, and as `_std` their standard deviation (n - 1), None of one run."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None  # statistics.stdev refuses nan
    return {key: statistics.fmean(values), f"{key}_std": spread}


def add_p_values(rows: Sequence[dict[str, Any]], runs: Sequence[PlannedRun]) -> None:
    """Adds to each model's row how likely the best model owes its lead over it to chance (`study.p_values`)."""
    monitor = summary_of(read_run(runs[0].folder, runs[0].model))["monitor"]
    key, finished = f"test_{monitor['name']}", [row for row in rows if row["seeds"]]
    by_model = {row["model"]: [run.folder for run in runs if run.model == row["model"]] for row in finished}
    best = max(finished, key=lambda row: row[key] if monitor["maximize"] else -row[key])["model"]
    shares = p_values(by_model, monitor["name"], best)
    if any(share is not None for share in shares.values()):
        for row in finished:
            row["p_value"] = shares[row["model"]]


def with_controls(rows: Sequence[dict[str, Any]], runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """The rows with `controls` of each model's runs, the mean of each, and then a row for each simple model on the same
    networks (`simple_rows`)."""
    for model_row in rows:
        found = [controls(run.folder) for run in runs if run.model == model_row["model"]]
        model_row |= {key: statistics.fmean(of_run[key] for of_run in found) for key in (found[0] if found else ())}
    shown = {key for model_row in rows for key in model_row}
    return [*rows, *({key: value for key, value in of.items() if key in shown} for of in simple_rows(runs[0]))]


def add_other_zoos(rows: Sequence[dict[str, Any]], runs: Sequence[PlannedRun], folders: Sequence[str]) -> None:
    """Adds to each model's row its metric on the test networks of other zoos (`tested_on`), as
    `test_<metric>_on_<name of the zoo>`; that a model cannot read them is said on stderr."""
    for model_row, folder in itertools.product(rows, folders):
        of_model = [run for run in runs if run.model == model_row["model"]]
        try:
            values = [tested_on(run.folder, folder) for run in of_model]
        except ValueError as error:
            print(f"note: {model_row['model']} on {folder}: {error}", file=sys.stderr)
            continue
        if values:
            metric = summary_of(read_run(of_model[0].folder, of_model[0].model))["monitor"]["name"]
            model_row |= _mean_and_spread(f"test_{metric}_on_{Path(folder).name}", values)


def simple_rows(run: PlannedRun) -> list[dict[str, Any]]:
    """A row for each simple model on the networks of a finished run (`baselines.ROWS`); none if its task has no such
    models, or the networks are of several architectures."""
    from scalegmn.experiments.baselines import ROWS  # scikit-learn takes a second to import

    data = summary_of(read_run(run.folder, run.model))["data"]
    return ROWS[data["task"]](run.folder)[1:] if data["task"] in ROWS and data["architectures"] == 1 else []


def write_curves(out: Path, runs: Sequence[PlannedRun], metric: str, controls: bool) -> None:
    """Writes curves.csv and curves.png: the metric's mean and standard deviation (n - 1) over seeds, for each model and
    number of training networks; with `controls` also the metric of simple models (`simple_rows`)."""
    points: dict[tuple[str, int], list[float]] = {}
    first: dict[int, PlannedRun] = {}
    for run in runs:
        summary = summary_of(read_run(run.folder, run.model))
        number = summary["data"]["networks"]["train"]
        first.setdefault(number, run)
        points.setdefault((run.model, number), []).append(summary[metric])
    for number, run in first.items() if controls else ():
        for simple in simple_rows(run):
            points[simple["model"], number] = [simple[metric]]
    rows: list[dict[str, Any]] = [
        {
            "model": model,
            "train_networks": number,
            **_mean_and_spread(metric, values),
            "seeds": len(values),
        }
        for (model, number), values in sorted(points.items())
    ]
    write_csv(out / "curves.csv", rows)
    curves = {
        model: [row for row in rows if row["model"] == model] for model in dict.fromkeys(r["model"] for r in rows)
    }
    networks_and_results(out / "curves.png", curves, metric)


def networks_of(runs: Sequence[PlannedRun]) -> str:
    """The zoo of finished runs, and how many of its networks.

    Raises:
        ValueError: runs have read different networks.
    """
    data_of = {run.folder: summary_of(read_run(run.folder, run.model))["data"] for run in runs}
    (first, data), *others = data_of.items()
    for folder, other in others:
        if (other["sha256"], other["networks"]) != (data["sha256"], data["networks"]):
            raise ValueError(
                f"{folder} was trained on other networks than {first}; remove one, or choose another --out"
            )
    sizes = ", ".join(f"{number:,} {split}" for split, number in data["networks"].items())
    return f"{data['zoo']} (sha256 {data['sha256'][:12]}; {sizes} networks)"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, means with their standard deviations."""
    names = [key for key in dict.fromkeys(key for model_row in rows for key in model_row) if not key.endswith("_std")]
    names.sort(key=lambda key: (key != "model", key == "seeds"))  # those of a model without runs are fewer
    lines = [[COLUMNS.get(key, last_part(key).replace("_", " ", 1).replace("_on_", " on ")) for key in names]]
    lines += [[_cell(model_row, key) for key in names] for model_row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        f"| {' | '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])} |" for line in lines
    )


def _cell(model_row: Mapping[str, Any], key: str) -> str:
    """A value of a row, as people read it."""
    value = model_row.get(key)
    if key.startswith(("test_", "val_", "moved_")) and value is not None:
        spread = model_row.get(f"{key}_std")
        return f"{value:.4f}" + ("" if spread is None else f" +- {spread:.4f}")
    digits = {"p_value": ".3f", "networks_per_second": ",.0f", "memory_gb": ".2f", "seconds": ",.0f", "parameters": ","}
    digits |= {"processor_seconds": ",.0f", "mflop": ".3g"}
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    if missing:
        return ""
    return format(value, digits[key]) if key in digits else word(value).replace("|", "\\|")


def conditions(config: CompareConfig, runs: Sequence[PlannedRun], networks: str) -> str:
    """What all models had in common, as a sentence below the table."""
    epochs = " or ".join(map(str, sorted({run.config.train_args.num_epochs for run in runs})))
    tuned = [f"{key} among {', '.join(map(word, values))}" for key, values in config.tune.items()]
    budget = f"; {' and '.join(tuned)}, chosen on the validation split with seed {config.seeds[0]}" if tuned else ""
    seeds = ", ".join(map(str, config.seeds))
    moved = (
        "Moved: test networks after random permutations, scalars and half-turns of neurons. " if config.controls else ""
    )
    return (
        f"{networks}. Every model: epochs at most {epochs}{budget}; then mean +- standard deviation (n - 1) over seeds "
        f"{seeds}. {moved}"
        f"p: how likely the best model's lead is chance (paired bootstrap over test networks and seeds). "
        f"Seconds: of one run; threads of each: {config.threads}."
    )


def last_part(key: str) -> str:
    """The last part of a dotted key."""
    return key.rpartition(".")[2]
