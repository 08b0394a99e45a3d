import torch

from scalegmn.graphs.parameter_graph import ParameterGraph
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.parameter_indices import ROLES
from scalegmn.networks.scalar_groups import SCALES, SIGNS, TRIVIAL

RESIDUAL = NetSpec(
    (
        LayerSpec(2, 3, None, "tanh"),
        LayerSpec(3, 2, None, "relu"),
        LayerSpec(2, 4, None, "identity", residual=0),
        LayerSpec(4, 1),
    )
)


def groups_of(graph):
    return [graph.scalar_groups[index] for index in graph.scalar_group.tolist()]


def names(graph, places):
    indices = graph.activation[places]
    return [graph.activations[index] if index >= 0 else None for index in indices.tolist()]


def test_two_small_networks_by_hand():
    small = NetParams.from_tensors(
        [torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]), torch.tensor([[[5.0]], [[6.0]]])],
        [torch.tensor([[7.0], [8.0]]), torch.tensor([[9.0], [10.0]])],
        ["relu", "tanh"],
    )
    deep = NetParams.from_tensors(
        [torch.full((1, 1, 2), 11.0), torch.full((1, 1, 1), 12.0), torch.full((1, 1, 1), 13.0)],
        [torch.full((1, 1), 14.0), torch.full((1, 1), 15.0), torch.full((1, 1), 16.0)],
        "gelu",
    )
    graph = ParameterGraph.from_params([small, deep], (1, 1), 3)
    assert graph.nodes.flatten().tolist() == [1, 1, 7, 9, 1, 1, 8, 10, 1, 1, 14, 15, 16]
    assert graph.edges.dense().flatten().tolist() == [1, 2, 5, 3, 4, 6, 11, 11, 12, 13]
    assert graph.edge_index.tolist() == [[0, 1, 2, 4, 5, 6, 8, 9, 10, 11], [2, 2, 3, 6, 6, 7, 10, 10, 11, 12]]
    assert graph.network.tolist() == [0] * 4 + [1] * 4 + [2] * 5
    assert graph.num_networks == 3
    assert [ROLES[role] for role in graph.role[-5:]] == ["input", "input", "hidden", "hidden", "output"]
    assert graph.node_type.tolist() == [0, 1, 2, 5, 0, 1, 2, 5, 0, 1, 2, 3, 5]
    assert graph.edge_type.tolist() == [0, 1, 4, 0, 1, 4, 0, 1, 2, 4]
    assert graph.linear.all()
    assert names(graph, slice(0, 8)) == [None, None, "relu", None, None, None, "tanh", None]
    assert names(graph, slice(8, None)) == [None, None, "gelu", "gelu", None]
    assert groups_of(graph) == [SCALES] * 4 + [SIGNS] * 4 + [TRIVIAL] * 5
    assert graph.residuals.shape == (2, 0)


def test_follows_the_specs(cnn_spec, random_params):
    params = [random_params(cnn_spec, 2), random_params(NetSpec((LayerSpec(1, 2, (2, 2), "relu"), LayerSpec(2, 2))), 1)]
    graph = ParameterGraph.from_params(params, (5, 3), 5)
    offsets = torch.tensor([0, cnn_spec.num_nodes, 2 * cnn_spec.num_nodes])
    expected = [params[0].spec.edge_index, params[0].spec.edge_index, params[1].spec.edge_index]
    assert torch.equal(graph.edge_index, torch.cat([e + o for e, o in zip(expected, offsets, strict=True)], 1))
    blocks = params[0].edge_features()
    assert torch.equal(
        graph.edges.dense()[: 2 * cnn_spec.num_edges], torch.cat([b.flatten(1, 2) for b in blocks], 1).flatten(0, 1)
    )
    kernels = graph.edges.dense()[-6:].reshape(6, 5, 3)
    assert torch.equal(kernels[:2, 1:3, :2], params[1].weights[0][0, :, 0])
    assert torch.equal(kernels[2:, 0, 0], params[1].weights[1].flatten())
    assert int((kernels != 0).sum()) == 2 * 4 + 4
    assert graph.linear[-6:].tolist() == [False] * 2 + [True] * 4


def test_residual_connections_and_what_they_tie(random_params):
    graph = ParameterGraph.from_params([random_params(RESIDUAL, 2)], (1, 1), 3)
    assert graph.residuals.tolist() == [[2, 3, 4, 14, 15, 16], [7, 8, 9, 19, 20, 21]]
    # the identities coupled with tanh commute with signs, the last one, which is coupled with nothing, with scales
    expected = [SIGNS] * 5 + [SCALES] * 2 + [SIGNS] * 3 + [SCALES] + [SIGNS]
    assert groups_of(graph)[:12] == expected
    assert names(graph, slice(2, 11)) == ["tanh"] * 3 + ["relu"] * 2 + ["identity"] * 4


def test_features_of_layers_and_back(cnn_spec, random_params):
    params = random_params(cnn_spec, 2)
    nodes, edges = params.node_features(), params.edge_features()
    assert [tuple(x.shape) for x in nodes] == [(2, 1, 1), (2, 4, 1), (2, 3, 1), (2, 5, 1), (2, 2, 1)]
    assert [tuple(e.shape[:3]) for e in edges] == [(2, 4, 1), (2, 3, 4), (2, 5, 3), (2, 2, 5)]
    back = NetParams.from_features(params.spec, nodes, edges)
    assert all((a == b).all() for a, b in zip(back.weights, params.weights, strict=True))
