"""`scalegmn zoo canonicalize --conf FILE`: a canonical copy of a configuration's zoo."""

from __future__ import annotations

from collections.abc import Sequence

from scalegmn.experiments.canonical_zoo import CanonicalizeConfig, write_canonical_copy
from scalegmn.experiments.config import read_config


def run(words: Sequence[str]) -> None:
    """Writes the copy."""
    write_canonical_copy(read_config(words, CanonicalizeConfig, "scalegmn zoo canonicalize"))
