"""From an ONNX file to `NetParams`."""

from __future__ import annotations

import re
from pathlib import Path

from scalegmn.interop.onnx.file import load_graph
from scalegmn.interop.onnx.graph import OnnxGraph
from scalegmn.interop.onnx.network import OnnxNetwork
from scalegmn.interop.torch_modules.parameters import named_tensors, read_parameters
from scalegmn.interop.torch_modules.reader import trace_module
from scalegmn.networks import NetParams


def from_onnx(path: str | Path, input_shape: tuple[int, ...] | None = None) -> NetParams:
    """The network of an ONNX file, with each layer's own activation.

    The architectures are those of `from_module` (docs/architectures.md). Activations may be spelled out by other
    operators. `evaluate` computes what the file of a chain of layers says.

    Args:
        path: the file.
        input_shape: the shape of an input, where the file leaves it open and it matters.

    Returns:
        A batch of one network, in the file's precision.

    Raises:
        ValueError: the `onnx` package or the file is missing, the file is damaged or keeps data elsewhere, or a
            parameter graph cannot represent the network; names the file, the node and the operator.
    """
    path = Path(path)
    graph = load_graph(path)
    try:
        return _params(graph, input_shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _params(graph: object, input_shape: tuple[int, ...] | None) -> NetParams:
    source = OnnxGraph(graph, input_shape)
    network = OnnxNetwork(source).eval()
    try:
        layers, spec = trace_module(network, source.example_input)
        params = read_parameters(named_tensors(network), layers, spec)
    except ValueError as error:
        raise ValueError(_in_words_of_the_file(str(error), network)) from None
    return params


def _in_words_of_the_file(message: str, network: OnnxNetwork) -> str:
    """A message with nodes and constants of the file in place of the module's names."""
    message = re.sub(r"step_(\d+) \(\w+\)", lambda match: network.source.steps[int(match[1])].place, message)
    return re.sub(r"parameter_\d+", lambda match: network.names.get(match[0], match[0]), message)
