"""Scalar groups, and what remains of them where layers are coupled."""

from dataclasses import replace

import pytest
import torch

from scalegmn.networks import ACTIVATIONS, BUILT_IN, Activation, LayerSpec, NetSpec, ScalarGroup, register_activation
from scalegmn.networks.scalar_groups import ALL_SCALARS, SCALES, SIGNS, TRIVIAL, shared_group

SQUARE = ScalarGroup(signs=True, scales=True, sign_exponent=0, exponent=2)
CUBE = ScalarGroup(signs=True, scales=True, sign_exponent=1, exponent=3)
SIZE = ScalarGroup(signs=True, scales=True, sign_exponent=0, exponent=1)
EVEN = ScalarGroup(signs=True, sign_exponent=0)


@pytest.fixture
def more_activations(monkeypatch):
    """Activations of other groups, for the time of a test."""
    monkeypatch.setattr(ACTIVATIONS, "_items", dict(ACTIVATIONS._items))
    for name, function, group in (
        ("square", lambda z, w0: z.square(), SQUARE),
        ("cube", lambda z, w0: z**3, CUBE),
        ("abs", lambda z, w0: z.abs(), SIZE),
        ("cos", lambda z, w0: z.cos(), EVEN),
    ):
        register_activation(Activation(name, function, group))


def test_activations_commute_with_their_groups(more_activations, generator):
    """sigma(q z) = chi(q) sigma(z), and with nothing else where there is less than all scalars."""
    z = 4 * torch.randn(200, dtype=torch.float64)
    for name, item in ACTIVATIONS.items():
        q = item.group.sample((200,), generator)
        moved, expected = item.function(q * z, 1.0), item.group.outgoing(q) * item.function(z, 1.0)
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12, msg=name)
        for lacking, q in (("signs", -torch.ones(200)), ("scales", torch.full((200,), 1.5))):
            if not getattr(item.group, lacking) and name != "identity":
                assert (item.function(q * z, 1.0) - q * item.function(z, 1.0)).abs().max() > 0.1, (name, lacking)


def test_built_in_activations_come_first():
    """Zoos on disk count activations in this order."""
    names = ["sine", "tanh", "relu", "leaky_relu", "gelu", "silu", "sigmoid", "identity"]
    assert list(BUILT_IN) == names


def test_names_are_given_once():
    with pytest.raises(ValueError, match="activation: 'relu' is registered already"):
        register_activation(Activation("relu", lambda z, w0: z))
    with pytest.raises(ValueError, match="activation: 'hetero' stands for networks that differ in it"):
        register_activation(Activation("hetero", lambda z, w0: z))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sign_exponent": 2}, "sign_exponent: found 2, expected 0"),
        ({"exponent": 0}, "exponent: found 0, expected a fin"),
    ],
)
def test_exponents_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        ScalarGroup(signs=True, **options)


def test_words_of_configurations():
    words = {TRIVIAL: "permutation", SIGNS: "sign", SCALES: "scale"}
    words |= dict.fromkeys((ALL_SCALARS, SQUARE, CUBE, SIZE, EVEN, replace(SCALES, exponent=0.5)), "hetero")
    assert {group: group.symmetry for group in words} == words


def test_samples_are_in_the_group(generator):
    q = {group: group.sample((1000,), generator, decades=2.0) for group in (TRIVIAL, SIGNS, SCALES, SQUARE, EVEN)}
    assert (q[TRIVIAL] == 1).all()
    assert q[SIGNS].unique().tolist() == q[EVEN].unique().tolist() == [-1, 1]
    assert 0.01 <= q[SCALES].min() < 0.02 < 50 < q[SCALES].max() <= 100
    assert q[SQUARE].min() < -50 < 50 < q[SQUARE].max()
    torch.testing.assert_close(SQUARE.outgoing(q[SQUARE]), q[SQUARE] ** 2)
    torch.testing.assert_close(CUBE.outgoing(q[SQUARE]), q[SQUARE] ** 3)
    assert (EVEN.outgoing(q[EVEN]) == 1).all()


@pytest.mark.parametrize(
    ("groups", "shared"),
    [
        ([SQUARE], SQUARE),
        ([SQUARE, SQUARE], TRIVIAL),  # z^2 + x is multiplied by nothing but 1
        ([CUBE, SIGNS], SIGNS),
        ([SIZE, SCALES], SCALES),
        ([SIZE, SIGNS], TRIVIAL),
        ([SIGNS, SCALES], TRIVIAL),
        ([ALL_SCALARS, SCALES], SCALES),
        ([EVEN, EVEN], TRIVIAL),
    ],
)
def test_coupled_layers_share_what_all_preserve(groups, shared):
    assert shared_group(groups) == shared


def chain(*activations, residual=None, **options):
    """Layers of 4 neurons, the second with a residual connection from the first or with options."""
    layers = [LayerSpec(4, 4, None, name) for name in activations]
    layers[1] = replace(layers[1], residual=residual, **options)
    return NetSpec((*layers, LayerSpec(4, 2)))


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        (("relu", "leaky_relu"), SCALES),
        (("relu", "tanh"), TRIVIAL),
        (("square", "square"), TRIVIAL),
        (("cube", "tanh"), SIGNS),
        (("abs", "relu"), SCALES),
        (("identity", "tanh"), SIGNS),
        (("identity", "relu"), SCALES),
        (("identity", "identity"), SCALES),
        (("gelu", "identity"), TRIVIAL),
    ],
)
def test_residual_connections(activations, expected, more_activations, random_params):
    (coupled,) = chain(*activations, residual=0).scaling_classes
    assert chain(*activations, residual=0).class_symmetry(coupled) == expected
    alone = chain(*activations)
    groups = [SCALES if name == "identity" else ACTIVATIONS[name].group for name in activations]
    assert [alone.class_symmetry(channels) for channels in alone.scaling_classes] == groups


def test_maxima_keep_signs_of_even_activations(more_activations):
    for name, expected in (
        ("tanh", TRIVIAL),
        ("relu", SCALES),
        ("square", SQUARE),
        ("cube", replace(CUBE, signs=False)),
        ("cos", EVEN),
    ):
        spec = chain("relu", name, maximum=True)
        assert spec.class_symmetry(spec.scaling_classes[1]) == expected


def test_tied_weights_keep_signs_of_odd_activations(more_activations):
    """The decoder of an autoencoder: W^T reads the output of W."""
    for name, expected in (
        ("tanh", SIGNS),
        ("cube", SIGNS),
        ("identity", SIGNS),
        ("square", TRIVIAL),
        ("cos", TRIVIAL),
    ):
        layers = LayerSpec(3, 4, None, "gelu"), LayerSpec(4, 4, None, name), LayerSpec(4, 4, None, "gelu", tied=1)
        spec = NetSpec((*layers, LayerSpec(4, 2)))
        groups = {channels.layers[0]: spec.class_symmetry(channels) for channels in spec.scaling_classes}
        assert groups[1] == expected, name


def test_networks_that_differ():
    spec = chain("hetero", "relu")
    first, second = spec.scaling_classes
    assert spec.class_symmetry(first) == "hetero"
    assert [spec.class_symmetry(first, name) for name in ("tanh", "relu", "gelu")] == [SIGNS, SCALES, TRIVIAL]
    assert spec.class_symmetry(second) == SCALES
    assert spec.symmetries == ("hetero", "scale")
    assert spec.is_hetero
    assert not chain("relu", "relu").is_hetero


def test_envelopes_of_other_groups(more_activations):
    square, relu, leaky = (NetSpec.mlp([2, 3, 1], name) for name in ("square", "relu", "leaky_relu"))
    assert NetSpec.envelope([square, relu]).layers[0].activation == "hetero"
    assert NetSpec.envelope([relu, leaky]).layers[0].activation == "relu"
    assert square.symmetries == ("hetero",)
