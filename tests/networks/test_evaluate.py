import pytest
import torch

from scalegmn.networks import NetSpec
from scalegmn.networks.evaluate import evaluate
from scalegmn.networks.siren import init_siren, pixel_grid, render


@pytest.mark.parametrize(("activation", "module"), [("tanh", torch.nn.Tanh()), ("relu", torch.nn.ReLU())])
def test_evaluate_equals_torch_networks_one_by_one(activation, module, random_params):
    params = random_params(NetSpec.mlp([3, 5, 4, 2], activation), 3)
    points = torch.randn(7, 3, dtype=torch.float64)
    for index in range(3):
        x = points
        for layer in range(3):
            x = torch.nn.functional.linear(x, params.weights[layer][index], params.biases[layer][index])
            x = module(x) if layer < 2 else x
        torch.testing.assert_close(evaluate(params, points)[index], x, rtol=1e-12, atol=1e-12)


def test_mixed_activations_equal_their_own_networks(random_params):
    mixed = random_params(NetSpec.mlp([3, 5, 2], "hetero"), 2, [1, 2])
    points = torch.randn(2, 7, 3, dtype=torch.float64)
    for index, name in ((0, "tanh"), (1, "relu")):
        own = random_params(NetSpec.mlp([3, 5, 2], name), 1)
        own = type(own)(own.spec, tuple(w[[index]] for w in mixed.weights), tuple(b[[index]] for b in mixed.biases))
        assert torch.equal(evaluate(own, points[[index]])[0], evaluate(mixed, points)[index])


def test_convolutions_are_refused(cnn_spec, random_params):
    with pytest.raises(ValueError, match="linear layers"):
        evaluate(random_params(cnn_spec, 1), torch.randn(2, 1))


def test_pixel_grid_is_numpys_meshgrid():
    assert pixel_grid(2, 3).tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]


def test_siren_initialisation(generator):
    spec = NetSpec.mlp([2, 64, 64, 1], "sine", 10.0)
    params = init_siren(spec, 50, generator)
    for weight, bound in zip(params.weights, (0.5, (6 / 64) ** 0.5 / 10, (6 / 64) ** 0.5 / 10), strict=True):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert render(params, 4, 5).shape == (50, 4, 5, 1)
