"""Raw features of edges as wide as their kernels, against the dense ones."""

import pytest
import torch

from scalegmn.graphs import edge_values
from scalegmn.graphs.edge_values import EdgeValues
from scalegmn.networks import LayerSpec, NetSpec

SPECS = [
    NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (1, 3), "relu"), LayerSpec(4, 2))),
    NetSpec((LayerSpec(1, 2, (5, 3), "relu"), LayerSpec(2, 2, (1, 1), "relu"), LayerSpec(2, 2))),
]
KERNEL, WIDTH = (5, 3), 15


@pytest.fixture
def edges(random_params):
    """Edges of three and of two networks, dense [E, K] and as values."""
    nets = [random_params(spec, num) for spec, num in zip(SPECS, (3, 2), strict=True)]
    dense = [torch.cat([block.flatten(1, 2) for block in params.edge_features(KERNEL)], 1) for params in nets]
    values = EdgeValues.of_networks([params.kernels(KERNEL) for params in nets], WIDTH)
    return torch.cat([of_nets.flatten(0, 1) for of_nets in dense]), values


def test_dense_features_and_linear_maps(edges):
    dense, values = edges
    assert (values.num_edges, values.width) == tuple(dense.shape)
    assert torch.equal(values.dense(), dense)
    weight = torch.randn(4, WIDTH, dtype=dense.dtype)
    torch.testing.assert_close(values.linear(weight), dense @ weight.T, rtol=0, atol=1e-12)


def test_runs_of_reordered_edges(edges):
    dense, values = edges
    order = torch.randperm(len(dense))
    sizes = [7, 0, len(dense) - 7]
    runs = values.split(order, sizes)
    for run, expected in zip(runs, dense[order].split(sizes), strict=True):
        assert torch.equal(run.dense(), expected)
        assert torch.equal(run.at(run.places), expected[:, run.places])
        assert not expected[:, [place for place in range(WIDTH) if place not in run.places.tolist()]].any()


def test_narrow_edges_stay_narrow(random_params):
    spec = NetSpec((LayerSpec(3, 4, (16, 16), "relu"), LayerSpec(4, 50, None, "relu"), LayerSpec(50, 50)))
    values = EdgeValues.of_networks([random_params(spec, 1).kernels()], 256)
    first, rest = values.split(torch.arange(spec.num_edges), [12, spec.num_edges - 12])
    assert (first.at(first.places).shape, rest.at(rest.places).shape) == ((12, 256), (2700, 1))


def test_kinds_of_edges(random_params, monkeypatch):
    spec = NetSpec((LayerSpec(3, 4, (16, 16), "relu"), LayerSpec(4, 50, (1, 2), "relu"), LayerSpec(50, 50)))
    values = EdgeValues.of_networks([random_params(spec, 2).kernels()], 256)
    assert values.kinds() is None
    monkeypatch.setattr(edge_values, "LEAST_SAVED", 1)
    assert values.kinds().tolist() == [*([1] * 12), *([0] * 2700)] * 2
