"""Residual connections couple neurons: what moves together leaves the function unchanged, what does not changes it."""

from itertools import pairwise

import pytest
import torch
from contract import without_residuals

from scalegmn.networks import BUILT_IN, CoupledChannels, LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.networks.scalar_groups import SCALES, TRIVIAL
from scalegmn.symmetry.align import align
from scalegmn.symmetry.canonicalize import canonicalize_phase, canonicalize_scale
from scalegmn.symmetry.groups import GroupElement, PhaseShift


def spec_of(layout, activations, residual, kernel=None):
    """Hidden layers of one kind, then a linear layer; a connection per hidden layer or None."""
    *hidden, last = pairwise(layout)
    parts = zip(hidden, activations, residual, strict=True)
    layers = (LayerSpec(i, o, kernel, name, 3.0 if name == "sine" else 1.0, s) for (i, o), name, s in parts)
    return NetSpec((*layers, LayerSpec(*last)))


# narrow to wide, wide to narrow, two connections from one layer, a chain of three
LAYOUT, SOURCES = [2, 4, 6, 5, 3, 6, 2], [None, None, 0, 0, 2]
NETS = [
    (["relu"] * 5, None),
    (["sine"] * 5, None),
    (["leaky_relu", "relu", "identity", "relu", "relu"], None),
    (["relu", "tanh", "tanh", "gelu", "identity"], None),
    (["hetero"] * 5, ["relu", "tanh", "gelu"]),
    (["hetero", "relu", "tanh", "hetero", "identity"], ["relu", "tanh", "leaky_relu"]),
]


def draw(random_params, activations, own, kernel=None):
    params = random_params(spec_of(LAYOUT, activations, SOURCES, kernel), 3, own and [*map(BUILT_IN.index, own)])
    return params.map(lambda tensor: tensor / 2)


def change_of_function(params, moved):
    """The largest change of an output, beside the largest output."""
    torch.manual_seed(0)
    if params.spec.is_cnn:
        images = torch.randn(4, 2, 6, 5, dtype=torch.float64)
        before, after = (evaluate_cnn(nets, images, stride=1) for nets in (params, moved))
    else:
        points = torch.randn(20, 2, dtype=torch.float64)
        before, after = evaluate(params, points), evaluate(moved, points)
    return ((after - before).abs().max() / before.abs().max()).item()


def test_classes_by_hand():
    spec = spec_of(LAYOUT, ["relu", "relu", "relu", "tanh", "identity"], SOURCES)
    # hidden sizes 4 6 5 3 6: layers 0, 2, 3, 4 share channels 0..2; layer 3 has no channel 3, layer 0 no channel 4
    assert spec.permutation_classes == (
        CoupledChannels((0, 2, 3, 4), slice(0, 3)),
        CoupledChannels((0, 2, 4), slice(3, 4)),
        CoupledChannels((1,), slice(0, 6)),
        CoupledChannels((2, 4), slice(4, 5)),
        CoupledChannels((4,), slice(5, 6)),
    )
    assert [spec.class_symmetry(channels) for channels in spec.permutation_classes] == [TRIVIAL, *[SCALES] * 4]
    # layer 2 joins 0 and 3 where it has the channel; where it has not, they are on their own
    spec = spec_of([1, 3, 5, 2, 1, 3, 1], ["relu"] * 5, [None, None, 0, None, 2])
    assert spec.permutation_classes[:3] == (
        CoupledChannels((0, 2, 4), slice(0, 2)),
        CoupledChannels((0,), slice(2, 3)),
        CoupledChannels((1,), slice(0, 5)),
    )
    assert NetSpec.mlp([2, 3, 4, 1], "relu").permutation_classes == (
        CoupledChannels((0,), slice(0, 3)),
        CoupledChannels((1,), slice(0, 4)),
    )


@pytest.mark.parametrize("kernel", [None, (3, 3)], ids=["mlp", "cnn"])
@pytest.mark.parametrize(("activations", "own"), NETS)
def test_action_leaves_the_function_unchanged(activations, own, kernel, random_params, generator):
    params = draw(random_params, activations, own, kernel)
    element = GroupElement.sample(params, generator)
    assert change_of_function(params, element.act(params)) < 1e-10
    assert change_of_function(params, GroupElement.sample(params, generator, scale=False).act(params)) < 1e-10
    for layer, permutation in enumerate(element.permutations):
        assert (permutation.sort(1).values == torch.arange(params.spec.layout[layer + 1])).all()
        assert (permutation != permutation.sort(1).values).any(1).all()


@pytest.mark.parametrize("kernel", [None, (3, 3)], ids=["mlp", "cnn"])
@pytest.mark.parametrize(("activations", "own"), NETS)
def test_ignoring_the_ties_changes_it(activations, own, kernel, random_params, generator):
    params = draw(random_params, activations, own, kernel)
    loose = without_residuals(params)
    permuted = GroupElement.sample(loose, generator, scale=False)
    assert change_of_function(loose, permuted.act(loose)) < 1e-10
    assert change_of_function(params, permuted.act(params)) > 1e-3
    scaled = GroupElement.sample(loose, generator, permute=False)
    assert change_of_function(params, scaled.act(params)) > 1e-3


def test_scalars_are_common_to_a_tie(random_params, generator):
    """And as large as its activations admit: identities commute with all, relu and tanh together with 1 only."""
    kinds = {
        "relu": (True, True),
        "tanh": (False, True),
        "identity": (True, True),
        "gelu": (False, False),
    }
    for name, (scaled, moved) in kinds.items():
        params = random_params(spec_of([2, 9, 2, 9, 1], [name, "relu", "identity"], [None, None, 0]), 2)
        first, _, last = GroupElement.sample(params, generator).scales
        assert torch.equal(first, last)
        assert (first.abs() != 1).any().item() == scaled
        assert (first != 1).any().item() == moved
    params = random_params(spec_of([2, 9, 2, 9, 1], ["tanh", "relu", "relu"], [None, None, 0]), 2)
    assert all((scales == 1).all() for scales in GroupElement.sample(params, generator).scales[::2])


@pytest.mark.parametrize("kernel", [None, (3, 3)], ids=["mlp", "cnn"])
@pytest.mark.parametrize(("activations", "own"), [net for net in NETS if net[0][0] != "sine"])
def test_canonical_scale(activations, own, kernel, random_params, generator):
    params = draw(random_params, activations, own, kernel)
    canonical = canonicalize_scale(params)
    assert change_of_function(params, canonical) < 1e-10
    positive = GroupElement.sample(params, generator, permute=False)
    positive = GroupElement(positive.permutations, tuple(q.abs() for q in positive.scales))
    again = canonicalize_scale(positive.act(params))
    torch.testing.assert_close(again.flatten(), canonical.flatten(), rtol=1e-10, atol=1e-12)


def test_phase(random_params, generator):
    """Neurons that are read by a residual connection keep their phase."""
    params = draw(random_params, ["sine"] * 5, None)
    shift = PhaseShift.sample(params, generator)
    assert change_of_function(params, shift.act(params)) < 1e-10
    assert [k.any().item() for k in shift.turns] == [False, True, False, True, True]
    canonical = canonicalize_phase(params)
    assert change_of_function(params, canonical) < 1e-10
    assert not torch.equal(canonical.biases[1], params.biases[1])
    torch.testing.assert_close(canonicalize_phase(shift.act(params)).flatten(), canonical.flatten())


def test_alignment_is_refused(random_params):
    params = draw(random_params, ["relu"] * 5, None)
    with pytest.raises(ValueError, match=r"some layers are coupled, in MLP .*residual 0 -> 2"):
        align(params, params)
