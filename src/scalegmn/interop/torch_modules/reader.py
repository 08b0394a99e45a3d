"""The walk through a module's graph of operations."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.interop.torch_modules.assemble import assemble
from scalegmn.interop.torch_modules.layers import TracedLayer
from scalegmn.interop.torch_modules.operators import OPERATORS, Call
from scalegmn.interop.torch_modules.operators.views import UNCHANGED, VIEWS
from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import Elements, NetworkInput, is_traced
from scalegmn.networks import NetSpec

_CHANGED = object()
"""In place of a value whose memory has been changed through another one."""


def trace_module(module: nn.Module, example_input: Tensor | Sequence[Tensor]) -> tuple[list[TracedLayer], NetSpec]:
    """The layers of a module, with the parameters that each reads, and the spec of its architecture.

    Args:
        module: the network; it is neither changed nor trained.
        example_input: the input that it is called with; only shapes and types count.

    Raises:
        ValueError: the module cannot be exported, or has an operation that a parameter graph cannot represent.
    """
    program = export(module, example_input)
    trace = Trace()
    return assemble(trace, GraphReader(program, trace).read())


def export(module: nn.Module, example_input: Tensor | Sequence[Tensor]) -> torch.export.ExportedProgram:
    """The graph of a module's operations as it evaluates; raises ValueError where it has none."""
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, strict=False)
    except Exception as error:  # whatever the module's own code raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{type(module).__name__} cannot be exported: {reason[0]}") from error
    finally:
        for submodule in training:
            submodule.training = True


class GraphReader:
    """Follows an exported graph, node by node, with traced values in place of tensors.

    Args:
        program: the exported module.
        trace: the layers that are found are added to it.
    """

    def __init__(self, program: torch.export.ExportedProgram, trace: Trace) -> None:
        self._program, self._trace = program, trace
        self._values: dict[torch.fx.Node, Any] = {}
        self._first_names = {id(tensor): name for name, tensor in reversed(program.state_dict.items())}
        self._memory: dict[torch.fx.Node, torch.fx.Node] = {}  # value -> the first value whose memory it may share

    def read(self) -> Any:
        """The value that the module returns."""
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node)
            elif node.op == "get_attr":
                self._values[node] = operator.attrgetter(node.target)(self._program.graph_module)
            elif node.op == "output":
                (results,) = node.args
                if len(results) != 1:
                    raise ValueError(f"expected a module that returns one tensor, found {len(results)}")
                return self._values[results[0]]
            else:
                self._read_call(node)
        raise AssertionError("a graph has an output")

    def _placeholder(self, node: torch.fx.Node) -> Any:
        """A parameter, a buffer, a constant or the network's input."""
        program, signature, example = self._program, self._program.graph_signature, node.meta["val"]
        parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        if node.name in parameters:
            name = parameters[node.name]
            tensor = program.state_dict.get(name, program.constants.get(name))
            index = torch.arange(example.numel()).reshape(example.shape)
            return Elements(self._first_names.get(id(tensor), name), index, node.name in signature.inputs_to_buffers)
        if node.name in signature.inputs_to_lifted_tensor_constants:
            return program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
        if not isinstance(example, Tensor):
            return example
        if any(isinstance(value, NetworkInput) for value in self._values.values()):
            raise ValueError("expected a module with one input tensor, found several")
        self._trace.start(example.numel())
        return NetworkInput(torch.arange(example.numel()).reshape(example.shape))

    def _read_call(self, node: torch.fx.Node) -> None:
        """Finds the value of an operation, and marks those whose memory it changes."""
        self._trace.place, name, values = _place(node), _operation(node), self._values
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if any(leaf is _CHANGED for leaf in torch.utils._pytree.tree_leaves((args, kwargs))):
            self._trace.refuse("a value shares memory with one that has been changed in place")
        values[node] = self._call(node, name.rstrip("_"), args, kwargs)
        is_changing = name.endswith("_") and not name.endswith("__")
        if is_changing or name in VIEWS or name in UNCHANGED:
            source = node.args[0]
            assert isinstance(source, torch.fx.Node)
            self._memory[node] = self._memory.get(source, source)
            if is_changing and is_traced(values[source]):
                shared = [other for other in values if self._memory.get(other, other) is self._memory[node]]
                values |= dict.fromkeys(shared, _CHANGED) | dict.fromkeys((node, source), values[node])

    def _call(self, node: torch.fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation returns: computed where all its arguments are constants, else by its operator's rule."""
        function: Any = node.target
        if not any(is_traced(leaf) for leaf in torch.utils._pytree.tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        if name not in OPERATORS:
            self._trace.refuse(f"{node.target} is not a known operator")
        return OPERATORS[name].rule(Call(self._trace, name, function, node.meta["val"]), *args, **kwargs)


def _operation(node: torch.fx.Node) -> str:
    """`conv2d` for aten.conv2d.default."""
    return "getitem" if node.target is operator.getitem else str(node.target).split(".")[1]


def _place(node: torch.fx.Node) -> str:
    """Where in the module an operation is: `layer1.0.conv1 (Conv2d)`."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", nn.Module)}).values())
    path, kind = stack[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return f"{path or 'module'} ({name.rpartition('.')[2]})"
