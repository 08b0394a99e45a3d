import pytest
import torch
from scipy.optimize import linear_sum_assignment

from scalegmn.networks import ACTIVATIONS, BUILT_IN, LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry import align as module
from scalegmn.symmetry.align import align
from scalegmn.symmetry.groups import GroupElement

# relu: no factors are drawn, since alignment leaves them to canonicalisation
NETS = [("sine", None), ("tanh", None), ("relu", None), ("gelu", None), ("hetero", [0, 1, 2, 4] * 2)]
LAYOUT = [2, 12, 10, 11, 3]


def sample(params, generator):
    """Random permutations, and signs where they are admitted."""
    element = GroupElement.sample(params, generator)
    return GroupElement(element.permutations, tuple(map(torch.sign, element.scales)))


def distance(a, b):
    return (a.flatten() - b.flatten()).norm(dim=1)


def noisy(params, level, generator):
    return params.map(lambda w: w + level * torch.randn(w.shape, generator=generator, dtype=w.dtype))


@pytest.mark.parametrize(("activation", "own"), NETS)
def test_brings_a_network_back_exactly(activation, own, random_params, generator):
    params = random_params(NetSpec.mlp(LAYOUT, activation), 8, own)
    element = sample(params, generator)
    found = align(params, element.act(params))
    for name in ("permutations", "scales"):
        assert all(map(torch.equal, getattr(found, name), getattr(element, name)))
    back = align(element.act(params), params)
    assert torch.equal(back.act(element.act(params)).flatten(), params.flatten())


def test_brings_convolutions_back_exactly(random_params, generator):
    spec = NetSpec((LayerSpec(1, 6, (3, 3), "tanh"), LayerSpec(6, 5, (5, 3), "tanh"), LayerSpec(5, 2)))
    params = random_params(spec, 5)
    moved = sample(params, generator).act(params)
    found = align(moved, params).act(moved)
    assert torch.equal(found.flatten(), params.flatten())
    images = torch.randn(3, 1, 9, 9, dtype=torch.float64)
    assert (evaluate_cnn(found, images) - evaluate_cnn(moved, images)).abs().max() < 1e-12


@pytest.mark.parametrize(("activation", "own"), NETS)
def test_keeps_functions_and_comes_nearer(activation, own, random_params):
    """Networks that have nothing to do with each other."""
    spec = NetSpec.mlp(LAYOUT, activation, w0=3.0)
    params, reference = (random_params(spec, 8, own) for _ in range(2))
    aligned = align(params, reference).act(params)
    points = torch.randn(20, 2, dtype=torch.float64)
    assert (evaluate(aligned, points) - evaluate(params, points)).abs().max() < 1e-10
    assert (distance(aligned, reference) < 0.95 * distance(params, reference)).all()


def test_undoes_the_group_between_noisy_copies(random_params, generator):
    params = random_params(NetSpec.mlp(LAYOUT, "sine"), 8)
    copy = noisy(params, 0.1, generator)
    moved = sample(copy, generator).act(copy)
    aligned = align(moved, params).act(moved)
    assert (distance(params, moved) > 10 * distance(params, copy)).all()
    torch.testing.assert_close(distance(params, aligned), distance(params, copy), rtol=1e-12, atol=0)


def test_signs_follow_each_networks_activation(random_params):
    own = [BUILT_IN.index(name) for name in ("sine", "relu", "gelu", "tanh")]
    params, reference = (random_params(NetSpec.mlp(LAYOUT, "hetero"), 4, own) for _ in range(2))
    for signs in align(params, reference).scales:
        for network, index in enumerate(own):
            odd = ACTIVATIONS[BUILT_IN[index]].group.signs
            assert set(signs[network].tolist()) == ({-1.0, 1.0} if odd else {1.0})


def optimal(similarity):
    """The slow, obvious twin of the greedy assignment: the best one, network by network."""
    return torch.stack([torch.from_numpy(linear_sum_assignment(s.numpy(), maximize=True)[1]) for s in similarity])


def test_assignment_is_close_to_the_best(generator):
    similarity = torch.randn(50, 32, 32, generator=generator, dtype=torch.float64)
    found, best = (
        similarity.gather(2, assign(similarity)[..., None]).sum((1, 2)) for assign in (module._assign, optimal)
    )
    assert (found <= best + 1e-9).all()
    assert (found / best).mean() > 0.95
    assert (found / best).min() > 0.9
    assert torch.equal(module._assign(similarity).sort(1).values, torch.arange(32).expand(50, 32))


@pytest.mark.parametrize(("level", "factor"), [(0.2, 1.0), (None, 1.02)])
def test_distance_is_close_to_that_of_best_assignments(level, factor, random_params, generator, monkeypatch):
    """Noisy copies, moved by the group, and networks that have nothing to do with each other (level None)."""
    params, reference = (random_params(NetSpec.mlp([2, 32, 32, 1], "sine"), 16) for _ in range(2))
    if level is not None:
        params = noisy(reference, level, generator)
        params = sample(params, generator).act(params)
    found = distance(align(params, reference).act(params), reference).mean()
    monkeypatch.setattr(module, "_assign", optimal)
    best = distance(align(params, reference).act(params), reference).mean()
    assert found <= factor * best + 1e-12


def test_by_hand(random_params):
    # the reference's neurons are the second, and the first turned around
    params = random_params(NetSpec.mlp([1, 2, 1], "sine"), 1)
    params.weights[0][:], params.biases[0][:] = torch.tensor([[[1.0], [5.0]]]), torch.tensor([[2.0, 0.0]])
    reference = random_params(params.spec, 1)
    reference.weights[0][:], reference.biases[0][:] = torch.tensor([[[5.0], [-1.0]]]), torch.tensor([[0.0, -2.0]])
    params.weights[1][:], reference.weights[1][:] = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, -3.0]]])
    element = align(params, reference)
    assert element.permutations[0].tolist() == [[1, 0]]
    assert element.scales[0].tolist() == [[-1.0, 1.0]]


def test_ties_and_single_neurons(random_params):
    params = random_params(NetSpec.mlp([2, 4, 1, 1], "relu"), 3).map(torch.zeros_like)  # all neurons are the same
    element = align(params, params)
    assert torch.equal(element.permutations[0].sort(1).values, torch.arange(4).expand(3, 4))
    assert (element.permutations[1] == 0).all()


def test_other_networks_are_refused(random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "relu"), 3)
    for other in (random_params(NetSpec.mlp([2, 5, 1], "relu"), 3), params[:2]):
        with pytest.raises(ValueError, match=r"expected . x MLP"):
            align(params, other)


def test_coupled_layers_are_refused(random_params):
    layers = (LayerSpec(2, 4, activation="relu"), LayerSpec(4, 4, activation="relu", residual=0), LayerSpec(4, 1))
    params = random_params(NetSpec(layers), 2)
    with pytest.raises(ValueError, match="some layers are coupled"):
        align(params, params)
