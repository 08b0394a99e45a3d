import pytest
import torch
from torch.nn.functional import conv2d, linear, pad

from scalegmn.networks import BUILT_IN, HETERO, LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import activate

CNNS = [
    ((LayerSpec(1, 4, (3, 3), "relu"), LayerSpec(4, 5, (3, 3), "relu"), LayerSpec(5, 2)), None),
    (
        (
            LayerSpec(2, 4, (5, 2), "tanh"),
            LayerSpec(4, 3, (1, 4), "tanh"),
            LayerSpec(3, 6, None, "tanh"),
            LayerSpec(6, 1),
        ),
        None,
    ),
    ((LayerSpec(3, 4, (2, 3), "sine", 3.0), LayerSpec(4, 3, (4, 5))), None),
    (
        (LayerSpec(1, 4, (3, 3), HETERO, 2.0), LayerSpec(4, 3, None, HETERO, 2.0), LayerSpec(3, 2)),
        ["relu", "sine", "gelu"],
    ),
]
RESIDUAL = (
    LayerSpec(2, 4, (3, 3), "gelu"),
    LayerSpec(4, 3, (7, 7), "relu"),
    LayerSpec(3, 6, (5, 5), "tanh", residual=0),
    LayerSpec(6, 5, (3, 3), "identity", residual=1),
    LayerSpec(5, 4, None, "sigmoid"),
    LayerSpec(4, 3, None, "relu"),
    LayerSpec(3, 6, None, "silu", residual=4),
    LayerSpec(6, 2),
)


def one_by_one(params, images, stride, padding):
    """The obvious way: one network after the other, padded to ceil(size / stride) positions."""
    outputs = []
    for b in range(len(params)):
        x, said = images, []
        for index, layer in enumerate(params.spec.layers):
            weight, bias = params.weights[index][b], params.biases[index][b]
            if layer.kernel is not None:
                if padding == "same":
                    missing = [
                        max((size + stride - 1) // stride * stride - stride + kernel - size, 0)
                        for size, kernel in zip(x.shape[2:], layer.kernel, strict=True)
                    ]
                    rows, columns = missing
                    x = pad(x, (columns // 2, (columns + 1) // 2, rows // 2, (rows + 1) // 2))
                x = conv2d(x, weight, bias, stride)
            else:
                x = linear(x, weight, bias)
            if layer.residual is not None:
                for channel in range(min(x.shape[1], said[layer.residual].shape[1])):
                    x[:, channel] += said[layer.residual][:, channel]
            own = layer.activation
            x = activate(x, BUILT_IN[params.activation[b]] if own == HETERO else own, layer.w0)
            said.append(x)
            following = params.spec.layers[index + 1 : index + 2]
            if layer.kernel is not None and (not following or following[0].kernel is None):
                x = x.mean((2, 3))
        outputs.append(x)
    return torch.stack(outputs)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("layers", "names"), CNNS)
def test_evaluate_cnn_equals_torch_networks_one_by_one(layers, names, stride, padding, random_params):
    params = random_params(NetSpec(layers), 3, names and [BUILT_IN.index(name) for name in names])
    images = torch.randn(4, layers[0].in_dim, 17, 20, dtype=torch.float64)
    found = evaluate_cnn(params, images, stride, padding)
    assert found.shape == (3, 4, layers[-1].out_dim)
    torch.testing.assert_close(found, one_by_one(params, images, stride, padding), rtol=1e-12, atol=1e-12)


def test_residual_connections(random_params):
    params = random_params(NetSpec(RESIDUAL), 3)
    images = torch.randn(4, 2, 9, 8, dtype=torch.float64)
    found = evaluate_cnn(params, images, stride=1)
    torch.testing.assert_close(found, one_by_one(params, images, 1, "same"), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="joins images of 5x4 and 2x1 pixels; use stride 1 and padding same"):
        evaluate_cnn(params, images)


@pytest.mark.parametrize(
    ("kernel", "stride", "windows"),
    [(3, 2, [3, 2]), (4, 2, [3, 3]), (5, 1, [3, 4, 4, 3]), (4, 1, [3, 4, 3, 2]), (1, 2, [1, 1])],
)
def test_same_padding_by_hand(kernel, stride, windows, random_params):
    # ones on a 4x4 image of ones: each position counts the pixels under its kernel; the odd zero is at the end
    params = random_params(NetSpec((LayerSpec(1, 1, (kernel, kernel)),)), 1).map(torch.ones_like)
    expected = sum(rows * columns for rows in windows for columns in windows) / len(windows) ** 2
    images = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    assert evaluate_cnn(params, images, stride).item() == pytest.approx(expected + 1)


def test_published_architecture_and_small_images(random_params):
    layers = (LayerSpec(1, 16, (3, 3), "relu"), *[LayerSpec(16, 16, (3, 3), "relu")] * 2, LayerSpec(16, 10))
    params = random_params(NetSpec(layers), 5)
    assert params.spec.num_parameters == 4970
    assert evaluate_cnn(params, torch.rand(2, 1, 32, 32).double(), padding="valid").shape == (5, 2, 10)
    assert evaluate_cnn(params, torch.rand(2, 1, 8, 8).double()).shape == (5, 2, 10)


@pytest.mark.parametrize(
    "layers",
    [(LayerSpec(2, 3, None, "relu"), LayerSpec(3, 2, (3, 3))), (LayerSpec(2, 3, None, "relu"), LayerSpec(3, 2))],
)
def test_other_orders_are_refused(layers, random_params):
    with pytest.raises(ValueError, match="expected convolutions, then linear layers, found linear"):
        evaluate_cnn(random_params(NetSpec(layers), 1), torch.randn(1, 2, 8, 8))


@pytest.mark.parametrize("change", [{"groups": 2}, {"residual": -1}, {"reads": -1}])
def test_only_chains(change, random_params):
    layers = [LayerSpec(2, 2, (3, 3), "relu"), LayerSpec(2, 2, (3, 3), "relu", **change), LayerSpec(2, 2)]
    params = random_params(NetSpec(tuple(layers)), 1)
    with pytest.raises(ValueError, match="expected a chain of layers, without residual connections from the input"):
        evaluate_cnn(params, torch.zeros(1, 2, 6, 6, dtype=torch.float64))
