"""Networks from ONNX files: each computes what the file says, or the file is refused by node and operator."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_files import SPELLED, chain, constant, external, node, write_onnx
from torch import nn

import scalegmn
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate


@pytest.fixture
def file(tmp_path):
    return tmp_path / "net.onnx"


def tensors_of(layout, generator):
    shapes = [shape for pair in zip(layout[1:], layout[:-1], strict=True) for shape in (pair, pair[:1])]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("activation", [name for name in SPELLED if name != "identity"])
def test_activations(file, generator, activation):
    """However they are spelled out; checked with the reference implementation of ONNX."""
    tensors = tensors_of((2, 5, 4, 3), generator)
    params = scalegmn.from_onnx(write_onnx(file, chain(tensors, activation, w0=7.5)))
    expected = scalegmn.from_state_dict(dict(zip("abcdef", tensors, strict=True)), activation, w0=7.5)
    assert params.spec == expected.spec
    assert torch.equal(params.flatten(), expected.flatten())
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    (found,) = ReferenceEvaluator(str(file)).run(None, {"x": x.numpy()})
    single = activation in ("leaky_relu", "gelu")  # whose slope, and erf in the reference, are in single precision
    torch.testing.assert_close(evaluate(params, x)[0], torch.from_numpy(found), rtol=0, atol=1e-6 if single else 1e-9)


def test_layers_differ_in_activation_and_form(file, generator):
    """Gemm both ways with its factors, MatMul without a bias, bias first, a number added, shapes computed beside."""
    w = [torch.randn(*shape, generator=generator).numpy() for shape in ((2, 5), (4, 5), (4, 3))]
    b = [torch.randn(n, generator=generator).numpy() for n in (5, 4)]
    nodes = [
        node("Gemm", "x", "w0", "b0", out="z0", alpha=2.0, beta=0.5),
        node("Tanh", "z0", out="x0"),
        node("Shape", "x0", out="shape"),
        node("Reshape", "x0", "shape", out="r0"),
        node("Gemm", "r0", "w1", "b1", out="z1", transB=1),
        *SPELLED["gelu"]("z1", "x1"),
        node("MatMul", "x1", "w2", out="p2"),
        node("Add", "half", "p2", out="y"),
    ]
    numbers = {"sqrt2": 2**0.5, "one": 1.0, "half": 0.5}
    initializers = [constant(f"w{i}", x) for i, x in enumerate(w)] + [constant(f"b{i}", x) for i, x in enumerate(b)]
    initializers += [constant(name, np.float32(value)) for name, value in numbers.items()]
    params = scalegmn.from_onnx(write_onnx(file, (nodes, initializers)))
    assert [layer.activation for layer in params.spec.layers] == ["tanh", "gelu", "identity"]
    x = torch.randn(6, 2, generator=generator)
    (found,) = ReferenceEvaluator(str(file)).run(None, {"x": x.numpy()})
    torch.testing.assert_close(evaluate(params, x)[0], torch.from_numpy(found), rtol=1e-5, atol=1e-5)


def convolutions(**attributes):
    initializers = [constant("w0", np.ones((4, 1, 3, 3))), constant("b0", np.arange(4.0).reshape(1, 4, 1, 1))]
    initializers += [constant("w1", np.ones((2, 4))), constant("axes", np.array([-1, -2]))]
    return [node("Conv", "x", "w0", out="c0", strides=[2, 2], pads=[1, 1, 1, 1], **attributes)], initializers


@pytest.mark.parametrize("pool", ["GlobalAveragePool", "GlobalMaxPool", "ReduceMean"])
def test_convolutions(file, pool):
    nodes, initializers = convolutions()
    nodes += [
        node("Add", "c0", "b0", out="z0"),
        node("Relu", "z0", out="x0"),
        node(pool, "x0", *(["axes"] if pool == "ReduceMean" else []), out="p0"),
        node("Flatten", "p0", out="f0"),
        node("Gemm", "f0", "w1", out="y", transB=1),
    ]
    params = scalegmn.from_onnx(write_onnx(file, (nodes, initializers)))
    assert str(params.spec) == "CNN [1, 4, 2] (relu)"
    assert params.weights[0].shape == (1, 4, 1, 3, 3)
    assert params.biases[0].tolist() == [[0, 1, 2, 3]]
    assert params.biases[1].tolist() == [[0, 0]]
    assert [layer.bias for layer in params.spec.layers] == [True, False]


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30.0 * x)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize("dynamo", [False, True])
def test_what_torch_exports(file, dynamo):
    """Both of its exporters; the network read computes what the module does."""
    torch.manual_seed(0)
    inr = nn.Sequential(nn.Linear(2, 5), Sine(), nn.Linear(5, 4, bias=False), Sine(), nn.Linear(4, 3))
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.GELU(), nn.Conv2d(4, 3, 3, stride=2), nn.SiLU(), Mean()
    cnn = nn.Sequential(*layers, nn.Linear(3, 2))
    for module, x, own in ((inr, torch.randn(7, 2), evaluate), (cnn, torch.randn(2, 1, 12, 12), evaluate_cnn)):
        options = {"external_data": False, "verbose": False} if dynamo else {}
        torch.onnx.export(module.eval(), (x,), str(file), dynamo=dynamo, **options)
        params = scalegmn.from_onnx(file)
        found = own(params, x) if module is inr else own(params, x, padding="valid")
        torch.testing.assert_close(found[0], module(x), rtol=1e-4, atol=1e-4)


def replaced(number, *new):
    """A change of the chain's nodes; others stay."""

    def change(parts):
        parts[0][number : number + 1] = new

    return change


BAD = {
    "an unknown operator": (replaced(2, node("Softplus", "z0", out="x0")), "node 'at_x0' (Softplus): is not read"),
    "another slope": (
        replaced(2, node("LeakyRelu", "z0", out="x0", alpha=0.2)),
        "node 'at_p1' (MatMul): what comes between it and the layer before is no known activation",
    ),
    "a rougher gelu": (replaced(2, node("Gelu", "z0", out="x0", approximate="tanh")), "'at_p1' (MatMul): what comes"),
    "a shifted sine": (replaced(2, node("Add", "z0", "o", out="s"), node("Sin", "x", out="x0")), "changed before its"),
    "a factor per neuron": (replaced(2, node("Mul", "z0", "bias0", out="x0")), "'at_x0' (Mul): a constant (5,)"),
    "a residual connection": (
        replaced(5, node("Identity", "z1", out="s"), node("Add", "s", "x0", out="x1")),
        "'at_x1' (Add): joins two paths",
    ),
    "an activation at the end": (
        replaced(7, node("Add", "p2", "bias2", out="z"), node("Sigmoid", "z", out="y")),
        "the output has an activation, sigmoid",
    ),
    "a weight too few": (replaced(0, node("MatMul", "x", "w9", out="p0")), "w9: no such value"),
    "another operator set": (
        replaced(2, helper.make_node("Relu", ["z0"], ["x0"], "at_x0", domain="evil.ops")),
        "'at_x0' (Relu): an operator of evil.ops",
    ),
    "weights elsewhere": (
        lambda parts: (
            parts[1].append(external("/etc/passwd")),
            replaced(0, node("MatMul", "x", "w", out="p0"))(parts),
        ),
        "'w' keeps its data in another file",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_other_networks_are_refused(file, generator, name):
    change, message = BAD[name]
    parts = chain(tensors_of((2, 5, 5, 3), generator), "relu")
    change(parts)
    with pytest.raises(ValueError, match=r"net\.onnx: ") as error:
        scalegmn.from_onnx(write_onnx(file, parts))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("attributes", "tail", "message"),
    [
        ({"group": 2}, [node("GlobalAveragePool", "c0", out="y")], "'at_c0' (Conv): group or transA are set"),
        (
            {},
            [
                node("Tanh", "c0", out="t"),
                node("GlobalMaxPool", "t", out="p"),
                node("Gemm", "p", "w1", out="y", transB=1),
            ],
            "'at_y' (Gemm): maxima are taken before it, which tanh neurons with other signs would change",
        ),
        (
            {},
            [node("Relu", "c0", out="t"), node("Flatten", "t", out="f"), node("MatMul", "f", "wide", out="y")],
            "'at_y' (MatMul): reads 16 values, but the layer before has 4",
        ),
        ({}, [node("Relu", "c0", out="t"), node("ReduceMean", "t", "channels", out="y")], "axes: found [1], expected"),
    ],
)
def test_other_convolutions_are_refused(file, attributes, tail, message):
    nodes, initializers = convolutions(**attributes)
    initializers += [constant("wide", np.ones((16, 2))), constant("channels", np.array([1]))]
    with pytest.raises(ValueError, match=r"net\.onnx: ") as error:
        scalegmn.from_onnx(write_onnx(file, (nodes + tail, initializers)))
    assert message in str(error.value)


def test_damaged_files_are_refused(file, generator):
    parts = chain(tensors_of((2, 5, 3), generator), "relu")
    whole = write_onnx(file, parts).read_bytes()
    for content in (whole[: len(whole) // 2], b"\x80\x04not a model", b"", whole[:-3]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.onnx: "):
            scalegmn.from_onnx(file)
    model = onnx.load_model_from_string(whole)
    model.graph.initializer[4].dims[0] = 10**9
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"net\.onnx: 'weight0': damaged"):
        scalegmn.from_onnx(file)
    with pytest.raises(ValueError, match=r"none\.onnx: no such file"):
        scalegmn.from_onnx(file.with_name("none.onnx"))
    with pytest.raises(ValueError, match="2 inputs, expected one"):
        scalegmn.from_onnx(write_onnx(file, parts, inputs=("x", "more")))
