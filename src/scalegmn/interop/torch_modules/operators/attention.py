"""Multi-head attention, as one operation or written out: softmax(q k^T) v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.heads import head_scores, scores_of_rows
from scalegmn.interop.torch_modules.layers import TracedAttention
from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.trace import Refusal, Trace
from scalegmn.interop.torch_modules.values import (
    ComputedParameters,
    Elements,
    NetworkInput,
    Neurons,
    OfHeads,
    Opaque,
    Scores,
    Turned,
    is_constant,
    is_constant_along,
    unique_columns,
)

FAMILY = "attention"


def with_constants(call: Call, *values: Any) -> Scores:
    """Attention scores with what is added to them, or what they are multiplied by: constants, masks that are computed
    from the input, the same for all heads; or a number for each head, that parameters or a layer give."""
    trace = call.trace
    scores = [value for value in values if isinstance(value, Scores)]
    if len(scores) > 1:
        trace.refuse("attention scores are combined with other scores, expected constant masks and scales")
    (result,) = scores
    for value in values:
        if isinstance(value, Neurons):
            result = _with_bias(call, result, value)
        elif isinstance(value, ComputedParameters) or (isinstance(value, Elements) and not value.is_buffer):
            parts = value.parts if isinstance(value, ComputedParameters) else (value,)
            for part in parts:
                result = _with_bias(call, result, _by_head(call, result, part))
        elif len(result.queries) > 1 and not _is_same_for_heads(call, result, value):
            trace.refuse("attention scores meet constants that differ by head")
    return result


def _axes_of_heads(call: Call, scores: Scores) -> list[int]:
    """The axes of scores, or of what attention returns, along which heads differ, counted from the end."""
    batch = call.shape[:-2]
    if batch.numel() != len(scores.order):
        call.trace.refuse("attention scores are repeated")
    order = scores.order.reshape(batch)
    return [axis - len(batch) - 2 for axis in range(len(batch)) if not is_constant_along(order, axis)]


def _is_same_for_heads(call: Call, scores: Scores, value: Any) -> bool:
    """Whether a constant is the same for all heads."""
    if isinstance(value, Elements):
        value = call.trace.read(value)
    tensor = value.value if isinstance(value, NetworkInput | Opaque) else value
    if not isinstance(tensor, Tensor):
        return True
    axes = [axis for axis in _axes_of_heads(call, scores) if -axis <= tensor.ndim]
    return all(bool((tensor == tensor.narrow(axis, 0, 1)).all()) for axis in axes)


def _by_head(call: Call, scores: Scores, elements: Elements) -> Neurons:
    """Parameters that differ by head, as a layer of constant inputs with a neuron per head."""
    trace, index = call.trace, elements.index
    axes = [axis for axis in _axes_of_heads(call, scores) if -axis <= index.ndim and index.shape[axis] > 1]
    if len(axes) != 1:
        trace.refuse("attention scores meet a parameter that all heads have, or that heads have along several axes")
    return trace.layer_of_constants(elements, axes[0])


def _with_bias(call: Call, scores: Scores, bias: Neurons) -> Scores:
    """Scores that meet a neuron for each head."""
    trace = call.trace
    is_masked = bias.is_output and bias.is_uniform
    if not is_masked:
        trace.check_current(bias)
    trace.refuse_sources(bias)
    ids = bias.ids
    for axis in (-1, -2):
        if -axis <= ids.ndim and not is_constant_along(ids, axis):
            trace.refuse("attention scores meet a layer's output that differs by position")
    ids = ids[(0, 0)] if ids.ndim < 2 else ids[..., 0, 0]
    batch = call.shape[:-2]
    if -1 in bias.versions or batch.numel() != len(scores.order):
        trace.refuse("attention scores meet the input, or are repeated")
    neurons = torch.empty(len(scores.queries), dtype=torch.long)
    numbers = ids.expand(batch).flatten()
    neurons[scores.order] = numbers
    if not torch.equal(neurons[scores.order], numbers) or len(neurons.unique()) < len(neurons):
        trace.refuse("attention scores of several heads meet one neuron, or of one head several")
    return replace(scores, biases=(*scores.biases, neurons))


def heads_of(trace: Trace, neurons: Neurons) -> Tensor:
    """[heads, channels] of a value [..., T, channels]."""
    trace.check_current(neurons)
    trace.refuse_sources(neurons)
    if not is_constant_along(neurons.ids, -2):
        trace.refuse("two activations are multiplied over positions, expected over the channels of each head")
    rows = neurons.ids.select(-2, 0).reshape(-1, neurons.ids.shape[-1]).tolist()
    return torch.tensor(list(dict.fromkeys(map(tuple, rows))))


def with_scores(trace: Trace, values: Sequence[Any]) -> list[Any]:
    """Arguments of attention but its values, with scores in place of queries and keys, if they have heads."""
    queries, keys, *rest = values
    try:
        return [scores_of(trace, queries, keys), *rest]
    except Refusal:
        return [*values]


def scores_of(trace: Trace, queries: Any, keys: Any) -> Scores:
    """Products of queries and keys [..., T, channels], head by head."""
    for value in (queries, keys):
        if not isinstance(value, Neurons | Turned | OfHeads):
            trace.refuse("queries or keys of attention are not a layer's output")
    shapes = [_shape(value) for value in (queries, keys)]
    if min(map(len, shapes)) < 2:
        trace.refuse("queries or keys of attention are not a layer's output")
    batch = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    if not (isinstance(queries, Neurons) and isinstance(keys, Neurons)):
        return head_scores(trace, queries, keys, batch)
    for value in (queries, keys):
        heads_of(trace, value)
    rows = [value.ids.select(-2, 0).expand(*batch, -1).reshape(-1, value.ids.shape[-1]) for value in (queries, keys)]
    return scores_of_rows(rows[0], rows[1])


def _shape(value: Neurons | Turned | OfHeads) -> torch.Size:
    if isinstance(value, Turned):
        return value.terms[0][0].shape
    return value.ids.shape if isinstance(value, Neurons) else value.labels.shape


def attend(call: Call, scores: Scores, values: Neurons) -> Neurons:
    """Multi-head attention: the neurons of the values, coupled with those of queries and keys."""
    trace = call.trace
    heads_of(trace, values)
    if not scores.is_softmaxed:
        trace.refuse("values are weighted by attention scores without a softmax over the keys")
    batch = call.shape[:-2]
    if batch.numel() != len(scores.order):
        trace.refuse("attention scores are repeated")
    rows = values.ids.select(-2, 0).expand(*batch, -1).reshape(-1, values.ids.shape[-1])
    heads = torch.empty(len(scores.queries), rows.shape[1], dtype=torch.long)
    heads[scores.order] = rows
    if not torch.equal(heads[scores.order], rows):
        trace.refuse("one head of scores weights several heads of values")
    groups = _by_keys(trace, scores, heads)
    order, queries, keys = (
        groups.flatten(),
        scores.queries[groups.flatten()].flatten(),
        scores.keys[groups[:, 0]].flatten(),
    )
    sources = heads[groups[:, 0]].flatten()
    biases = tuple(nodes[order] for nodes in scores.biases)
    for nodes in (queries, keys, sources):
        if len(nodes.unique()) < len(nodes):
            trace.refuse("heads of attention share neurons")
        if trace.neurons.is_read(nodes) and not trace.neurons.is_aligned(nodes):
            trace.refuse("queries, keys or values of attention are read elsewhere too")
        trace.neurons.mark_read(nodes)
    for nodes in biases:
        trace.neurons.mark_read(nodes)
    result, new = (sources, heads) if groups.shape[1] == 1 else _repeated(trace, heads, groups)
    trace.attended.append((result, queries, keys, sources, *biases))
    attention = trace.layers[trace.neurons.layer_of(result[0])].options.setdefault("attention", {})
    attention[int(result[0])] = TracedAttention(queries, keys, len(order), scores.rotary, biases)
    ids = new[scores.order].reshape(*batch, 1, -1).expand(*call.shape)
    versions = values.versions if groups.shape[1] == 1 else {len(trace.layers) - 1: 0}
    return replace(values, ids=ids, versions=versions)


def _by_keys(trace: Trace, scores: Scores, heads: Tensor) -> Tensor:
    """[heads of keys, R] numbers of the heads of queries that each head of keys and values has."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, key in enumerate(torch.cat([scores.keys, heads], 1).tolist()):
        groups.setdefault(tuple(key), []).append(number)
    counts = f"{len(scores.queries)} heads of queries and {len(groups)} of keys and values"
    if len({*map(len, groups.values())}) > 1:
        trace.refuse(f"attention of {counts}, expected as many heads of queries for each")
    return torch.tensor(list(groups.values()))


def _repeated(trace: Trace, heads: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """A layer without weights that repeats each channel of values for each head of queries: its neurons, and those of
    each head of queries [heads, channels]."""
    num_heads, repeats = groups.shape
    sources = heads[groups[:, 0]].flatten()
    options = {"groups": len(sources), "affine": False}
    layer = trace.new_layer(repeats * len(sources), sources, None, is_activated=True, options=options)
    trace.add_layer(layer)
    new = torch.empty_like(heads)
    new[groups] = layer.nodes.reshape(num_heads, -1, repeats).mT
    return layer.nodes, new


def gated_by_head(call: Call, values: Neurons, gate: Neurons) -> Neurons:
    """What attention returns, times a neuron for each head; heads are permuted with these, as with biases of scores."""
    trace = call.trace
    for value in (values, gate):
        trace.check_current(value)
        trace.refuse_sources(value)
    met = values.ids.unique()
    place = next(
        (place for place, joined in enumerate(trace.attended) if torch.equal(joined[0].sort().values, met)), None
    )
    if place is None or trace.attended[place][0] is not trace.attended[place][3] or -1 in gate.versions:
        trace.refuse("an activation is multiplied by another value (a gate), expected a number or a scale per channel")
    nodes = trace.attended[place][0]
    layer = trace.layers[trace.neurons.layer_of(nodes[0])]
    attention = layer.options["attention"][int(nodes[0])]
    head_of = torch.zeros(int(nodes.max()) + 1, dtype=torch.long)
    head_of[nodes] = torch.arange(attention.num_heads).repeat_interleave(len(nodes) // attention.num_heads)
    pairs = torch.stack([head_of[values.ids].expand(*call.shape).flatten(), gate.ids.expand(*call.shape).flatten()])
    heads, gates = unique_columns(pairs)[0]
    if len(heads) != attention.num_heads or len(gates.unique()) < len(gates) or trace.depends(gates, nodes):
        trace.refuse("heads of attention meet several neurons of a gate, or one that they share")
    trace.neurons.mark_read(gates)
    trace.attended[place] = (*trace.attended[place], gates)
    layer.options["attention"][int(nodes[0])] = attention._replace(biases=(*attention.biases, gates))
    return replace(values, ids=values.ids.expand(*call.shape))


def mixed_over_positions(trace: Trace, values: Neurons, shape: Sequence[int]) -> Neurons:
    """Sums of a layer's values at several positions, with weights that no symmetry moves: channels stay channels, and
    their blocks stay where they are, as their weights may differ.

    Args:
        trace: the layers so far.
        values: [..., S, channels].
        shape: of the result.
    """
    trace.check_current(values)
    trace.refuse_sources(values)
    if -1 in values.versions or values.ids.ndim < 2 or not is_constant_along(values.ids, -2):
        trace.refuse("a matrix product over channels, with what no layer computes")
    rows = torch.tensor(list(dict.fromkeys(map(tuple, values.ids.select(-2, 0).flatten(0, -2).tolist()))))
    nodes = rows.flatten()
    if len(nodes.unique()) < len(nodes) or len({trace.neurons.layer_of(node) for node in nodes.tolist()}) > 1:
        trace.refuse("values of several layers, or of channels in several blocks, are mixed")
    if not trace.in_blocks(rows):
        trace.refuse("values are mixed in several blocks")
    trace.neurons.mark_read(nodes)
    return replace(values, ids=values.ids.narrow(-2, 0, 1).expand(*shape))


def multiply_values(call: Call, x: Any, y: Any) -> Any:
    """A product of two activations: of queries and keys, or of attention weights and values."""
    of_heads = Neurons | Turned | OfHeads
    if isinstance(x, of_heads) and isinstance(y, of_heads) and min(len(_shape(x)), len(_shape(y))) > 1:
        return scores_of(call.trace, x, _moved(y, lambda tensor: tensor.mT))
    if isinstance(x, Scores) and isinstance(y, Neurons):
        return attend(call, x, y)
    call.trace.refuse("a matrix product that is neither a linear layer nor attention")


def _moved(value: Neurons | Turned | OfHeads, move: Callable[[Tensor], Tensor]) -> Neurons | Turned | OfHeads:
    """Queries, keys or values with their axes moved."""
    if isinstance(value, Neurons):
        return replace(value, ids=move(value.ids))
    if isinstance(value, Turned):
        return Turned(tuple((move(ids), move(factors)) for ids, factors in value.terms))
    channels = None if value.channels is None else move(value.channels)
    return replace(value, labels=move(value.labels), channels=channels)


@operator(FAMILY, "scaled_dot_product_attention")
def scaled_dot_product_attention(call: Call, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Neurons:
    """Attention as one operation."""
    if not isinstance(value, Neurons):
        call.trace.refuse("values of attention are not a layer's output")
    if kwargs.pop("enable_gqa", False):
        key, value = (_repeat_heads(item, _shape(query)[-3]) for item in (key, value))
    scores = replace(scores_of(call.trace, query, key), is_softmaxed=True)
    return attend(call, with_constants(call, scores, *args, *kwargs.values()), value)


def _repeat_heads(value: Any, num_heads: int) -> Any:
    """Keys or values, each head for as many heads of queries as it has."""
    repeats = num_heads // _shape(value)[-3]
    return _moved(value, lambda tensor: tensor.repeat_interleave(repeats, -3))


@operator(FAMILY, "softmax", "_softmax", "log_softmax", "_log_softmax", reads_input=False)
def softmax(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Of attention scores, or of the network's output."""
    if isinstance(x, Scores):
        axis = args[0] if args else kwargs["dim"]
        if x.is_softmaxed or "log" in call.name or axis not in (-1, len(call.shape) - 1):
            call.trace.refuse("attention scores meet another function than one softmax over the keys")
        return replace(x, is_softmaxed=True)
    if not isinstance(x, Neurons):
        call.trace.refuse("a softmax of a value that is not a layer's output")
    if x.factor != 1:
        x = call.trace.settled(x)
    return replace(x, is_output=True, is_uniform=False)


@operator(FAMILY, "masked_fill", reads_input=False)
def masked_fill(call: Call, x: Any, *args: Any) -> Any:
    """A mask of attention scores."""
    if not isinstance(x, Scores):
        call.trace.refuse("a mask is applied to a value that is not attention scores")
    return with_constants(call, x, *args)


@operator(FAMILY, "where", reads_input=False)
def where(call: Call, condition: Any, x: Any, y: Any) -> Any:
    """A constant mask of attention scores."""
    is_mask = isinstance(condition, Tensor | Scores | NetworkInput) or is_constant(condition)
    if not any(isinstance(value, Scores) for value in (x, y)) or not is_mask:
        call.trace.refuse("a choice between values, expected a constant mask of attention scores")
    return with_constants(call, x, y)


@operator(FAMILY, "isnan", "eq", "all", "logical_not", "any", reads_input=False)
def examine_scores(call: Call, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A property of attention scores, such as for rows that are masked as a whole."""
    if not isinstance(x, Scores):
        call.trace.refuse(f"{call.name} of a value that is not attention scores")
    return x
