from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from scalegmn.networks import BUILT_IN, LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.symmetry.groups import GroupElement
from scalegmn.zoos.augment import (
    AugmentConfig,
    augment,
    check_augment,
    dropout,
    flip,
    mixup,
    noise,
    relabel,
    rotate,
    transform,
    translate,
)

SIREN = NetSpec.mlp([2, 12, 10, 3], "sine", w0=6.0)
HETERO = NetSpec.mlp([2, 12, 10, 3], "hetero", w0=6.0)
OWN = [BUILT_IN.index(name) for name in ("sine", "relu", "sine", "tanh", "relu", "gelu")]
POINTS = torch.rand(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
EVERYTHING = AugmentConfig(
    0.1, 10.0, relabel=True, dropout=0.1, noise=0.05, mixup=0.5, group=("permutation", "sign", "phase")
)
CNN = NetSpec((LayerSpec(2, 5, (3, 3), "relu"), LayerSpec(5, 4, (3, 3), "relu"), LayerSpec(4, 3)))


@pytest.fixture
def sirens(random_params):
    return random_params(SIREN, 6)


@pytest.fixture
def target():
    return one_hot(torch.arange(6) % 4, 4).double()


def change_of_function(params, moved, points=POINTS):
    return (evaluate(moved, points) - evaluate(params, points)).abs().max().item()


def change(params, moved):
    return (moved.flatten() - params.flatten()).abs().max().item()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_off_by_default(sirens, target, generator):
    state = generator.get_state()
    assert augment(AugmentConfig(), sirens, target, generator) == (sirens, target)
    assert torch.equal(generator.get_state(), state)


# What is seen where: f'(x) = f(R x + t)


def test_translate(sirens, generator):
    shifts = torch.rand(6, 2, generator=generator, dtype=torch.float64)
    moved = translate(sirens, shifts)
    expected = evaluate(sirens, POINTS + shifts[:, None])
    assert (evaluate(moved, POINTS) - expected).abs().max() < 1e-10
    assert change_of_function(sirens, moved) > 0.1


def test_rotate(sirens):
    degrees = torch.tensor([0.0, 90.0, -90.0, 30.0, 180.0, 360.0], dtype=torch.float64)
    moved = rotate(sirens, degrees)
    expected = evaluate(sirens, POINTS @ rotations(degrees).mT)
    assert (evaluate(moved, POINTS) - expected).abs().max() < 1e-10
    quarter = torch.stack([-POINTS[:, 1], POINTS[:, 0]], dim=1)  # a point on the x axis is seen on the y axis
    assert (evaluate(moved, POINTS)[1] - evaluate(sirens, quarter)[1]).abs().max() < 1e-10


def test_flip(random_params, generator):
    params = random_params(CNN, 40)
    images = torch.randn(6, 2, 7, 7, generator=generator, dtype=torch.float64)  # 7 -> 3 -> 1, the same from both sides
    views = [turned.flip(axes) for turned in (images, images.mT) for axes in ((), (2,), (3,), (2, 3))]
    expected = torch.stack([evaluate_cnn(params, view, padding="valid") for view in views])
    found = evaluate_cnn(flip(params, generator), images, padding="valid")
    errors = (found - expected).flatten(2).abs().amax(2)  # of each of the 8 symmetries, [8, B]
    assert errors.amin(0).max() < 1e-10
    assert len(errors.argmin(0).unique()) == 8


def test_flip_mirrors_kernels_that_are_not_square(random_params, generator):
    spec = NetSpec((LayerSpec(1, 4, (3, 1), "relu"), LayerSpec(4, 2)))
    params = random_params(spec, 10)
    moved = flip(params, generator).weights[0]
    same, mirrored = (((moved - w).flatten(1) == 0).all(1) for w in (params.weights[0], params.weights[0].flip(3)))
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_flip_needs_kernels():
    with pytest.raises(ValueError, match=r"data.augment.flip: found True, expected False for .* no kernels"):
        check_augment(AugmentConfig(flip=True), SIREN)


def test_relabel(sirens, generator):
    before, after = evaluate(sirens, POINTS), evaluate(relabel(sirens, generator), POINTS)
    assert (before.sort(2).values - after.sort(2).values).abs().max() < 1e-10
    orders = (before[:, :1, :, None] - after[:, :1, None]).abs().argmin(2)[:, 0]
    assert len(orders.unique(dim=0)) > 1
    for old, new, order in zip(before, after, orders, strict=True):  # one permutation for all points
        torch.testing.assert_close(old[:, order], new, rtol=0, atol=1e-10)


def rotations(degrees):
    """R, [B, 2, 2], of angles [B]."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 2)


def test_translate_and_rotate_together(sirens, target):
    """f(R x + t) with R and t from the same seed, within the limits, different for each network."""
    moved, same = augment(AugmentConfig(translate=0.2, rotate=30.0), sirens, target, seeded())
    generator = seeded()
    shifts, degrees = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1 for shape in ((6, 2), (6,)))
    seen = POINTS @ rotations(30 * degrees).mT + 0.2 * shifts[:, None]
    assert (evaluate(moved, POINTS) - evaluate(sirens, seen)).abs().max() < 1e-10
    assert same is target


# What changes the function by chance


def test_noise(random_params, generator):
    params = random_params(NetSpec.mlp([2, 200, 200, 1], "sine"), 2)
    params.weights[1][1] *= 100
    once, again = (noise(params, 0.1, generator) for _ in range(2))
    first = (once.weights[1] - params.weights[1]).flatten(1)  # [2, 40000]
    second = (again.weights[1] - params.weights[1]).flatten(1)
    assert first.std(1).tolist() == pytest.approx([0.1, 10.0], rel=0.03)
    assert (first.mean(1).abs() < 5 / 200 * first.std(1)).all()
    independent = torch.stack([first[0, 1:], first[0, :-1], first[1, 1:], second[0, 1:], second[1, 1:]])
    # neighbours, networks and draws: not one number for all
    assert (independent.corrcoef() - torch.eye(5)).abs().max() < 5 / 200
    assert (once.biases[0] - params.biases[0]).std(1).tolist() == pytest.approx([0.1, 0.1], rel=0.2)


def test_noise_moves_the_function_in_proportion(sirens):
    changes = [change_of_function(sirens, noise(sirens, std, seeded())) for std in (1e-6, 1e-5)]
    assert 0 < changes[0] < 1e-3
    assert changes[1] / changes[0] == pytest.approx(10, rel=0.05)


def test_dropout(random_params, generator):
    params = random_params(NetSpec.mlp([2, 200, 200, 1], "sine"), 3)
    dropped = dropout(params, 0.3, generator)
    assert all(map(torch.equal, dropped.biases, params.biases))
    zero = dropped.weights[1] == 0
    assert zero.double().mean((1, 2)).tolist() == pytest.approx([0.3] * 3, abs=0.02)
    assert torch.equal(dropped.weights[1][~zero], params.weights[1][~zero])
    assert not torch.equal(zero[0], zero[1])
    assert 0 < zero.double().mean(2).std() < 0.1  # single weights, not whole neurons
    assert change_of_function(params, dropped) > 0.1
    everything = dropout(params, 1.0, generator)  # leaves a constant
    assert change_of_function(everything, everything, POINTS[:1]) == 0
    assert torch.equal(evaluate(everything, POINTS), params.biases[-1][:, None].expand(3, 50, 1))


# What leaves the function alone


@pytest.mark.parametrize(
    ("activation", "group"),
    [
        ("sine", ["permutation"]),
        ("sine", ["sign"]),
        ("sine", ["phase"]),
        ("sine", ["permutation", "sign", "phase"]),
        ("tanh", ["permutation", "sign"]),
        ("relu", ["permutation"]),
        ("relu", ["scale"]),
        ("leaky_relu", ["permutation", "scale"]),
        ("gelu", ["permutation"]),
    ],
)
def test_group(activation, group, random_params, generator):
    params = random_params(NetSpec.mlp([2, 12, 10, 3], activation, w0=6.0), 6)
    moved = transform(params, group, generator)
    assert change_of_function(params, moved) < 1e-9
    for before, after in zip(params.flatten(), moved.flatten(), strict=True):
        assert (before - after).abs().max() > 0.1
    if "permutation" not in group:  # neurons keep their places
        ratio = (moved.weights[0] / params.weights[0])[..., 0]
        torch.testing.assert_close(moved.weights[0], params.weights[0] * ratio[..., None], rtol=1e-12, atol=1e-12)
        assert {"sign": (ratio.abs() == 1), "scale": ratio > 0, "phase": ratio == 1}[group[0]].all()


def test_each_network_its_own_group(random_params, generator):
    params = random_params(HETERO, 6, OWN)
    for group, kinds in {"sign": ("sine", "tanh"), "scale": ("relu",), "phase": ("sine",)}.items():
        moved = transform(params, [group], generator)
        assert change_of_function(params, moved) < 1e-9
        changed = (moved.flatten() - params.flatten()).abs().amax(1) > 0.1
        assert changed.tolist() == [BUILT_IN[index] in kinds for index in OWN]
    assert change_of_function(params, transform(params, ["permutation", "sign", "scale", "phase"], generator)) < 1e-9


def test_control_group_elements_of_others_change_the_function(random_params, generator):
    """Signs of relu neurons, as if they were odd."""
    relu = random_params(NetSpec.mlp([2, 12, 10, 3], "relu"), 6)
    odd = transform(replace(relu, spec=NetSpec.mlp([2, 12, 10, 3], "tanh")), ["sign"], generator)
    assert change_of_function(relu, replace(odd, spec=relu.spec)) > 0.1


# Mixup


def test_mixup_of_equal_networks_and_with_share_one(sirens, target):
    shares = torch.linspace(0, 1, 6)
    equal = sirens[torch.zeros(6, dtype=torch.long)]
    assert change(equal, mixup(equal, target, shares)[0]) == 0
    unmixed, same = mixup(sirens, target, torch.ones(6))
    assert change(sirens, unmixed) == 0
    assert torch.equal(same, target)
    partners, others = mixup(sirens, target, torch.zeros(6))  # the other network, in other words
    assert torch.equal(others, target.roll(1, 0))
    assert (evaluate(partners, POINTS) - evaluate(sirens, POINTS).roll(1, 0)).abs().max() < 1e-10
    assert change(sirens.map(lambda w: w.roll(1, 0)), partners) > 0.1


@pytest.mark.parametrize(("activation", "own"), [("sine", None), ("relu", None), ("hetero", [0, 0, 1, 1, 4, 4])])
def test_mixup_sees_through_the_group(activation, own, random_params, target, generator):
    """A network mixed with a moved copy of itself is the same function; without alignment it is another."""
    params = random_params(NetSpec.mlp([2, 12, 10, 3], activation, w0=6.0), 3, own and own[::2])
    params = params[torch.arange(6) // 2]
    moved = transform(params, ["permutation", "sign"], generator)
    shares = torch.full((6,), 0.4)
    mixed, _ = mixup(moved, target, shares)
    second = torch.tensor([1, 3, 5])  # whose partner is its copy
    assert change_of_function(params[second], mixed[second]) < 1e-9
    assert change(moved[second], mixed[second]) < 1e-12
    plain = moved.map(lambda w: 0.4 * w + 0.6 * w.roll(1, 0))
    assert change_of_function(params[second], plain[second]) > 0.1


def test_mixup_of_canonical_networks_sees_through_all_groups(random_params, target, generator):
    """Scale and phase are removed by canonicalisation beforehand."""
    for activation, group, names in (
        ("relu", ["permutation", "scale"], ["scale"]),
        ("sine", ["permutation", "phase"], ["phase"]),
    ):
        params = random_params(NetSpec.mlp([2, 12, 10, 3], activation, w0=6.0), 1)[torch.zeros(6, dtype=torch.long)]
        moved = canonicalize(transform(params, group, generator), names)
        assert change_of_function(params, mixup(moved, target, torch.full((6,), 0.4))[0]) < 1e-9


def test_mixup_of_targets(sirens):
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.1], dtype=torch.float64)
    scores = torch.arange(6.0, dtype=torch.float64)
    _, found = mixup(sirens, scores, shares)
    torch.testing.assert_close(found, shares * scores + (1 - shares) * scores.roll(1))
    images = torch.rand(6, 4, 4, dtype=torch.float64)
    _, found = mixup(sirens, images, shares)
    torch.testing.assert_close(found[2], (images[1] + images[2]) / 2)
    with pytest.raises(ValueError, match=r"found targets of torch.int64"):
        mixup(sirens, torch.arange(6), shares)


def test_mixup_stays_among_networks_of_one_activation(random_params, target):
    params = random_params(HETERO, 6, OWN)
    mixed, targets = mixup(params, target, torch.full((6,), 0.3))
    alone = [3, 5]  # the only tanh and gelu
    changed = [(a - b).abs().max() > 0.1 for a, b in zip(mixed.flatten(), params.flatten(), strict=True)]
    # the first of its activation has no other before it
    assert changed == [False, False, True, False, True, False]
    assert torch.equal(targets[alone], target[alone])
    torch.testing.assert_close(targets[2], 0.3 * target[2] + 0.7 * target[0])
    torch.testing.assert_close(targets[4], 0.3 * target[4] + 0.7 * target[1])


def test_mixup_shares_are_beta(random_params):
    params = random_params(NetSpec.mlp([2, 1, 1], "relu"), 4000)
    first = torch.arange(4000) % 2  # 1 where its partner is 0: the share itself
    _, shares = augment(AugmentConfig(mixup=0.5), params, first.double(), seeded())
    shares = shares[first == 1]
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / 8, abs=0.01)  # of Beta(a, a): 1 / (4 (2 a + 1))


# All together


def test_one_seed_one_result(sirens, target):
    first, second = (augment(EVERYTHING, sirens, target, seeded()) for _ in range(2))
    assert torch.equal(first[0].flatten(), second[0].flatten())
    assert torch.equal(first[1], second[1])
    assert change(first[0], augment(EVERYTHING, sirens, target, seeded(1))[0]) > 0.1
    single, _ = augment(EVERYTHING, sirens.to(torch.float32), target, seeded())
    assert single.weights[0].dtype == torch.float32


@pytest.mark.parametrize(("spec", "own"), [(SIREN, None), (HETERO, OWN)])
def test_everything_at_once_and_a_batch_of_one(spec, own, random_params, target):
    params = random_params(spec, 6, own)
    for size in (6, 1):
        before = params[:size].flatten()
        found, targets = augment(EVERYTHING, params[:size], target[:size], seeded())
        assert found.spec == spec
        assert found.flatten().isfinite().all()
        torch.testing.assert_close(targets.sum(1), torch.ones(size, dtype=torch.float64))
        assert torch.equal(params[:size].flatten(), before)  # the stored networks stay
    alone = AugmentConfig(mixup=1.0, group=("permutation",))
    assert change_of_function(params[:1], augment(alone, params[:1], target[:1], seeded())[0]) < 1e-10


def test_convolutions(cnn_spec, random_params, generator):
    params = random_params(cnn_spec, 4)
    config = AugmentConfig(noise=0.1, dropout=0.1, mixup=1.0, group=("permutation", "scale"))
    check_augment(config, cnn_spec)
    found, scores = augment(config, params, torch.arange(4.0), generator)
    assert [w.shape for w in found.weights] == [w.shape for w in params.weights]
    assert scores.shape == (4,)


# What is refused


def test_impossible_settings():
    message = (
        "data.augment.rotate: found -3, expected 0 or more; data.augment.noise: found nan, expected 0 or more; "
        "data.augment.dropout: found 1.0, expected 0 or more and less than 1"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        AugmentConfig(rotate=-3, noise=float("nan"), dropout=1.0)


@pytest.mark.parametrize(
    ("activation", "refused", "admitted"),
    [
        ("sine", ["scale"], ["permutation", "sign", "phase"]),
        ("tanh", ["scale", "phase"], ["permutation", "sign"]),
        ("relu", ["sign", "phase"], ["permutation", "scale"]),
        ("gelu", ["sign", "scale", "phase"], ["permutation"]),
        ("hetero", [], ["permutation", "sign", "scale", "phase"]),
    ],
)
def test_groups_that_networks_do_not_have(activation, refused, admitted):
    spec = NetSpec.mlp([2, 12, 10, 3], activation)
    check_augment(AugmentConfig(translate=0.1, rotate=5.0, group=tuple(admitted)), spec)
    for name in refused:
        with pytest.raises(ValueError, match=f"data.augment.group: found {name}, expected one of permutation"):
            check_augment(AugmentConfig(group=(*admitted, name)), spec)


def test_networks_without_two_coordinates(cnn_spec):
    for spec in (cnn_spec, NetSpec.mlp([3, 12, 1], "sine")):
        with pytest.raises(ValueError, match=r"translate: found 0.1, .*; data.augment.rotate: found 5.0, expected 0"):
            check_augment(AugmentConfig(translate=0.1, rotate=5.0), spec)


def test_alignment_is_what_mixup_needs(random_params, target, generator):
    """Unrelated networks: aligned, the mixed one is nearer to both."""
    params = random_params(SIREN, 6)
    moved = GroupElement.sample(params, generator).act(params)
    mixed, _ = mixup(moved, target, torch.full((6,), 0.5))
    plain = moved.map(lambda w: 0.5 * w + 0.5 * w.roll(1, 0))
    size = [(p.flatten() - moved.flatten()).norm(dim=1) for p in (mixed, plain)]
    assert (size[0] < size[1]).all()


def test_mixup_needs_networks_without_residual_connections():
    *hidden, last = NetSpec.mlp([2, 4, 4, 4, 1], "sine").layers
    spec = NetSpec((*hidden[:2], replace(hidden[2], residual=0), last))
    with pytest.raises(ValueError, match=r"data.augment.mixup: found 0.5, expected 0 for MLP .*residual 0 -> 2"):
        check_augment(AugmentConfig(mixup=0.5), spec)
    check_augment(AugmentConfig(noise=0.1, group=("permutation", "sign")), spec)
