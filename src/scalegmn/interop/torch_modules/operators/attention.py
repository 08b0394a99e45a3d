"""Multi-head attention, as one operation or written out: softmax(q k^T) v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.trace import Refusal, Trace
from scalegmn.interop.torch_modules.values import (
    Elements,
    NetworkInput,
    Neurons,
    Scores,
    is_constant,
    is_constant_along,
)

FAMILY = "attention"


def with_constants(call: Call, *values: Any) -> Scores:
    """Attention scores with what is added to them, or what they are multiplied by: constants, or masks that are
    computed from the input, the same for all heads."""
    scores = [value for value in values if isinstance(value, Scores)]
    if len(scores) > 1:
        call.trace.refuse("attention scores are combined with other scores, expected constant masks and scales")
    for value in values:
        if isinstance(value, Neurons) or (isinstance(value, Elements) and not value.is_buffer):
            kind = "a parameter" if isinstance(value, Elements) else "a layer's output"
            call.trace.refuse(f"attention scores meet {kind}, expected constant masks and scales")
        if len(scores[0].queries) > 1 and not _is_same_for_heads(call, value):
            call.trace.refuse("attention scores meet constants that differ by head")
    return scores[0]


def _is_same_for_heads(call: Call, value: Any) -> bool:
    """Whether a constant is the same for all heads, which lie along the third axis from the end."""
    if isinstance(value, Elements):
        value = call.trace.read(value)
    tensor = value.value if isinstance(value, NetworkInput) else value
    if not isinstance(tensor, Tensor) or tensor.ndim < 3 or tensor.shape[-3] == 1:
        return True
    return bool((tensor == tensor.narrow(-3, 0, 1)).all())


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
        if not isinstance(value, Neurons) or value.ids.ndim < 2:
            trace.refuse("queries or keys of attention are not a layer's output")
        heads_of(trace, value)
    rows = [value.ids.select(-2, 0) for value in (queries, keys)]
    batch = torch.broadcast_shapes(*(item.shape[:-1] for item in rows))
    lists = [map(tuple, item.expand(*batch, -1).reshape(-1, item.shape[-1]).tolist()) for item in rows]
    pairs = list(dict.fromkeys(zip(*lists, strict=True)))
    return Scores(torch.tensor([query for query, _ in pairs]), torch.tensor([key for _, key in pairs]))


def attend(call: Call, scores: Scores, values: Neurons) -> Neurons:
    """Multi-head attention: the neurons of the values, coupled with those of queries and keys."""
    trace, heads, queries, keys = call.trace, heads_of(call.trace, values), scores.queries, scores.keys
    if not scores.is_softmaxed:
        trace.refuse("values are weighted by attention scores without a softmax over the keys")
    is_repeated = any(len(nodes.unique()) < nodes.numel() for nodes in (heads, queries, keys))
    if not len(heads) == len(queries) == len(keys) or is_repeated:
        counts = f"{len(queries)} heads of queries, {len(keys)} of keys and {len(heads)} of values"
        trace.refuse(f"attention of {counts}, expected as many of each")
    for nodes in (queries.flatten(), keys.flatten(), heads.flatten()):
        if trace.neurons.is_read(nodes):
            trace.refuse("queries, keys or values of attention are read elsewhere too")
        trace.neurons.mark_read(nodes)
    trace.attended.append((queries.flatten(), keys.flatten(), heads.flatten()))
    place = trace.neurons.layer_of(heads[0, 0])
    attention = trace.layers[place].options.setdefault("attention", {})
    attention[int(heads[0, 0])] = (queries.flatten(), keys.flatten(), len(heads))
    return replace(values, ids=values.ids.narrow(-2, 0, 1).expand(*call.shape))


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
    if isinstance(x, Neurons) and isinstance(y, Neurons) and min(x.ids.ndim, y.ids.ndim) > 1:
        return scores_of(call.trace, x, replace(y, ids=y.ids.mT))
    if isinstance(x, Scores) and isinstance(y, Neurons):
        return attend(call, x, y)
    call.trace.refuse("a matrix product that is neither a linear layer nor attention")


@operator(FAMILY, "scaled_dot_product_attention")
def scaled_dot_product_attention(call: Call, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Neurons:
    """Attention as one operation."""
    for operand in (query, key, value):
        if not isinstance(operand, Neurons):
            call.trace.refuse("queries, keys or values of attention are not a layer's output")
    scores = replace(scores_of(call.trace, query, key), is_softmaxed=True)
    return attend(call, with_constants(call, scores, *args, *kwargs.values()), value)


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
