"""Networks of several architectures in one call."""

import pytest
import torch
from contract import build

from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.spec import LayerSpec, NetSpec

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
    with pytest.raises(ValueError, match=r"the model was built for networks .* found CNN \[2, 5, 5\]"):
        ScaleGMNConfig(symmetry="permutation").build(SPECS[0]).double()(nets)
    mlps = [random_params(NetSpec.mlp(layout, "relu"), 1) for layout in ([2, 4, 1], [2, 3, 1], [2, 3, 3, 1])]
    config = NGGNNConfig(output="parameters", hidden_dim=6, max_hidden_layers=2, normalize=False)
    with pytest.raises(ValueError, match="pass one architecture at a time"):
        config.build(mlps[0].spec).double()(mlps[:2])
    with pytest.raises(
        ValueError, match=r"ng_gnn_args.output: the model was built for MLP .*, found MLP \[2, 3, 3, 1\]"
    ):
        config.build(mlps[0].spec).double()(mlps[2])
