import math

import pytest
import torch

from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.canonicalize import (
    canonicalize,
    canonicalize_phase,
    canonicalize_scale,
    incoming_norm,
)
from scalegmn.symmetry.groups import GroupElement

RESIDUAL = NetSpec((LayerSpec(2, 4, None, "relu"), LayerSpec(4, 4, None, "relu", residual=0), LayerSpec(4, 3)))


@pytest.mark.parametrize("w0", [1.0, 6.0, 30.0])
def test_phase(w0, random_params):
    params = random_params(NetSpec.mlp([2, 7, 5, 3], "sine", w0), 6)
    canonical = canonicalize_phase(params)
    points = torch.rand(30, 2, dtype=torch.float64) * 2 - 1
    # sin(w0 z) of arguments of a few hundred is itself good to 1e-13
    assert (evaluate(canonical, points) - evaluate(params, points)).abs().max() < 1e-12 * max(1, w0)
    for bias in canonical.biases[:-1]:
        assert (w0 * bias).abs().max() <= math.pi / 2 + 1e-12
    assert (canonical.weights[1] - params.weights[1]).abs().max() > 0.1
    assert torch.equal(canonical.biases[-1], params.biases[-1])
    again = canonicalize_phase(canonical)
    for a, b in zip((*again.weights, *again.biases), (*canonical.weights, *canonical.biases), strict=True):
        assert torch.equal(a, b)


def test_phase_by_hand():
    # w0 b / pi = 0.9: one turn; b -> b - pi / w0, outgoing weight flips
    bias = torch.tensor([[0.9 * math.pi / 2, 0.2]])
    params = NetParams.from_tensors(
        [torch.ones(1, 2, 1), torch.tensor([[[3.0, 4.0]]])], [bias, torch.zeros(1, 1)], "sine", w0=2.0
    )
    canonical = canonicalize_phase(params)
    assert torch.allclose(canonical.biases[0], torch.tensor([[-0.1 * math.pi / 2, 0.2]]))
    assert canonical.weights[1].tolist() == [[[-3.0, 4.0]]]


def test_other_activations_are_left_alone(random_params):
    params = random_params(NetSpec.mlp([2, 7, 5, 3], "tanh"), 2)
    assert all(map(torch.equal, canonicalize_phase(params).weights, params.weights))


def test_mixed_networks_keep_their_function(random_params):
    own = [BUILT_IN.index(name) for name in ("sine", "relu", "sine")]
    params = random_params(NetSpec.mlp([2, 7, 5, 3], "hetero", 6.0), 3, own)
    canonical = canonicalize_phase(params)
    points = torch.rand(30, 2, dtype=torch.float64) * 2 - 1
    assert (evaluate(canonical, points) - evaluate(params, points)).abs().max() < 1e-11
    assert torch.equal(canonical.biases[0][1], params.biases[0][1])
    assert (6.0 * canonical.biases[0][[0, 2]]).abs().max() <= math.pi / 2 + 1e-12


def same(a, b, tolerance=0.0):
    pairs = zip((*a.weights, *a.biases), (*b.weights, *b.biases), strict=True)
    return all((x - y).abs().max() <= tolerance for x, y in pairs)


@pytest.mark.parametrize(
    ("activation", "own"), [("relu", None), ("leaky_relu", None), ("hetero", ["relu", "tanh"] * 2)]
)
def test_scale(activation, own, random_params, generator):
    own = own and [BUILT_IN.index(name) for name in own]
    params = random_params(NetSpec.mlp([2, 7, 5, 3], activation), 4, own)
    params.weights[0][0, 2], params.biases[0][0, 2] = 0, 0  # a neuron without incoming weights
    canonical = canonicalize_scale(params)
    points = torch.rand(30, 2, dtype=torch.float64) * 2 - 1
    assert (evaluate(canonical, points) - evaluate(params, points)).abs().max() < 1e-10
    norms = torch.cat([canonical.weights[1], canonical.biases[1][..., None]], 2).norm(dim=2)
    assert (norms[0] - 1).abs().max() < 1e-12
    if own:
        assert torch.equal(canonical.weights[1][1], params.weights[1][1])  # tanh
    assert same(canonicalize_scale(canonical), canonical, 1e-12)
    # one representative per orbit: rescaled networks become the same
    g = GroupElement.sample(params, generator, permute=False, decades=3.0)
    if not own:
        # (the outgoing weights of a neuron that carries nothing are left alone)
        assert same(canonicalize_scale(g.act(params))[1:], canonical[1:], 1e-10)


def test_scale_of_convolutions(random_params, generator):
    spec = NetSpec((LayerSpec(1, 4, (3, 3), "relu"), LayerSpec(4, 3, (3, 1), "relu"), LayerSpec(3, 2)))
    params = random_params(spec, 3)
    canonical = canonicalize_scale(params)
    assert (canonical.weights[0].flatten(2).square().sum(2) + canonical.biases[0] ** 2 - 1).abs().max() < 1e-12
    g = GroupElement.sample(params, generator, permute=False)
    assert same(canonicalize_scale(g.act(params)), canonical, 1e-10)


@pytest.mark.parametrize(
    "spec",
    [
        NetSpec.mlp([2, 7, 5, 3], "relu"),
        NetSpec.mlp([2, 3], "relu"),
        NetSpec((LayerSpec(1, 4, (3, 3), "leaky_relu"), LayerSpec(4, 3, (3, 1), "leaky_relu"), LayerSpec(3, 2))),
    ],
)
def test_even_scale(spec, random_params, generator):
    """The same function for all networks of an orbit, and layers of one size, however large the last one was."""
    params = random_params(spec, 4)
    params = params.replace(weights=(*params.weights[:-1], 1e3 * params.weights[-1]))
    canonical = canonicalize(params, ["even_scale"])
    assert same(canonicalize_scale(canonical), canonicalize_scale(params), 1e-9)
    rows = [canonical.weights[-1].flatten(2).norm(dim=2).square().mean(1).sqrt()]
    rows += [incoming_norm(canonical, index)[:, 0] for index in range(min(1, spec.num_layers - 1))]
    assert all((row / rows[0] - 1).abs().max() < 1e-12 for row in rows)
    g = GroupElement.sample(params, generator, permute=False, decades=3.0)
    assert same(canonicalize(g.act(params), ["even_scale"]), canonical, 1e-9)
    other = params.replace(biases=(*params.biases[:-1], 1 + params.biases[-1]))
    assert not same(canonicalize(other, ["even_scale"]), canonical, 1e-9)


def test_even_scale_of_nothing(random_params):
    params = random_params(NetSpec.mlp([2, 4, 3], "relu"), 2).map(torch.zeros_like)
    assert same(canonicalize(params, ["even_scale"]), params, 0)


@pytest.mark.parametrize("spec", [NetSpec.mlp([2, 4, 3], "tanh"), NetSpec.mlp([2, 4, 3], "hetero"), RESIDUAL])
def test_even_scale_is_for_relu_chains(spec, random_params):
    params = random_params(spec, 2, [0, 1] if "hetero" in str(spec) else None)
    with pytest.raises(ValueError, match="even_scale: found"):
        canonicalize(params, ["even_scale"])


def test_by_name(random_params):
    params = random_params(NetSpec.mlp([2, 7, 5, 3], "relu"), 2)
    assert same(canonicalize(params, ["phase", "scale"]), canonicalize_scale(params))
    assert canonicalize(params, []) is params


def test_scale_of_dead_and_tiny_neurons(random_params):
    """Neurons without weights stay, without NaN in the gradient; tiny ones reach norm 1 in float32."""
    params = random_params(NetSpec.mlp([2, 4, 3, 2], "relu"), 2).map(lambda tensor: tensor.float())
    tiny = NetParams(params.spec, tuple(1e-15 * w for w in params.weights), tuple(0 * b for b in params.biases))
    for weight in canonicalize_scale(tiny).weights[:2]:
        torch.testing.assert_close(weight.norm(dim=2), torch.ones(weight.shape[:2]))
    params.weights[0][:, 0], params.biases[0][:, 0] = 0, 0
    params = params.map(lambda tensor: tensor.requires_grad_())
    canonical = canonicalize_scale(params)
    assert (canonical.weights[0][:, 0] == 0).all()
    (canonical.weights[-1].square().sum() + canonical.biases[0].sum()).backward()
    assert all(weight.grad.isfinite().all() for weight in params.weights)
