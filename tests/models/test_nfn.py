import re

import golden
import pytest
import torch
from contract import Contract, build, flat
from memory import share_of_budget

from scalegmn.models.nfn import NFNConfig
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.nn.statistics import raw_statistics
from scalegmn.nn.weight_space import InputOutputEmbedding


def config_of(case):
    """Our configuration of a published model."""
    published = case["hyper_parameters"]
    config = {
        "layer": {"PT": "pointwise"}.get(published["mode"], published["mode"]),
        "num_frequencies": published.get("fourier_size") or 0,
        "io_embed": published.get("io_embed", False),
        "norm": {"simple": "channels", None: "none"}[published.get("lnorm")],
        "normalize": "normalize" in published,
    }
    if positions := published.get("pos_enc"):
        config |= {"num_bands": positions["num_bands"], "max_frequency": positions["max_freq"]}
        config |= {"layer_positions": positions["enc_layers"]}
    if case["task"] == "editing":
        widths = (published["hidden_chan"],) * published["hidden_layers"]
        return NFNConfig(output="parameters", hidden_dims=widths, out_scale=published["out_scale"], **config)
    head = published["head"]
    config |= {"pool": head["pool"], "readout_dim": head["h_size"], "out_dim": head["num_out"]}
    return NFNConfig(hidden_dims=tuple(published["hchannels"]), **config)


MAPS = [
    (r"^layer_(\d+)\.", r"maps.\1.weight_maps.position."),
    (r"^layer_(\d+)_rc\.", r"maps.\1.weight_maps.all."),
    (r"^layer_(\d+)_r\.", r"maps.\1.weight_maps.sender."),
    (r"^layer_(\d+)_c\.", r"maps.\1.weight_maps.receiver."),
    (r"^bias_(\d+)\.", r"maps.\1.bias_maps.receiver."),
    (r"^bias_(\d+)_rc\.", r"maps.\1.bias_maps.all."),
    (r"^w0_rpt\.", "maps.0.weight_maps.receiver."),
    (r"^w0_rbdcst\.", "maps.0.weight_maps.all."),
    (r"^wfin_cpt\.", "maps.LAST.weight_maps.sender."),
    (r"^wfin_cbdcst\.", "maps.LAST.weight_maps.all."),
    (r"^bias_fin_rc\.", "maps.LAST.bias_maps.all."),
    (r"^_B$", "frequencies"),
]
EMBEDDINGS = {
    "in_embed": ("first_weight", lambda x: x[0, :, 0].mT),
    "out_embed": ("last_weight", lambda x: x[0].permute(1, 2, 0)),
    "out_bias_embed": ("last_bias", lambda x: x[0].mT),
}


def ours(state, model):
    """Published parameters by our names."""
    found, stacked, num_layers = {}, {}, model.spec.num_layers
    places = [k for k, layer in enumerate(model.layers) if not isinstance(layer, InputOutputEmbedding)]
    linears = sorted({int(name.split(".")[-2]) for name in state if name.startswith("head.")})
    for name, tensor in state.items():
        if scalar := re.fullmatch(r"hnet\.\d+\.(weight|bias)_scales\.(\d+)", name):
            stacked.setdefault(f"{scalar[1]}_scales", {})[int(scalar[2])] = tensor
        elif statistic := re.fullmatch(r"(mean|std)_(weight|bias)s?_(\d+)", name):
            kind = f"normalization.{statistic[2]}_{ {'mean': 'means', 'std': 'scales'}[statistic[1]] }"
            stacked.setdefault(kind, {})[int(statistic[3])] = tensor
        elif name.startswith("head."):
            *_, index, kind = name.split(".")
            found[f"readout.1.linears.{linears.index(int(index))}.{kind}"] = tensor
        else:
            index, rest = re.fullmatch(r"(?:nfnet_features|hnet)\.(\d+)\.(.*)", name).groups()
            place = places[int(index)]
            if rest in EMBEDDINGS:
                own, change = EMBEDDINGS[rest]
                found[f"layers.{place - 1}.{own}"] = change(tensor)
                continue
            if norm := re.fullmatch(r"([wv])_norms\.(\d+)\.(gamma|beta)", rest):
                rest = f"{norm[3]}s.{int(norm[2]) + (num_layers if norm[1] == 'v' else 0)}"
            for pattern, replacement in MAPS:
                rest = re.sub(pattern, replacement.replace("LAST", str(num_layers - 1)), rest)
            found[f"layers.{place}.{rest}"] = tensor
    return found | {name: torch.stack([parts[k].flatten() for k in sorted(parts)]) for name, parts in stacked.items()}


@pytest.mark.parametrize("path", golden.cases("nfn"), ids=lambda path: path.stem)
def test_published_outputs(path):
    case, state, params, output = golden.read(path, "relu")
    if case["hyper_parameters"].get("head", {}).get("sigmoid"):  # which is the task's here
        output = output.logit()
    model = config_of(case).build(params.spec)
    golden.assert_published(model, ours(state, model), params, output, case["parameter_count"])


INR, RGB = NetSpec.mlp([2, 32, 32, 1], "sine"), NetSpec.mlp([2, 32, 32, 3], "sine")
ZOO = NetSpec((*(LayerSpec(i, 16, (3, 3), "relu") for i in (1, 16, 16)), LayerSpec(16, 10)))
EDITING = {"output": "parameters", "hidden_dims": (128, 128, 128)}


@pytest.mark.parametrize(
    ("config", "spec", "count"),
    [
        (NFNConfig(), INR, 68_844_330),
        (NFNConfig(), RGB, 135_126_826),
        (NFNConfig(layer="NP", num_bands=6), INR, 45_668_650),
        (NFNConfig(layer="NP", num_bands=3), INR, 45_478_186),
        (NFNConfig(layer="NP", num_frequencies=256, num_bands=6, layer_positions=True, pool="NP"), INR, 53_283_114),
        (NFNConfig(layer="NP", num_bands=3, **EDITING), INR, 4_133_656),
        (NFNConfig(**EDITING), INR, 6_440_853),
        (NFNConfig(hidden_dims=(16, 16, 5), num_frequencies=0, out_dim=1), ZOO, 2_811_743),
        (NFNConfig(layer="NP", hidden_dims=(16, 16, 5), num_frequencies=0, io_embed=True, out_dim=1), ZOO, 2_031_390),
    ],
)
def test_published_parameter_counts(config, spec, count):
    with torch.device("meta"):
        model = config.build(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


SPECS = [
    NetSpec.mlp([2, 5, 3], "sine", 6.0),
    NetSpec.mlp([3, 4, 3, 5, 2], "hetero"),
    NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2))),
    NetSpec((LayerSpec(2, 4, (1, 1), "tanh"), LayerSpec(4, 3, (2, 2)))),
]
SMALL = {"hidden_dims": (8, 6), "num_frequencies": 2, "fourier_scale": 0.3, "readout_dim": 32}
POSITIONS = {"num_bands": 2, "max_frequency": 3.0}
BALANCED = {"hidden_dims": (8, 6), "num_frequencies": 0, "readout_dim": 32, "products": True, "init": "balanced"}
CONFIGS = [
    NFNConfig(**SMALL, normalize=True, append_statistics=True),
    NFNConfig(**SMALL, layer="NP", **POSITIONS, layer_positions=True, pool="NP", norm="channels"),
    NFNConfig(**{**SMALL, "num_frequencies": 0}, layer="NP", io_embed=True, normalize=True),
    NFNConfig(**SMALL, layer="pointwise", **POSITIONS),
    NFNConfig(**SMALL, norm="neurons"),
    NFNConfig(**SMALL, output="parameters", norm="channels"),
    NFNConfig(**SMALL, output="parameters", layer="NP", **POSITIONS),
    NFNConfig(**SMALL, products=True, norm="channels", append_statistics=True),
    NFNConfig(**BALANCED, layer="NP"),
    NFNConfig(**BALANCED, output="parameters", normalize=True),
]
CASES = [(c, s) for c in CONFIGS for s in SPECS if not (s.is_cnn and c.norm == "neurons")]


class TestNFN(Contract):
    @pytest.fixture(params=CASES, ids=str)
    def case(self, request):
        return request.param


def moved_ends(params, inputs, outputs):
    """Networks whose inputs and outputs are in another order."""
    weights, biases = list(params.weights), list(params.biases)
    weights[0], weights[-1], biases[-1] = weights[0][:, :, inputs], weights[-1][:, outputs], biases[-1][:, outputs]
    return NetParams(params.spec, tuple(weights), tuple(biases), params.activation)


@pytest.mark.parametrize("output", ["vector", "parameters"])
def test_np_layers_permute_inputs_and_outputs_too_unless_told_apart(output, random_params):
    params = random_params(NetSpec.mlp([3, 4, 5, 3], "relu"), 4)
    inputs, outputs = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])

    def difference(**options):
        model = build(NFNConfig(**SMALL, output=output, pool="NP", **options), params.spec)
        found, moved = model(params), model(moved_ends(params, inputs, outputs))
        if output == "parameters":
            found = moved_ends(found, inputs, outputs)
        return (flat(moved) - flat(found)).abs().max() / flat(found).std()

    assert difference(layer="NP") < 1e-10
    assert difference(layer="NP", **POSITIONS) > 1e-3
    assert difference(layer="NP", io_embed=True) > 1e-3
    assert difference(layer="HNP") > 1e-3


def test_statistics_against_torch(random_params):
    params = random_params(SPECS[2], 4)
    (found,) = raw_statistics([(params.weights, params.biases)])
    rows = [x.flatten(1) for pair in zip(params.weights, params.biases, strict=True) for x in pair]
    quantiles = torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = [torch.cat([x.mean(1)[:, None], x.var(1)[:, None], x.quantile(quantiles, 1).mT], 1) for x in rows]
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-12, atol=1e-12)
    (constant,) = raw_statistics([([torch.ones(2, 1, 3)], [torch.full((2, 1), 5.0)])])
    assert (constant[:, 7:] == torch.tensor([5.0, 0] + [5] * 5)).all()


def test_the_layer_norm_is_per_neuron(random_params):
    """After it, all channels of W_1 at each hidden neuron, and of W_L, have mean 0 and variance 1."""
    params = random_params(NetSpec.mlp([3, 4, 5, 2], "relu"), 4)
    model = NFNConfig(**SMALL, norm="neurons").build(params.spec).double()
    features = [w[..., None] for w in params.weights], [b[..., None] for b in params.biases]
    for layer in model.layers[:3]:
        features = layer(*features)
    (first, middle, last), (*_, last_bias) = features
    for rows in (first.flatten(2), middle, last.transpose(1, 2).flatten(2), last_bias.flatten(1)):
        assert rows.mean(-1).abs().max() < 1e-12
        assert (rows.var(-1, correction=0) - 1).abs().max() < 1e-2


def test_dropout_only_in_training_and_of_whole_channels(random_params):
    params = random_params(SPECS[0], 3)
    model = NFNConfig(**SMALL, dropout=0.5, readout_dropout=0.5, readout_input_dropout=0.5).build(params.spec).double()
    assert not torch.equal(model(params), model(params))
    model.eval()
    assert torch.equal(model(params), model(params))
    torch.manual_seed(0)
    activation = model.layers[2].train()
    (weight, _), (bias, _) = activation([torch.ones(40, 5, 4, 6)] * 2, [torch.ones(40, 5, 6)] * 2)
    assert ((weight == 0).flatten(1, 2).all(1) | (weight == 2).flatten(1, 2).all(1)).all()
    assert set(weight.unique().tolist()) == set(bias.unique().tolist()) == {0.0, 2.0}
    assert not ((bias == 0).all(1) | (bias == 2).all(1)).all()


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        (NFNConfig(hidden_dims=(64, 64)), INR),
        (NFNConfig(hidden_dims=(64, 64), layer="NP", num_bands=3, norm="channels", dropout=0.1), RGB),
        (NFNConfig(hidden_dims=(16, 16, 5), num_frequencies=0, out_dim=1), ZOO),
        (NFNConfig(hidden_dims=(32, 32), output="parameters", norm="neurons"), INR),
    ],
    ids=str,
)
def test_memory_is_estimated(config, spec, random_params):
    params = random_params(spec, 4).map(lambda tensor: tensor.float())
    assert 0.3 < share_of_budget(config.build(spec), params) < 1


@pytest.mark.parametrize("layer", ["NP", "HNP"])
def test_published_initial_values(layer):
    """Maps whose results are added share one bound; at W_1 of HNP each has that of its own."""
    layers = (
        NFNConfig(layer=layer, hidden_dims=(64,), num_frequencies=8).build(NetSpec.mlp([2, 8, 8, 1], "sine")).layers
    )
    for index, maps in enumerate(layers[1].maps):
        for own in (maps.weight_maps, maps.bias_maps):
            alone = layer == "HNP" and index == 0 and own is maps.weight_maps
            total = sum(linear.in_features for linear in own.values())
            for linear in own.values():
                bound = (linear.in_features if alone else total) ** -0.5
                for parameter in (linear.weight, linear.bias):
                    assert 0.85 * bound < parameter.abs().max() <= bound


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(
        ValueError, match=r"hidden_dims: found \[\], expected.*num_bands: found -1.*io_embed: is for layer NP"
    ):
        NFNConfig(hidden_dims=(), num_bands=-1, io_embed=True)
    with pytest.raises(ValueError, match="norm: found channels, but one channel"):
        NFNConfig(hidden_dims=(4, 1), norm="channels")
    with pytest.raises(ValueError, match=r"layer_positions: needs num_bands, found 0; .*append_statistics: is for vec"):
        NFNConfig(layer_positions=True, append_statistics=True, output="parameters")
    with pytest.raises(ValueError, match="products: are of layers NP and HNP, found pointwise"):
        NFNConfig(products=True, layer="pointwise")
    with pytest.raises(ValueError, match=r"hidden_dims: found \[4, 3\], expected an even last one for products"):
        NFNConfig(products=True, hidden_dims=(4, 3))
    for key, value in {"products": False, "num_frequencies": 2, "num_bands": 2, "norm": "channels"}.items():
        with pytest.raises(ValueError, match=rf"^nfn_args.{key}: found {value}, expected \w+ for init balanced$"):
            NFNConfig(**BALANCED | {key: value})
    with pytest.raises(ValueError, match="io_embed: found True, expected False for init balanced"):
        NFNConfig(**BALANCED, layer="NP", io_embed=True)
    with pytest.raises(ValueError, match="at least one hidden layer"):
        NFNConfig().build(NetSpec.mlp([2, 1], "sine"))
    with pytest.raises(ValueError, match="norm: neurons is for linear layers, found CNN"):
        NFNConfig(norm="neurons").build(SPECS[2])
