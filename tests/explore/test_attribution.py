"""Attributions follow the symmetries, and say what a prediction rests on."""

import pytest
from contract import build

from scalegmn.explore import attribution
from scalegmn.explore.attribution import (
    gradient_times_weight,
    integrated_gradients,
    reference_network,
    score_of,
    symmetries_to_remove,
)
from scalegmn.models.flat_mlp import FlatMLPConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.symmetry.groups import GroupElement, PhaseShift

SMALL = {"hidden_dim": 8, "num_layers": 3, "out_dim": 3}
CNN = NetSpec((LayerSpec(1, 4, (3, 3), "relu"), LayerSpec(4, 5, (3, 3), "relu"), LayerSpec(5, 2)))
CASES = {
    "sine": (NetSpec.mlp([2, 6, 5, 1], "sine", w0=6.0), ScaleGMNConfig(symmetry="sign", **SMALL), ("phase",)),
    "tanh": (NetSpec.mlp([3, 6, 5, 2], "tanh"), ScaleGMNConfig(symmetry="sign", **SMALL), ()),
    "relu": (NetSpec.mlp([3, 6, 5, 2], "relu"), ScaleGMNConfig(symmetry="scale", **SMALL), ()),
    "cnn": (CNN, ScaleGMNConfig(symmetry="scale", **SMALL), ()),
}


def attributions(model, params, train, removed, method):
    score = score_of(model, 1)
    x = canonicalize(params, removed)
    if method == "gradient":
        return gradient_times_weight(score, x)
    return integrated_gradients(score, x, reference_network(canonicalize(train, removed)), steps=8)


def moves(params, generator, phase):
    element = GroupElement.sample(params, generator)
    moved = PhaseShift.sample(params, generator).act(params) if phase else params
    return element, element.act(moved)


@pytest.mark.parametrize("method", attribution.METHODS)
@pytest.mark.parametrize("case", CASES)
def test_attributions_of_moved_networks_are_the_moved_attributions(case, method, random_params, generator):
    spec, config, canonical = CASES[case]
    params, train = random_params(spec, 3), random_params(spec, 5)
    removed = symmetries_to_remove(config, canonical)
    element, moved = moves(params, generator, bool(canonical))
    model = build(config, spec)
    before = attributions(model, params, train, removed, method)
    after = attributions(model, moved, train, removed, method)
    size = before.values.flatten().abs().max()
    error = before.moved(element).values.flatten() - after.values.flatten()
    assert error.abs().max() <= 1e-9 * size
    assert (before.values.flatten() - after.values.flatten()).abs().max() > 1e-3 * size  # they did move
    for expected, found in zip(before.moved(element).neurons(), after.neurons(), strict=True):
        assert (expected - found).abs().max() <= 1e-9 * size
    # a model without symmetries does not follow
    flat = build(FlatMLPConfig(out_dim=3), spec)
    before, after = (attributions(flat, nets, train, (), method) for nets in (params, moved))
    size = before.values.flatten().abs().max()
    assert (before.moved(element).values.flatten() - after.values.flatten()).abs().max() > 1e-3 * size


def test_phases_must_be_removed_first(random_params, generator):
    """The control: x df/dx of networks with phases is not that of the moved networks, even if f is made invariant."""
    spec, config, _ = CASES["sine"]
    params = random_params(spec, 3)
    model = build(config, spec)

    def score(nets):
        return score_of(model, 1)(canonicalize(nets, ("phase",)))

    before, after = (gradient_times_weight(score, nets) for nets in (params, moves(params, generator, True)[1]))
    assert (before.score - after.score).abs().max() <= 1e-9 * before.score.abs().max()
    sums = [values.values.biases[0].sum(1) for values in (before, after)]
    assert (sums[0] - sums[1]).abs().max() > 1e-3 * sums[0].abs().max()


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_moved_by_no_element(case, random_params, generator):
    spec, config, canonical = CASES[case]
    reference = reference_network(canonicalize(random_params(spec, 5), symmetries_to_remove(config, canonical)))
    element = GroupElement.sample(reference, generator, decades=0.0)
    assert (element.act(reference).flatten() - reference.flatten()).abs().max() <= 1e-12
    one = random_params(spec, 1)
    assert (element.act(one).flatten() - one.flatten()).abs().max() > 1e-3  # which others are


def test_integrated_gradients_are_complete(random_params):
    """They sum to the score's difference from the reference; half of the path does not."""
    spec, config, _ = CASES["sine"]
    model, removed = build(config, spec), ("phase",)
    x = canonicalize(random_params(spec, 3).map(lambda tensor: tensor / 4), removed)
    reference = reference_network(x)
    result = integrated_gradients(score_of(model, 0), x, reference, steps=128)
    gap = result.values.flatten().sum(1) - (result.score - result.reference)
    assert gap.abs().max() < 1e-3 * (result.score - result.reference).abs().max()
    coarse = integrated_gradients(score_of(model, 0), x, reference, steps=1)
    assert (coarse.values.flatten().sum(1) - (result.score - result.reference)).abs().max() > gap.abs().max()


def test_a_score_needs_an_output_that_exists(random_params):
    spec, config, _ = CASES["tanh"]
    with pytest.raises(ValueError, match=r"--output: found 3, expected 0 to 2"):
        score_of(build(config, spec), 3)(random_params(spec, 1))


def test_removing_grouped_channels(random_params):
    """A channel's outgoing weights are those of its group alone."""
    spec = NetSpec((LayerSpec(1, 4, (1, 1), "relu"), LayerSpec(4, 6, (1, 1), "relu", groups=2), LayerSpec(6, 1)))
    params = random_params(spec, 1)
    without = attribution.without_neurons(params, [(0, 3)])
    assert not without.weights[0][:, 3].any()
    changed = (without.weights[1] != params.weights[1]).flatten(3).any(3)[0]
    assert changed.nonzero().tolist() == [[3, 1], [4, 1], [5, 1]]
