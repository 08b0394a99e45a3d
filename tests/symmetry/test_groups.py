import pytest
import torch

from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.groups import GroupElement, PhaseShift

NETS = [("sine", None), ("tanh", None), ("relu", None), ("leaky_relu", None), ("gelu", None), ("hetero", [0, 1, 2, 4])]


def change_of_function(params, moved):
    points = torch.randn(20, params.spec.layout[0], dtype=torch.float64)
    return (evaluate(moved, points) - evaluate(params, points)).abs().max().item()


@pytest.mark.parametrize(("activation", "own"), NETS)
def test_action_leaves_the_function_unchanged(activation, own, random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 6, 3], activation, w0=3.0), 4, own)
    moved = GroupElement.sample(params, generator).act(params)
    assert change_of_function(params, moved) < 1e-10
    assert (moved.weights[1] - params.weights[1]).abs().max() > 0.1


@pytest.mark.parametrize("grouped", [False, True])
def test_a_single_network_moves_as_in_a_batch(grouped, random_params, generator):
    """Also where its weights are transposed in memory; the network itself stays."""
    last = LayerSpec(4, 4, None, "relu", groups=2) if grouped else LayerSpec(4, 3, None, "relu")
    layers = LayerSpec(2, 4, (3, 3), "relu"), last, LayerSpec(last.out_dim, 5, None, "relu")
    params = random_params(NetSpec((*layers, LayerSpec(5, 2))), 1)
    element = GroupElement.sample(params, generator)
    twice = GroupElement(*(tuple(x.expand(2, -1) for x in part) for part in (element.permutations, element.scales)))
    expected = twice.act(NetParams.cat([params, params]))[:1].flatten()
    before = params.flatten().clone()
    transposed = tuple(weight.mT.contiguous().mT if weight.ndim == 3 else weight for weight in params.weights)
    for weights in (params.weights, transposed):
        torch.testing.assert_close(element.act(params.replace(weights=weights)).flatten(), expected, rtol=0, atol=0)
    assert torch.equal(params.flatten(), before)


@pytest.mark.parametrize(("activation", "wrong"), [("sine", 2.0), ("relu", -1.0), ("gelu", -1.0), ("tanh", 0.5)])
def test_elements_outside_the_group_change_it(activation, wrong, random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 3], activation), 4)
    element = GroupElement.sample(params, generator, scale=False)
    element = GroupElement(element.permutations, tuple(torch.full_like(q, wrong) for q in element.scales))
    assert change_of_function(params, element.act(params)) > 1e-3


def test_permutations_are_never_the_identity(random_params, generator):
    params = random_params(NetSpec.mlp([2, 2, 1, 1], "sine"), 200)
    element = GroupElement.sample(params, generator)
    assert (element.permutations[0] == torch.tensor([1, 0])).all()  # two neurons: the swap is all there is
    assert (element.permutations[1] == 0).all()


@pytest.mark.parametrize(("activation", "own"), [("relu", None), ("hetero", [0, 1, 2, 4])])
def test_compose_and_inverse(activation, own, random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 3], activation), 4, own)
    first, second = (GroupElement.sample(params, generator) for _ in range(2))
    both = second.compose(first).act(params)
    for a, b in zip(both.weights, second.act(first.act(params)).weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    back = first.inverse().act(first.act(params))
    for a, b in zip((*back.weights, *back.biases), (*params.weights, *params.biases), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_action_by_hand():
    params = NetParams.from_tensors(
        [torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 4.0]]])],
        [torch.tensor([[5.0, 6.0]]), torch.zeros(1, 1)],
        "relu",
    )
    moved = GroupElement((torch.tensor([[1, 0]]),), (torch.tensor([[2.0, 10.0]]),)).act(params)
    assert moved.weights[0].tolist() == [[[20.0], [2.0]]]
    assert moved.biases[0].tolist() == [[60.0, 10.0]]
    assert torch.allclose(moved.weights[1], torch.tensor([[[0.4, 1.5]]]))


def test_action_on_convolutions_permutes_whole_kernels(cnn_spec, random_params, generator):
    params = random_params(cnn_spec, 3)
    element = GroupElement.sample(params, generator)
    moved = element.act(params)
    b, i, j = 2, 1, 3
    old_i, old_j = element.permutations[1][b, i], element.permutations[0][b, j]
    ratio = element.scales[1][b, old_i] / element.scales[0][b, old_j]
    torch.testing.assert_close(moved.weights[1][b, i, j], params.weights[1][b, old_i, old_j] * ratio)


def test_scales_follow_each_networks_activation(random_params, generator):
    own = [BUILT_IN.index(name) for name in ("sine", "relu", "gelu", "tanh")]
    params = random_params(NetSpec.mlp([2, 50, 1], "hetero"), 4, own)
    scales = GroupElement.sample(params, generator, decades=2.0).scales[0]
    assert set(scales[0].tolist()) == set(scales[3].tolist()) == {-1.0, 1.0}
    assert scales[1].min() > 0
    assert scales[1].max() / scales[1].min() > 10
    assert (scales[2] == 1).all()


def test_changes_move_by_the_derivative(random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 3], "sine", 6.0), 4)
    changes = random_params(params.spec, 4)
    changed = NetParams(
        params.spec,
        tuple(map(torch.add, params.weights, changes.weights)),
        tuple(map(torch.add, params.biases, changes.biases)),
    )
    for element in (GroupElement.sample(params, generator), PhaseShift.sample(params, generator)):
        found = element.act_on_changes(changes).flatten()
        expected = element.act(changed).flatten() - element.act(params).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        back = element.inverse().act(element.act(params)).flatten()
        torch.testing.assert_close(back, params.flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_networks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
def test_features_narrower_than_the_element(num_networks, dtype, random_params, generator):
    """They are widened to its type, and stay as they are themselves."""
    params = random_params(NetSpec.mlp([2, 4, 3], "tanh"), num_networks)
    element = GroupElement.sample(params, generator)
    edges = [torch.arange(weight.numel(), dtype=dtype).view(*weight.shape, 1) for weight in params.weights]
    moved = element.act_on_edges(edges, params.spec)
    for found, expected in zip(moved, element.act_on_edges([e.double() for e in edges], params.spec), strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(e.flatten(), torch.arange(e.numel(), dtype=dtype)) for e in edges)
