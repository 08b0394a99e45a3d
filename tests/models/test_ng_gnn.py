from dataclasses import replace
from itertools import pairwise

import golden
import neural_graphs
import pytest
from contract import Contract

from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.spec import LayerSpec, NetSpec

RENAMES = [
    (r"^gnn\.convs\.(\d+)\.edge_encoder\.", r"layers.\1.message.edge_linear."),
    (r"^gnn\.convs\.(\d+)\.pre_nns\.0\.0\.", r"layers.\1.message.linear."),
    (r"^gnn\.convs\.(\d+)\.post_nns\.0\.0\.", r"layers.\1.update."),
    (r"^gnn\.convs\.(\d+)\.lin\.", r"layers.\1.last."),
    (r"^gnn\.convs\.(\d+)\.aggr_module\.avg_deg_log$", r"layers.\1.aggregate.mean_log_degree"),
    (r"^gnn\.norms\.", "norms."),
    (r"^gnn\.edge_update\.(\d+)\.lin_e\.", r"edge_updates.\1.edge_linear."),
    (r"^gnn\.edge_update\.(\d+)\.lin_s\.", r"edge_updates.\1.sender_linear."),
    (r"^gnn\.edge_update\.(\d+)\.lin_t\.", r"edge_updates.\1.receiver_linear."),
    (r"^gnn\.edge_update\.(\d+)\.lin1\.", r"edge_updates.\1.last."),
]
UNUSED = [r"avg_deg_lin$", r"proj_mlp_edge_in\."]


def config_of(case):
    """Our configuration of a published model."""
    published, backbone = case["hyper_parameters"], case["hyper_parameters"]["gnn_backbone"]
    return NGGNNConfig(
        hidden_dim=published["d_hid"],
        num_layers=backbone["num_layers"],
        modulation="film" if backbone["modulate_edges"] else "concat",
        scalers=tuple(backbone["scalers"]),
        **neural_graphs.options(case),
    )


CASES = [path for path in golden.cases("ng_gnn") if "mixed" not in path.stem]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_published_outputs(path):
    activation = "relu" if "cnn" in path.stem else "sine"
    case, state, params, output = golden.read(path, activation)
    embeds = case["hyper_parameters"]["graph_constructor"].get("use_act_embed") and case["activations"][0] is not None
    unused = UNUSED if embeds else [*UNUSED, r"act_emb\."]
    idle = sum(state[name].numel() for name in case["parameters_without_influence"])
    model = config_of(case).build(params.spec)
    found = neural_graphs.ours(case, state, RENAMES, unused)
    golden.assert_published(model, found, params, output, case["parameter_count"] - idle)


ZOO = NetSpec((*(LayerSpec(i, o, (3, 3), "relu") for i, o in pairwise([1, 16, 16, 16])), LayerSpec(16, 10)))
COLOURS = NetSpec.mlp([2, 32, 32, 3], "sine")
EDITING = NGGNNConfig(hidden_dim=128, num_frequencies=0, output="parameters")
CNN = NGGNNConfig(hidden_dim=256, linear_encoder=True, out_dim=1, reverse_edges=False)


@pytest.mark.parametrize(
    ("config", "spec", "count"),
    [
        (NGGNNConfig(), neural_graphs.INR, 92_010),
        (NGGNNConfig(num_probes=64), neural_graphs.INR, 100_714),
        (NGGNNConfig(), COLOURS, 94_122),
        (EDITING, neural_graphs.INR, 1_186_696),
        (replace(EDITING, num_probes=64), neural_graphs.INR, 1_221_128),
        (CNN, ZOO, 5_587_969 - 65_792 - 1_792),  # without the idle ones
    ],
)
def test_published_parameter_counts(config, spec, count):
    assert neural_graphs.count(config, spec) == count


SMALL = NGGNNConfig(hidden_dim=6, num_layers=3, num_frequencies=5, frequency_scale=0.2, out_dim=4)
MLPS = [NetSpec.mlp([2, 5, 4, 2], "sine", 2.0), NetSpec.mlp([2, 5, 1], "relu")]
CNNS = [NetSpec((LayerSpec(1, 3, (3, 3), "hetero"), LayerSpec(3, 4, (3, 1), "hetero"), LayerSpec(4, 2)))]
CONFIGS = [
    SMALL,
    replace(SMALL, reverse_edges=False, pooling="outputs_mean", modulation="gate"),
    replace(SMALL, num_frequencies=0, encoder_layers=2, pooling="mean", modulation="concat", num_layers=1),
    replace(SMALL, normalize=False, pooling="max", scalers=("attenuation",)),
]
INR_CONFIGS = [
    replace(SMALL, num_probes=3),
    replace(SMALL, output="parameters"),
    replace(SMALL, output="parameters", reverse_edges=False, num_probes=3, denormalize=True, num_layers=2),
]
CNN_CONFIGS = [replace(SMALL, reverse_edges=False, linear_encoder=True, activation_embedding=True)]


class TestNGGNN(Contract):
    @pytest.fixture(
        params=[
            *((config, spec) for config in CONFIGS for spec in (*MLPS, *CNNS)),
            *((config, spec) for config in INR_CONFIGS for spec in MLPS),
            *((config, spec) for config in CNN_CONFIGS for spec in CNNS),
        ],
    )
    def case(self, request):
        return request.param
