from dataclasses import replace
from itertools import pairwise

import golden
import neural_graphs
import pytest
import torch
from contract import EngineContract, assert_ties_are_seen, build
from memory import share_of_budget
from torch import nn

from scalegmn.models.ng_t import NGTConfig
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.symmetry.measure import assert_invariant

RENAMES = [
    (r"^cls_token$", "token"),
    (r"\.self_attn\.qkv_(node|edge)\.", r".attention.\1_linear."),
    (r"\.self_attn\.proj_out\.", ".attention.last."),
    (r"^layers\.(\d+)\.lin0\.", r"layers.\1.linear."),
    (r"\.node_ln0\.", ".first_norm."),
    (r"\.node_ln1\.", ".second_norm."),
    (r"\.node_mlp\.0\.", ".mlp_first."),
    (r"\.node_mlp\.2\.", ".mlp_last."),
    (r"\.edge_updates\.edge_mlp0\.lin0_e\.", ".edge_update.edge_linear."),
    (r"\.edge_updates\.edge_mlp0\.lin0_s\.", ".edge_update.sender_linear."),
    (r"\.edge_updates\.edge_mlp0\.lin0_t\.", ".edge_update.receiver_linear."),
    (r"\.edge_updates\.edge_mlp0\.lin1\.", ".edge_update.last."),
    (r"\.edge_updates\.edge_mlp1\.0\.", ".edge_update.mlp_first."),
    (r"\.edge_updates\.edge_mlp1\.2\.", ".edge_update.mlp_last."),
    (r"\.edge_updates\.eln0\.", ".edge_update.first_norm."),
    (r"\.edge_updates\.eln1\.", ".edge_update.second_norm."),
]


def config_of(case):
    """Our configuration of a published model."""
    published = case["hyper_parameters"]
    return NGTConfig(
        node_dim=published["d_node"],
        edge_dim=published["d_edge"],
        attention_dim=published["d_attn_hid"],
        num_heads=published["n_heads"],
        node_hidden_dim=published["d_node_hid"],
        edge_hidden_dim=published["d_edge_hid"],
        readout_dim=published["d_out_hid"],
        num_layers=published["n_layers"],
        modulate_values=published["modulate_v"],
        **neural_graphs.options(case),
    )


*CASES, HETERO = sorted(golden.cases("ng_t"), key=lambda path: path.stem.endswith("mixed"))


def test_all_cases_are_there():
    assert len(CASES) == 7


def test_published_outputs_of_mixed_architectures():
    """Residual connections, kernels from 3 to 7, activations by layer, identities among them."""
    case, state, nets, output = golden.read_mixed(HETERO)
    config = replace(config_of(case), max_hidden_layers=5, activation_embedding=True)
    model = config.build(nets[1].spec).double().eval()
    model.load_state_dict(neural_graphs.ours(case, state, RENAMES, []))
    assert sum(parameter.numel() for parameter in model.parameters()) == case["parameter_count"]
    assert (torch.cat([model(params) for params in nets]) - output).abs().max() < 1e-10 * output.std()
    assert (model(nets) - output).abs().max() < 1e-10 * output.std()
    model.engine = "plain"
    assert (model(nets) - output).abs().max() < 1e-10 * output.std()


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_published_outputs(path, engine):
    activation = "relu" if "cnn" in path.stem else "sine"
    case, state, params, output = golden.read(path, activation)
    unused = [r"act_emb\."]
    idle = sum(state[name].numel() for name in case["parameters_without_influence"])
    model = config_of(case).build(params.spec)
    model.engine = engine
    found = neural_graphs.ours(case, state, RENAMES, unused)
    golden.assert_published(model, found, params, output, case["parameter_count"] - idle)


ZOO = NetSpec((*(LayerSpec(i, o, (3, 3), "relu") for i, o in pairwise([1, 16, 16, 16])), LayerSpec(16, 10)))
PARK_NETS = NetSpec((LayerSpec(3, 8, (7, 7), "gelu"), LayerSpec(8, 16, (3, 3), "hetero"), LayerSpec(16, 10)))
COLOURS = NetSpec.mlp([2, 32, 32, 3], "sine")
EDITING = NGTConfig(num_heads=4, reverse_edges=True, output="parameters")
PARK = NGTConfig(
    node_dim=32,
    edge_dim=16,
    attention_dim=32,
    num_heads=4,
    node_hidden_dim=64,
    edge_hidden_dim=64,
    readout_dim=64,
    num_layers=3,
    out_dim=1,
    max_hidden_layers=5,
    activation_embedding=True,
)
PUBLISHED_ZOO = {"node_dim": 128, "edge_dim": 64, "attention_dim": 256, "node_hidden_dim": 256, "edge_hidden_dim": 128}


@pytest.mark.parametrize(
    ("config", "spec", "count"),
    [
        (NGTConfig(), neural_graphs.INR, 376_586),
        (NGTConfig(num_probes=64), neural_graphs.INR, 393_866),
        (NGTConfig(), COLOURS, 393_098),
        (EDITING, neural_graphs.INR, 391_112),
        (replace(EDITING, num_probes=64), neural_graphs.INR, 408_392),
        (NGTConfig(readout_dim=256, out_dim=1, **PUBLISHED_ZOO), ZOO, 1_807_873 - 896),  # without the idle ones
        (PARK, PARK_NETS, 92_705),
    ],
)
def test_published_parameter_counts(config, spec, count):
    assert neural_graphs.count(config, spec) == count


SMALL = NGTConfig(
    node_dim=6,
    edge_dim=4,
    attention_dim=8,
    num_heads=2,
    node_hidden_dim=7,
    edge_hidden_dim=5,
    readout_dim=8,
    num_layers=3,
    num_frequencies=5,
    frequency_scale=0.2,
    out_dim=4,
)
MLPS = [NetSpec.mlp([2, 5, 4, 2], "sine", 2.0), NetSpec.mlp([2, 5, 1], "relu")]
CNNS = [NetSpec((LayerSpec(1, 3, (3, 3), "hetero"), LayerSpec(3, 4, (3, 1), "hetero"), LayerSpec(4, 2)))]
CONFIGS = [
    SMALL,
    replace(SMALL, reverse_edges=True, pooling="outputs_mean", layer_norm=False),
    replace(SMALL, num_frequencies=0, encoder_layers=2, pooling="mean", modulate_values=False, num_layers=1),
    replace(SMALL, normalize=False, pooling="max", update_edges=False),
    replace(SMALL, pooling="token"),
]
INR_CONFIGS = [
    replace(SMALL, num_probes=3),
    replace(SMALL, output="parameters"),
    replace(SMALL, output="parameters", reverse_edges=True, num_probes=3, denormalize=True, num_layers=2),
]
CNN_CONFIGS = [replace(SMALL, linear_encoder=True, activation_embedding=True)]


RESIDUAL = [
    NetSpec(
        (*NetSpec.mlp([2, 5, 4, 1], "tanh").layers[:2], LayerSpec(4, 3, None, "relu", residual=0), LayerSpec(3, 2))
    ),
    NetSpec(
        (
            LayerSpec(1, 3, (3, 3), "hetero"),
            LayerSpec(3, 4, (3, 1), "hetero"),
            LayerSpec(4, 5, (1, 1), "hetero", residual=0),
            LayerSpec(5, 4, (3, 3), "identity", residual=1),
            LayerSpec(4, 2),
        )
    ),
]
RESIDUAL_CASES = [
    *((SMALL, spec) for spec in RESIDUAL),
    (replace(SMALL, output="parameters"), RESIDUAL[0]),
    (replace(SMALL, pooling="mean", reverse_edges=True), RESIDUAL[1]),
]


@pytest.mark.parametrize(("config", "spec"), RESIDUAL_CASES)
def test_residual_connections_are_seen(config, spec, random_params, generator):
    params = random_params(spec, 6, [1, 2] * 3 if "hetero" in spec.symmetries else None)
    assert_ties_are_seen(build(config, spec), params, generator)


CONTRACT_CASES = [
    *((config, spec) for config in CONFIGS for spec in (*MLPS, *CNNS)),
    *((config, spec) for config in INR_CONFIGS for spec in MLPS),
    *((config, spec) for config in CNN_CONFIGS for spec in CNNS),
    *RESIDUAL_CASES,
]


class TestNGT(EngineContract):
    @pytest.fixture(params=CONTRACT_CASES)
    def case(self, request):
        return request.param


@pytest.mark.parametrize("pooling", ["outputs", "mean"])
def test_other_depths_widths_and_kernels(pooling, random_params, generator):
    """With room for more layers, a network is read by its own graph, as by a model that was built for it."""
    config = replace(SMALL, normalize=False, pooling=pooling, max_hidden_layers=3)
    model = build(config, neural_graphs.DEEP)
    params = random_params(neural_graphs.WIDE, 6)
    kernel = nn.functional.pad(params.weights[0], (1, 1, 1, 1))
    padded = NetParams.from_tensors([kernel, params.weights[1]], params.biases, "relu")
    twin = config.build(padded.spec).double().eval()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(params), twin(padded), rtol=1e-10, atol=1e-12)
    assert_invariant(model, params, generator, scale=False)
    with pytest.raises(ValueError, match=r"networks from 1 to 2, of 0 to 3 hidden layers .* up to 5x5 and .*, found"):
        model(random_params(NetSpec.mlp([1, 3, 3, 3, 3, 2], "relu"), 2))


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({"num_probes": 3}, neural_graphs.WIDE, r"num_probes: found 3, but CNNs have no probe features"),
        ({"linear_encoder": True}, MLPS[0], r"linear_encoder: only for CNNs"),
        ({"activation_embedding": True}, MLPS[0], r"activation_embedding: there is none for sine"),
        ({"output": "parameters"}, neural_graphs.WIDE, r"output: found parameters, but changes of kernels"),
        ({"denormalize": True, "normalize": False}, MLPS[0], r"denormalize: needs normalize, found false"),
        ({"num_frequencies": -1, "dropout": 1}, MLPS[0], r"dropout: found 1, .*num_frequencies: found -1"),
        ({"attention_dim": 10, "num_heads": 4}, MLPS[0], r"attention_dim: found 10, expected a multiple of 4"),
    ],
)
def test_options_that_do_not_fit(options, spec, message):
    with pytest.raises(ValueError, match=rf"ng_t_args.*{message}"):
        NGTConfig(**options).build(spec)


def test_parts_follow_the_size():
    """Larger networks pass fewer at a time."""
    found = [
        NGTConfig().build(NetSpec.mlp([2, n, n, 1], "sine")).networks_at_once(torch.device("cpu")) for n in (8, 32, 512)
    ]
    assert found[0] > found[1] > found[2] == 1


@pytest.mark.parametrize("config", [NGTConfig(), replace(EDITING, num_probes=8)], ids=["vector", "parameters"])
def test_memory_is_estimated(config, random_params, monkeypatch):
    monkeypatch.setattr("scalegmn.engine.memory.tensor_bytes", lambda device: 2**60)  # what is kept decides
    params = random_params(neural_graphs.INR, 2).map(lambda tensor: tensor.float())
    assert 0.3 < share_of_budget(config.build(neural_graphs.INR), params) < 1
