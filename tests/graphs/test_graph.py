from scalegmn.graphs.graph import ParameterGraph
from scalegmn.networks import NetParams


def test_graph_blocks_and_back(cnn_spec, random_params):
    params = random_params(cnn_spec, 2)
    graph = ParameterGraph.from_params(params)
    assert [tuple(x.shape) for x in graph.nodes] == [(2, 1, 1), (2, 4, 1), (2, 3, 1), (2, 5, 1), (2, 2, 1)]
    assert [tuple(e.shape[:3]) for e in graph.edges] == [(2, 4, 1), (2, 3, 4), (2, 5, 3), (2, 2, 5)]
    back = NetParams.from_features(graph.spec, graph.nodes, graph.edges)
    assert all((a == b).all() for a, b in zip(back.weights, params.weights, strict=True))
