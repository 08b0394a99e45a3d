import pytest
import torch

from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.statistics import (
    NUM_LAYER_STATISTICS,
    NUM_NETWORK_STATISTICS,
    at_depth,
    invariant_statistics,
    quantiles,
    sizes,
)

SPECS = {
    **{name: NetSpec.mlp([3, 6, 5, 4], name, 6.0) for name in ("relu", "tanh", "sine", "gelu", "hetero")},
    "cnn": NetSpec((LayerSpec(1, 6, (3, 3), "relu"), LayerSpec(6, 5, (3, 1), "leaky_relu"), LayerSpec(5, 4))),
    "residual": NetSpec(
        (
            LayerSpec(2, 6, (3, 3), "relu"),
            LayerSpec(6, 4, (1, 1), "tanh"),
            LayerSpec(4, 6, (3, 3), "relu", residual=0),
            LayerSpec(6, 3),
        )
    ),
    "groups": NetSpec(
        (LayerSpec(2, 4, (3, 3), "relu"), LayerSpec(4, 6, (3, 3), "relu", groups=2), LayerSpec(6, 3, reads=1))
    ),
}


@pytest.fixture(params=SPECS)
def params(request, random_params):
    spec = SPECS[request.param]
    return random_params(spec, 6, [BUILT_IN.index(name) for name in ("relu", "tanh")] * 3 if spec.is_hetero else None)


def values(params):
    """Every statistic, [B, numbers]."""
    layers, network = invariant_statistics(params)
    assert layers.shape == (len(params), params.spec.num_layers, NUM_LAYER_STATISTICS)
    assert network.shape == (len(params), NUM_NETWORK_STATISTICS)
    torch.testing.assert_close(sizes(params)[..., 0], layers[..., 2], rtol=0, atol=0)
    return torch.cat([layers.flatten(1), network], dim=1)


def test_exact_over_six_decades(params, generator):
    for _ in range(3):
        moved = GroupElement.sample(params, generator, decades=3).act(params)
        assert (values(moved) - values(params)).abs().max() < 1e-9
        assert (sizes(moved) - sizes(params)).abs().max() < 1e-9


def test_what_is_no_symmetry_is_seen(params):
    """Networks that compute something else have other statistics; a factor outside their group makes them so."""
    stays = GroupElement.sample(params, permute=False, scale=False)
    outside = {"relu": -1, "leaky_relu": -1, "hetero": -3}.get(params.spec.layers[0].activation, 2)
    moved = GroupElement(stays.permutations, tuple(outside * q for q in stays.scales)).act(params)
    assert ((values(moved) - values(params)).abs().amax(1) > 1e-3).all()


def test_statistics_of_weights_as_they_are_move(random_params, generator):
    """What the canonical form and the absolute values are for."""
    for name in ("relu", "tanh"):
        params = random_params(SPECS[name], 6)
        moved = GroupElement.sample(params, generator).act(params)
        changes = [
            quantiles(a.flatten(1)) - quantiles(b.flatten(1))
            for a, b in zip(params.weights, moved.weights, strict=True)
        ]
        assert min(change.abs().max() for change in changes) > 0.1


def test_plain_sizes_where_scales_are_no_symmetry(random_params):
    params = random_params(SPECS["tanh"], 4)
    expected = [tensor.flatten(1).square().mean(1).sqrt().log10() for tensor in (*params.weights, *params.biases)]
    found = sizes(params)
    torch.testing.assert_close(torch.cat([found[..., 0], found[..., 1]], 1), torch.stack(expected, 1))


def test_silent_neurons_have_no_say(random_params):
    """What a relu neuron without incoming weights and bias sends is zero, whatever its outgoing weights."""
    params = random_params(SPECS["relu"], 4)
    params.weights[0][:, 2], params.biases[0][:, 2] = 0, 0
    expected = values(params)
    params.weights[1][:, :, 2] *= 1000
    torch.testing.assert_close(values(params), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [0, 1e-15, 1e4])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_zeros_and_extremes_are_finite(activation, factor, random_params):
    """In float32, with gradients."""
    params = random_params(SPECS[activation], 4).to(torch.float32).map(lambda x: (factor * x).requires_grad_())
    found = values(params)
    gradients = torch.autograd.grad(found.sum(), [*params.weights, *params.biases])
    assert all(tensor.isfinite().all() for tensor in (found, *gradients))


def test_paths_and_singular_values():
    """Of [2, 2, 1] by hand: paths 3 1 + 4 2 through absolute weights."""
    spec = NetSpec.mlp([1, 2, 1], "tanh")
    weights = (torch.tensor([[[3.0], [-4.0]]]).double(), torch.tensor([[[1.0, 2.0]]]).double())
    params = NetParams(spec, weights, (torch.zeros(1, 2).double(), torch.zeros(1, 1).double()))
    _, network = invariant_statistics(params)
    expected = torch.tensor([[11.0, 9 + 64, 5**0.5, 1, 1, 1, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(torch.cat([10 ** network[:, :3], network[:, 3:]], 1), expected)


def test_layers_of_shorter_networks_are_missing_before_the_last():
    rows = torch.arange(1.0, 7).reshape(1, 3, 2)
    assert torch.equal(at_depth(rows, 3), rows)
    assert at_depth(rows, 4)[0, :, 0].nan_to_num().tolist() == [1, 3, 0, 5]


def test_quantiles_of_more_numbers_than_the_type_can_count():
    x = torch.arange(2052).view(1, -1)  # half precision has every second number from 2048 on
    assert torch.equal(quantiles(x.half()), quantiles(x.double()).half())
