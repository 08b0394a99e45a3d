"""Rows of metrics: reading JSON Lines, writing CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalegmn.reporting.files import write_atomic


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, without a last line that is still being written."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, atomically: columns in the order of first appearance, empty where a row has no value."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row))
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
