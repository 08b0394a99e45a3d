import math
from types import SimpleNamespace

import pytest
import torch
from contract import Contract, build

from scalegmn.experiments.controls import work_per_network
from scalegmn.models.dng import DNGConfig
from scalegmn.networks import LayerSpec, NetSpec

SPECS = [
    NetSpec.mlp([2, 5, 4, 1], "sine", 6.0),
    NetSpec.mlp([3, 4, 2], "hetero"),
    NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2))),
    NetSpec((LayerSpec(2, 4, (2, 2), "tanh"), LayerSpec(4, 3, (1, 1)))),
]
SMALL = {"hidden_dim": 8, "num_frequencies": 4, "readout_dim": 16}
CONFIGS = [DNGConfig(**SMALL), DNGConfig(**SMALL, normalize=False, out_dim=1, dropout=0.1)]


class TestDNG(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


def gru(cell, x, h):
    """One step of a GRU, gate by gate."""
    r_x, z_x, n_x = (cell.weight_ih @ x + cell.bias_ih).chunk(3)
    r_h, z_h, n_h = (cell.weight_hh @ h + cell.bias_hh).chunk(3)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    return (1 - z) * torch.tanh(n_x + r * n_h) + z * h


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[2]], ids=str)
def test_states_are_those_of_the_equations(spec, random_params):
    """One neuron and one weight after the other."""
    model, params = build(CONFIGS[1], spec), random_params(spec, 1)

    def fourier(module, v):
        angles = 2 * math.pi * module.frequencies @ v
        return torch.cat([angles.cos(), angles.sin()])

    states = list(model.inputs)
    for index, (weight, bias) in enumerate(zip(params.weights, params.biases, strict=True)):
        new = []
        for i in range(weight.shape[1]):
            message = torch.zeros(8, dtype=torch.float64)
            for j, state in enumerate(states):
                edge = model.edges[index](fourier(model.weight_features[index], weight[0, i, j].flatten()))
                message += edge * model.senders(state) / math.sqrt(len(states))
            bias_features = fourier(model.bias_features[index], bias[0, i].reshape(1))
            new.append(model.norm(gru(model.update, bias_features, message)))
        states = new
    torch.testing.assert_close(model(params)[0], model.readout(torch.cat(states)), rtol=1e-9, atol=1e-10)


def test_its_work_is_counted(random_params):
    """Its first states are parameters, which modules are called with."""
    params = random_params(SPECS[0], 1)
    nets = SimpleNamespace(read=lambda rows: params[rows])
    assert work_per_network(CONFIGS[0].build(SPECS[0]).double(), nets) > 2 * 8 * 8 * 3 * SPECS[0].num_nodes


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"dng_args.hidden_dim: found 0.*output: found parameters, but no state knows"):
        DNGConfig(hidden_dim=0, output="parameters")
    residual = NetSpec((LayerSpec(2, 3, None, "tanh"), LayerSpec(3, 3, None, "tanh", residual=0), LayerSpec(3, 1)))
    with pytest.raises(ValueError, match="dng knows of no residual connections"):
        DNGConfig().build(residual)
