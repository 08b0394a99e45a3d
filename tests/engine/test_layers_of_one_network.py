"""Networks of one architecture run layer by layer, without a list of their edges, also where they are no chains."""

import pytest
import torch
from contract import assert_engine_computes_the_plain_form, build
from torch import nn

import scalegmn
from scalegmn.engine.chunks import ChunkPlan
from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig, execution
from scalegmn.networks import LayerSpec, NetParams, NetSpec


def transformer():
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True, activation="gelu"), (1, 3, 8)


class Skips(nn.Module):
    """Convolutions of several sizes and groups, of which one reads the network's input beside hidden channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.first, self.second = nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(8, 5, 5, padding=2)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Linear(5, 3)

    def forward(self, x):
        both = torch.cat([torch.relu(self.norm(self.first(torch.relu(self.stem(x))))), x], dim=1)
        return self.last(torch.tanh(self.second(both)).mean((2, 3)))


def skips():
    return Skips(), (1, 2, 6, 6)


def networks(make):
    """Two networks."""
    module, shape = make()
    params = scalegmn.from_module(module.eval(), torch.randn(shape)).map(torch.Tensor.double)
    return NetParams.cat([params, params.map(lambda x: x + 0.1 * torch.rand_like(x))]).with_batch_norm_folded()


@pytest.fixture
def graphs(monkeypatch):
    """The number of parameter graphs that were built; all networks are large enough to run layer by layer."""
    built, from_params = [], ParameterGraph.from_params

    def spy(*args):
        built.append(args)
        return from_params(*args)

    monkeypatch.setattr(ParameterGraph, "from_params", spy)
    monkeypatch.setattr(execution, "LEAST_EDGES_OF_BLOCK", 0)
    return built


def assert_forms_agree(config, params, chunk, graphs, monkeypatch):
    model = build(config, params.spec)
    if chunk is not None:
        monkeypatch.setattr(model, "chunks", lambda num_edges, device: ChunkPlan(chunk, materialize=chunk == 7))
    assert_engine_computes_the_plain_form(model, [params])
    assert len(graphs) == 1  # of the plain form


@pytest.mark.parametrize("chunk", [None, 7, 50])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("symmetry", ["permutation", "hetero"])
@pytest.mark.parametrize("make", [transformer, skips])
def test_same_as_the_plain_form(make, symmetry, direction, positions, chunk, graphs, monkeypatch):
    torch.manual_seed(0)
    config = ScaleGMNConfig(
        symmetry=symmetry,
        direction=direction,
        edge_positions=positions,
        hidden_dim=8,
        num_layers=3,
        out_dim=4,
        update_edges=True,
        message=EquivariantNetConfig("layer", positions=symmetry != "permutation"),
    )
    assert_forms_agree(config, networks(make), chunk, graphs, monkeypatch)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("symmetry", ["permutation", "hetero"])
@pytest.mark.parametrize("make", [transformer, skips])
def test_same_changes_as_the_plain_form(make, symmetry, direction, graphs, monkeypatch):
    torch.manual_seed(0)
    config = ScaleGMNConfig(symmetry=symmetry, direction=direction, output="parameters", hidden_dim=8, num_layers=3)
    assert_forms_agree(config, networks(make), None, graphs, monkeypatch)


@pytest.mark.parametrize("readout", ["last_layer", "full_graph"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_residual_connections(direction, readout, graphs, monkeypatch, random_params):
    """From the input, between hidden layers, into the output, and past no layer at all."""
    layers = (LayerSpec(3, 5, None, "relu"), LayerSpec(5, 4, None, "relu", residual=0), LayerSpec(4, 3, residual=-1))
    config = ScaleGMNConfig(symmetry="scale", direction=direction, readout=readout, hidden_dim=8, num_layers=3)
    assert_forms_agree(config, random_params(NetSpec(layers), 3), None, graphs, monkeypatch)


def test_means_against_edges_are_of_all_edges_together(graphs):
    """So networks with several readers of one layer run as one graph."""
    torch.manual_seed(0)
    params = networks(skips)
    config = ScaleGMNConfig(symmetry="permutation", direction="bidirectional", aggregator="mean", hidden_dim=8)
    assert_engine_computes_the_plain_form(build(config, params.spec), [params])
    assert len(graphs) == 2
