"""Many configurations, of which each commit tests those with every pair of options, and `make test-slow` the rest."""

from collections.abc import Hashable, Sequence
from itertools import combinations, product

import pytest


def pairwise_cover(cases: Sequence[Sequence[Hashable]]) -> set[int]:
    """Places of cases that together have every pair of values (at two positions) that occurs in any case.

    Greedy: the next case is the first of those with the most pairs that are missing.

    Args:
        cases: the values of each case, one per position.
    """
    pairs = [set(combinations(enumerate(values), 2)) for values in cases]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda place: len(pairs[place] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def product_params(*axes):
    """All combinations for `pytest.mark.parametrize`; those outside the pairwise cover are slow."""
    axes = [list(axis) for axis in axes]
    cover = pairwise_cover(list(product(*(range(len(axis)) for axis in axes))))
    return [
        pytest.param(*combination, marks=() if place in cover else pytest.mark.slow)
        for place, combination in enumerate(product(*axes))
    ]
