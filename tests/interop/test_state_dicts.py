"""Networks from state dicts, whatever their entries are called."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import scalegmn
from scalegmn.interop.state_dicts import read_layers
from scalegmn.networks.evaluate import evaluate


def test_names(generator):
    """By name where names say what is what; else by the number of axes."""
    tensors = [torch.randn(*shape, generator=generator) for shape in ((5, 2), (5,), (3, 5), (3,))]
    weights, biases = tensors[::2], tensors[1::2]
    grid = {"grid": torch.zeros(9, 2), "steps": torch.tensor(7), "name": "net"}
    expected = scalegmn.NetParams.from_tensors([w[None] for w in weights], [b[None] for b in biases], "tanh")
    for state in (
        {
            **grid,
            "net.0.weight": weights[0],
            "net.0.bias": biases[0],
            "net.2.weight": weights[1],
            "net.2.bias": biases[1],
        },
        {"bias_a": biases[0], "bias_b": biases[1], "weight_a": weights[0], "weight_b": weights[1]},
        {"W0": weights[0], "b0": biases[0], "W1": weights[1], "b1": biases[1], "steps": torch.tensor(7)},
    ):
        params = scalegmn.from_state_dict(state, "tanh")
        assert params.spec == expected.spec
        assert torch.equal(params.flatten(), expected.flatten())


def test_convolutions():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, (1, 5)), nn.ReLU(), nn.Linear(3, 2))
    params = scalegmn.from_state_dict(module.state_dict(), "relu")
    assert str(params.spec) == "CNN [1, 4, 3, 2] (relu)"
    assert params.spec.kernel == (3, 5)


def test_module_computes_the_same(generator):
    module = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    params = scalegmn.from_state_dict(module.state_dict(), "tanh")
    torch.testing.assert_close(evaluate(params, x)[0], module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"0.weight": torch.zeros(3, 2)}, "1 weights and 0 biases, .* add them"),
        ({"W": torch.zeros(3, 2)}, "1 weights and 0 biases"),
        ({}, "0 weights and 0 biases"),
        ({"state_dict": {}}, "0 weights and 0 biases"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(),
            "layer 1: weight has shape .*0.weight, 1.weight",
        ),
        ({"b.weight": torch.zeros(3, 2), "b.bias": torch.zeros(3).long()}, "b.bias is not a dense tensor"),
        (
            {
                "b.weight": torch.zeros(3, 5),
                "b.bias": torch.zeros(3),
                "a.weight": torch.zeros(5, 2),
                "a.bias": torch.zeros(5),
            },
            "layer 1: reads 2 neurons, but layer 0 has 3; its layers are b.weight, a.weight, in this order",
        ),
    ],
)
def test_others_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        scalegmn.from_state_dict(state, "relu")


def test_order_of_safetensors(tmp_path):
    """Numbers count as numbers: the file has its own order."""
    state = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12))).state_dict()
    save_file(state, tmp_path / "net.safetensors")
    assert read_layers(tmp_path / "net.safetensors")[1] == list(state)
