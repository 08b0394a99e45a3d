"""The walk through a module's graph of operations."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from scalegmn.interop.torch_modules.alignment import over_positions
from scalegmn.interop.torch_modules.assemble import assemble
from scalegmn.interop.torch_modules.channelwise import JOINS, as_layer, computed_alike, mixed_by_layer
from scalegmn.interop.torch_modules.execution import (
    as_dtype,
    check_dtype,
    compute,
    execute,
    generic_input,
    generic_tensors,
    joined,
    seeded,
    tensor_names,
)
from scalegmn.interop.torch_modules.experts import with_experts
from scalegmn.interop.torch_modules.headwise import before_scores, computed_in_heads
from scalegmn.interop.torch_modules.layers import ReadLayer, TracedLayer
from scalegmn.interop.torch_modules.nodes import (
    changed_argument,
    is_random,
    is_read_by_others,
    is_read_elsewhere,
    is_rounded,
    is_view,
    place_of,
)
from scalegmn.interop.torch_modules.operators import OPERATORS, Call
from scalegmn.interop.torch_modules.operators.attention import mixed_over_positions, with_scores
from scalegmn.interop.torch_modules.operators.views import UNCHANGED, VIEWS
from scalegmn.interop.torch_modules.pinning import pin
from scalegmn.interop.torch_modules.program import ExampleInput, export, operation
from scalegmn.interop.torch_modules.spelling import is_known_in_size
from scalegmn.interop.torch_modules.trace import Refusal, Trace
from scalegmn.interop.torch_modules.values import (
    FILLS,
    PREPARED,
    ComputedParameters,
    ComputedWeights,
    Elements,
    NetworkInput,
    Neurons,
    OfHeads,
    Opaque,
    Scores,
    Turned,
    is_constant_along,
    is_prepared_by,
    is_traced,
)
from scalegmn.interop.torch_modules.verification import broken_symmetry, check_values, is_symmetric, keeps_symmetry
from scalegmn.networks import NetSpec

FEW_POSITIONS = 4
"""Fewer positions than so many for each expert show little of a router."""

NUM_ORDERS = 16
"""So many other orders of the input's numbers are tried then."""

READS_OPAQUE = (
    *("linear", "addmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "mm", "bmm", "mv", "cat", "concat", "concatenate"),
    *("batch_norm", "instance_norm", "layer_norm", "rms_norm", "group_norm"),
    *("rnn_tanh", "rnn_relu", "lstm", "gru", "rnn_tanh_cell", "rnn_relu_cell", "lstm_cell", "gru_cell", "embedding"),
    *("bilinear", "grid_sampler"),
)
"""Operations whose layers may read what no layer describes."""


LIKE_ANOTHER = ("expand_as", "view_as", "reshape_as", "type_as")
"""Operations that read nothing but the shape and type of their second argument."""

AT_PLACES = ("index", "index_select", "gather", "index_add", "scatter_add", "index_put")
"""Operations whose places may be what no layer describes."""

WEIGHTED = ("linear", "conv1d", "conv2d", "conv3d")
"""Operations whose second argument, weights, may be computed from parameters."""

CHANNELS = dict.fromkeys(
    (
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "batch_norm",
        "group_norm",
    ),
    1,
)
"""Operation -> the axis of its channels, where it is not the last."""

MIXES = {"matmul": 1, "bmm": 1, "scaled_dot_product_attention": 2, "linear": 0, "conv1d": 0}
"""Operations that mix the positions of an argument, channel by channel -> its place."""

AS_IT_IS, IN_HEADS, ALIKE, AS_LAYERS, MIXED, OPAQUE = "as it is", "in heads", "alike", "as layers", "mixed", "opaque"
OF_PARAMETERS = "of parameters"
"""Ways to read an operation: by its operator's rule; as one on queries or keys that computes each head alike; as one
that computes each channel alike; by its rule, with what is computed from layers as layers without weights; as one that
mixes positions, with all but its last argument pinned; by its rule, with all activations pinned; as one that computes
weights from parameters."""


@dataclass(frozen=True)
class _Changed:
    """In place of a value whose memory has been changed through another one."""

    values: tuple[Any, ...]
    """What the memory depends on."""


def trace_module(
    module: nn.Module, example_input: ExampleInput, output: int | str | None = None, is_strict: bool = True
) -> tuple[list[ReadLayer], NetSpec]:
    """The layers of a module, with the parameters that each reads, and the spec of its architecture.

    Each layer is evaluated as it was read and compared with what the module computes, and the symmetries of the spec
    are verified, with parameters that are moved a little at random (`execution.generic_tensors`).

    Args:
        module: the network; it is neither changed nor trained.
        example_input: the input that it is called with.
        output: which of several outputs counts.
        is_strict: whether an operation that no layer describes is refused; else the neurons that it reads are pinned.

    Raises:
        ValueError: the module cannot be exported, has an operation that a parameter graph cannot represent, or computes
            something else than what was read; names the first layer that differs.
    """
    trace = Trace(is_strict)
    try:
        program = export(module, example_input, output, is_strict)
        reader = GraphReader(program, trace)
        with seeded():
            results = reader.read()
        layers, spec = assemble(trace, results)
        trace.place = ""
        spec = reader.verified(layers, spec)
        joined, spec = reader.with_experts(layers, spec)
    except ValueError:
        raise
    except Exception as error:  # a mistake of this package, as those of the module's code are found by the export
        place = f"{trace.place}: " if trace.place else ""
        raise ValueError(f"{type(module).__name__}: {place}{_unforeseen(error)}; please report it") from error
    return joined, spec


def _unforeseen(error: Exception) -> str:
    """What a mistake of this package looks like."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}; this is not foreseen"


class GraphReader:
    """Follows an exported graph, node by node, with traced values beside tensors.

    Args:
        program: the exported module.
        trace: the layers that are found are added to it.
    """

    def __init__(self, program: torch.export.ExportedProgram, trace: Trace) -> None:
        self._program, self._trace = program, trace
        self._values: dict[torch.fx.Node, Any] = {}
        self._actual: dict[torch.fx.Node, Any] = {}  # what the module computes
        self._first_names = {id(tensor): name for name, tensor in reversed(program.state_dict.items())}
        self._memory: dict[torch.fx.Node, torch.fx.Node] = {}  # value -> the first value whose memory it may share
        sizes = {id(tensor): tensor.numel() for tensor in program.state_dict.values()}
        self._dtype = check_dtype(sum(sizes.values()))
        self._counted = torch.arange(max([1, *sizes.values()]))
        trace.tensors = generic_tensors(program, self._dtype)
        names, uses = tensor_names(program), Counter[str]()
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in names:
                tensor = program.state_dict.get(names[node.name])
                uses[self._first_names.get(id(tensor), names[node.name])] += len(node.users)
        trace.shared = {name for name, count in uses.items() if count > 1}
        self._inputs: dict[str, Any] = {}
        self._before_scores = before_scores(program.graph)
        self._output: Tensor | None = None
        self._is_replaced = False  # whether the values are not those of the module

    def read(self) -> list[Any]:
        """The values that the module returns."""
        self._start()
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node)
            elif node.op == "get_attr":
                constant = operator.attrgetter(node.target)(self._program.graph_module)
                self._values[node] = self._actual[node] = as_dtype(constant, self._dtype)
            elif node.op == "output":
                self._output = joined([self._actual[result] for result in node.args[0]])
                if self._is_replaced:
                    self._output = self._run(self._trace.tensors)
                return [self._returned(result) for result in node.args[0]]
            else:
                self._read_call(node)
        raise AssertionError("a graph has an output")

    def _returned(self, node: torch.fx.Node) -> Any:
        """A value that the module returns."""
        value = self._values[node]
        if isinstance(value, _Changed):
            if self._trace.is_strict:
                self._trace.refuse("the module returns a value that has been changed in place through another one")
            pin(self._trace, value.values, "its memory is changed in place through another value")
            return _opaque(self._actual[node])
        if isinstance(value, ComputedParameters | ComputedWeights):
            pin(self._trace, [value], "the module returns it")
            return _opaque(self._actual[node])
        return value

    def verified(self, layers: list[TracedLayer], spec: NetSpec) -> NetSpec:
        """The spec, with layers pinned whose symmetries the module's operations do not keep; a strict trace refuses
        them, and so does any where pinning does not help."""
        assert self._output is not None
        self._values.clear()
        self._actual.clear()
        while True:
            broken, problem = broken_symmetry(layers, spec, self._trace.tensors, self._output, self._run)
            if not broken:
                return spec
            if self._trace.is_strict or all(spec.layers[index].pinned for index in broken):
                raise ValueError(problem)
            for index in broken:
                layers[index].pinned_by = problem
            spec = NetSpec(
                tuple(
                    replace(layer, pinned=True, unscaled=False) if index in broken else layer
                    for index, layer in enumerate(spec.layers)
                )
            )

    def with_experts(self, layers: list[TracedLayer], spec: NetSpec) -> tuple[list[ReadLayer], NetSpec]:
        """The layers and their spec, with the experts of each mixture as one layer. Where few positions choose among
        many experts, the example input shows little of the router, so its numbers are tried in other orders, too."""
        tensors, outputs = self._trace.tensors, self._output
        assert outputs is not None
        read = [self._inputs[name] for name in self._read_inputs]
        num_positions = sum(x.shape[:-1].numel() if x.is_floating_point() else x.numel() for x in read)

        def keeps(layers: Sequence[ReadLayer], spec: NetSpec, routers: set[int]) -> bool:
            return keeps_symmetry(layers, spec, routers, tensors, outputs, self._run)

        def is_kept(layers: Sequence[ReadLayer], spec: NetSpec) -> bool:
            widths = [spec.width(gate) for layer in spec.layers for gate in layer.gates]
            num_orders = NUM_ORDERS if num_positions < FEW_POSITIONS * max(widths, default=0) else 0
            return all(
                is_symmetric(layers, spec, tensors, partial(self._run, order=order), seed=order)
                for order in range(1, num_orders + 1)
            )

        joined = with_experts(layers, spec, keeps)
        if is_kept(*joined):
            return joined
        return with_experts(layers, spec, lambda *given: keeps(*given) and is_kept(*given[:2]))

    def _run(self, tensors: Mapping[str, Any], order: int | None = None) -> Tensor:
        """The module's outputs with other tensors, and with the numbers of the input in one of many random orders."""
        inputs = {name: _cloned(value) for name, value in self._inputs.items()}
        if order is not None:
            generator = torch.Generator().manual_seed(order)
            for name in self._read_inputs:
                numbers = inputs[name].flatten()
                inputs[name] = numbers[torch.randperm(len(numbers), generator=generator)].view(inputs[name].shape)
        return execute(self._program, tensors, inputs, self._dtype)

    def _start(self) -> None:
        """Chooses what the network reads among the module's inputs: those of floating point numbers or, where there
        are none, the first; others are constants, such as masks."""
        names = tensor_names(self._program)
        given = [node for node in self._program.graph.nodes if node.op == "placeholder" and node.name not in names]
        args, kwargs = self._program.example_inputs
        examples = dict(zip((node.name for node in given), _pytree.tree_leaves((args, kwargs)), strict=True))
        self._inputs = {name: generic_input(value, self._dtype) for name, value in examples.items()}
        tensors = {name: value for name, value in examples.items() if isinstance(value, Tensor)}
        floating = [name for name, value in tensors.items() if value.is_floating_point()]
        self._read_inputs = floating or list(tensors)[:1]

    def _placeholder(self, node: torch.fx.Node) -> Any:
        """A parameter, a buffer, a constant or the network's input."""
        program, signature, example = self._program, self._program.graph_signature, node.meta["val"]
        parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        if node.name in self._inputs:
            self._actual[node] = _cloned(self._inputs[node.name])
            if node.name not in self._read_inputs:
                return self._actual[node]
            return self._trace.new_input(self._actual[node])
        name = tensor_names(program)[node.name]
        self._actual[node] = self._trace.tensors[name]
        if node.name in parameters and (example.is_floating_point() or example.is_complex()):
            tensor = program.state_dict.get(name, program.constants.get(name))
            index = self._counted[: example.numel()].view(example.shape)
            first_name, is_buffer = self._first_names.get(id(tensor), name), node.name in signature.inputs_to_buffers
            return Elements(first_name, index, is_buffer, counted=self._counted)
        return self._actual[node]

    def _read_call(self, node: torch.fx.Node) -> None:
        """Finds the value of an operation, and marks those whose memory it changes."""
        trace, name, values = self._trace, operation(node), self._values
        trace.place = place_of(node)
        for read in node.all_input_nodes:
            if isinstance(values[read], _Changed):
                if trace.is_strict:
                    trace.refuse("a value shares memory with one that has been changed in place")
                pin(trace, values[read].values, "its memory is changed in place through another value")
                values[read] = _opaque(self._actual[read])
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if is_random(node) and trace.is_strict:
            trace.refuse(f"{name} draws random numbers when the module evaluates")
        values[node] = self._value(node, name.rstrip("_"), args, kwargs)
        changed = changed_argument(node)
        source = changed or node.args[0] if node.args else None
        if isinstance(source, torch.fx.Node) and (changed or is_view(node)):
            self._memory[node] = self._memory.get(source, source)
            if changed and (is_traced(values[source]) or is_traced(values[node])):
                for other in [other for other in values if self._memory.get(other, other) is self._memory[node]]:
                    if other not in (node, source):
                        before = values[other]
                        known = before.values if isinstance(before, _Changed) else (before,)
                        values[other] = _Changed((*known, values[node]))
                values[source] = values[node]

    def _value(self, node: torch.fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation returns, by its operator's rule; else, unless the trace is strict, `Opaque`, where all
        neurons and parameters that it reads are pinned."""
        trace, problem = self._trace, ""
        if name in LIKE_ANOTHER and is_traced(args[1]):  # whose shape alone counts
            args = (args[0], self._actual[node.args[1]], *args[2:])  # type: ignore[index]
        leaves = [leaf for leaf in _pytree.tree_leaves((args, kwargs), is_leaf=is_traced) if is_traced(leaf)]
        restore = trace.saved(leaves)
        is_computed = not is_known_in_size(node)
        if is_computed:
            args = _pytree.tree_map(_cloned, args)  # some are changed in place
            self._actual[node] = node.meta["val"] = self._found(node, name)
        is_drawn = is_random(node) and name not in FILLS and bool(leaves)
        if is_rounded(node) and not trace.is_strict:
            is_drawn, problem = bool(leaves), f"{name} rounds numbers of 64 bits"
        ways = [] if is_drawn else self._attempts(name, leaves)
        if any(isinstance(leaf, Turned | OfHeads) for leaf in leaves) and node in self._before_scores:
            ways = [IN_HEADS]
        elif node in self._before_scores and ways and not trace.is_strict:
            ways.insert(1 if AS_IT_IS in ways else 0, IN_HEADS)
        if ALIKE in ways and "softmax" in name and is_read_by_others(node):
            ways.sort(key=[ALIKE, AS_IT_IS, AS_LAYERS, OF_PARAMETERS].index)
        for way in ways:
            try:
                value = self._read_as(way, node, name, args, kwargs)
                if not is_computed:
                    self._actual[node] = self._compute(node)
                    is_computed = True
                value = self._with_actual(value, self._actual[node])
            except Exception as error:
                if trace.is_strict:
                    raise
                problem = problem or (error.problem if isinstance(error, Refusal) else _unforeseen(error))
                restore()
            else:
                if isinstance(value, Scores | OfHeads | Turned):
                    pin(trace, [leaf for leaf in leaves if isinstance(leaf, ComputedWeights)], f"{name} of all of it")
                if way == OPAQUE:
                    pin(trace, [leaf for leaf in leaves if not isinstance(leaf, Elements)], problem)
                elif way == MIXED:
                    others = [leaf for leaf in leaves if leaf is not args[MIXES[name]]]
                    pin(trace, with_scores(trace, others) if "attention" in name else others, problem)
                self._note(name, (args, kwargs), value)
                return value
        if not is_computed:
            self._actual[node] = self._compute(node)
        if leaves and all(isinstance(leaf, Elements) and leaf.is_buffer for leaf in leaves):
            return self._actual[node]
        pin(trace, leaves, problem or f"{name} of what no layer describes")
        return _opaque(self._actual[node])

    def _note(self, name: str, reads: Any, result: Any) -> None:
        """Notes an operation, with its numbers, with the layers of whose output it makes something else."""
        if name in (*VIEWS, *UNCHANGED):
            return
        leaves = [self._number(leaf) for leaf in _pytree.tree_leaves(reads, is_leaf=is_traced)]
        numbers = [leaf for leaf in leaves if isinstance(leaf, int | float)]
        new = [leaf for leaf in _pytree.tree_leaves(result, is_leaf=is_traced) if isinstance(leaf, Neurons)]
        for value in leaves:
            if isinstance(value, Neurons) and not any(
                not other.is_output and (other.versions, other.factor) == (value.versions, value.factor)
                for other in new
            ):
                self._trace.note_operation(f"{name} {numbers}", value)

    def _number(self, value: Any) -> Any:
        """A constant tensor or a buffer of one element as a number; others as they are."""
        if isinstance(value, Elements) and value.is_buffer:
            value = self._trace.read(value)
        return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value

    def _attempts(self, name: str, leaves: Sequence[Any]) -> list[str]:
        """In which ways to try to read an operation."""
        if self._trace.is_strict or not leaves:
            return [AS_IT_IS]
        are_weights = all(isinstance(leaf, Elements | ComputedParameters | ComputedWeights) for leaf in leaves)
        if are_weights and name == "batch_norm":
            return [OF_PARAMETERS]  # standardised weights
        has_opaque = any(isinstance(leaf, Opaque) for leaf in leaves)
        neurons = [leaf for leaf in leaves if isinstance(leaf, Neurons)]
        ways = [AS_IT_IS] if name in (*READS_OPAQUE, *AT_PLACES) or not has_opaque else []
        are_parameters = all(isinstance(leaf, Elements | ComputedParameters) for leaf in leaves)
        reads_parameter = any(isinstance(leaf, Elements) and not leaf.is_buffer for leaf in leaves)
        if (neurons or are_parameters or reads_parameter) and (name not in READS_OPAQUE or name in JOINS):
            ways.append(ALIKE)
        if neurons and (not has_opaque or name in READS_OPAQUE):
            ways.append(AS_LAYERS)
        if name in MIXES:
            ways.append(MIXED)
        if name in READS_OPAQUE and any(not isinstance(leaf, Elements | Opaque) for leaf in leaves):
            ways.append(OPAQUE)
        if are_weights:
            ways.append(OF_PARAMETERS)
        return ways

    def _read_as(self, way: str, node: torch.fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of an operation that is read in one of the ways of `_attempts`."""
        trace = self._trace
        nodes = (node.args, node.kwargs)
        if way in (ALIKE, IN_HEADS):
            actual = torch.fx.map_arg(nodes, self._actual.__getitem__)
            if way == IN_HEADS:
                shape = getattr(node.meta["val"], "shape", ())  # several values are views
                return computed_in_heads(trace, node.target, args, kwargs, actual, shape)
            return computed_alike(trace, node.target, args, kwargs, actual, _results(node))
        if way == OF_PARAMETERS:
            return _computed_weights((args, kwargs), node.meta["val"])
        if way == AS_LAYERS:
            is_new = False

            def as_layers(value: Any) -> Any:
                nonlocal is_new
                if not isinstance(value, Neurons):
                    return value
                axis = CHANNELS.get(name, -1)
                is_shuffled = (
                    name in READS_OPAQUE
                    and not is_constant_along(value.ids, axis)
                    and any(
                        not is_constant_along(value.ids, other)
                        for other in range(value.ids.ndim)
                        if other != axis % value.ids.ndim
                    )
                )
                if not is_shuffled and not trace.is_derived(value):
                    return value
                is_new = True
                return over_positions(trace, value, axis) if is_shuffled else as_layer(trace, value)

            args, kwargs = _pytree.tree_map(as_layers, (args, kwargs), is_leaf=is_traced)
            if not is_new:
                trace.refuse("no value is computed from others of its layer")
        if way == OPAQUE:
            args, kwargs = _as_opaque((args, kwargs), self._actual, nodes)
        if way == MIXED:
            place = MIXES[name]
            if any(leaf is args[place] for leaf in args[:place]) or not isinstance(args[place], Neurons):
                trace.refuse("a product of a value with itself")
            if name == "conv1d" and (args[1].index.shape[1:] != (args[0].ids.shape[1], 1) or len(args) > 3):
                trace.refuse("a convolution over channels")
            if name in ("linear", "conv1d"):
                return mixed_by_layer(trace, args[place], CHANNELS.get(name, -1), node.meta["val"].shape)
            return mixed_over_positions(trace, args[place], node.meta["val"].shape)
        return self._call(node, name, args, kwargs)

    def _compute(self, node: torch.fx.Node) -> Any:
        """What the module computes here."""
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._actual.__getitem__)
        return compute(node, args, kwargs, self._dtype)

    def _found(self, node: torch.fx.Node, name: str) -> Any:
        """What an operation returns whose size depends on its values; where it finds no places, the first, so that what
        is read at these (by an expert that no position chooses) is read as elsewhere."""
        result = self._compute(node)
        is_found = all(leaf.numel() for leaf in _pytree.tree_leaves(result))
        if is_found or name not in ("nonzero", "nonzero_numpy", "where", "index"):
            return result
        self._is_replaced = True
        if name == "index":
            masks: Any = node.args[1]
            for value in [self._values[mask] for mask in masks if mask is not None]:
                if isinstance(value, Opaque) and value.value.dtype == torch.bool:
                    value.value[(0,) * value.value.ndim] = True
            return self._compute(node)
        return _pytree.tree_map(lambda leaf: leaf if leaf.numel() else leaf.new_zeros(1, *leaf.shape[1:]), result)

    def _call(self, node: torch.fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation returns: None where all its arguments are constants, else by its operator's rule."""
        self._trace.claimed = None
        leaves = [leaf for leaf in _pytree.tree_leaves((args, kwargs), is_leaf=is_traced) if is_traced(leaf)]
        is_shape_alone = name in FILLS or (name in (*VIEWS, *UNCHANGED) and isinstance(args[0], Tensor))
        if not leaves or is_shape_alone:
            return None
        if is_prepared_by(name, leaves) or (
            all(isinstance(leaf, NetworkInput) for leaf in leaves)
            and (name not in OPERATORS or not OPERATORS[name].reads_input)
        ):
            return PREPARED
        are_scores = any(isinstance(leaf, Scores) for leaf in leaves)
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        has_tensors = any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(args[1:]))
        if are_scores and len(leaves) == 1 and is_pointwise and not has_tensors and isinstance(args[0], Scores):
            return args[0]  # a function of each score
        is_view = name in (*VIEWS, *UNCHANGED)
        computed = [leaf for leaf in leaves if isinstance(leaf, ComputedParameters | ComputedWeights)]
        if computed and not (is_view or are_scores or (name in WEIGHTED and computed == [args[1]])):
            self._trace.refuse("parameters are read that are computed from others")
        if name not in OPERATORS:
            self._trace.refuse(f"{node.target} is not a known operator")
        read_elsewhere = operation(node) == name and is_read_elsewhere(node)
        call = Call(self._trace, name, node.target, node.meta["val"], read_elsewhere, partial(self._recomputed, node))  # type: ignore[arg-type]
        return OPERATORS[name].rule(call, *args, **kwargs)

    def _recomputed(self, node: torch.fx.Node, value: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """What an argument of an operation is that is computed from parameters, with others in their places."""
        known: dict[torch.fx.Node, Any] = {}

        def of(source: torch.fx.Node) -> Any:
            if source not in known:
                read = self._values[source]
                if isinstance(read, Elements) and source.op == "placeholder" and read.name in tensors:
                    known[source] = tensors[read.name]
                elif not is_traced(read) or source.op != "call_function":
                    known[source] = self._actual[source]
                else:
                    args, kwargs = torch.fx.map_arg((source.args, source.kwargs), of)
                    known[source] = compute(source, args, kwargs, self._dtype)
            return known[source]

        result: Tensor = of(next(source for source in node.all_input_nodes if self._values[source] is value))
        return result

    def _with_actual(self, value: Any, actual: Any) -> Any:
        """A value with what the module computes for it, compared with what its layer would compute."""
        claimed, self._trace.claimed = self._trace.claimed, None
        if value is None:
            return actual
        if isinstance(value, list) and not isinstance(actual, Tensor):
            return [self._with_actual(*pair) for pair in zip(value, actual, strict=True)]
        if isinstance(value, NetworkInput):
            if value is not PREPARED and value.parts is None:
                return replace(value, value=actual)
            prepared = self._prepared(actual)
            return prepared if value.parts is None else replace(prepared, parts=value.parts)
        if isinstance(value, Opaque):
            return replace(value, value=actual)
        if not isinstance(value, Neurons):
            return value
        if value.is_output:
            return replace(value, value=actual / value.factor)
        if claimed is not None:
            check_values(self._trace, actual, claimed * value.factor)
        return replace(value, value=actual if value.factor == 1 else actual / value.factor)

    def _prepared(self, actual: Any) -> Any:
        """What is computed from the input without parameters, as an input of its own."""
        if isinstance(actual, list | tuple):
            return [self._prepared(item) for item in actual]
        return replace(self._trace.new_input(actual), is_prepared=True) if isinstance(actual, Tensor) else actual


def _computed_weights(reads: Any, result: Any) -> Any:
    """What is computed from parameters alone, as a value; each of several results alike."""
    leaves = [leaf for leaf in _pytree.tree_leaves(reads, is_leaf=is_traced) if is_traced(leaf)]
    parts = [part for leaf in leaves for part in ((leaf,) if isinstance(leaf, Elements) else leaf.parts)]
    value = ComputedWeights(tuple(part for part in parts if not part.is_buffer))
    return [value] * len(result) if isinstance(result, list | tuple) else value


def _results(node: torch.fx.Node) -> Any:
    """Examples of what an operation returns; None in place of those of several that nothing reads."""
    results = node.meta["val"]
    if not isinstance(results, list | tuple):
        return results
    read = {user.args[1] for user in node.users if operation(user) == "getitem"}
    return [result if place in read else None for place, result in enumerate(results)]


def _opaque(actual: Any) -> Any:
    """What no layer describes, as a value: tensors of floating point numbers and others alike."""
    if isinstance(actual, list | tuple):
        return [_opaque(item) for item in actual]
    return Opaque(actual) if isinstance(actual, Tensor) else actual


def _as_opaque(reads: Any, actual: Mapping[torch.fx.Node, Any], nodes: Any) -> Any:
    """Arguments of an operation with activations as `Opaque`; parameters stay."""
    flat, structure = _pytree.tree_flatten(reads, is_leaf=is_traced)
    sources, _ = _pytree.tree_flatten(nodes)
    pairs = zip(flat, sources, strict=True)
    new = [
        Opaque(actual[source]) if is_traced(value) and not isinstance(value, Elements) else value
        for value, source in pairs
    ]
    return _pytree.tree_unflatten(new, structure)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
