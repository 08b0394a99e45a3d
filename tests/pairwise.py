"""A small selection of many configurations in which every pair of options still occurs."""

from collections.abc import Hashable, Sequence
from itertools import combinations


def pairwise_cover(cases: Sequence[Sequence[Hashable]]) -> set[int]:
    """Places of cases that together have every pair of values (at two positions) that occurs in any case.

    Greedy: the next case is the first of those with the most pairs that are missing.

    Args:
        cases: the values of each case, one per position.
    """
    pairs = [set(combinations(enumerate(values), 2)) for values in cases]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda place: (len(pairs[place] & missing), -place))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
