import itertools

from covering import pairwise_cover, product_params


def test_every_pair_is_covered():
    axes = ["abcd", [1, 2], [True, False], "xyz"]
    cover = pairwise_cover(*axes)
    assert len(cover) == 12  # 4 x 3, the least that is possible
    for first, second in itertools.combinations(range(4), 2):
        assert {(c[first], c[second]) for c in cover} == set(itertools.product(axes[first], axes[second]))


def test_the_rest_is_slow():
    params = product_params("ab", [1, 2], [1, 2])
    assert [param.values for param in params] == list(itertools.product("ab", [1, 2], [1, 2]))
    assert len([param for param in params if not param.marks]) == 4
