"""Networks of one layer, inputs straight into outputs: nothing to permute, and every parameter is read."""

import itertools
from dataclasses import replace

import pytest
import torch
from contract import assert_engine_computes_the_plain_form, build, error, flat

from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.symmetry.groups import GroupElement

LINEAR = NetSpec.mlp([3, 2], "sine")
CONVOLUTION = NetSpec((LayerSpec(2, 3, (3, 3)),))
SCALEGMN = [
    ScaleGMNConfig(symmetry=symmetry, direction=direction, hidden_dim=6, out_dim=4, num_layers=3, **options)
    for symmetry, direction, options in itertools.product(
        ["sign", "permutation", "scale", "hetero"],
        ["forward", "bidirectional"],
        [
            {"message": EquivariantNetConfig("layer")},
            {"readout": "full_graph", "edge_positions": True, "sizes": True},
            {"output": "parameters", "update": EquivariantNetConfig("mlp", 2, positions=True)},
            {"num_probes": 3, "edge_positions": True, "aggregator": "mean"},
        ],
    )
]
NEURAL_GRAPHS = [
    replace(config, **options)
    for config in (
        NGGNNConfig(hidden_dim=6, num_layers=3, num_frequencies=5, frequency_scale=0.2, out_dim=4),
        NGTConfig(node_dim=8, edge_dim=6, num_layers=2, num_heads=2, num_frequencies=5, frequency_scale=0.2, out_dim=4),
    )
    for options in (
        {},
        {"reverse_edges": False, "pooling": "mean"},
        {"output": "parameters"},
        {"output": "parameters", "num_probes": 3},
    )
]
CASES = [(config, LINEAR) for config in (*SCALEGMN, *NEURAL_GRAPHS)] + [
    (config, CONVOLUTION)
    for config in (*SCALEGMN, *NEURAL_GRAPHS)
    if not config.num_probes and not (config.output == "parameters" and config in NEURAL_GRAPHS)
]


def name(case):
    config, spec = case
    options = [getattr(config, option, None) for option in ("symmetry", "direction", "readout", "pooling", "output")]
    return "-".join(map(str, [config.name, *options, config.num_probes, spec.layers[0].kernel]))


@pytest.fixture(params=CASES, ids=name)
def case(request):
    return request.param


def test_both_forms_compute_the_same(case, random_params):
    config, spec = case
    params = random_params(spec, 3)
    model = build(config, spec)
    model.fit_normalization([random_params(spec, 20)])
    assert_engine_computes_the_plain_form(model, [params])
    if config.output == "vector":
        assert_engine_computes_the_plain_form(model, [params, random_params(spec, 2)])


def test_all_is_seen_and_nothing_moves(case, random_params, generator):
    """The group is {1}. Outputs depend on every weight and bias, and on the order of inputs and outputs."""
    config, spec = case
    params = random_params(spec, 4)
    model = build(config, spec)
    model.fit_normalization([random_params(spec, 20)])
    assert model.visibility(spec).share == 1
    assert error(model, params, GroupElement.sample(params, generator)) == 0
    leaves = params.map(lambda tensor: tensor.requires_grad_())
    output = flat(model(leaves))
    (output * torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    assert all(tensor.grad.abs().amax(0).min() > 0 for tensor in (*leaves.weights, *leaves.biases))
    (weight,), (bias,) = params.weights, params.biases
    other_inputs = params.replace(weights=(weight.flip(2),))
    other_outputs = params.replace(weights=(weight.flip(1),), biases=(bias.flip(1),))
    for moved in (other_inputs, other_outputs):
        assert (flat(model(moved)) - flat(model(params))).abs().max() > 1e-6


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("built_for", [LINEAR, NetSpec.mlp([3, 4, 2], "relu")], ids=str)
@pytest.mark.parametrize("symmetry", ["scale", "permutation", "hetero"])
def test_networks_of_several_depths(symmetry, built_for, direction, random_params):
    """In one batch, with those of one layer, by a model built for either."""
    config = ScaleGMNConfig(
        symmetry=symmetry,
        direction=direction,
        readout="full_graph",
        edge_positions=True,
        max_hidden_layers=2,
        hidden_dim=6,
        out_dim=4,
    )
    model = build(config, built_for)
    nets = [random_params(spec, 2) for spec in (LINEAR, *(NetSpec.mlp(d, "relu") for d in ([3, 4, 2], [3, 5, 4, 2])))]
    assert_engine_computes_the_plain_form(model, nets)
    alone = torch.cat([model(params) for params in nets])
    torch.testing.assert_close(model(nets), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", [NEURAL_GRAPHS[0], NEURAL_GRAPHS[4]], ids=["ng_gnn", "ng_t"])
def test_neural_graphs_of_several_depths(config, random_params):
    model = build(replace(config, max_hidden_layers=2), LINEAR)
    nets = [random_params(spec, 2) for spec in (LINEAR, NetSpec.mlp([3, 5, 4, 2], "relu"))]
    assert_engine_computes_the_plain_form(model, nets)


def test_forward_models_of_deeper_networks_say_which_readout_reads_them(random_params):
    model = ScaleGMNConfig(max_hidden_layers=2, hidden_dim=6).build(NetSpec.mlp([3, 4, 2], "sine")).double()
    with pytest.raises(ValueError, match=r"does not read the input, found MLP \[3, 2\] .*; use full_graph"):
        model(random_params(LINEAR, 2))
