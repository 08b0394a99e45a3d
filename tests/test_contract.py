"""ScaleGMN: the contract of every metanetwork, and what only it has."""

import itertools
from dataclasses import replace

import pytest
import torch
from contract import Contract, build
from covering import pairwise_cover

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.networks.siren import render
from scalegmn.nn.invariant import SignInvariant
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.measure import assert_invariant, invariance_error
from scalegmn.tasks.editing import edited

NETS = [
    EquivariantNetConfig(),
    EquivariantNetConfig(io="same", num_layers=2, skip_connections=True),
    EquivariantNetConfig(io="factor", io_branches=2, positions=True),
    EquivariantNetConfig(io="mlp", io_branches=2, positions=True),
    EquivariantNetConfig(io="layer"),
]
CONFIGS = [
    ScaleGMNConfig(
        symmetry=symmetry,
        direction=direction,
        readout=readout,
        readout_projection="mlp" if number == 3 else "linear",
        num_layers=4,
        hidden_dim=6,
        out_dim=4,
        node_positions=("product_sum", "none", "product_sum", "product", "product_sum")[number],
        edge_positions=number != 1,
        skip_connections=number != 2,
        normalize=number == 1,
        sign_map="absolute" if number == 4 else "symmetrized",
        aggregator="mean" if number == 4 else "add",
        update_edges=number != 3,
        message=net,
        update=net,
    )
    for symmetry, direction, readout, (number, net) in itertools.product(
        ["sign", "permutation", "scale", "hetero"],
        ["forward", "bidirectional"],
        ["last_layer", "full_graph"],
        enumerate(NETS),
    )
]
WAYS = {
    "net": {"node_positions": "net", "position_net": EquivariantNetConfig("layer", positions=True)},
    "net-mlp": {"node_positions": "net", "position_net": EquivariantNetConfig("mlp", 2, positions=True)}
    | {"edge_positions": False},
    "net_sum-per_type": {"node_positions": "net_sum", "position_map": "per_type"},
    "product-shared": {"node_positions": "product", "position_map": "shared"},
    "product_sum-per_type": {"position_map": "per_type"},
    "product-message": {"message_function": "product", "num_layers": 2, "readout": "full_graph"},
    "sine_sum": {"update_rule": "sine_sum", "num_layers": 2, "readout": "full_graph"},
    "sine_cat": {"update_rule": "sine_cat", "num_layers": 2, "readout": "full_graph"},
}
"""Published options that no published file uses; all hold for sign."""


def fits(symmetry, way):
    """Whether a symmetry has an option."""
    return symmetry == "sign" or not (way.startswith("sine") or (symmetry == "hetero" and way.startswith("net")))


CONFIGS += [
    ScaleGMNConfig(symmetry=symmetry, direction=direction, hidden_dim=6, out_dim=4, **options)
    for symmetry, direction in itertools.product(["sign", "scale", "hetero"], ["forward", "bidirectional"])
    for way, options in WAYS.items()
    if fits(symmetry, way)
]
CONFIGS += [
    ScaleGMNConfig(symmetry=symmetry, direction=direction, readout=readout, hidden_dim=6, out_dim=4, sizes=True)
    for symmetry, direction, readout in itertools.product(
        ["sign", "permutation", "scale", "hetero"], ["forward", "bidirectional"], ["last_layer", "full_graph"]
    )
]
SIGN = [NetSpec.mlp([2, 5, 1], "sine"), NetSpec.mlp([2, 5, 4, 2], "sine", 6.0), NetSpec.mlp([3, 4, 3, 5, 2], "tanh")]
CNN = (LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2))
SPECS = {
    "sign": SIGN,
    "permutation": [*SIGN[:2], NetSpec.mlp([2, 5, 4, 2], "gelu")],
    "scale": [NetSpec.mlp([2, 5, 4, 2], "relu"), NetSpec(CNN)],
    "hetero": [
        NetSpec.mlp([2, 5, 4, 2], "hetero"),
        NetSpec((*(replace(layer, activation="hetero") for layer in CNN[:2]), CNN[2])),
    ],
}


def name(config):
    net = f"{config.message.io}{config.message.io_branches}{'-p' if config.message.positions else ''}"
    way = f"{config.node_positions}-{config.position_map}-{config.update_rule}-{config.message_function}"
    sizes = "-sizes" if config.sizes else ""
    return f"{config.symmetry}-{config.direction}-{config.readout}-{net}-{way}{sizes}"


def options_of(config, spec):
    """What the pairwise cover combines."""
    positions = config.node_positions, config.edge_positions, config.position_map, config.position_net
    return (
        *(config.symmetry, config.direction, config.readout, config.message, positions, config.update_rule),
        *(config.message_function, config.sizes),
        SPECS[config.symmetry].index(spec),
    )


ALL_CASES = [(config, spec) for config in CONFIGS for spec in SPECS[config.symmetry]]
COVER = pairwise_cover([options_of(*case) for case in ALL_CASES])
"""Each pair of options per commit, all combinations in the slow tests."""
CASES = [
    pytest.param(case, id=f"{name(case[0])}-{case[1]}", marks=() if place in COVER else pytest.mark.slow)
    for place, case in enumerate(ALL_CASES)
]


def gradients(model, outputs):
    """Of a function of the outputs in which each of them counts."""
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3), dtype=outputs.dtype)
    return torch.autograd.grad((outputs * weights).sum(), list(model.parameters()), allow_unused=True)


def assert_same(model, found, expected):
    """Outputs and gradients, to rounding."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    names = [name for name, _ in model.named_parameters()]
    for name, a, b in zip(names, gradients(model, found), gradients(model, expected), strict=True):
        assert (a - b).abs().max() <= 1e-10 * (1 + b.abs().max()), name


class TestScaleGMN(Contract):
    @pytest.fixture(params=CASES)
    def case(self, request):
        return request.param

    def silent(self, config, spec):
        return spec.is_cnn and config.node_positions in ("none", "product", "net")  # a CNN's input nodes carry 0

    def test_fast_form_equals_plain_form(self, model, nets):
        params = nets(5)
        fast = model(params)
        model.engine = "plain"
        assert_same(model, fast, model(params))

    @pytest.mark.parametrize("materialize", [True, False])
    def test_equals_itself_in_pieces(self, model, nets, monkeypatch, materialize):
        params = nets(5)
        whole = model(params)
        pieces = ChunkPlan(num_edges=24, materialize=materialize)
        monkeypatch.setattr(model, "chunks", lambda *args: pieces)
        assert_same(model, model(params), whole)


def test_symmetry_must_hold_for_the_networks(random_params):
    with pytest.raises(ValueError, match=r"symmetry: sign does not hold for .*relu.*; use scale"):
        ScaleGMNConfig().build(NetSpec.mlp([2, 5, 1], "relu"))
    model = ScaleGMNConfig(hidden_dim=4).build(NetSpec.mlp([2, 5, 1], "sine")).double()
    model(random_params(NetSpec.mlp([2, 5, 1], "tanh"), 2))  # same sizes, same symmetry
    with pytest.raises(ValueError, match="sign does not hold"):
        model(random_params(NetSpec.mlp([2, 5, 1], "relu"), 2))


class Broken(torch.nn.Module):
    """Almost SignInvariant: one sign only."""

    def __init__(self, rho):
        super().__init__()
        self.rho = rho

    def forward(self, context, x):
        return self.rho(x)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_harness_catches_a_broken_module(direction, random_params, generator):
    spec = SIGN[1]
    model = build(ScaleGMNConfig(direction=direction, hidden_dim=6), spec)
    params = random_params(spec, 6)
    places = [name for name, module in model.named_modules() if isinstance(module, SignInvariant)]
    assert len(places) >= 8
    for place in places:
        parent, _, leaf = place.rpartition(".")
        whole = model.get_submodule(place)
        setattr(model.get_submodule(parent), leaf, Broken(whole.rho))
        assert invariance_error(model, params, generator) > 1e-6, place
        setattr(model.get_submodule(parent), leaf, whole)
    assert_invariant(model, params, generator)


def test_harness_catches_broken_edge_order(random_params, generator):
    spec = NetSpec.mlp([2, 4, 4, 1], "sine")
    model = build(ScaleGMNConfig(hidden_dim=6), spec)

    def transposed(params: NetParams):
        weights = (params.weights[0], params.weights[1].mT, params.weights[2])
        return model(NetParams(spec, weights, params.biases))

    assert invariance_error(transposed, random_params(spec, 6), generator) > 1e-6


def test_layers_are_equivariant(random_params, generator):
    """One layer on features: acting before equals acting after, on nodes and on edges."""
    spec = SIGN[2]
    model = build(ScaleGMNConfig(direction="bidirectional", readout="full_graph", hidden_dim=5), spec)
    params = random_params(spec, 3)
    g = GroupElement.sample(params, generator)
    graph = ParameterGraph.from_params([params], (1, 1), 3)
    nodes = [torch.randn(3, n, 5, dtype=torch.float64) for n in spec.layout]
    edges = [torch.randn(3, layer.out_dim, layer.in_dim, 5, dtype=torch.float64) for layer in spec.layers]

    def apply(nodes, edges):
        x = torch.cat(nodes, dim=1).flatten(0, 1)
        e = torch.cat([block.flatten(1, 2) for block in edges], dim=1).flatten(0, 1)
        context, p = model.graph_context(graph), model.node_positions(graph.node_type)
        new_x, new_e, _ = model.layers[0](context, graph.edge_index, graph.residuals, x, e, e, p)
        new_nodes = new_x.unflatten(0, (3, -1)).split(spec.layout, dim=1)
        blocks = new_e.unflatten(0, (3, -1)).split([block[0, ..., 0].numel() for block in edges], dim=1)
        return list(new_nodes), [new.reshape(block.shape) for new, block in zip(blocks, edges, strict=True)]

    new_nodes, new_edges = apply(nodes, edges)
    moved_nodes, moved_edges = apply(g.act_on_nodes(nodes, params.spec), g.act_on_edges(edges, params.spec))
    for found, expected in zip(
        (*moved_nodes, *moved_edges),
        (*g.act_on_nodes(new_nodes, params.spec), *g.act_on_edges(new_edges, params.spec)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize(
    ("symmetry", "way"),
    [(symmetry, None) for symmetry in SPECS] + [(s, way) for s in ("sign", "scale") for way in WAYS if fits(s, way)],
)
@pytest.mark.parametrize("index", [0, 1])
def test_parameter_changes_are_equivariant(symmetry, way, direction, index, random_params, generator):
    """Editing a transformed network gives the transformed edit."""
    spec = SPECS[symmetry][-1 if index else 0]
    own = [BUILT_IN.index(n) for n in ("relu", "tanh", "relu", "tanh")] if symmetry == "hetero" else None
    params = random_params(spec, 4, own)
    config = ScaleGMNConfig(symmetry=symmetry, direction=direction, output="parameters", hidden_dim=5, normalize=False)
    config = replace(config, **WAYS.get(way, {}))
    model = build(config, spec)
    g = GroupElement.sample(params, generator, scale=symmetry != "permutation")
    changes = model(params)
    assert [w.shape for w in changes.weights] == [w.shape for w in params.weights]
    expected, moved = g.act(changes), model(g.act(params))
    for found, wanted in zip((*moved.weights, *moved.biases), (*expected.weights, *expected.biases), strict=True):
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("symmetry", ["scale", "hetero"])
def test_published_backward_edges_break_the_symmetry(symmetry, random_params, generator):
    own = [BUILT_IN.index(n) for n in ("relu", "tanh", "relu", "tanh")] if symmetry == "hetero" else None
    for spec in SPECS[symmetry]:
        params = random_params(spec, 4, own)
        config = ScaleGMNConfig(symmetry=symmetry, direction="bidirectional", hidden_dim=6)
        assert_invariant(build(config, spec), params, generator)
        assert invariance_error(build(replace(config, reciprocal=False), spec), params, generator) > 1e-3


# Editing: the whole task, theta -> theta + delta(theta) -> image

EDITORS = [
    pytest.param(replace(config, output="parameters", readout="last_layer", sizes=False), id=name(config))
    for config in CONFIGS
    if config.symmetry in ("sign", "permutation") and config.readout == "full_graph"
]


def distance(found, expected):
    """The largest difference of parameters, relative to the spread of each tensor between networks."""
    pairs = zip((*found.weights, *found.biases), (*expected.weights, *expected.biases), strict=True)
    return max(((a - b).abs().max() / (b - b.mean(0)).abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("config", EDITORS)
def test_editing_a_transformed_inr_gives_the_transformed_edit(config, random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 1], "sine", 2.0), 4)
    model = build(config, params.spec)
    element = GroupElement.sample(params, generator, scale=config.symmetry == "sign")
    moved = element.act(params)
    with torch.no_grad():
        before, after = edited(model, params), edited(model, moved)
        assert distance(before, params) > 1e-4  # there is an edit
        assert distance(after, element.act(before)) < 1e-9
        assert (render(after, 6, 5) - render(before, 6, 5)).abs().max() < 1e-8
        outside = GroupElement(element.permutations, tuple(1.5 * q for q in element.scales))
        assert distance(edited(model, outside.act(params)), outside.act(before)) > 1e-6


def test_editing_harness_catches_a_broken_model(random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 1], "sine", 2.0), 4)
    model = build(ScaleGMNConfig(output="parameters", hidden_dim=6), params.spec)
    places = [name for name, module in model.named_modules() if isinstance(module, SignInvariant)]
    element = GroupElement.sample(params, generator)
    found = []
    for place in places:
        parent, _, own = place.rpartition(".")
        whole = model.get_submodule(place)
        setattr(model.get_submodule(parent), own, Broken(whole.rho))
        with torch.no_grad():
            found.append(distance(edited(model, element.act(params)), element.act(edited(model, params))))
        setattr(model.get_submodule(parent), own, whole)
    assert min(found) > 1e-9
    assert max(found) > 1e-3
