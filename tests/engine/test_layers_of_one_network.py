"""Networks of one architecture run layer by layer, without a list of their edges, also where they are no chains."""

import pytest
import torch
from architectures import networks, skips, transformer
from contract import assert_engine_computes_the_plain_form, build

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig, execution
from scalegmn.networks import LayerSpec, NetSpec


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
