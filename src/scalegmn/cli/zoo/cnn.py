"""`scalegmn zoo cnn --conf zoos/digits_cnn.yml`: train a zoo of CNNs."""

from __future__ import annotations

from collections.abc import Sequence

from scalegmn.configuration.parsing import parse
from scalegmn.experiments.file_kinds import only_for
from scalegmn.zoos.fit.cnn_zoo import CnnRecipe, make_cnn_zoo

COMMAND = "scalegmn zoo cnn"


def run(words: Sequence[str]) -> None:
    """Reads a recipe and makes its zoo."""
    make_cnn_zoo(parse(CnnRecipe, words, COMMAND, only_for(COMMAND, CnnRecipe)))
