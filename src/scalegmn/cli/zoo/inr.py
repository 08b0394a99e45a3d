"""`scalegmn zoo inr --conf zoos/digits_inr.yml`: fit a zoo of INRs."""

from __future__ import annotations

from collections.abc import Sequence

from scalegmn.configuration.parsing import parse
from scalegmn.experiments.file_kinds import only_for
from scalegmn.zoos.fit.inr_zoo import InrRecipe, make_zoo

COMMAND = "scalegmn zoo inr"


def run(words: Sequence[str]) -> None:
    """Reads a recipe and makes its zoo."""
    make_zoo(parse(InrRecipe, words, COMMAND, only_for(COMMAND, InrRecipe)))
