from itertools import combinations, product

from covering import pairwise_cover, product_params


def test_every_pair_is_covered():
    cases = list(product("abcd", [1, 2], [True, False], "xyz"))
    cover = [cases[place] for place in pairwise_cover(cases)]
    assert len(cover) == 12  # 4 x 3, the least that is possible
    for first, second in combinations(range(4), 2):
        assert {(c[first], c[second]) for c in cover} == {(c[first], c[second]) for c in cases}


def test_only_pairs_that_occur():
    assert pairwise_cover([("a", 1), ("b", 2), ("b", 2)]) == {0, 1}


def test_the_rest_is_slow():
    params = product_params("ab", [1, 2], [1, 2])
    assert [param.values for param in params] == list(product("ab", [1, 2], [1, 2]))
    assert len([param for param in params if not param.marks]) == 4
