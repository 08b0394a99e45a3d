"""The operations of an exported graph, computed with tensors in one precision."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

LARGE = 2_000_000
"""From so many parameters on, checks are made in float32 and with a single group element."""

NOISE = 262_147
"""So many random numbers move a parameter, again and again: a prime, so that each row of a matrix meets others."""


def check_dtype(num_parameters: int) -> torch.dtype:
    """The precision of the checks for a module of a size."""
    return torch.float32 if num_parameters > LARGE else torch.float64


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating point tensors, and types, among any value in one precision."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return dtype if leaf.is_floating_point else leaf
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return _pytree.tree_map(cast, value)


def compute(node: torch.fx.Node, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    """What an operation returns; rounding to other floating point types is left out."""
    function: Any = node.target
    with torch.no_grad():
        return as_dtype(function(*as_dtype(args, dtype), **as_dtype(kwargs, dtype)), dtype)


def execute(
    program: torch.export.ExportedProgram, tensors: Mapping[str, Any], inputs: Mapping[str, Any], dtype: torch.dtype
) -> Tensor:
    """The outputs of an exported program, see `joined`.

    Args:
        program: of `program.export`.
        tensors: parameters, buffers and constants by their names.
        inputs: what is given to the placeholders of inputs, by their names.
        dtype: of all floating point numbers.
    """
    with seeded():
        return _executed(program, tensors, inputs, dtype)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Makes random numbers the same every time, and leaves the generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def joined(outputs: Sequence[Any]) -> Tensor:
    """All numbers of a module's outputs in one tensor; a single output as it is."""
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    return torch.cat([tensor.reshape(-1) for tensor in floating or tensors])


def _executed(
    program: torch.export.ExportedProgram, tensors: Mapping[str, Any], inputs: Mapping[str, Any], dtype: torch.dtype
) -> Tensor:
    """The operations of `execute`."""
    names, values = tensor_names(program), {}
    last_use = {source: node for node in program.graph.nodes for source in node.all_input_nodes}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = tensors[names[node.name]] if node.name in names else inputs[node.name]
        elif node.op == "get_attr":
            values[node] = as_dtype(operator.attrgetter(node.target)(program.graph_module), dtype)
        elif node.op == "output":
            return joined([values[result] for result in node.args[0]])
        else:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = compute(node, args, kwargs, dtype)
            for source in node.all_input_nodes:
                if last_use[source] is node:
                    values.pop(source, None)
    raise AssertionError("a graph has an output")


def tensor_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Placeholder -> the name of the parameter, buffer or constant that it stands for."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def generic_tensors(program: torch.export.ExportedProgram, dtype: torch.dtype) -> dict[str, Any]:
    """Parameters, buffers and constants by name, the parameters moved a little at random: what holds for them holds
    for any parameters, also where those of the module are zeros or ones."""
    generator = torch.Generator().manual_seed(0)
    new: dict[str, Any] = {}
    parameters = {*program.graph_signature.inputs_to_parameters.values()}
    first: dict[int, str] = {}
    for name, tensor in {**program.constants, **program.state_dict}.items():
        same = first.setdefault(id(tensor), name)
        if same != name:
            new[name] = new[same]
            continue
        value = as_dtype(tensor.detach() if isinstance(tensor, Tensor) else tensor, dtype)
        new[name] = value = value.clone() if isinstance(value, Tensor) else value
        if name in parameters and value.is_floating_point() and value.numel():
            flat = value.contiguous().view(-1)
            noise = torch.randn(min(len(flat), NOISE), generator=generator, dtype=dtype).to(value.device)
            spread = float(flat[:: -(-len(flat) // NOISE)].std(correction=0))
            for part in flat.split(NOISE):
                part.add_(noise[: len(part)], alpha=0.1 * (spread if spread > 0 else 1.0))
            new[name] = flat.view(value.shape)
    return new


def generic_input(example: Any, dtype: torch.dtype) -> Any:
    """An input to check with: the example, or random numbers of its shape where it is the same everywhere."""
    if not isinstance(example, Tensor) or not example.is_floating_point():
        return example
    value = example.detach().to(dtype)
    if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(value.shape, generator=generator, dtype=dtype).to(value.device)
    return value.clone()
