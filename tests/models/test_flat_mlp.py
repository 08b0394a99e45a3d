from itertools import accumulate, pairwise

import golden
import pytest
import torch
from contract import Contract

from scalegmn.models import FlatMLPConfig
from scalegmn.networks import LayerSpec, NetSpec

SPECS = [
    NetSpec.mlp([2, 5, 4, 2], "sine", 6.0),
    NetSpec((LayerSpec(1, 3, (3, 3), "hetero"), LayerSpec(3, 4, (3, 1), "hetero"), LayerSpec(4, 2))),
]
CONFIGS = [
    FlatMLPConfig(hidden_dim=16, num_hidden=2),
    FlatMLPConfig(hidden_dim=16, num_hidden=2, batch_norm=False, normalize=False, out_dim=1),
    FlatMLPConfig(hidden_dim=16, num_hidden=2, output="parameters"),
]


class TestFlatMLP(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


def test_published_outputs_of_dwsnets_mlp():
    (path,) = (path for path in golden.cases("mlp") if path.stem == "mlp-dws")
    case, state, params, output = golden.read(path, "sine")
    published = case["hyper_parameters"]
    config = FlatMLPConfig(hidden_dim=published["hidden_dim"], num_hidden=published["n_hidden"], normalize=False)
    places = {"seq.0": 0, "seq.2": 3, "seq.3": 4, "seq.5": 7, "seq.6": 8, "seq.8": 11}
    found = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        found[f"layers.{places[module]}.{kind}"] = tensor
    # there weights are [n_{l-1}, n_l], and all of them come before the biases
    tensors = (*(weight.mT for weight in params.weights), *params.biases)
    start = list(accumulate((tensor[0].numel() for tensor in tensors), initial=0))
    order = [
        torch.arange(a, b).reshape(tensor.shape[1:]) for tensor, (a, b) in zip(tensors, pairwise(start), strict=True)
    ]
    num = params.spec.num_layers
    numbers = [part.flatten() for layer in range(num) for part in (order[layer].mT, order[num + layer])]
    found["layers.0.weight"] = found["layers.0.weight"][:, torch.cat(numbers)]
    golden.assert_published(config.build(params.spec), found, params, output, case["parameter_count"])


def test_published_outputs_of_nfns_mlp():
    (path,) = (path for path in golden.cases("mlp") if path.stem == "mlp-nfn")
    case, state, params, output = golden.read(path, "sine")
    config = FlatMLPConfig(
        hidden_dim=case["hyper_parameters"]["h_size"], num_hidden=1, batch_norm=False, normalize=False
    )
    places = {"2": 0, "5": 3, "8": 6}
    found = {f"layers.{places[name.split('.')[1]]}.{name.split('.')[2]}": tensor for name, tensor in state.items()}
    golden.assert_published(config.build(params.spec), found, params, output.logit(), case["parameter_count"])


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (FlatMLPConfig(), 42_762),
        (FlatMLPConfig(hidden_dim=1000, num_hidden=1, batch_norm=False), 2_197_010),
        (FlatMLPConfig(hidden_dim=1000, num_hidden=2, batch_norm=False, output="parameters"), 4_374_191),
    ],
)
def test_published_parameter_counts(config, count):
    model = config.build(NetSpec.mlp([2, 32, 32, 1], "sine"))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_wrong_numbers_are_named_together():
    with pytest.raises(ValueError, match=r"mlp_args.hidden_dim: found 0, .*; mlp_args.dropout: found 1, expected a"):
        FlatMLPConfig(hidden_dim=0, dropout=1)
