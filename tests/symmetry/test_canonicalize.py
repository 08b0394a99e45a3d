import math

import pytest
import torch

from scalegmn.nets.functional import evaluate
from scalegmn.spec import ACTIVATIONS, NetParams, NetSpec
from scalegmn.symmetry.canonicalize import canonicalize_phase


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
    own = [ACTIVATIONS.index(name) for name in ("sine", "relu", "sine")]
    params = random_params(NetSpec.mlp([2, 7, 5, 3], "hetero", 6.0), 3, own)
    canonical = canonicalize_phase(params)
    points = torch.rand(30, 2, dtype=torch.float64) * 2 - 1
    assert (evaluate(canonical, points) - evaluate(params, points)).abs().max() < 1e-11
    assert torch.equal(canonical.biases[0][1], params.biases[0][1])
    assert (6.0 * canonical.biases[0][[0, 2]]).abs().max() <= math.pi / 2 + 1e-12
