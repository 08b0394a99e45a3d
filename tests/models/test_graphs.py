"""Networks that are no chains: ResNets, transformers, grouped convolutions, skips from the input to the output."""

from dataclasses import replace

import pytest
import torch
from architectures import architecture, traced
from contract import assert_engine_computes_the_plain_form, build, error, flat

from scalegmn.engine import neural_graphs
from scalegmn.graphs import edge_values
from scalegmn.interop.torch_modules import from_module
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.symmetry.groups import GroupElement

SCALEGMN = ScaleGMNConfig(direction="bidirectional", readout="full_graph", hidden_dim=4, num_layers=2, out_dim=3)
HETERO = replace(SCALEGMN, symmetry="hetero")
PERMUTATION = replace(SCALEGMN, symmetry="permutation", normalize=False)
GNN = NGGNNConfig(hidden_dim=4, num_layers=2, num_frequencies=0, normalize=False, out_dim=3)
CONFIGS = {"hetero": HETERO, "permutation": PERMUTATION, "ng_gnn": GNN, "statnn": StatNNConfig(hidden_dim=8, out_dim=3)}
SKIPS = NetSpec((LayerSpec(2, 4, None, "relu"), LayerSpec(4, 3), LayerSpec(2, 3, reads=-1, residual=1)))
"""The output reads the input, and adds what the hidden neurons say."""


def networks(name):
    """Three networks of an architecture, with different parameters."""
    _, params, _ = traced(name)
    torch.manual_seed(1)
    return NetParams.cat([params, *(params.map(lambda one: one * (1 + 0.3 * torch.rand_like(one))) for _ in range(2))])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["dense", "grouped", "resnet18", "side by side", "vit", "gpt"])
def test_invariance(name, kind, generator):
    params = networks(name)
    model = build(CONFIGS[kind], params.spec)
    scale = kind == "hetero"
    element = GroupElement.sample(params, generator, scale=scale)
    assert error(model, params, element) <= 1e-9
    outside = tuple(q * (1 + torch.rand_like(q)) for q in element.scales)
    assert error(model, params, replace(element, scales=outside)) > 1e-6


@pytest.mark.parametrize("kind", ["hetero", "permutation", "ng_gnn"])
@pytest.mark.parametrize("name", ["grouped", "gpt"])
def test_every_layer_is_read(name, kind):
    params = networks(name)
    config = replace(CONFIGS[kind], num_layers=5) if kind == "ng_gnn" else CONFIGS[kind]
    model = build(replace(config, pooling="mean") if kind == "ng_gnn" else config, params.spec)
    expected = model(params)
    for index in range(params.spec.num_layers):
        weights = list(params.weights)
        weights[index] = torch.randn_like(weights[index])
        assert (model(replace(params, weights=tuple(weights))) - expected).abs().max() > 1e-9, index


def skips(activation):
    """Residual connections between hidden layers and into the output."""
    hidden = LayerSpec(2, 4, None, activation), LayerSpec(4, 3, None, activation)
    return NetSpec((*hidden, LayerSpec(3, 4, None, activation, residual=0), LayerSpec(4, 3, residual=1)))


def attention(activation):
    """Groups, a normalisation layer, a residual connection, attention of 2 heads of dimension 2."""
    return NetSpec(
        (
            LayerSpec(2, 4, (3, 3), activation),
            LayerSpec(4, 4, (1, 1), groups=2),
            LayerSpec(4, 4, None, "gelu", groups=4, norm="layer", residual=0),
            *(LayerSpec(4, 4, reads=layer) for layer in (0, 2)),
            LayerSpec(4, 4, reads=2, attention=(3, 4, 2)),
            LayerSpec(4, 3),
        )
    )


DIRECTIONS = ["forward", "bidirectional"]
OUTPUTS = [("vector", "last_layer"), ("vector", "full_graph"), ("parameters", "last_layer")]
NO_CHAINS = [
    ("sign", skips("tanh")),
    ("scale", skips("relu")),
    ("scale", SKIPS),
    ("hetero", skips("hetero")),
    ("permutation", skips("gelu")),
    ("hetero", attention("relu")),
    ("permutation", attention("gelu")),
]


@pytest.mark.parametrize(("symmetry", "spec"), NO_CHAINS)
@pytest.mark.parametrize(("output", "readout"), OUTPUTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_engine_computes_the_plain_form(symmetry, spec, direction, output, readout, random_params):
    """Outputs and gradients; the engine runs networks that are no chains as one sparse graph."""
    options = {"symmetry": symmetry, "direction": direction, "output": output, "readout": readout, "num_layers": 3}
    params = random_params(spec, 3, [1, 2, 1] if "hetero" in spec.symmetries else None)
    assert_engine_computes_the_plain_form(build(replace(SCALEGMN, normalize=False, **options), spec), [params])


@pytest.mark.parametrize("output", ["vector", "parameters"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("name", "sizes"), [("grouped", {1, 9}), ("side by side", {1, 9})])
def test_kernels_of_several_sizes(name, sizes, direction, output, monkeypatch):
    """Edges of small and of large kernels are worked through apart where a table of both would be large."""
    params = traced(name)[1].with_batch_norm_folded()
    assert {block.values.shape[-1] for block in params.kernels()} == sizes
    model = build(replace(HETERO, direction=direction, output=output), params.spec)
    together = flat(model(params))
    monkeypatch.setattr(edge_values, "LEAST_SAVED", 1)
    torch.testing.assert_close(flat(model(params)), together, rtol=1e-10, atol=1e-12)
    nets = [params, *([params.map(lambda tensor: 2 * tensor)] if output == "vector" else [])]
    assert_engine_computes_the_plain_form(model, nets)


@pytest.mark.parametrize("options", [{"num_frequencies": 0}, {"num_frequencies": 3}, {"encoder_layers": 2}], ids=str)
@pytest.mark.parametrize("reverse", [True, False])
def test_edges_are_encoded_in_chunks(options, reverse, monkeypatch):
    params = traced("side by side")[1].with_batch_norm_folded()
    config = replace(GNN, reverse_edges=reverse, pooling="mean", **options)
    model = build(config, params.spec)
    at_once = model(params)
    monkeypatch.setattr(neural_graphs, "tensor_bytes", lambda device: 100)
    torch.testing.assert_close(model(params), at_once, rtol=1e-10, atol=1e-12)
    assert_engine_computes_the_plain_form(model, [params, params.map(lambda tensor: 2 * tensor)])


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("readout", ["last_layer", "full_graph"])
def test_residual_connections_into_the_output(direction, readout, random_params, generator):
    params = random_params(SKIPS, 4)
    config = replace(SCALEGMN, symmetry="scale", direction=direction, readout=readout, num_layers=3)
    model = build(config, SKIPS)
    assert error(model, params, GroupElement.sample(params, generator)) <= 1e-9
    moved = replace(params, weights=(params.weights[0] + 1, *params.weights[1:]))
    assert (model(moved) - model(params)).abs().max() > 1e-6


def test_batch_norms_are_read_as_they_evaluate():
    """Statistics count as what they do to scale and shift."""
    module, x = architecture("resnet18")
    params = from_module(module, x)
    model = build(HETERO, params.spec)
    with torch.no_grad():
        module.bn1.weight.mul_(2)
        module.bn1.running_var.add_(module.bn1.eps).mul_(4).sub_(module.bn1.eps)
    same = from_module(module, x)
    torch.testing.assert_close(model(same), model(params), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        module.bn1.running_mean.add_(1)
    assert (model(from_module(module, x)) - model(params)).abs().max() > 1e-9


def test_changes_need_folded_batch_norms():
    _, params, _ = traced("side by side")
    model = build(replace(HETERO, output="parameters"), params.spec)
    with pytest.raises(ValueError, match=r"networks without batch norms; pass params.with_batch_norm_folded\(\)"):
        model(params)
    weights = model(params.with_batch_norm_folded()).weights
    assert [change.shape for change in weights] == [weight.shape for weight in params.weights]


def test_models_that_see_no_input_refuse_networks_whose_output_reads_it(random_params):
    """A model of chains whose readout sees the outputs alone has no branch for what skips from the input; others read
    it, the same in both forms."""
    hidden = LayerSpec(2, 4, None, "relu"), LayerSpec(4, 4, None, "relu", residual=0)
    chain = NetSpec((*hidden, LayerSpec(4, 3)))
    params = random_params(SKIPS, 4)
    config = replace(SCALEGMN, symmetry="scale", direction="forward", max_hidden_layers=2, num_layers=3)
    with pytest.raises(ValueError, match=r"readout: .* whose output layer does not read the input, .*use full_graph"):
        build(replace(config, readout="last_layer"), chain)(params)
    plain, fast = (build(replace(config, readout="full_graph", engine=name), chain) for name in ("plain", "fast"))
    fast.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fast(params), plain(params), rtol=1e-9, atol=1e-9)
