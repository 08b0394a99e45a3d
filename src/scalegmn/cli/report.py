"""`scalegmn report RUN... --out report.html`: one page about several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.experiments.report import MARK, find_runs, page
from scalegmn.reporting.files import write_atomic
from scalegmn.reporting.words import counted


def run(words: Sequence[str]) -> None:
    """Writes the page."""
    parser = Arguments("scalegmn report", "Write one HTML page about runs, finished or not.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run, or of several")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (report.html)")
    values = parser.read(words)
    if values.out.exists() and MARK.encode() not in values.out.read_bytes()[:500]:
        raise ValueError(f"--out: {values.out} exists already, and is no report")
    runs = find_runs(values.runs)
    write_atomic(values.out, page(runs))
    print(f"{values.out}: {counted(len(runs), 'run')}")
