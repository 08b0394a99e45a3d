"""`scalegmn compare --conf compare/digits.yml --out DIR`: several models on one zoo."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from scalegmn.configuration.parsing import parse
from scalegmn.experiments.compare import CompareConfig, compare
from scalegmn.experiments.file_kinds import only_for

COMMAND = "scalegmn compare"


def run(words: Sequence[str]) -> None:
    """Trains what is missing and prints the table; exit code 1 when a run has failed."""
    failed = compare(parse(CompareConfig, words, COMMAND, only_for(COMMAND, CompareConfig)))
    if failed:
        names = ", ".join(map(str, failed))
        print(f"error: {len(failed)} failed ({names}); the same command tries them again", file=sys.stderr)
        sys.exit(1)
