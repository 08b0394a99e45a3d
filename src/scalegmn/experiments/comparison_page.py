"""The page of a comparison in Markdown, made from its folder."""

from __future__ import annotations

import csv
import shlex
import sys
from pathlib import Path

from scalegmn.reporting.files import write_atomic

FIGURES = {"figure": "Results and costs.", "curves": "Over the number of training networks."}
"""Figure in a comparison's folder -> what it shows."""


def write_page(path: Path, out: Path, text: str) -> None:
    """Writes the page, and the figures beside it.

    Args:
        path: of the page; figures are named after it.
        out: the comparison's folder.
        text: the table and its conditions, in Markdown.
    """
    command = shlex.join(["scalegmn", *sys.argv[1:]])
    parts = [
        f"# Comparison: {path.stem.replace('_', ' ')}",
        "Made from the runs' folders by",
        f"```bash\n{command}\n```",
        text.strip(),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, shows in FIGURES.items():
        if (out / f"{name}.png").exists():
            write_atomic(path.with_name(f"{path.stem}_{name}.png"), (out / f"{name}.png").read_bytes())
            parts.append(f"![{shows}]({path.stem}_{name}.png)")
    for title, name in (("Learning curves", "curves.csv"), ("What was tried", "tuning.csv")):
        if (out / name).exists():
            parts += [f"## {title}", _table(out / name)]
    write_atomic(path, "\n\n".join(parts) + "\n")


def _table(path: Path) -> str:
    """A CSV file as a table in Markdown, numbers with four digits."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    lines = [header, ["---"] * len(header), *([_shown(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: str) -> str:
    """A cell: fractions with four digits, all else as it is."""
    try:
        return value if "." not in value else f"{float(value):.4g}"
    except ValueError:
        return value.replace("|", "\\|")
