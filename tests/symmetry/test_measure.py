import pytest
import torch

from scalegmn.networks import NetSpec
from scalegmn.symmetry.measure import assert_invariant, invariance_error, spread


def test_spread_by_hand():
    assert spread(torch.tensor([[0.0], [2.0]])) == 1.0


def test_harness_measures_and_fails(random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 1], "sine"), 8)

    def symmetric(p):
        return torch.stack([p.weights[1].square().sum((1, 2)), p.biases[0].abs().sum(1)], 1)

    def only_permutations(p):
        return p.biases[0].sum(1, keepdim=True)

    assert_invariant(symmetric, params, generator)
    assert_invariant(only_permutations, params, generator, scale=False)
    assert invariance_error(only_permutations, params, generator) > 0.1
    for broken in (only_permutations, lambda p: p.flatten()):
        with pytest.raises(AssertionError, match="of the spread between networks"):
            assert_invariant(broken, params, generator)


def test_not_a_number_is_never_invariant(random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 1], "sine"), 8)
    calls = []

    def fails_when_moved(p):
        calls.append(p)
        return p.biases[-1] * (float("nan") if len(calls) == 3 else 1.0)

    with pytest.raises(AssertionError):
        assert_invariant(fails_when_moved, params, generator)
    with pytest.raises(AssertionError):
        assert_invariant(lambda p: torch.zeros(8, 1), params, generator)  # says nothing about symmetry
