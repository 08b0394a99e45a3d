"""ScaleGMN on networks of several architectures, as one sparse graph."""

import itertools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from contract import assert_ties_are_seen, build, error, flat
from covering import product_params

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig, execution
from scalegmn.networks import HETERO, LayerSpec, NetSpec
from scalegmn.symmetry.groups import GroupElement

KINDS = {"sign": ["sine", "tanh"], "scale": ["relu", "leaky_relu"], "permutation": ["gelu", "relu"]}
KINDS[HETERO] = ["relu", "tanh", "gelu", HETERO]
"""Symmetry -> activations of the layers that it covers."""

SIZES = [[2, 4, 3, 5, 2], [2, 3, 2], [2, 5, 4, 2], [2, 6, 3, 2]]


def mlp(layout, kinds):
    *hidden, last = itertools.pairwise(layout)
    names = itertools.cycle(kinds)
    return NetSpec((*(LayerSpec(*sizes, None, next(names)) for sizes in hidden), LayerSpec(*last)))


def cnn(kinds):
    """Of two hidden layers, kernels of two sizes."""
    return NetSpec((LayerSpec(2, 4, (3, 3), kinds[0]), LayerSpec(4, 3, (1, 2), kinds[-1]), LayerSpec(3, 2)))


def residual(kinds, kernel=(3, 3)):
    """Three hidden layers, the last and the first tied, with the first and the last of `kinds`."""
    return NetSpec(
        (
            LayerSpec(2, 5, kernel, kinds[0]),
            LayerSpec(5, 4, kernel, kinds[0]),
            LayerSpec(4, 3, kernel, kinds[-1], residual=0),
            LayerSpec(3, 2),
        )
    )


def nets_of(specs, random_params, num=2):
    """Random networks of each, mixed ones relu and tanh in turn."""
    own = ([1, 2] * num)[:num]
    return [random_params(spec, num, own if HETERO in spec.symmetries else None) for spec in specs]


def as_graph(model, params):
    """The output where equal chains are read like any other networks."""
    with patch.object(execution, "is_chain", lambda model, spec: False):
        return model(params)


def config_of(symmetry, direction, readout="last_layer", **options):
    return ScaleGMNConfig(
        symmetry=symmetry, direction=direction, readout=readout, **{"num_layers": 3, "hidden_dim": 5} | options
    )


def assert_same(found, expected):
    """Of outputs, to 1e-9 of their size."""
    scale = flat(expected).abs().max()
    torch.testing.assert_close(flat(found) / scale, flat(expected) / scale, rtol=0, atol=1e-9)


def gradients(model, output):
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(2)
    output = flat(output)
    (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found, expected):
    for name, gradient in expected.items():
        size = gradient.abs().max().clamp_min(1e-12)
        torch.testing.assert_close(found[name] / size, gradient / size, rtol=0, atol=1e-9, msg=lambda m, n=name: n + m)


DIRECTIONS, READOUTS = ["forward", "bidirectional"], ["last_layer", "full_graph"]
WAYS = product_params(KINDS, DIRECTIONS, READOUTS)


@pytest.mark.parametrize(("symmetry", "direction", "readout"), WAYS)
def test_together_equals_one_by_one(symmetry, direction, readout, random_params):
    """Depths, widths, kernels, activations and residual connections in one batch; outputs and gradients."""
    kinds = KINDS[symmetry]
    specs = [mlp(sizes, kinds[k:] + kinds[:k]) for k, sizes in enumerate(SIZES)]
    specs += [cnn(kinds), residual(kinds), residual(kinds[:1], None), residual(kinds[:2], None)]
    model = build(
        config_of(symmetry, direction, readout, max_hidden_layers=4, normalize=True, sizes=True), residual(kinds)
    )
    nets = nets_of(specs, random_params)
    nets.append(nets_of(specs[:1], random_params, 1)[0])
    model.fit_normalization(nets)
    alone = torch.cat([model(params[index : index + 1]) for params in nets for index in range(len(params))])
    expected = gradients(model, alone)
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    together = model(nets)
    assert passes == [len(specs)]
    assert_same(together, alone)
    assert_same_gradients(gradients(model, together), expected)


OPTIONS = {
    "default": {},
    "published": {"message": EquivariantNetConfig(positions=True), "update": EquivariantNetConfig(positions=True)},
    "nets": {
        "node_positions": "net",
        "position_net": EquivariantNetConfig(io="layer", positions=True),
        "position_map": "per_type",
        "message": EquivariantNetConfig(io="mlp", io_branches=2, num_layers=2, skip_connections=True),
        "update": EquivariantNetConfig(io_branches=2),
        "aggregator": "mean",
    },
    "plain": {
        "edge_positions": False,
        "node_positions": "none",
        "sign_map": "absolute",
        "update_edges": False,
        "reciprocal": False,
    },
    "mapped": {"position_map": "per_type", "aggregator": "mean", "message": EquivariantNetConfig(io="same")},
    "shared": {"position_map": "shared", "node_positions": "product", "norm_epsilon": 1e-10},
}


@pytest.mark.parametrize(
    ("symmetry", "direction", "readout", "way"), product_params(KINDS, DIRECTIONS, READOUTS, OPTIONS)
)
def test_equal_chains_as_a_graph(symmetry, direction, readout, way, random_params):
    """The same function as in blocks per layer."""
    options = OPTIONS[way]
    if symmetry == HETERO and options.get("node_positions") == "net":
        options = {name: value for name, value in options.items() if "position" not in name}
    activation = {"scale": "relu", "permutation": "gelu", HETERO: HETERO}.get(symmetry, "tanh")
    for spec in (mlp([2, 4, 3, 2], [activation]), cnn([activation])):
        (params,) = nets_of([spec], random_params, 3)
        model = build(config_of(symmetry, direction, readout, max_hidden_layers=3, **options), spec)
        found, expected = as_graph(model, params), model(params)
        assert_same(found, expected)
        assert_same_gradients(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("symmetry", KINDS)
def test_changes_of_equal_chains_as_a_graph(symmetry, direction, random_params):
    activation = {"scale": "relu", "permutation": "gelu", HETERO: HETERO}.get(symmetry, "tanh")
    for spec in (mlp([2, 4, 3, 2], [activation]), cnn([activation])):
        (params,) = nets_of([spec], random_params, 3)
        model = build(config_of(symmetry, direction, output="parameters"), spec)
        assert_same(as_graph(model, params), model(params))


def wrong_scalars(params, layer):
    """-1 and 2 by turns in one hidden layer: no network's symmetry."""
    element = GroupElement.sample(params, permute=False, scale=False)
    scales = [q.clone() for q in element.scales]
    scales[layer][:, ::2], scales[layer][:, 1::2] = -1, 2
    return GroupElement(element.permutations, tuple(scales))


@pytest.mark.parametrize(
    ("symmetry", "direction", "output"), product_params(KINDS, DIRECTIONS, ["vector", "parameters"])
)
def test_residual_networks_keep_their_symmetries(symmetry, direction, output, random_params, generator):
    kinds = KINDS[symmetry]
    for spec in (residual(kinds), residual(kinds[:1], None), residual(kinds[:2], None)):
        (params,) = nets_of([spec], random_params, 4)
        readout = "last_layer" if direction == "forward" else "full_graph"
        model = build(config_of(symmetry, direction, readout, output=output, num_layers=4), spec)
        for _ in range(3):
            assert error(model, params, GroupElement.sample(params, generator, scale=symmetry != "permutation")) <= 1e-9
        if symmetry != "permutation":
            assert error(model, params, wrong_scalars(params, 1)) > 1e-6
        if output == "vector":
            assert_ties_are_seen(model, params, generator)


@pytest.mark.parametrize("output", ["vector", "parameters"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_several_activations_in_one_network(direction, output, random_params, generator):
    """Each layer's own scalars, and no others."""
    (params,) = nets_of([mlp([2, 4, 3, 5, 4, 2], ["relu", "tanh", HETERO, "gelu"])], random_params, 4)
    model = build(config_of(HETERO, direction, "full_graph", output=output), params.spec)
    for _ in range(3):
        assert error(model, params, GroupElement.sample(params, generator)) <= 1e-9
    for layer, factor in ((0, -1), (1, 2), (2, -2), (3, 2)):
        element = GroupElement.sample(params, generator, permute=False, scale=False)
        scales = [q * (factor if k == layer else 1) for k, q in enumerate(element.scales)]
        assert error(model, params, GroupElement(element.permutations, tuple(scales))) > 1e-6


@pytest.mark.parametrize(("symmetry", "direction", "readout"), WAYS)
def test_no_gradient_between_networks(symmetry, direction, readout, random_params):
    kinds = KINDS[symmetry]
    specs = [cnn(kinds), residual(kinds), mlp([2, 3, 2], kinds)]
    model = build(config_of(symmetry, direction, readout, max_hidden_layers=3, num_layers=4), specs[1])
    nets = [params.map(torch.Tensor.requires_grad_) for params in nets_of(specs, random_params)]
    model(nets)[3].sum().backward()
    for number, params in enumerate(nets):
        for tensor in (*params.weights, *params.biases):
            if tensor.grad is not None:
                reached = tensor.grad.flatten(1).abs().amax(1) > 0
                assert reached.tolist() == [False, number == 1]
    assert all(tensor.grad is not None for tensor in nets[1].weights)


@pytest.mark.parametrize("symmetry", KINDS)
def test_in_mixed_precision(symmetry, random_params):
    kinds = KINDS[symmetry]
    specs = [cnn(kinds), residual(kinds), mlp([2, 3, 2], kinds)]
    torch.manual_seed(0)
    model = config_of(symmetry, "bidirectional", "full_graph", max_hidden_layers=3).build(specs[1])
    nets = [params.to(torch.float32) for params in nets_of(specs, random_params)]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(nets)
        found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), model(nets), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("symmetry", "materialize", "num_edges"), product_params(KINDS, [True, False], [7, 60, 10_000])
)
def test_in_pieces(symmetry, materialize, num_edges, random_params, monkeypatch):
    kinds = KINDS[symmetry]
    specs = [cnn(kinds), residual(kinds), mlp([2, 3, 2], kinds)]
    options = OPTIONS["published"] if symmetry == "sign" else {"aggregator": "mean"}
    model = build(config_of(symmetry, "bidirectional", max_hidden_layers=3, **options), specs[1])
    nets = nets_of(specs, random_params)
    whole = model(nets)
    expected = gradients(model, whole)
    monkeypatch.setattr(model, "chunks", lambda *args: ChunkPlan(num_edges, materialize))
    pieces = model(nets)
    assert_same(pieces, whole)
    assert_same_gradients(gradients(model, pieces), expected)


@pytest.mark.parametrize(("symmetry", "direction", "readout"), WAYS)
def test_every_parameter_is_used(symmetry, readout, direction, random_params):
    kinds = KINDS[symmetry]
    branches = EquivariantNetConfig(io_branches=2)
    config = config_of(
        symmetry, direction, readout, max_hidden_layers=3, num_layers=4, message=branches, update=branches
    )
    specs = [cnn(kinds), residual(kinds), mlp([2, 3, 2], ["tanh"] if symmetry == HETERO else kinds)]
    model = build(config, specs[1])
    found = gradients(model, model(nets_of(specs, random_params)))
    assert [name for name, gradient in found.items() if not gradient.any()] == []


def test_only_residual_networks_have_parameters_for_it():
    config = config_of("scale", "bidirectional")
    counts = [sum(p.numel() for p in config.build(residual(["relu"], k)).parameters()) for k in (None, (1, 1))]
    loose = NetSpec(tuple(replace(layer, residual=None) for layer in residual(["relu"], None).layers))
    plain = sum(p.numel() for p in config.build(loose).parameters())
    assert counts[0] == counts[1] == plain + 2 * 2 * 5 * 5  # two of the three layers compute hidden nodes


def test_what_cannot_be_read_is_refused(random_params):
    relu = [mlp(sizes, ["relu"]) for sizes in ([2, 4, 3, 2], [2, 3, 2], [2, 4, 3, 3, 2], [3, 4, 3, 2])]
    model = config_of("scale", "forward").build(relu[0]).double()
    deep = config_of("scale", "forward", max_hidden_layers=3).build(relu[0]).double()
    assert model(nets_of([mlp([2, 9, 1, 2], ["relu"])], random_params)).shape == (2, 10)  # other widths
    refused = [
        (model, relu[1], r"of 2 to 2 hidden layers \(max_hidden_layers\).*found MLP \[2, 3, 2\]"),
        (model, relu[2], r"of 2 to 2 hidden layers"),
        (deep, mlp([2, 1, 1, 1, 1, 2], ["relu"]), r"of 0 to 3 hidden layers"),
        (deep, relu[3], r"from 2 to 2"),
        (deep, cnn(["relu"]), r"kernels up to 1x1"),
        (deep, residual(["relu"], None), "built for networks without residual connections, found MLP .*0 -> 2"),
        (deep, mlp([2, 3, 3, 2], ["tanh"]), "scale does not hold"),
    ]
    for reader, spec, message in refused:
        with pytest.raises(ValueError, match=message):
            reader(nets_of([spec], random_params)[0])
        with pytest.raises(ValueError, match=message):
            reader(nets_of([relu[0], spec], random_params))
    with pytest.raises(ValueError, match="of 0 to 1 hidden layers"):
        config_of("scale", "forward", max_hidden_layers=1).build(relu[0])
    editing = config_of("scale", "forward", output="parameters", max_hidden_layers=3).build(relu[0]).double()
    with pytest.raises(
        ValueError, match=r"scalegmn_args.output: the model was built for changes of MLP \[2, 4, 3, 2\]"
    ):
        editing(nets_of([relu[1]], random_params)[0])
    with pytest.raises(ValueError, match="pass one architecture at a time"):
        editing(nets_of([relu[0], mlp([2, 9, 1, 2], ["relu"])], random_params))
