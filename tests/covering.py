"""Products of options, of which each commit tests every pair and `make test-slow` the rest."""

import itertools

import pytest


def pairwise_cover(*axes):
    """Combinations in which every value of each axis meets every value of every other axis, in order of the product.

    Args:
        axes: the values of each option.

    Returns:
        Tuples of a value per axis: greedily few, and the same ones in every process.
    """
    combinations = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def pairs(combination):
        return set(itertools.combinations(enumerate(combination), 2))

    missing, chosen = set().union(*map(pairs, combinations)), set()
    while missing:
        best = max(combinations, key=lambda combination: len(pairs(combination) & missing))
        chosen.add(best)
        missing -= pairs(best)
    return [tuple(axis[k] for axis, k in zip(axes, c, strict=True)) for c in combinations if c in chosen]


def product_params(*axes):
    """All combinations for `pytest.mark.parametrize`; those outside the pairwise cover are slow."""
    axes = [list(axis) for axis in axes]
    cover = pairwise_cover(*axes)
    return [
        pytest.param(*combination, marks=() if combination in cover else pytest.mark.slow)
        for combination in itertools.product(*axes)
    ]
