"""`scalegmn report RUN [RUN...] [--out report.html]`: one page that compares runs, finished or not.

A RUN is a run's folder, or a folder that holds several runs (of seeds, of a sweep). The page is one file without links.
"""

from __future__ import annotations

import json
import statistics
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from scalegmn.configuration.files import leaves
from scalegmn.reporting.figures import compared_curves
from scalegmn.reporting.rows import read_rows
from scalegmn.reporting.words import counted

MARK = '<meta name="generator" content="scalegmn.experiments.report">'
"""Tells a report from another file, which is never overwritten."""


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder.

    Attributes:
        name: of the run on the page.
        folder: of the run.
        config: dotted key -> value, from config.yml.
        rows: lines of metrics.jsonl.
        summary: contents of summary.json; None: the run is not finished.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None

    def results(self) -> dict[str, Any]:
        """Numbers and texts of the summary; of an unfinished run, the numbers of its last epoch."""
        if self.summary is not None:
            return {
                name: value
                for name, value in self.summary.items()
                if isinstance(value, (int, float, str)) and name != "git_commit"
            }
        last = self.rows[-1] if self.rows else {}
        named = {name: value for name, value in last.items() if name.startswith("val_") or name == "seconds"}
        return {**named, "epochs": len(self.rows)}


def find_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in these folders, each once.

    Raises:
        ValueError: a folder holds no run, or a file of a run is damaged.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        configs = [folder / "config.yml"] if (folder / "config.yml").exists() else sorted(folder.glob("*/config.yml"))
        if not configs:
            raise ValueError(f"{folder}: no config.yml there nor one folder below; expected the folder of a run")
        paths |= {config.parent.resolve(): config.parent for config in configs}
    return [read_run(path, name) for path, name in zip(paths.values(), _names(list(paths)), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def read_run(folder: Path, name: str) -> RunRecord:
    """Reads a run.

    Args:
        folder: of the run.
        name: of the run on the page.

    Raises:
        ValueError: a file is damaged; the error names it.
    """
    path = folder / "config.yml"
    try:
        config = dict(leaves(yaml.safe_load(path.read_text())))
        path = folder / "metrics.jsonl"
        rows = read_rows(path) if path.exists() else []
        if any("epoch" not in row for row in rows):
            raise ValueError("a line without epoch")
        path = folder / "summary.json"
        summary = dict(json.loads(path.read_text())) if path.exists() else None
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())})") from None
    return RunRecord(name, folder, config, rows, summary)


def page(runs: Sequence[RunRecord]) -> str:
    """The HTML of the page (`report.html.jinja`); every value in it is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = _shown
    template = environment.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text())
    num_unfinished = sum(run.summary is None for run in runs)
    curves = {run.name: run.rows for run in runs if any("train_loss" in row for row in run.rows)}
    seeds = _over_seeds(runs)
    return template.render(
        mark=MARK,
        look=resources.files("scalegmn.reporting").joinpath("look.css").read_text(),
        script=resources.files(__package__).joinpath("report.js").read_text(),
        seeds=seeds,
        rows=json.dumps({name: list(rows) for name, rows in curves.items()}),
        note=counted(len(runs), "run") + (f", {num_unfinished} unfinished" if num_unfinished else ""),
        names=[run.name for run in runs],
        results=_results(runs),
        curves=_base64(compared_curves(curves)) if curves else None,
        differences=_differences(runs),
        data=_metadata({run.name: _data(run) for run in runs}),
        versions=_metadata({run.name: _versions(run) for run in runs}),
        figures={run.name: _figures(run) for run in runs},
    )


def _results(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The sortable table: columns with their kinds, test metrics first, and a row per run."""
    results = [run.results() for run in runs]
    columns = list(dict.fromkeys(name for values in results for name in values))
    columns.sort(key=lambda name: (not name.startswith("test_"), not name.startswith("val_")))
    has_text = {name: any(isinstance(values.get(name), str) for values in results) for name in columns}
    states = ["unfinished" if run.summary is None else "finished" for run in runs]
    return {
        "columns": {name: "text" if has_text[name] else "number" for name in columns},
        "rows": [
            {"name": run.name, "state": state, "values": values}
            for run, state, values in zip(runs, states, results, strict=True)
        ],
    }


PLACES = ("train_args.seed", "run_dir", "seeds", "resume")
"""Keys of config.yml in which runs of several seeds differ."""


def _over_seeds(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Runs that differ in the seed alone: mean, standard deviation and place on a common scale of each test metric;
    None unless several finished runs do."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.summary is not None:
            rest = {key: value for key, value in run.config.items() if key not in PLACES}
            groups.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return None
    results = {run.name: run.results() for group in groups.values() for run in group}
    is_number = {
        name: all(isinstance(values.get(name), (int, float)) for values in results.values())
        for values in results.values()
        for name in values
        if name.startswith("test_")
    }
    metrics = [name for name, number in is_number.items() if number]
    rows = []
    for group in several:
        cells = []
        for metric in metrics:
            everywhere = [values[metric] for values in results.values()]
            cells.append(_band([results[run.name][metric] for run in group], min(everywhere), max(everywhere)))
        rows.append({"name": ", ".join(run.name for run in group), "count": len(group), "cells": cells})
    return {"metrics": metrics, "rows": rows, "scale": "the smallest to the largest value of all runs"}


def _band(values: Sequence[float], low: float, high: float) -> dict[str, Any]:
    """Mean and standard deviation (n - 1), and where they are when `low` is at 0 and `high` at 100."""
    mean, std = statistics.fmean(values), statistics.stdev(values)
    size = high - low or 1.0

    def place(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (value - low) / size)), 2)

    start, end = place(mean - std), place(mean + std)
    places = [place(value) for value in values]
    text = f"mean {mean:.4g}, standard deviation {std:.4g}, {len(values)} runs"
    return {
        **{"mean": mean, "std": std, "low": start, "width": round(end - start, 2)},
        **{"middle": place(mean), "places": places, "text": text},
    }


def _differences(runs: Sequence[RunRecord]) -> list[list[Any]]:
    """A row per key of config.yml in which runs differ: the key, and its value in each run."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [[key, *(run.config.get(key, "") for run in runs)] for key in keys]
    return [row for row in rows if _differ(row[1:])]


def _metadata(metadata: Mapping[str, Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: a row of metadata per run, or a single row if all runs agree."""
    records = list(metadata.values())
    if not _differ(records):
        metadata = {"all runs": records[0]}
    keys = list(dict.fromkeys(key for record in records for key in record))
    return ["", *keys], [[name, *(record.get(key, "") for key in keys)] for name, record in metadata.items()]


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _shown(value: Any) -> str:
    """A value in a form for people: numbers in few digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value)


def _data(run: RunRecord) -> dict[str, str]:
    """The networks that a run reads."""
    data = (run.summary or {}).get("data", {"zoo": run.config.get("data.dataset_path", "")})
    sizes = ", ".join(f"{number:,} {split}" for split, number in data.get("networks", {}).items())
    known = {name: str(data.get(name, "")) for name in ("zoo", "sha256", "read")}
    classes = {"classes": ", ".join(data["classes"])} if "classes" in data else {}
    return {**known, "sha256": known["sha256"][:12], "networks": sizes, **classes}


def _versions(run: RunRecord) -> dict[str, str]:
    """Versions of the software that made a run."""
    summary = run.summary or {}
    commit, *changes = (summary.get("git_commit") or "").split("-")
    return {**summary.get("versions", {}), "git commit": "-".join([commit[:10], *changes])}


def _figures(run: RunRecord) -> dict[str, str]:
    """Caption -> PNG in base64, of the run's figures."""
    paths = sorted((run.folder / "figures").glob("*.png"))
    return {path.stem.replace("_", " "): _base64(path.read_bytes()) for path in paths}


def _base64(content: bytes) -> str:
    return b64encode(content).decode()
