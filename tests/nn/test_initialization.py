"""Balanced initial values: features keep their size, permutation models start odd, and training starts at once."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from scalegmn.models.dng import DNGConfig
from scalegmn.models.dwsnet import DWSNetConfig
from scalegmn.models.flat_mlp import FlatMLPConfig
from scalegmn.models.gradmetanet import GradMetaNetConfig
from scalegmn.models.hidden_probe import HiddenProbeConfig
from scalegmn.models.inr2jls import INR2JLSConfig
from scalegmn.models.monomial_nfn import MonomialNFNConfig
from scalegmn.models.mvprobe import MVProbeConfig
from scalegmn.models.nfn import NFNConfig
from scalegmn.models.nft import NFTConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.phasor import PhasorConfig
from scalegmn.models.probegen import ProbeGenConfig
from scalegmn.models.quasi_nfn import QuasiNFNConfig
from scalegmn.models.quasi_scalegmn import QuasiScaleGMNConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.models.unf import UNFConfig
from scalegmn.networks import BUILT_IN, NetParams, NetSpec
from scalegmn.networks.evaluate import evaluate
from scalegmn.nn.initialization import constant_features, initialized, resize, start_odd
from scalegmn.nn.messages import ConcatMessage
from scalegmn.nn.mlp import MLP
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.measure import relative_change
from scalegmn.tasks.editing import edited

SIREN = NetSpec.mlp([2, 8, 8, 1], "sine", 6.0)
GMN = {"symmetry": "permutation", "hidden_dim": 16}
NG = {"num_frequencies": 0, "dropout": 0.0}
NG_T = {
    "node_dim": 16,
    "edge_dim": 16,
    "attention_dim": 16,
    "num_heads": 2,
    "node_hidden_dim": 32,
    "edge_hidden_dim": 32,
}
NFN = {"hidden_dims": (16, 16), "num_frequencies": 0, "readout_dim": 32, "products": True}
DWSNET = {"hidden_dim": 16, "num_hidden": 1, "set_layer": "deep_set", "reduction": "mean"}
DWSNET |= {"batch_norm": False, "products": True}
PERMUTATION = {
    "gmn": ScaleGMNConfig(**GMN),
    "gmn-bidirectional": ScaleGMNConfig(**GMN, direction="bidirectional"),
    "gmn-product": ScaleGMNConfig(**GMN, message_function="product"),
    "gmn-scale": ScaleGMNConfig(**GMN, message_function="scale"),
    "gmn-deep": ScaleGMNConfig(**GMN, mlp_dims=(16, 12), mlp_layer_norm=False),
    "ng_gnn": NGGNNConfig(**NG, hidden_dim=16),
    "nfn": NFNConfig(**NFN),
    "nfn-np": NFNConfig(**NFN, layer="NP"),
    "unf": UNFConfig(hidden_dims=(16, 16), readout_dim=32, products=True),
    "dwsnet": DWSNetConfig(**DWSNET),
    "ng_gnn-fourier": NGGNNConfig(hidden_dim=16, frequency_scale=0.1, encoder_layers=2, reverse_edges=False),
}


def build(config, spec, init, seed=0):
    torch.manual_seed(seed)
    return initialized(config.build(spec), init, spec).double().eval()


def test_values_alone_differ():
    for config in PERMUTATION.values():
        before, after = (build(config, SIREN, init).state_dict() for init in ("published", "balanced"))
        assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
        assert any((before[name] != after[name]).any() for name in before)


def test_resize_keeps_the_size_of_what_is_read():
    linear = nn.Linear(40, 200)
    linear.weight.data[:, 10:] = 0
    with torch.no_grad():
        resize(linear, 3.0)
        rms = linear(torch.randn(500, 40)).square().mean().sqrt()
    assert rms == pytest.approx(3, rel=0.1)
    assert linear.bias.eq(0).all()


@pytest.mark.parametrize("hidden_dims", [(8,), (9,), (8, 6)])
def test_mlp_starts_odd(hidden_dims):
    mlp, x = MLP(5, hidden_dims, 4).double(), torch.randn(20, 5, dtype=torch.float64)
    assert (mlp(x) + mlp(-x)).abs().max() > 0.1
    with torch.no_grad():
        start_odd(mlp)
    assert (mlp(x) + mlp(-x)).abs().max() < 1e-12
    assert mlp(x).square().mean() > 0.1


def test_concat_message_starts_odd_in_edge_and_in_sender():
    message = initialized(ConcatMessage(8, lambda i, o: MLP(i, [8], o)), "balanced", SIREN).double()
    edge, sender = torch.randn(2, 10, 8, dtype=torch.float64)
    new = message(None, None, sender, edge)
    for other in (message(None, None, -sender, edge), message(None, None, sender, -edge)):
        assert (new + other).abs().max() < 1e-12
    assert new.square().mean() > 0.1


@pytest.mark.parametrize("config", PERMUTATION.values(), ids=PERMUTATION)
def test_permutation_models_start_invariant_to_signs(config, random_params, generator):
    params = random_params(SIREN, 6)
    moved = GroupElement.sample(params, generator).act(params)

    def change(init):
        model = build(config, SIREN, init)
        with torch.no_grad():
            return relative_change(model(moved), model(params))

    assert change("balanced") < 1e-9
    assert change("published") > 1e-2


def test_ng_t_starts_nearly_invariant_to_signs(random_params, generator):
    params = random_params(SIREN, 6)
    moved = GroupElement.sample(params, generator).act(params)
    config = NGTConfig(**NG, **NG_T, reverse_edges=True)
    changes = []
    for init in ("published", "balanced"):
        model = build(config, SIREN, init)
        with torch.no_grad():
            changes.append(relative_change(model(moved), model(params)))
    assert changes[1] < 0.3 * changes[0]


def test_ng_t_keeps_constant_features_beside_those_that_differ(random_params):
    """Of a node or a pair of nodes: a, b, a, b, ...; LayerNorm changes a - b alone, which tells the others' size."""
    params, config = random_params(SIREN, 6), NGTConfig(**NG, **NG_T, reverse_edges=True)

    def spread(init):
        model, found = build(config, SIREN, init), []
        model.engine = "plain"
        for layer in model.layers:
            layer.register_forward_hook(lambda _, __, output: found.extend(output))
        with torch.no_grad():
            model(params)
        constant = [features[..., constant_features(features.shape[-1])] for features in found]
        assert all((features[..., 0] - features[..., 1]).std() > 1e-3 for features in constant)
        return max((features[..., 2:] - features[..., :2]).abs().max().item() for features in constant)

    assert spread("balanced") < 1e-9
    assert spread("published") > 0.1


def sizes(config, spec, params, init):
    """RMS of the nodes after each layer."""
    model, found = build(config, spec, init), []
    model.engine = "plain"
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, output: found.append(output[0].square().mean().sqrt().item()))
    with torch.no_grad():
        model(params)
    return found


KINDS = [("sign", "tanh", "forward"), ("sign", "tanh", "bidirectional")]
KINDS += [("scale", "relu", "forward"), ("hetero", "hetero", "forward")]
"""Without bidirectional scale and hetero: reciprocals of weights near zero have no size to keep."""


@pytest.mark.parametrize(("symmetry", "activation", "direction"), KINDS)
@pytest.mark.parametrize("width", [4, 40])
def test_features_keep_their_size(symmetry, activation, direction, width, random_params):
    spec = NetSpec.mlp([3, width, width, 4], activation)
    kinds = [BUILT_IN.index(name) for name in ("relu", "tanh")] * 2 if symmetry == "hetero" else None
    params = random_params(spec, 4, kinds)
    config = ScaleGMNConfig(symmetry=symmetry, direction=direction, hidden_dim=16)
    for size in sizes(config, spec, params, "balanced"):
        assert 0.25 < size < 4
    if width == 4:
        assert sizes(config, spec, params, "published")[-1] < 0.25


TINY, LINEAR = NetSpec.mlp([2, 5, 5, 1], "sine", 6.0), NetSpec.mlp([2, 5, 5, 1], "identity")
SMALL = {"hidden_dim": 16, "num_layers": 3, "out_dim": 4, "normalize": True}
STARTING = {
    "scalegmn": ScaleGMNConfig(**SMALL),
    "scalegmn-bidirectional": ScaleGMNConfig(**SMALL, direction="bidirectional"),
    "scalegmn-product": ScaleGMNConfig(**SMALL, message_function="product", mlp_layer_norm=False),
    "quasi_scalegmn": QuasiScaleGMNConfig(**SMALL),
    "gmn": ScaleGMNConfig(**SMALL, symmetry="permutation", message_function="product"),
    "ng_gnn": NGGNNConfig(**NG, hidden_dim=16, num_layers=3, out_dim=4, reverse_edges=False),
    "ng_t": NGTConfig(**NG, **NG_T, reverse_edges=True, num_layers=3, out_dim=4),
    "nfn-products": NFNConfig(**NFN, out_dim=4),
    "unf-products": UNFConfig(hidden_dims=(16, 16), readout_dim=32, products=True, out_dim=4),
    "dwsnet-products": DWSNetConfig(**DWSNET, out_dim=4),
}
STARTING = {name: replace(config, init="balanced") for name, config in STARTING.items()} | {
    "scalegmn-probes": ScaleGMNConfig(**SMALL, num_probes=16),
    "probegen": ProbeGenConfig(num_probes=16, hidden_dim=32, num_linears=3, out_dim=4),
    "hidden_probe": HiddenProbeConfig(num_probes=16, hidden_dim=32, num_linears=3, neuron_dim=16, out_dim=4),
    "phasor": PhasorConfig(hidden_dim=16, num_layers=3, out_dim=4),
    "dng": DNGConfig(hidden_dim=32, num_frequencies=8, readout_dim=32, out_dim=4),
    "inr2jls": INR2JLSConfig(hidden_dim=32, num_frequencies=8, readout_dim=32, out_dim=4),
    "unf": UNFConfig(hidden_dims=(16, 16), readout_dim=32, out_dim=4),
    "nft": NFTConfig(hidden_dim=16, num_layers=1, readout_dim=32, out_dim=4),
    "quasi_nfn": QuasiNFNConfig(hidden_dims=(16, 16), readout_dim=32, out_dim=4),
    "monomial_nfn": MonomialNFNConfig(hidden_dims=(16, 16), readout_dim=32, out_dim=4),
    "gradmetanet": GradMetaNetConfig(num_probes=64, num_layers=1, out_dim=4),
    "dwsnet": DWSNetConfig(hidden_dim=8, num_hidden=1, num_heads=4, out_dim=4),
    "nfn": NFNConfig(hidden_dims=(16, 16), num_frequencies=8, fourier_scale=1.0, readout_dim=32, out_dim=4),
    "statnn": StatNNConfig(features="invariant", hidden_dim=64, out_dim=4),
    "mvprobe": MVProbeConfig(num_probes=16, projection_dim=16, representation_dim=32, out_dim=4),
    "mlp": FlatMLPConfig(hidden_dim=64, num_hidden=1, out_dim=4),
}
SHARE_LEFT = {"nft": 0.5, "probegen": 0.5, "hidden_probe": 0.5, "scalegmn-product": 0.5}
"""The most that 50 steps leave of the first loss; 0.2 of models that are not named."""


@pytest.fixture
def zoo(generator):
    return labelled(TINY, generator)


def labelled(spec, generator):
    """32 networks, and the quarter of the plane in which the pair of their values at two points lies."""
    weights = [torch.randn(32, *layer.weight_shape, generator=generator) / layer.in_dim for layer in spec.layers]
    biases = [0.3 * torch.randn(32, layer.out_dim, generator=generator) for layer in spec.layers[:-1]]
    params = NetParams(spec, tuple(weights), (*biases, torch.zeros(32, 1)))  # whose sign would tell
    values = evaluate(params, torch.tensor([[0.5, 0.2], [-0.4, 0.6]]))[..., 0]
    return params, ((values > values.median(0).values) * torch.tensor([1, 2])).sum(1)


def share_left(config, params, loss_of):
    """The share of the first loss, loss_of(model), that 50 steps leave."""
    torch.manual_seed(0)
    model = config.build(params.spec).to(params.biases[0].dtype)
    model.fit_normalization([params])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(51):
        losses.append(loss_of(model))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return (losses[-1] / losses[0]).item()


def share_left_of_labels(config, zoo):
    params, labels = zoo
    return share_left(config, params, lambda model: nn.functional.cross_entropy(model(params), labels))


@pytest.mark.parametrize("name", STARTING)
def test_training_starts(name, generator):
    params, labels = labelled(LINEAR if name == "mvprobe" else TINY, generator)
    if name == "scalegmn-product":  # in single precision 0.14 to 0.63, by how sums are rounded
        params = params.to(torch.float64)
    assert share_left_of_labels(STARTING[name], (params, labels)) < SHARE_LEFT.get(name, 0.2)


def test_training_of_edits_starts(zoo):
    """Networks are to compute what they compute at the mirrored point."""
    params, _ = zoo
    points = torch.cartesian_prod(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4))
    target = evaluate(params, points.flip(1))
    config = ScaleGMNConfig(**SMALL, output="parameters", direction="bidirectional", message_function="product")

    def error(model):
        return (evaluate(edited(model, params), points) - target).square().mean()

    assert share_left(replace(config, init="balanced"), params, error) < 0.4


def test_each_model_is_shown_to_start():
    assert {config.name for config in STARTING.values()} == set(METANETWORKS)


def test_training_hardly_starts_as_published(zoo):
    assert share_left_of_labels(replace(STARTING["scalegmn"], init="published"), zoo) > 0.3
