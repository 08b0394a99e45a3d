from itertools import pairwise

import golden
import pytest
import torch
from contract import Contract

from scalegmn.models.statnn import StatNNConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.nn.statistics import NUM_STATISTICS

(CNN,) = (path for path in golden.cases("statnn") if path.stem == "statnn-cnn")
(HETERO,) = (path for path in golden.cases("statnn") if path.stem == "statnn-mixed")


def ours(state):
    """Published parameters by our names: the Linears in order of index."""
    names = sorted({int(name.split(".")[1]) for name in state})
    return {
        f"mlp.linears.{place}.{kind}": state[f"hypernetwork.{index}.{kind}"]
        for place, index in enumerate(names)
        for kind in ("weight", "bias")
    }


def test_published_outputs():
    case, state, params, output = golden.read(CNN, "relu")
    model = StatNNConfig(hidden_dim=12, out_dim=1).build(params.spec)
    golden.assert_published(model, ours(state), params, output.logit(), case["parameter_count"])


def test_published_outputs_of_mixed_architectures():
    """There all statistics of weights come before those of biases."""
    case, state, nets, output = golden.read_mixed(HETERO)
    state = ours(state)
    first = state["mlp.linears.0.weight"]
    state["mlp.linears.0.weight"] = first.unflatten(1, (2, 6, NUM_STATISTICS)).transpose(1, 2).flatten(1)
    model = StatNNConfig(hidden_dim=12, out_dim=1, max_hidden_layers=5).build(nets[0].spec).double()
    model.load_state_dict(state)
    assert sum(parameter.numel() for parameter in model.parameters()) == case["parameter_count"]
    assert (torch.cat([model(params) for params in nets]) - output).abs().max() < 1e-10 * output.std()
    assert (model(nets) - output).abs().max() < 1e-10 * output.std()


@pytest.mark.parametrize(("layers", "kernel", "count"), [(None, (3, 3), 1_059_001), (5, (7, 7), 1_087_001)])
def test_published_parameter_counts(layers, kernel, count):
    spec = NetSpec((*(LayerSpec(i, o, kernel, "relu") for i, o in pairwise([1, 16, 16, 16])), LayerSpec(16, 10)))
    model = StatNNConfig(out_dim=1, max_hidden_layers=layers).build(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


SPECS = [
    NetSpec.mlp([2, 5, 4, 2], "sine", 6.0),
    NetSpec((LayerSpec(1, 3, (3, 3), "hetero"), LayerSpec(3, 4, (3, 1), "hetero"), LayerSpec(4, 2))),
]
CONFIGS = [
    StatNNConfig(hidden_dim=20),
    StatNNConfig(hidden_dim=20, normalize=True, out_dim=2),
    StatNNConfig(hidden_dim=20, features="invariant"),
]


class TestStatNN(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS])
    def case(self, request):
        return request.param

    def test_other_networks_are_refused(self, model, random_params):
        """Other widths are not others."""
        params = random_params(NetSpec.mlp([3, 4, 2, 2, 5], "relu"), 2)
        with pytest.raises(ValueError, match="the model was built for 3 layers"):
            model(params)


def test_invariant_features_normalise_themselves():
    with pytest.raises(ValueError, match=r"statnn_args.normalize: found True, but invariant .*; use null"):
        StatNNConfig(features="invariant", normalize=True)


def test_parameters_are_refused():
    with pytest.raises(ValueError, match=r"statnn_args.output: found parameters, but .*; use vector"):
        StatNNConfig(output="parameters")
