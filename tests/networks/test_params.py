"""NetParams are checked when they are built, changed by `replace`, and never compared by their tensors."""

import pytest
import torch
from torch import nn

from scalegmn.interop.torch_modules import from_module
from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.networks.evaluate import evaluate

SPEC = NetSpec.mlp([2, 3, 1], "relu")
NORMED = NetSpec((LayerSpec(2, 3), LayerSpec(3, 3, groups=3, norm="batch", activation="relu"), LayerSpec(3, 1)))


def tensors(spec=SPEC, num=4):
    return {
        "weights": tuple(torch.ones(num, *layer.weight_shape) for layer in spec.layers),
        "biases": tuple(torch.zeros(num, layer.out_dim) for layer in spec.layers),
    }


def statistics(num=4):
    return (None, torch.ones(num, 2, 3), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (torch.ones(4, 3, 2),)}, "weights: found 1 tensors, expected 2 for MLP"),
        ({"biases": (torch.zeros(4, 3),) * 3}, "biases: found 3 tensors, expected 2"),
        ({"weights": (torch.ones(4, 3, 2), torch.ones(4, 3))}, r"layer 1: weight has shape \(4, 3\), expected \(4, 1"),
        (
            {"weights": (torch.ones(5, 3, 2), torch.ones(4, 1, 3))},
            r"layer 0: weight has shape \(5, 3, 2\), expected \(4",
        ),
        ({"biases": (torch.zeros(4, 3), torch.zeros(3, 1))}, r"layer 1: bias has shape \(3, 1\), expected \(4, 1\)"),
        (
            {"biases": (torch.zeros(4, 3), torch.zeros(4, 1).double())},
            "layer 1: bias is torch.float64, expected torch.fl",
        ),
        ({"biases": (torch.zeros(4, 3), torch.zeros(4, 1, device="meta"))}, "layer 1: bias is on meta, expected cpu"),
        (
            {"activation": torch.zeros(4, dtype=torch.long)},
            "activation: found indices, expected None, as no layer of MLP",
        ),
        ({"statistics": (None,)}, "statistics: found 1 entries, expected 2"),
        ({"statistics": (None, torch.ones(4, 2, 1))}, "layer 1: statistics are given, expected none"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        NetParams(**{"spec": SPEC, **tensors(), **change})
    with pytest.raises(ValueError, match=message):
        NetParams(SPEC, **tensors()).replace(**change)


def test_types_are_floating_point():
    whole = {name: tuple(tensor.long() for tensor in values) for name, values in tensors().items()}
    with pytest.raises(ValueError, match=r"layer 0: bias is torch.int64, expected a floating point type"):
        NetParams(SPEC, **whole)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (None, "layer 0: its activation is hetero; expected 4 indices in `activation`, found None"),
        (
            torch.zeros(3, dtype=torch.long),
            r"activation: found torch.int64 of shape \(3,\), expected torch.int64 of \(4,\)",
        ),
        (torch.zeros(4), r"activation: found torch.float32 of shape \(4,\)"),
        (
            torch.tensor([0, 1, len(BUILT_IN), 0]),
            rf"found index {len(BUILT_IN)}, expected 0 to {len(BUILT_IN) - 1}",
        ),
        (torch.tensor([0, 1, -1, 0]), "activation: found index -1"),
        (torch.zeros(4, dtype=torch.long, device="meta"), "activation is on meta, expected cpu"),
    ],
)
def test_activations_that_do_not_fit(activation, message):
    with pytest.raises(ValueError, match=message):
        NetParams(NetSpec.mlp([2, 3, 1], "hetero"), **tensors(), activation=activation)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "layer 1: statistics of a batch norm are missing"),
        ((None, None, None), "layer 1: statistics of a batch norm are missing"),
        ((None, torch.ones(4, 3), None), r"layer 1: statistics has shape \(4, 3\), expected \(4, 2, 3\)"),
        ((None, torch.ones(4, 2, 3).half(), None), "layer 1: statistics is torch.float16, expected torch.float32"),
        ((None, torch.ones(4, 2, 3), torch.ones(4, 2, 1)), "layer 2: statistics are given, expected none, as it is no"),
    ],
)
def test_statistics_that_do_not_fit(given, message):
    NetParams(NORMED, **tensors(NORMED), statistics=statistics())
    with pytest.raises(ValueError, match=message):
        NetParams(NORMED, **tensors(NORMED), statistics=given)


def test_equality_is_identity(random_params):
    params = random_params(SPEC, 2)
    other = params.replace()
    assert params == params
    assert params != other
    assert len({params, other, params}) == 2
    assert params in [other, params]


def test_replace_keeps_the_rest(random_params):
    spec = NetSpec.mlp([2, 3, 1], "hetero")
    params = random_params(spec, 3, [0, 1, 2])
    changed = params.replace(biases=tuple(bias + 1 for bias in params.biases))
    assert changed.weights is params.weights
    assert changed.activation is params.activation
    assert torch.equal(changed.biases[0], params.biases[0] + 1)
    with pytest.raises(TypeError, match="bias"):
        params.replace(bias=params.biases)


def test_every_way_from_params_to_params_keeps_statistics():
    params = NetParams(NORMED, **tensors(NORMED), statistics=(None, torch.rand(4, 2, 3) + 1, None))
    flat = params.unflatten(params.flatten())
    for other in (params.map(torch.clone), params.to(torch.float64), params[:2], params[torch.tensor([0, 1])], flat):
        expected = params.statistics[1][: len(other)].to(other.biases[0].dtype)
        assert torch.equal(other.statistics[1], expected)
    both = NetParams.cat([params, params])
    assert torch.equal(both.statistics[1], params.statistics[1].repeat(2, 1, 1))
    assert both.statistics[0] is None


def test_networks_of_several_specs_are_not_joined(random_params):
    with pytest.raises(
        ValueError, match=r"expected networks of one spec, found MLP \[2, 3, 1\] .* and MLP \[2, 4, 1\]"
    ):
        NetParams.cat([random_params(SPEC, 2), random_params(NetSpec.mlp([2, 4, 1], "relu"), 2)])


def test_gradients_and_functional_transforms(random_params):
    """Networks are built of tensors that are differentiated, or batched by `torch.func`."""
    params, x = random_params(SPEC, 3), torch.randn(5, 2, dtype=torch.float64)

    def loss(weights):
        return evaluate(params.replace(weights=weights), x).square().sum()

    grads = torch.func.grad(loss)(params.weights)
    leaves = tuple(weight.clone().requires_grad_() for weight in params.weights)
    expected = torch.autograd.grad(loss(leaves), leaves)
    assert all(map(torch.equal, grads, expected))
    stacked = tuple(torch.stack([weight, 2 * weight]) for weight in params.weights)
    losses = torch.vmap(loss)(stacked)
    torch.testing.assert_close(losses, torch.stack([loss(tuple(w[k] for w in stacked)) for k in (0, 1)]))


def test_built_of_batched_activations(random_params):
    params = random_params(NetSpec.mlp([2, 3, 1], "hetero"), 3, [0, 1, 2])
    several = torch.tensor([[0, 1, 2], [2, 2, 2]])
    assert torch.vmap(lambda kinds: params.replace(activation=kinds).biases[0].sum())(several).shape == (2,)


@pytest.mark.parametrize("activation", ["relu", "hetero"])
def test_compiled_functions_build_networks(activation, random_params):
    spec = NetSpec.mlp([2, 3, 1], activation)
    x = torch.randn(5, 2, dtype=torch.float64)
    kinds = [BUILT_IN.index(name) for name in ("relu", "tanh", "gelu")] if activation == "hetero" else None
    params = random_params(spec, 3, kinds)

    def shifted(params):
        return evaluate(params.replace(biases=tuple(bias + 1 for bias in params.biases)), x)

    compiled = torch.compile(shifted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(params), shifted(params), rtol=0, atol=1e-12)


def test_modules_have_statistics():
    params = from_module(
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)), torch.ones(2, 2)
    )
    assert params.spec.layers[1].norm == "batch"
    assert params.statistics[1].shape == (1, 2, 3)
