"""Networks of several architectures in one call."""

from dataclasses import replace
from math import log

import pytest
import torch
from contract import assert_engine_computes_the_plain_form, build, error

from scalegmn.engine import relational
from scalegmn.models import DWSNetConfig, FlatMLPConfig, NFNConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.probegen import ProbeGenConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.networks import LayerSpec, MultiArchBatch, NetParams, NetSpec
from scalegmn.symmetry.groups import GroupElement

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
MLPS = [
    NetSpec.mlp([2, 4, 3, 5], "sine", 2.0),
    NetSpec.mlp([2, 6, 6, 5], "hetero"),
    NetSpec((*NetSpec.mlp([2, 3, 4, 1], "relu").layers[:2], LayerSpec(4, 3, residual=0), LayerSpec(3, 5))),
]
GNN = NGGNNConfig(hidden_dim=6, num_frequencies=5, frequency_scale=0.2, max_hidden_layers=4, mean_log_degree=1.5)
WIDTHS = {"node_dim": 8, "edge_dim": 6, "attention_dim": 8, "num_heads": 2, "readout_dim": 8}
TRANSFORMER = NGTConfig(**WIDTHS, num_frequencies=5, frequency_scale=0.2, max_hidden_layers=4)
STATISTICS = StatNNConfig(hidden_dim=20, max_hidden_layers=4)
PROBES = ProbeGenConfig(num_probes=6, hidden_dim=16, num_linears=3, image_size=8, stride=1)
CONFIGS = [
    replace(GNN, activation_embedding=True),
    replace(GNN, reverse_edges=False, linear_encoder=True, pooling="outputs_mean", scalers=("attenuation", "identity")),
    replace(GNN, pooling="mean", modulation="concat", normalize=True),
    replace(GNN, pooling="max", modulation="gate", num_layers=1),
    replace(TRANSFORMER, activation_embedding=True),
    replace(TRANSFORMER, linear_encoder=True, pooling="outputs_mean", update_edges=False),
    replace(TRANSFORMER, reverse_edges=True, pooling="mean", normalize=True),
    replace(TRANSFORMER, pooling="max", num_layers=1, modulate_values=False),
    replace(TRANSFORMER, pooling="token", layer_norm=False, num_layers=2),
    STATISTICS,
    replace(STATISTICS, normalize=True),
    replace(STATISTICS, features="invariant"),
    PROBES,
]
MLP_CONFIGS = [
    replace(GNN, num_probes=3, max_hidden_layers=2),
    GNN,
    replace(TRANSFORMER, num_probes=3, max_hidden_layers=2),
    TRANSFORMER,
    PROBES,
]
CASES = [(config, SPECS) for config in CONFIGS] + [
    (config, specs)
    for config in MLP_CONFIGS
    for specs in ([MLPS[:2]] if config.name != "probegen" and config.num_probes else [MLPS])
]


def nets_of(random_params, specs=SPECS):
    """Batches of 3, 1, 2, 2 and 1 networks; the first and the fourth, and the second and the last, are alike."""
    numbers = [(0, 3), (1, 1), (len(specs) - 1, 2), (0, 2), (1, 1)]
    return [random_params(specs[k], num, [2] * num if k == 1 else None) for k, num in numbers]


def gradients(output, model, nets):
    """Of one number, with respect to the model's parameters and the networks'."""
    tensors = [*model.parameters(), *(t for params in nets for t in (*params.weights, *params.biases))]
    return torch.autograd.grad(output, tensors, materialize_grads=True)


@pytest.fixture(params=[False, True], ids=["by_size", "all_at_once"])
def fill_up(request, monkeypatch):
    """Whether NG-T fills up small networks of any size."""
    if request.param:
        monkeypatch.setattr("scalegmn.engine.relational._LEAST_SHARE", 0)


NEURAL_GRAPHS = [config for config in CONFIGS if config.name in ("ng_gnn", "ng_t")]


@pytest.mark.parametrize("config", NEURAL_GRAPHS, ids=lambda config: config.name)
def test_engine_computes_the_plain_form(config, random_params):
    model, nets = build(config, SPECS[-1]), nets_of(random_params)
    model.fit_normalization(nets)
    assert_engine_computes_the_plain_form(model, nets)


@pytest.mark.usefixtures("fill_up")
@pytest.mark.parametrize(("config", "specs"), CASES, ids=lambda value: getattr(value, "name", None))
def test_together_equals_one_by_one(config, specs, random_params):
    model = build(config, specs[-1])
    nets = [params.map(lambda tensor: tensor.requires_grad_()) for params in nets_of(random_params, specs)]
    model.fit_normalization(nets)
    alone = torch.cat([model(params[index : index + 1]) for params in nets for index in range(len(params))])
    together = model(nets)
    assert together.shape == (9, 10)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 2, 90, dtype=torch.float64).reshape(9, 10)
    found, expected = (gradients((weights * output).sum(), model, nets) for output in (together, alone))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("fill_up")
@pytest.mark.parametrize(("config", "specs"), CASES, ids=lambda value: getattr(value, "name", None))
def test_no_gradient_between_networks(config, specs, random_params):
    model = build(config, specs[-1])
    nets = [params.map(lambda tensor: tensor.requires_grad_()) for params in nets_of(random_params, specs)]
    model(nets)[4].sum().backward()  # the first of the third batch
    for place, params in enumerate(nets):
        reached = [tensor.grad.flatten(1).abs().amax(1) > 0 for tensor in (*params.weights, *params.biases)]
        assert torch.stack(reached).any(0).tolist() == [place == 2 and index == 0 for index in range(len(params))]


@pytest.mark.parametrize("pooling", ["outputs", "mean", "token"])
def test_nothing_comes_from_where_nobody_is(pooling, random_params, monkeypatch):
    """NaN in the features of nodes and pairs with which NG-T fills up the smaller networks."""
    monkeypatch.setattr("scalegmn.engine.relational._LEAST_SHARE", 0)
    model, nets = build(replace(TRANSFORMER, pooling=pooling), SPECS[2]), nets_of(random_params)
    plain = model(nets)
    expected = torch.autograd.grad(plain.square().sum(), list(model.parameters()))
    layer, update, there = relational.run_nodes, relational.run_edges, []

    def spoilt_layer(module, x, e, rows, exists, chunks):
        there.append(exists)
        return layer(module, x, e, rows, exists, chunks).masked_fill(~exists[:, rows, None], torch.nan)

    def spoilt_update(module, x, e, rows, chunks):
        pairs = there[-1][:, rows, None] & there[-1][:, None]
        return update(module, x, e, rows, chunks).masked_fill(~pairs[..., None], torch.nan)

    monkeypatch.setattr(relational, "run_nodes", spoilt_layer)
    monkeypatch.setattr(relational, "run_edges", spoilt_update)
    spoilt_output = model(nets)
    assert not all(exists.all() for exists in there)
    torch.testing.assert_close(spoilt_output, plain, rtol=0, atol=0)
    found = torch.autograd.grad(spoilt_output.square().sum(), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


GRAPH = NetSpec(
    (
        LayerSpec(2, 4, (5, 5), "relu"),
        LayerSpec(4, 4, (3, 3), "identity", groups=2),
        LayerSpec(4, 4, activation="gelu", groups=4, norm="layer", residual=0),
        LayerSpec(4, 6, reads=0),
        LayerSpec(4, 6, reads=2),
        LayerSpec(4, 6, reads=2, attention=(3, 4, 2)),
        LayerSpec(6, 5),
    )
)
"""Groups, a normalisation layer, a residual connection, attention."""


@pytest.mark.parametrize(
    "config",
    [
        replace(GNN, max_hidden_layers=6, normalize=True),
        replace(GNN, max_hidden_layers=6, pooling="mean", reverse_edges=False),
        replace(TRANSFORMER, max_hidden_layers=6),
        replace(TRANSFORMER, max_hidden_layers=6, pooling="max", reverse_edges=True, normalize=True),
        replace(STATISTICS, max_hidden_layers=6),
    ],
    ids=lambda config: config.name,
)
def test_networks_that_are_no_chain(config, random_params, generator):
    model, params, chain = build(config, GRAPH), random_params(GRAPH, 4), random_params(SPECS[2], 2)
    if config.name in ("ng_gnn", "ng_t"):
        assert_engine_computes_the_plain_form(model, [params.with_batch_norm_folded()])
        model.engine = "fast"
    assert error(model, params, GroupElement.sample(params, generator, scale=False)) <= 1e-9
    expected = torch.cat([model(params[:2]), model(chain), model(params[2:])])
    torch.testing.assert_close(model([params[:2], chain, params[2:]]), expected, rtol=1e-10, atol=1e-12)
    if config.name == "statnn":  # which sees tensors, not what reads what
        return
    for index, change in ((2, {"residual": None}), (5, {"attention": None})):
        layers = list(GRAPH.layers)
        layers[index] = replace(layers[index], **change)
        other = NetParams(NetSpec(tuple(layers)), params.weights, params.biases)
        assert (model(other) - model(params)).abs().max() > 1e-6


def test_probes_and_changes_need_a_chain():
    mlp = NetSpec((*NetSpec.mlp([2, 4, 4, 1], "relu").layers[:2], LayerSpec(4, 3, reads=0)))
    for options, field in (({"num_probes": 2}, "num_probes"), ({"output": "parameters"}, "output")):
        for config in (replace(GNN, **options), replace(TRANSFORMER, **options)):
            with pytest.raises(ValueError, match=f"{config.name}_args.{field}: expected networks that are a chain"):
                config.build(mlp)
    with pytest.raises(ValueError, match="probegen sends inputs through chains of layers only, found network of 3"):
        PROBES.build(mlp)


def test_equal_architectures_pass_together(random_params):
    model, nets = build(STATISTICS, SPECS[2]), nets_of(random_params)
    passed = []
    model.register_forward_hook(lambda module, args, output: passed.append(list(map(len, args[0]))))
    model(nets)
    assert passed == [[5, 2, 2]]


def test_what_cannot_be_read_is_refused(random_params):
    nets = nets_of(random_params)
    with pytest.raises(ValueError, match="the model was built for networks from 2 to 5"):
        ScaleGMNConfig(symmetry="permutation").build(SPECS[0]).double()(nets)
    mlps = [random_params(NetSpec.mlp(layout, "relu"), 1) for layout in ([2, 4, 1], [2, 3, 1], [2, 3, 3, 1])]
    config = NGGNNConfig(output="parameters", hidden_dim=6, max_hidden_layers=2, normalize=False)
    with pytest.raises(ValueError, match="pass one architecture at a time"):
        config.build(mlps[0].spec).double()(mlps[:2])
    with pytest.raises(
        ValueError, match=r"ng_gnn_args.output: the model was built for MLP .*, found MLP \[2, 3, 3, 1\]"
    ):
        config.build(mlps[0].spec).double()(mlps[2])


@pytest.mark.parametrize("config", [GNN, TRANSFORMER, STATISTICS], ids=lambda config: config.name)
def test_models_are_built_for_what_covers_all(config, random_params):
    """As deep as the deepest, with the largest kernels, whatever the order; `MultiArchBatch` are read like a list."""
    config, nets = replace(config, max_hidden_layers=None), nets_of(random_params)
    model = config.build_for(dict.fromkeys(SPECS, 1)).double().eval()
    assert torch.equal(model(MultiArchBatch.of(nets)), model(nets))
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
