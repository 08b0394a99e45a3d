"""Recurrent layers (RNN, LSTM, GRU) and their cells.

A step is W x + b of the input, W h + b of the state before it, cut into gates, and the state after it, which is
computed from the gates channel by channel: gates and state of a hidden unit are permuted together. A layer that goes
through a sequence is read as its first step, whose states before and after have the same neurons
(`LayerSpec.same_neurons`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.alignment import coupled_layer
from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import Elements, Neurons

FAMILY = "recurrent layers"

NUM_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}


def step(call: Call, x: Any, states: Sequence[Any], parameters: Sequence[Any]) -> tuple[Tensor, int]:
    """The neurons of the state after a step, and their layer.

    Args:
        call: the operation, of a cell or of a layer.
        x: what it reads, with channels along the last axis.
        states: h, of an LSTM also c: zeros, parameters, or a layer's output.
        parameters: W [gates n, in] and W [gates n, n] of input and state, and their biases or nothing.
    """
    trace, kind = call.trace, call.name.removesuffix("_cell")
    inner, outer, *biases = parameters
    inner_bias, outer_bias = (*biases, None, None)[:2]
    if not all(isinstance(item, Elements) for item in (inner, outer)) or len(parameters) not in (2, 4):
        trace.refuse(f"{call.name}: weights that are computed from others, or a projection of the state")
    size = outer.index.shape[1]
    neurons = trace.as_neurons(x, -1)
    nodes = [_state(call, state, size) for state in states]
    if min(trace.neurons.layer_of(neuron) for part in nodes for neuron in part.tolist()) < 0:
        trace.refuse(f"{call.name}: the state before a step is the network's input, or what no layer computes")
    from_state = trace.new_layer(len(outer.index), nodes[0], outer, bias=outer_bias)
    trace.add_layer(from_state)
    from_input = trace.new_layer(len(inner.index), trace.channels_along(neurons, -1), inner, bias=inner_bias)
    if NUM_GATES[kind] > 1:
        trace.add_layer(from_input)
        gates = [part for layer in (from_input, from_state) for part in layer.nodes.split(size)]
        state = coupled_layer(trace, [*gates, *nodes])
        return state, trace.neurons.layer_of(state[0])
    from_input.residual, from_input.version, from_input.is_activated = from_state.nodes, 1, True
    from_input.options["activation"] = kind.removeprefix("rnn_")
    trace.neurons.mark_read(from_state.nodes)
    trace.add_layer(from_input)
    return from_input.nodes, len(trace.layers) - 1


def _state(call: Call, state: Any, size: int) -> Tensor:
    """The neurons of a state before a step."""
    trace = call.trace
    if isinstance(state, Elements) and not state.is_buffer:
        rows = state.index.reshape(-1, size).unique(dim=0).mT
        layer = trace.new_layer(size, None, replace(state, index=rows), options={"constant": True})
        trace.add_layer(layer)
        return layer.nodes
    return trace.channels_along(trace.as_neurons(state, -1), -1)


def _along_last(call: Call, nodes: Tensor, layer: int, shape: Sequence[int]) -> Neurons:
    """A state's neurons along the last axis of a shape."""
    return Neurons(nodes.expand(*shape), {layer: call.trace.layers[layer].version})


@operator(FAMILY, "rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell")
def cell(call: Call, x: Any, state: Any, *parameters: Any) -> Any:
    """A step of a recurrent layer."""
    states = list(state) if isinstance(state, list | tuple) else [state]
    given = [item for item in parameters if item is not None]
    nodes, layer = step(call, x, states, given)
    after = [_along_last(call, nodes, layer, call.shape)]
    if len(states) > 1:  # the cell of an LSTM, whose channels are those of the state
        cells = coupled_layer(call.trace, [nodes])
        after.append(_along_last(call, cells, call.trace.neurons.layer_of(cells[0]), call.shape))
    return after if isinstance(call.result, list | tuple) else after[0]


@operator(FAMILY, "rnn_tanh", "rnn_relu", "gru", "lstm")
def recurrent_layer(
    call: Call,
    x: Any,
    state: Any,
    parameters: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    is_training: bool,
    is_bidirectional: bool,
    is_batch_first: bool,
) -> Any:
    """All layers and directions of a recurrent layer, over a sequence."""
    trace, results = call.trace, call.result
    states = list(state) if isinstance(state, list | tuple) else [state]
    num_directions = 2 if is_bidirectional else 1
    count = len(parameters) // (num_layers * num_directions)
    if count != (4 if has_biases else 2):
        trace.refuse(f"{call.name}: the state is projected")
    read, last = x, []
    for place in range(num_layers):
        nodes = []
        for direction in range(num_directions):
            index = place * num_directions + direction
            before = [_at(call, item, index) for item in states]
            nodes.append(_looped(call, read, before, parameters[index * count : (index + 1) * count]))
        shape = (*results[0].shape[:-1], sum(len(part) for part, _ in nodes))
        versions = {layer: trace.layers[layer].version for _, layer in nodes}
        read = Neurons(torch.cat([part for part, _ in nodes]).expand(*shape), versions)
        last += nodes
    versions = {layer: trace.layers[layer].version for _, layer in last}
    axes = [1] * (results[1].ndim - 2)
    final = torch.stack([part for part, _ in last]).reshape(len(last), *axes, -1)
    finals = [Neurons(final.expand(*results[1].shape), versions)]
    if len(states) > 1:
        cells = [coupled_layer(trace, [part]) for part, _ in last]
        versions = {trace.neurons.layer_of(part[0]): 0 for part in cells}
        final = torch.stack(cells).reshape(len(last), *axes, -1)
        finals.append(Neurons(final.expand(*results[2].shape), versions))
    return [read, *finals]


def _looped(call: Call, x: Any, before: Sequence[Any], parameters: Sequence[Any]) -> tuple[Tensor, int]:
    """A step whose states before and after have the same neurons."""
    nodes, index = step(call, x, before, parameters)
    layer = call.trace.layers[index]
    if layer.residual is not None:
        state = call.trace.layers[call.trace.neurons.layer_of(layer.residual[0])].reads
        assert state is not None, "the state before a step has neurons"
        layer.same_neurons = (state,)
    return nodes, index


def _at(call: Call, state: Any, index: int) -> Any:
    """The state of one layer and direction."""
    if isinstance(state, Neurons):
        value = None if state.value is None else state.value[index]
        return replace(state, ids=state.ids[index], value=value)
    if isinstance(state, Elements):
        return replace(state, index=state.index[index])
    return state[index]
