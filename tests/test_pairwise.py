from itertools import combinations, product

from pairwise import pairwise_cover


def test_every_pair_occurs_in_few_cases():
    cases = list(product("abcd", range(3), "xy", "xy"))
    chosen = [cases[place] for place in pairwise_cover(cases)]
    assert len(chosen) <= 14 < len(cases) == 48
    for one, other in combinations(range(4), 2):
        assert {(c[one], c[other]) for c in chosen} == {(c[one], c[other]) for c in cases}


def test_only_pairs_that_occur():
    assert pairwise_cover([("a", 1), ("b", 2), ("b", 2)]) == {0, 1}
