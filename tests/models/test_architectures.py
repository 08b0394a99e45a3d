"""Networks of several architectures in one call."""

from dataclasses import replace
from math import log

import pytest
import torch
from contract import build

from scalegmn.models import DWSNetConfig, FlatMLPConfig, NFNConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.spec import LayerSpec, MixedNets, NetSpec

SPECS = [
    NetSpec((LayerSpec(2, 4, (3, 3), "relu"), LayerSpec(4, 3, (5, 5), "gelu"), LayerSpec(3, 5))),
    NetSpec((LayerSpec(2, 5, (3, 3), "hetero"), LayerSpec(5, 5))),
    NetSpec(
        (
            LayerSpec(2, 3, (3, 3), "tanh"),
            LayerSpec(3, 6, (3, 3), "identity"),
            LayerSpec(6, 4, (5, 5), "relu", residual=0),
            LayerSpec(4, 5),
        )
    ),
]
WIDTHS = {"node_dim": 8, "edge_dim": 6, "attention_dim": 8, "num_heads": 2, "readout_dim": 8}
CONFIGS = [
    NGGNNConfig(hidden_dim=6, num_frequencies=5, max_hidden_layers=4, mean_log_degree=1.5, activation_embedding=True),
    NGTConfig(**WIDTHS, num_frequencies=5, max_hidden_layers=4, activation_embedding=True),
    StatNNConfig(hidden_dim=20, max_hidden_layers=4),
]


def nets_of(random_params):
    """Batches of 3, 1, 2, 2 and 1 networks; the first and the fourth, and the second and the last, are alike."""
    numbers = [(0, 3), (1, 1), (2, 2), (0, 2), (1, 1)]
    return [random_params(SPECS[k], num, [2] * num if k == 1 else None) for k, num in numbers]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_together_equals_one_by_one(config, random_params):
    model, nets = build(config, SPECS[2]), nets_of(random_params)
    alone = [model(params[index : index + 1]) for params in nets for index in range(len(params))]
    together = model(nets)
    assert together.shape == (9, 10)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)
    together[3].sum().backward()  # and as it trains
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(nets[1]).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_equal_architectures_pass_together(random_params):
    model, nets = build(CONFIGS[2], SPECS[2]), nets_of(random_params)
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    model(nets)
    assert passes == [5, 2, 2]


def test_what_cannot_be_read_is_refused(random_params):
    nets = nets_of(random_params)
    with pytest.raises(ValueError, match="the model was built for CNN"):
        ScaleGMNConfig(symmetry="permutation").build(SPECS[0]).double()(nets)
    mlps = [random_params(NetSpec.mlp(layout, "relu"), 1) for layout in ([2, 4, 1], [2, 3, 1], [2, 3, 3, 1])]
    config = NGGNNConfig(output="parameters", hidden_dim=6, max_hidden_layers=2, normalize=False)
    with pytest.raises(ValueError, match="pass one architecture at a time"):
        config.build(mlps[0].spec).double()(mlps[:2])
    with pytest.raises(
        ValueError, match=r"ng_gnn_args.output: the model was built for MLP .*, found MLP \[2, 3, 3, 1\]"
    ):
        config.build(mlps[0].spec).double()(mlps[2])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_models_are_built_for_what_covers_all(config, random_params):
    """As deep as the deepest, with the largest kernels, whatever the order; `MixedNets` are read like a list."""
    config, nets = replace(config, max_hidden_layers=None), nets_of(random_params)
    model = config.build_for(dict.fromkeys(SPECS, 1)).double().eval()
    assert torch.equal(model(MixedNets.of(nets)), model(nets))
    with pytest.raises(ValueError, match="the model was built for"):
        replace(config, max_hidden_layers=2).build_for(dict.fromkeys(SPECS, 1))


@pytest.mark.parametrize("config", [DWSNetConfig(), NFNConfig(), FlatMLPConfig()], ids=lambda config: config.name)
def test_models_of_one_architecture_say_so(config):
    with pytest.raises(ValueError, match=rf"model: {config.name} reads networks of one architecture, found 3; use sca"):
        config.build_for(dict.fromkeys(SPECS, 1))
    mlp = NetSpec.mlp([2, 4, 1], "relu")
    assert config.build_for({mlp: 7}).spec is mlp


def test_mean_log_degree_is_that_of_the_training_networks():
    """Of MLPs 2-4-1 and, three times, 2-3-3-1: 4 nodes with 2 edges and 1 with 4; 3 with 2, 3 with 3 and 1 with 3."""
    counts = {NetSpec.mlp([2, 4, 1], "relu"): 1, NetSpec.mlp([2, 3, 3, 1], "relu"): 3}
    model = NGGNNConfig(hidden_dim=4, normalize=False).build_for(counts)
    expected = (4 * log(3) + log(5) + 3 * (3 * log(3) + 4 * log(4))) / (7 + 3 * 9)
    assert model.layers[0].aggregate.mean_log_degree.item() == pytest.approx(expected)
    given = NGGNNConfig(hidden_dim=4, normalize=False, mean_log_degree=1.5).build_for(counts)
    assert given.layers[0].aggregate.mean_log_degree.item() == 1.5
