"""`scalegmn symmetry --conf FILE | --checkpoint RUN`: which symmetries a model keeps."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from scalegmn.experiments.config import read_config
from scalegmn.experiments.symmetry_report import CheckConfig, measure


def run(words: Sequence[str]) -> None:
    """Prints the table; exit code 1 if a claimed symmetry is broken."""
    table, broken = measure(read_config(words, CheckConfig, "scalegmn symmetry"))
    print(table)
    sys.exit(1 if broken else 0)
