"""What every metanetwork must satisfy, in float64, for every configuration."""

import itertools

import pytest
import torch

from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.nn.invariant import SignInvariant
from scalegmn.spec import NetParams, NetSpec
from scalegmn.symmetry.checks import assert_invariant, invariance_error
from scalegmn.symmetry.groups import GroupElement

NETS = [
    EquivariantNetConfig(),
    EquivariantNetConfig(io="same"),
    EquivariantNetConfig(io="factor", io_branches=2, positions=True),
]
CONFIGS = [
    ScaleGMNConfig(
        symmetry=symmetry,
        direction=direction,
        readout=readout,
        num_layers=4,
        hidden_dim=6,
        out_dim=4,
        node_positions=number != 1,
        edge_positions=number != 1,
        skip_connections=number != 2,
        normalize=number == 1,
        message=net,
        update=net,
    )
    for symmetry, direction, readout, (number, net) in itertools.product(
        ["sign", "permutation"], ["forward", "bidirectional"], ["last_layer", "full_graph"], enumerate(NETS)
    )
]
SPECS = [NetSpec.mlp([2, 5, 1], "sine"), NetSpec.mlp([2, 5, 4, 2], "sine", 6.0), NetSpec.mlp([3, 4, 3, 5, 2], "tanh")]


def name(config):
    net = f"{config.message.io}{config.message.io_branches}{'-p' if config.message.positions else ''}"
    return f"{config.symmetry}-{config.direction}-{config.readout}-{net}"


def build(config, spec):
    """A model away from its initialisation, where every parameter matters: initial values + noise."""
    torch.manual_seed(1)
    model = config.build(spec).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=CONFIGS, ids=name)
def config(request):
    return request.param


@pytest.fixture(params=SPECS, ids=str)
def spec(request):
    return request.param


@pytest.fixture
def model(config, spec, random_params):
    model = build(config, spec)
    model.fit_normalization(random_params(spec, 50))
    return model


def test_invariant_to_the_symmetry_it_claims(model, config, spec, random_params, generator):
    params = random_params(spec, 6)
    assert_invariant(model, params, generator, scale=config.symmetry != "permutation")


def test_not_invariant_to_more(model, config, spec, random_params, generator):
    params = random_params(spec, 6)
    outputs = model(params)
    if config.symmetry == "permutation":  # signs are outside its group
        assert invariance_error(model, params, generator, permute=False) > 1e-6
    element = GroupElement.sample(params, generator, permute=False)
    doubled = GroupElement(element.permutations, tuple(2 * q for q in element.scales)).act(params)
    assert (model(doubled) - outputs).abs().max() > 1e-6


def test_batched_equals_one_by_one(model, spec, random_params):
    params = random_params(spec, 5)
    together = model(params)
    alone = torch.cat([model(params[index : index + 1]) for index in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_no_gradient_between_networks(model, spec, random_params):
    params = random_params(spec, 4).map(lambda tensor: tensor.requires_grad_())
    model.train()
    model(params)[1].sum().backward()
    for index, tensor in enumerate((*params.weights, *params.biases)):
        reached = tensor.grad.flatten(1).abs().amax(1) > 0
        assert not reached[[0, 2, 3]].any()
        if index < spec.num_layers:
            assert reached[1]


def test_every_parameter_is_used(model, spec, random_params):
    model.train()
    model(random_params(spec, 4)).square().sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # node positions of layers that nothing reads are rows of a table, edge embeddings are always read
    assert unused == []


def test_other_networks_are_refused(model, random_params):
    with pytest.raises(ValueError, match="the model was built for"):
        model(random_params(NetSpec.mlp([2, 7, 1], "sine"), 2))


def test_symmetry_must_hold_for_the_networks(random_params):
    with pytest.raises(ValueError, match=r"symmetry: sign does not hold for .*relu.*; use permutation"):
        ScaleGMNConfig().build(NetSpec.mlp([2, 5, 1], "relu"))
    model = ScaleGMNConfig(hidden_dim=4).build(NetSpec.mlp([2, 5, 1], "sine")).double()
    model(random_params(NetSpec.mlp([2, 5, 1], "tanh"), 2))  # same sizes, same symmetry
    with pytest.raises(ValueError, match="sign does not hold"):
        model(random_params(NetSpec.mlp([2, 5, 1], "relu"), 2))
    with pytest.raises(ValueError, match="hidden layer"):
        ScaleGMNConfig().build(NetSpec.mlp([2, 1], "sine"))


class Broken(torch.nn.Module):
    """Almost SignInvariant: one sign only."""

    def __init__(self, rho):
        super().__init__()
        self.rho = rho

    def forward(self, x):
        return self.rho(x)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_harness_catches_a_broken_module(direction, random_params, generator):
    spec = SPECS[1]
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
    spec = SPECS[2]
    model = build(ScaleGMNConfig(direction="bidirectional", readout="full_graph", hidden_dim=5), spec)
    params = random_params(spec, 3)
    g = GroupElement.sample(params, generator)
    nodes = [torch.randn(3, n, 5, dtype=torch.float64) for n in spec.layout]
    edges = [torch.randn(3, layer.out_dim, layer.in_dim, 5, dtype=torch.float64) for layer in spec.layers]
    positions = model.node_positions()

    def apply(nodes, edges):
        return model.layers[0](nodes, edges, [block.transpose(1, 2) for block in edges], positions)

    new_nodes, new_edges = apply(nodes, edges)
    moved_nodes, moved_edges = apply(g.act_on_nodes(nodes), g.act_on_edges(edges))
    for found, expected in zip(
        (*moved_nodes, *moved_edges), (*g.act_on_nodes(new_nodes), *g.act_on_edges(new_edges)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
