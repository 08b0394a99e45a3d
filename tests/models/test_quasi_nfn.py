import pytest
import torch
from contract import Contract

from scalegmn.models.monomial_nfn import MonomialLayer, rescaled
from scalegmn.models.quasi_nfn import QuasiNFNConfig
from scalegmn.networks import LayerSpec, NetSpec

RELU = NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2)))
SPECS = [
    NetSpec.mlp([2, 5, 4, 1], "sine", 6.0),
    NetSpec.mlp([2, 5, 4, 3, 2], "relu"),
    NetSpec((LayerSpec(2, 4, (2, 2), "tanh"), LayerSpec(4, 3, (1, 1)))),
    RELU,
]
CONFIGS = [
    QuasiNFNConfig(hidden_dims=(4, 3), readout_dim=16),
    QuasiNFNConfig(hidden_dims=(4, 3), output="parameters", heads=2, normalize=False),
]


class TestQuasiNFN(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


def test_factors_act_as_scalars(random_params):
    """One number per neuron commutes with layers, in which outgoing weights are divided; numbers per channel do not."""
    torch.manual_seed(0)
    params = random_params(RELU, 3)
    layers = [MonomialLayer([1, 3, 4, 2], [9, 3, 1], False, *dims).double() for dims in ((1, 2), (2, 2))]
    features = layers[0]([w.reshape(*w.shape[:3], -1) for w in params.weights], [b[..., None] for b in params.biases])
    alone = [1 + torch.rand(3, n, 1, dtype=torch.float64) for n in (3, 4)]

    def difference(scalars):
        pairs = zip(rescaled(layers[1](*features), scalars), layers[1](*rescaled(features, scalars)), strict=True)
        return max((x - y).abs().max() for xs, ys in pairs for x, y in zip(xs, ys, strict=True))

    assert difference([q.repeat(1, 1, 2) for q in alone]) < 1e-12
    assert difference([torch.cat([q, q**2], -1) for q in alone]) > 1e-3
