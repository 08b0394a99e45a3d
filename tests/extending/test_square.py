"""An activation that the package does not know (square.py) is exact everywhere."""

import sys
from pathlib import Path

import pytest
import torch
from commands import run_fork

from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import (
    ACTIVATIONS,
    Activation,
    LayerSpec,
    NetParams,
    NetSpec,
    ScalarGroup,
    register_activation,
)
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import activations, evaluate
from scalegmn.nn.probes import ProbeImages
from scalegmn.symmetry.align import align
from scalegmn.symmetry.canonicalize import canonicalize_scale, incoming_norm
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.measure import assert_invariant, invariance_error, relative_change
from scalegmn.zoos.augment import AugmentConfig, augment, check_augment

LAYOUT = [2, 5, 4, 3]


@pytest.fixture(autouse=True)
def square(monkeypatch):
    """square.py imported, for the time of a test."""
    monkeypatch.setattr(ACTIVATIONS, "_items", dict(ACTIVATIONS._items))
    monkeypatch.delitem(sys.modules, "extending.square", raising=False)
    import extending.square  # noqa: F401


@pytest.fixture
def mlps(random_params):
    return random_params(NetSpec.mlp(LAYOUT, "square"), 6)


@pytest.fixture
def hetero(random_params):
    """One network each of square, relu, tanh, gelu, sine and square."""
    names = ("square", "relu", "tanh", "gelu", "sine", "square")
    spec = NetSpec.mlp(LAYOUT, "hetero", 2.0).with_activation("hetero", names)
    return random_params(spec, 6, [spec.activations.index(name) for name in names])


@pytest.fixture
def layers(random_params):
    """Layers of several activations in each network."""
    names = ["square", "relu", "tanh", "square", "gelu", "square"]
    widths = [2, 4, 4, 3, 3, 4, 3]
    layers = [LayerSpec(a, b, None, name) for a, b, name in zip(widths, widths[1:], names, strict=False)]
    return random_params(NetSpec((*layers, LayerSpec(3, 2))), 6)


@pytest.fixture
def cnns(random_params):
    layers = LayerSpec(1, 4, (3, 3), "square"), LayerSpec(4, 3, (3, 3), "square"), LayerSpec(3, 2)
    return random_params(NetSpec(layers), 5)


def outputs(params):
    generator = torch.Generator().manual_seed(1)
    shape = (7, 1, 6, 6) if params.spec.is_cnn else (7, params.spec.layout[0])
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (evaluate_cnn if params.spec.is_cnn else evaluate)(params, inputs)


def change(params, moved):
    """Of each output, relative to the largest of its network."""
    before = outputs(params)
    return ((outputs(moved) - before).abs().amax((1, 2)) / before.abs().amax((1, 2))).max()


@pytest.mark.parametrize("nets", ["mlps", "hetero", "cnns", "layers"])
def test_group_elements_keep_the_function(nets, request, generator):
    params = request.getfixturevalue(nets)
    element = GroupElement.sample(params, generator)
    moved = element.act(params)
    assert (moved.weights[0] - params.weights[0]).abs().max() > 0.1
    assert change(params, moved) < 1e-9
    assert change(params, element.inverse().act(moved)) < 1e-9
    second = GroupElement.sample(params, generator)
    both = second.compose(element).act(params)
    torch.testing.assert_close(both.flatten(), second.act(moved).flatten(), rtol=1e-12, atol=1e-12)


def test_scalars_are_all_numbers_but_zero(mlps, hetero, generator):
    scales = torch.cat(GroupElement.sample(mlps, generator).scales, 1)
    assert scales.min() < -1
    assert scales.max() > 1
    scales = torch.cat(GroupElement.sample(hetero, generator).scales, 1)
    assert (scales < 0).any(1).tolist() == [True, False, True, False, True, True]
    assert (scales.abs() != 1).any(1).tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("wrong", [{"exponent": 1}, {"exponent": 3}, {"sign_exponent": 1}])
def test_a_wrong_exponent_changes_the_function(wrong, random_params, generator):
    group = ScalarGroup(**{"signs": True, "scales": True, "sign_exponent": 0, "exponent": 2, **wrong})
    register_activation(Activation("wrong", ACTIVATIONS["square"].function, group))
    params = random_params(NetSpec.mlp(LAYOUT, "wrong"), 6)
    assert change(params, GroupElement.sample(params, generator).act(params)) > 1e-3


@pytest.mark.parametrize("nets", ["mlps", "hetero", "cnns"])
def test_canonical_networks(nets, request, generator):
    params = request.getfixturevalue(nets)
    canonical = canonicalize_scale(params)
    assert change(params, canonical) < 1e-9
    torch.testing.assert_close(canonicalize_scale(canonical).flatten(), canonical.flatten(), rtol=1e-12, atol=1e-12)
    element = GroupElement.sample(params, generator, permute=False)
    positive = GroupElement(element.permutations, tuple(map(torch.abs, element.scales)))
    moved = canonicalize_scale(positive.act(params)).flatten()
    torch.testing.assert_close(moved, canonical.flatten(), rtol=1e-9, atol=1e-9)
    for layer in range(params.spec.num_layers - 1):
        assert ((incoming_norm(canonical, layer)[0] - 1).abs() < 1e-12).all()  # of the first network, of squares


@pytest.mark.parametrize("nets", ["mlps", "hetero"])
def test_alignment_sees_through_permutations_and_signs(nets, request, generator):
    params = request.getfixturevalue(nets)
    element = GroupElement.sample(params, generator)
    moved = GroupElement(element.permutations, tuple(map(torch.sign, element.scales))).act(params)
    back = align(moved, params).act(moved)
    torch.testing.assert_close(back.flatten(), params.flatten(), rtol=1e-12, atol=1e-12)


def test_augmentation(mlps, generator):
    config = AugmentConfig(group=("permutation", "sign", "scale"))
    check_augment(config, mlps.spec)
    moved, _ = augment(config, mlps, torch.zeros(6), generator)
    assert change(mlps, moved) < 1e-9
    with pytest.raises(ValueError, match="found phase, expected one of permutation, sign, scale for"):
        check_augment(AugmentConfig(group=("phase",)), mlps.spec)


def test_coupled_layers_share_no_scalar(random_params, generator):
    """x + z^2 is multiplied by nothing but 1."""
    layers = [LayerSpec(2, 4, None, "square"), LayerSpec(4, 4, None, "square", residual=0), LayerSpec(4, 1)]
    params = random_params(NetSpec(tuple(layers)), 4)
    element = GroupElement.sample(params, generator)
    assert all((q == 1).all() for q in element.scales)
    assert change(params, element.act(params)) < 1e-9


def test_from_tensors_knows_it():
    weights, biases = [torch.ones(2, 3, 1), torch.ones(2, 1, 3)], [torch.zeros(2, 3), torch.zeros(2, 1)]
    params = NetParams.from_tensors(weights, biases, ["square", "relu"])
    assert evaluate(params, torch.tensor([[-2.0], [3.0]])).squeeze().tolist() == [[12.0, 27.0], [0.0, 9.0]]


def metanetwork(params, **options):
    """A small ScaleGMN of hetero symmetry for such networks."""
    torch.manual_seed(0)
    config = ScaleGMNConfig(symmetry="hetero", hidden_dim=8, num_layers=3, **options)
    return config.build_for({params.spec: len(params)}).double().eval()


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("nets", ["mlps", "hetero", "cnns", "layers"])
def test_metanetworks_are_invariant(nets, direction, engine, request, generator):
    params = request.getfixturevalue(nets)
    model = metanetwork(params, direction=direction, out_dim=3)
    model.engine = engine
    assert_invariant(model, params, generator, tolerance=1e-9)
    wrong = params.replace(weights=(*params.weights[:-1], 1.5 * params.weights[-1]))  # incoming weights do not follow
    assert relative_change(model(wrong), model(params)) > 1e-6


@pytest.mark.parametrize("nets", ["mlps", "hetero", "cnns"])
def test_values_before_activations_are_probes_after_them_are_not(nets, request, generator, monkeypatch):
    """Those before it are multiplied by q, as features are, those after it by chi(q) = q^2."""
    params = request.getfixturevalue(nets)
    model = metanetwork(params, out_dim=3, num_probes=6, probe_images=ProbeImages(image_size=6))
    assert_invariant(model, params, generator, tolerance=1e-9)
    if not params.spec.is_cnn:
        monkeypatch.setattr("scalegmn.nn.probes.pre_activations", lambda params, x, shifts: activations(params, x))
        assert invariance_error(model, params, generator) > 1e-6


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("nets", ["mlps", "hetero"])
def test_changes_are_equivariant(nets, direction, request, generator):
    params = request.getfixturevalue(nets)
    model = metanetwork(params, direction=direction, output="parameters")
    element = GroupElement.sample(params, generator)
    changes, moved = element.act_on_changes(model(params)).flatten(), model(element.act(params)).flatten()
    torch.testing.assert_close(moved, changes, rtol=1e-9, atol=1e-9)
    assert changes.abs().max() > 1e-6


def scalegmn(home, *words):
    """The output of the command, in a process of its own."""
    done = run_fork("-m", "scalegmn", *words, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_a_zoo_to_a_trained_metanetwork(tmp_path):
    """By the command alone: CNNs with squares, a model trained on them, and how well it keeps their symmetry."""
    here = Path(__file__).parent
    extension, conf = here / "square.py", here.parents[1] / "configs/digits_cnn/scalegmn_hetero.yml"
    shapes = ["--channels=[3,4]", "--depths=[2]", "--kernels=[3]", "--activations=[square]", "--padding=same"]
    ranges = ["--networks=60", "--checkpoints=[1]", "--num_images=300", "--init_std=[0.2,0.4]", "--lr=[1e-4,1e-3]"]
    text = scalegmn(tmp_path, "zoo", "cnn", "--import", extension, "--mixed=true", *shapes, *ranges, "--out=zoo")
    assert "60 checkpoints of 60 networks of 4 architectures" in text
    small = ["--scalegmn_args.hidden_dim=8", "--scalegmn_args.num_layers=2", "--train_args.num_epochs=1"]
    words = ["--import", extension, "--conf", conf, "--data.dataset_path=zoo", *small, "--run_dir=run"]
    assert "(square)" in scalegmn(tmp_path, "train", "generalization", *words)
    rows = dict(line.split(maxsplit=1) for line in scalegmn(tmp_path, "symmetry", "--checkpoint=run").splitlines()[1:])
    assert rows["hetero"].endswith("kept")
    assert float(rows["hetero"].split()[2]) < 1e-9
