"""ONNX files, node by node."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def node(operator, *inputs, out, **attributes):
    return helper.make_node(operator, list(inputs), [out], name=f"at_{out}", **attributes)


def constant(name, values):
    return numpy_helper.from_array(np.asarray(values), name)


def write_onnx(path, parts, output="y", inputs=("x",)):
    """A file of (nodes, initializers) whose input is `x`."""
    nodes, initializers = parts
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*inputs, output)]
    graph = helper.make_graph(nodes, "net", values[:-1], values[-1:], initializers)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


SPELLED = {
    "identity": lambda z, y: [node("Identity", z, out=y)],
    "relu": lambda z, y: [node("Relu", z, out=y)],
    "leaky_relu": lambda z, y: [node("LeakyRelu", z, out=y)],
    "tanh": lambda z, y: [node("Tanh", z, out=y)],
    "sigmoid": lambda z, y: [node("Sigmoid", z, out=y)],
    "sine": lambda z, y: [node("Mul", "w0", z, out=f"{y}.w0"), node("Sin", f"{y}.w0", out=y)],
    "silu": lambda z, y: [node("Sigmoid", z, out=f"{y}.s"), node("Mul", f"{y}.s", z, out=y)],
    "gelu": lambda z, y: [
        node("Div", z, "sqrt2", out=f"{y}.d"),
        node("Erf", f"{y}.d", out=f"{y}.e"),
        node("Add", f"{y}.e", "one", out=f"{y}.a"),
        node("Mul", z, f"{y}.a", out=f"{y}.m"),
        node("Mul", f"{y}.m", "half", out=y),
    ],
}
"""Activation -> the nodes that spell it out, from z to y."""


def chain(tensors, activation, w0=1.0):
    """MatMul and Add per layer, with an activation between two; tensors are weights [out, in] and biases in turn."""
    dtype = tensors[0].numpy().dtype
    numbers = {"w0": w0, "sqrt2": 2**0.5, "one": 1.0, "half": 0.5}
    initializers = [constant(name, dtype.type(value)) for name, value in numbers.items()]
    nodes, x, num_layers = [], "x", len(tensors) // 2
    for layer, (weight, bias) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        initializers += [constant(f"weight{layer}", weight.numpy().T.copy()), constant(f"bias{layer}", bias.numpy())]
        z = "y" if layer == num_layers - 1 else f"z{layer}"
        nodes += [node("MatMul", x, f"weight{layer}", out=f"p{layer}"), node("Add", f"p{layer}", f"bias{layer}", out=z)]
        if layer < num_layers - 1:
            x = f"x{layer}"
            nodes += SPELLED[activation](z, x)
    return nodes, initializers


def external(path):
    """A tensor whose numbers are in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 2], data_location=TensorProto.EXTERNAL)
    entry = onnx.StringStringEntryProto(key="location", value=str(path))
    tensor.external_data.append(entry)
    return tensor
