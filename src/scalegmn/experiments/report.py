"""`scalegmn report RUN [RUN...] [--out report.html]`: one page that compares runs, finished or not.

A RUN is a run's folder, or one that holds several (of seeds, of a sweep). The page needs nothing but itself.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from scalegmn.configuration.files import leaves
from scalegmn.reporting.figures import compared_curves
from scalegmn.reporting.run_folder import read_rows

MARK = '<meta name="generator" content="scalegmn.experiments.report">'
"""What tells our page from another file, which is not overwritten."""

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #f4f5f7; margin: 0 }
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 0 0 .7rem }
.note { color: #667085; margin: 0 }
section { background: #fff; border: 1px solid #e1e4ea; border-radius: 8px; padding: 1rem 1.2rem; margin-top: 1.2rem;
  overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .32rem .75rem; border-bottom: 1px solid #eceef2; text-align: left }
td.number, th.number { text-align: right }
thead th { border-bottom: 2px solid #cfd4dd; font-weight: 600; vertical-align: bottom }
#results thead th { cursor: pointer } #results thead th:hover { color: #1857c0 }
th[aria-sort=ascending]::after { content: " \\2191" } th[aria-sort=descending]::after { content: " \\2193" }
tbody tr:hover { background: #f7f9fc }
.state { border-radius: 1em; padding: .1em .6em; font-size: .85em; background: #e3f4e8; color: #17663a }
.unfinished { background: #fdf0d5; color: #8a5a00 }
img { max-width: 100%; height: auto }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
figure { margin: 0; max-width: 100% } figcaption { color: #667085; font-size: .85em }
.figures img { max-height: 420px }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0 }
"""

SCRIPT = """
const table = document.getElementById("results"), body = table.tBodies[0];
table.querySelectorAll("thead th").forEach((header, column) => header.onclick = () => {
  const rising = header.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => header.classList.contains("number") ? a - b : a.localeCompare(b);
  const empty = row => key(row) === "";
  [...body.rows].sort((a, b) => empty(a) - empty(b) || (rising ? 1 : -1) * order(key(a), key(b)))
    .forEach(row => body.append(row));
});
"""


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds.

    Attributes:
        name: of the run on the page.
        folder: of the run.
        config: dotted key -> value of config.yml.
        rows: of metrics.jsonl.
        summary: summary.json; None: the run is not finished.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None

    def results(self) -> dict[str, Any]:
        """The numbers that the summary has; of an unfinished run, the last epoch's."""
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
        ValueError: a folder holds none, or a file of one is damaged.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        configs = [folder / "config.yml"] if (folder / "config.yml").exists() else sorted(folder.glob("*/config.yml"))
        if not configs:
            raise ValueError(f"{folder}: no config.yml there nor one folder below; expected the folder of a run")
        paths |= {config.parent.resolve(): config.parent for config in configs}
    return [read_run(path, name) for path, name in zip(paths.values(), _names(list(paths)), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """As much of the end of each path as tells them all apart."""
    parts = [path.parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]


def read_run(folder: Path, name: str) -> RunRecord:
    """A run, under a name; raises ValueError with the name of a damaged file."""
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
    """The HTML."""
    unfinished = sum(run.summary is None for run in runs)
    note = f"{len(runs)} run{'s' if len(runs) > 1 else ''}" + (f", {unfinished} unfinished" if unfinished else "")
    curves = {run.name: run.rows for run in runs if any("train_loss" in row for row in run.rows)}
    sections = {
        "Results": _results(runs) + '<p class="note">A click on a column sorts by it.</p>',
        "Curves": _image(compared_curves(curves), "all runs")
        if curves
        else '<p class="note">No epoch is over yet.</p>',
        "Configuration": _differences(runs),
        "Data": _metadata({run.name: _data(run) for run in runs}),
        "Versions": _metadata({run.name: _versions(run) for run in runs}),
        "Figures": "".join(map(_figures, runs)),
    }
    content = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in sections.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}<title>scalegmn: {note}</title>'
        f'<style>{STYLE}</style></head><body><main><h1>Runs compared</h1><p class="note">{note}</p>'
        f"{content}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _results(runs: Sequence[RunRecord]) -> str:
    """The sortable table: a row per run, test metrics first."""
    results = [run.results() for run in runs]
    columns = list(dict.fromkeys(name for found in results for name in found))
    columns.sort(key=lambda name: (not name.startswith("test_"), not name.startswith("val_")))
    kinds = {
        name: "text" if any(isinstance(found.get(name), str) for found in results) else "number" for name in columns
    }
    lines = []
    for run, found in zip(runs, results, strict=True):
        state = "unfinished" if run.summary is None else "finished"
        values = ((found.get(name, ""), kind) for name, kind in kinds.items())
        cells = (f'<td class="{kind}" data-value="{escape(str(v))}">{escape(_text(v))}</td>' for v, kind in values)
        lines.append(f'{_cell(run.name)}<td><span class="state {state}">{state}</span></td>{"".join(cells)}')
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in kinds.items())
    return _table(f"<th>run</th><th>state</th>{head}", lines, ' id="results"')


def _differences(runs: Sequence[RunRecord]) -> str:
    """The keys of config.yml in which runs differ, a row each."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    found = {key: [run.config.get(key, "") for run in runs] for key in keys}
    lines = [_cell(key) + "".join(map(_cell, values)) for key, values in found.items() if _differ(values)]
    head = "<th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    return _table(head, lines) if lines else '<p class="note">The same in all runs.</p>'


def _metadata(metadata: Mapping[str, Mapping[str, str]]) -> str:
    """A row of metadata per run, or one for all where they agree."""
    found = list(metadata.values())
    if not _differ(found):
        metadata = {"all runs": found[0]}
    keys = list(dict.fromkeys(key for own in found for key in own))
    head = "<th></th>" + "".join(f"<th>{escape(key)}</th>" for key in keys)
    return _table(
        head, [_cell(name) + "".join(_cell(own.get(key, "")) for key in keys) for name, own in metadata.items()]
    )


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _table(head: str, lines: Sequence[str], attributes: str = "") -> str:
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table{attributes}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(value: Any) -> str:
    return f"<td>{escape(_text(value))}</td>"


def _text(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value)


def _data(run: RunRecord) -> dict[str, str]:
    """Which networks a run reads."""
    data = (run.summary or {}).get("data", {"zoo": run.config.get("data.dataset_path", "")})
    sizes = ", ".join(f"{number:,} {split}" for split, number in data.get("networks", {}).items())
    known = {name: str(data.get(name, "")) for name in ("zoo", "sha256", "read")}
    return {**known, "sha256": known["sha256"][:12], "networks": sizes}


def _versions(run: RunRecord) -> dict[str, str]:
    """What a run was made with."""
    summary = run.summary or {}
    commit, *changes = (summary.get("git_commit") or "").split("-")
    return {**summary.get("versions", {}), "git commit": "-".join([commit[:10], *changes])}


def _figures(run: RunRecord) -> str:
    """The run's figures, which can be folded away."""
    images = [_image(path.read_bytes(), path.stem) for path in sorted((run.folder / "figures").glob("*.png"))]
    content = "".join(images) or '<p class="note">None yet.</p>'
    return f'<details open><summary>{escape(run.name)}</summary><div class="figures">{content}</div></details>'


def _image(content: bytes, caption: str) -> str:
    """A PNG inside the page."""
    data, text = b64encode(content).decode(), escape(caption.replace("_", " "))
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
