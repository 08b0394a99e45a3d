from dataclasses import replace

import pytest
import torch

from scalegmn.networks import BUILT_IN, LayerSpec, MultiArchBatch, NetParams, NetSpec


def test_derived_by_hand():
    spec = NetSpec.mlp([2, 3, 3, 2], "sine", w0=5.0)
    assert spec.layout == (2, 3, 3, 2)
    assert (spec.num_layers, spec.num_nodes, spec.num_edges) == (3, 10, 6 + 9 + 6)
    assert spec.num_parameters == (6 + 3) + (9 + 3) + (6 + 2)
    assert spec.roles == ("input", "hidden", "hidden", "output")
    assert [t.tolist() for t in spec.node_types] == [[0, 1], [2, 2, 2], [3, 3, 3], [4, 5]]
    assert spec.num_node_types == 6
    assert [t.tolist() for t in spec.edge_types] == [[[0, 1]], [[2]], [[3], [4]]]
    assert spec.num_edge_types == 5
    assert spec.symmetries == ("sign", "sign")
    assert [layer.w0 for layer in spec.layers] == [5.0, 5.0, 1.0]


def test_edge_index_by_hand():
    spec = NetSpec.mlp([1, 2, 1], "relu")
    # nodes: 0 input, 1 2 hidden, 3 output
    assert spec.edge_index.tolist() == [[0, 0, 1, 2], [1, 2, 3, 3]]
    spec = NetSpec.mlp([2, 2], "relu")
    assert spec.edge_index.tolist() == [[0, 1, 0, 1], [2, 2, 3, 3]]
    assert spec.num_edge_types == 2


def test_hashable_and_serialisable(cnn_spec):
    assert NetSpec.from_dict(cnn_spec.to_dict()) == cnn_spec
    assert hash(NetSpec.from_dict(cnn_spec.to_dict())) == hash(cnn_spec)


def test_kernels_are_centred_and_linear_layers_use_component_0(cnn_spec, random_params):
    params = random_params(cnn_spec, 2)
    assert cnn_spec.kernel == (5, 3)
    edges = params.edge_features()
    assert [tuple(block.shape) for block in edges] == [(2, 4, 1, 15), (2, 3, 4, 15), (2, 5, 3, 15), (2, 2, 5, 15)]
    grid = edges[0].unflatten(-1, (5, 3))
    assert torch.equal(grid[..., 1:4, :], params.weights[0])
    assert grid[..., 0, :].abs().max() == grid[..., 4, :].abs().max() == 0
    assert torch.equal(edges[1].unflatten(-1, (5, 3))[..., 2, 1], params.weights[1][..., 0, 0])
    assert torch.equal(edges[3][..., 0], params.weights[3])
    assert edges[3][..., 1:].abs().max() == 0
    assert params.node_features()[0].abs().max() == 0


@pytest.mark.parametrize("kind", ["mlp", "cnn", "mixed"])
def test_to_pyg_and_back(kind, cnn_spec, random_params):
    if kind == "cnn":
        params = random_params(cnn_spec, 3)
    elif kind == "mlp":
        params = random_params(NetSpec.mlp([2, 4, 3, 1], "sine"), 3)
    else:
        params = random_params(NetSpec.mlp([2, 4, 3, 1], "hetero"), 3, [1, 2, 1])
    batch = params.to_pyg()
    assert batch.num_graphs == 3
    graph = batch[1]
    edge = 5  # weight of one edge found through edge_index alone
    sender, receiver = graph.edge_index[:, edge].tolist()
    layer = next(k for k in range(params.spec.num_layers) if receiver < sum(params.spec.layout[: k + 2]))
    j, i = sender - sum(params.spec.layout[:layer]), receiver - sum(params.spec.layout[: layer + 1])
    assert torch.equal(graph.edge_attr[edge], params.edge_features()[layer][1, i, j])
    back = NetParams.from_pyg(batch, params.spec)
    for a, b in zip((*params.weights, *params.biases), (*back.weights, *back.biases), strict=True):
        assert torch.equal(a, b)
    assert (back.activation is None) if kind != "mixed" else torch.equal(back.activation, params.activation)


def test_from_pyg_reads_one_graph(random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "sine"), 3)
    back = NetParams.from_pyg(params.to_pyg()[1], params.spec)
    assert torch.equal(back.flatten(), params[1:2].flatten())


def test_from_pyg_refuses_other_graphs(random_params):
    batch = random_params(NetSpec.mlp([2, 4, 1], "sine"), 2).to_pyg()
    with pytest.raises(ValueError, match="x has shape"):
        NetParams.from_pyg(batch, NetSpec.mlp([2, 5, 1], "sine"))
    batch.edge_index = batch.edge_index.flip(1)
    with pytest.raises(ValueError, match="edge order"):
        NetParams.from_pyg(batch, NetSpec.mlp([2, 4, 1], "sine"))


def test_from_tensors():
    weights = [torch.randn(3, 4, 2), torch.randn(3, 1, 4)]
    biases = [torch.randn(3, 4), torch.randn(3, 1)]
    params = NetParams.from_tensors(weights, biases, "sine", w0=7.0)
    assert params.spec == NetSpec.mlp([2, 4, 1], "sine", 7.0)
    assert len(params) == 3
    assert params.flatten().shape == (3, params.spec.num_parameters)
    mixed = NetParams.from_tensors(weights, biases, ["relu", "tanh", "relu"])
    assert mixed.spec.symmetries == ("hetero",)
    assert [BUILT_IN[index] for index in mixed.activation] == ["relu", "tanh", "relu"]
    assert mixed[torch.tensor([1])].activation.tolist() == [BUILT_IN.index("tanh")]
    assert NetParams.from_tensors(weights, biases, ["tanh"] * 3).spec == NetSpec.mlp([2, 4, 1], "tanh")
    conv = NetParams.from_tensors([torch.randn(3, 4, 2, 3, 3), weights[1]], biases, "relu")
    assert conv.spec.layers[0] == LayerSpec(2, 4, (3, 3), "relu")


NAN = torch.full((3, 4), float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {1: torch.randn(3, 1, 5)}}, "layer 1: reads 5 neurons, but layer 0 has 4"),
        ({"weights": {0: torch.randn(4, 2)}}, "layer 0: weight has shape"),
        ({"weights": {1: torch.randn(2, 1, 4)}, "biases": {1: torch.randn(2, 1)}}, "layer 1: weight holds 2 networks"),
        ({"biases": {1: torch.randn(3, 2)}}, "layer 1: bias has shape"),
        ({"biases": {0: NAN}}, "layer 0: bias of network 0 has NaN"),
        ({"weights": {0: torch.ones(3, 4, 2).long()}}, "layer 0: weight is torch.int64"),
        ({"activation": "sin"}, "layer 0: unknown activation 'sin'"),
        ({"activation": ["relu", "tanh", "sin"]}, "unknown name 'sin'"),
        ({"activation": ["relu", "tanh"]}, "2 names for 3 networks"),
        ({"activation": "hetero"}, "expected one name per network"),
        ({"biases": {1: torch.zeros(3, 1).double()}}, "layer 1: bias is torch.float64"),
    ],
)
def test_from_tensors_names_the_problem(change, message):
    weights, biases = [torch.randn(3, 4, 2), torch.randn(3, 1, 4)], [torch.randn(3, 4), torch.randn(3, 1)]
    for index, tensor in change.get("weights", {}).items():
        weights[index] = tensor
    for index, tensor in change.get("biases", {}).items():
        biases[index] = tensor
    with pytest.raises(ValueError, match=message):
        NetParams.from_tensors(weights, biases, change.get("activation", "relu"))


RESIDUAL = NetSpec(
    (
        LayerSpec(3, 4, (3, 3), "relu"),
        LayerSpec(4, 5, (5, 5), "identity"),
        LayerSpec(5, 6, (3, 3), "tanh", residual=0),
        LayerSpec(6, 2),
    )
)


def test_residual_connections():
    assert RESIDUAL.residuals == ((0, 2, 4),)
    assert str(RESIDUAL) == "CNN [3, 4, 5, 6, 2] (identity, relu, tanh, residual 0 -> 2)"
    assert NetSpec.from_dict(RESIDUAL.to_dict()) == RESIDUAL
    assert RESIDUAL.with_activation("relu").residuals == RESIDUAL.residuals


def test_descriptions_from_before_residual_connections(cnn_spec):
    content = cnn_spec.to_dict()
    for layer in content["layers"]:
        del layer["residual"]
    assert NetSpec.from_dict(content) == cnn_spec


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (2, {"residual": 2}, "layer 2: residual: found 2, expected a layer from -1 to 1"),
        (2, {"residual": -2}, "layer 2: residual: found -2, expected a layer"),
        (2, {"residual": "a"}, "layer 2: residual: found 'a', expected a layer"),
        (3, {"residual": 0}, "layer 3: residual: found 0, but only one of the two layers is a convolution"),
        (2, {"kernel": None}, "layer 2: residual: found 0, but only one of the two layers is a convolution"),
    ],
)
def test_residual_connections_from_nowhere(index, change, message):
    layers = list(RESIDUAL.layers)
    layers[index] = replace(layers[index], **change)
    with pytest.raises(ValueError, match=message):
        NetSpec(tuple(layers))


def test_covering_by_hand():
    first = NetSpec((LayerSpec(1, 4, (3, 7), "relu"), LayerSpec(4, 9, (5, 5), "identity"), LayerSpec(9, 2)))
    second = NetSpec(
        (
            LayerSpec(1, 6, (5, 3), "leaky_relu"),
            LayerSpec(6, 3, (3, 3), "tanh"),
            LayerSpec(3, 5, (3, 3), "gelu", residual=0),
            LayerSpec(5, 2),
        )
    )
    third = NetSpec((LayerSpec(1, 2, (1, 1), "tanh"), LayerSpec(2, 2)))
    layers = (
        LayerSpec(1, 6, (5, 7), "relu"),
        LayerSpec(6, 9, (5, 5), "tanh"),
        LayerSpec(9, 5, (3, 3), "gelu", residual=0),
        LayerSpec(5, 2),
    )
    assert NetSpec.envelope([first, second]) == NetSpec(layers)
    mixed = NetSpec.envelope([first, second, third])
    assert mixed == NetSpec((replace(layers[0], activation="hetero"), *layers[1:]))
    assert NetSpec.envelope([mixed, first]) == mixed  # which is within
    assert NetSpec.envelope([first]) is first
    with pytest.raises(ValueError, match=r"same inputs and outputs, found CNN \[1, 4, 9, 2\] .* and MLP \[2, 4, 2\]"):
        NetSpec.envelope([first, NetSpec.mlp([2, 4, 2], "relu")])


def test_mixed_nets_are_sliced_by_network(random_params):
    parts = [random_params(NetSpec.mlp([2, width, 1], "sine"), num) for width, num in ((3, 2), (4, 1), (5, 4))]
    nets = MultiArchBatch.of(parts)
    assert len(nets) == 7
    alone = [part[index : index + 1].flatten() for part in parts for index in range(len(part))]
    for start in range(8):
        for stop in range(start, 8):
            found = nets[start:stop]
            assert len(found) == stop - start
            rows = [row for part in found.parts for row in part.flatten()]
            assert all(torch.equal(row, own[0]) for row, own in zip(rows, alone[start:stop], strict=True))
    assert isinstance(nets[0:2], NetParams)  # of one architecture
    assert nets[3:3].spec == parts[0].spec
    assert [part.biases[0].dtype for part in nets.to(torch.float16)] == [torch.float16] * 3


def test_frequencies_of_earlier_versions_without_sines():
    content = NetSpec.mlp([2, 3, 1], "sine", w0=20).to_dict()
    content["layers"][1]["w0"] = 20.0
    assert NetSpec.from_dict(content) == NetSpec.mlp([2, 3, 1], "sine", w0=20)
