"""Operations on queries and keys before their products, that compute each head alike.

Rotary embeddings are sums of channels of a head with constant factors that differ by position: which channels meet is
known (`Turned`). Whatever else is done to each head alike (a norm over its channels) is known by the heads alone
(`OfHeads`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from scalegmn.interop.torch_modules.alignment import coupled_layer
from scalegmn.interop.torch_modules.channelwise import JOINS, OF_ALL, POINTWISE
from scalegmn.interop.torch_modules.heads import as_of_heads, as_turned
from scalegmn.interop.torch_modules.operators.views import UNCHANGED, VIEWS
from scalegmn.interop.torch_modules.pinning import pin
from scalegmn.interop.torch_modules.program import operation
from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import (
    Elements,
    Neurons,
    OfHeads,
    Opaque,
    Turned,
    is_constant_along,
    is_traced,
)

STACKS = (*JOINS, "stack")

LINEAR = (
    *("mul", "add", "sub", "neg", "div", "index", "view_as_complex", "view_as_real", *STACKS, *VIEWS, *UNCHANGED),
)
"""Operations on sums of neurons with constant factors that give such sums."""

NORMS = ("rms_norm", "layer_norm")

PRODUCTS = ("matmul", "bmm")


def before_scores(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """The operations whose results nothing but products of queries and keys read."""
    found: set[torch.fx.Node] = set()
    for node in reversed(graph.nodes):
        is_candidate = node.op == "call_function" and node.users and _is_headwise(node)
        if is_candidate and all(user in found or _is_product(user, node) for user in node.users):
            found.add(node)
    return found


def _is_headwise(node: torch.fx.Node) -> bool:
    name = operation(node).rstrip("_")
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or name in POINTWISE
    return name in (*LINEAR, *NORMS, *OF_ALL) or is_pointwise


def _is_product(node: torch.fx.Node, operand: torch.fx.Node) -> bool:
    """Whether an operation multiplies an operand, queries or keys, by the other."""
    if node.op != "call_function":
        return False
    name = operation(node)
    if name == "scaled_dot_product_attention":
        return operand in node.args[:2] and operand not in node.args[2:]
    return name in PRODUCTS and _leads_to_softmax(node)


def _leads_to_softmax(node: torch.fx.Node) -> bool:
    """Whether a softmax reads what an operation returns, before another product does."""
    waiting, seen = [*node.users], set()
    while waiting:
        user = waiting.pop()
        if user in seen or user.op != "call_function" or operation(user) in (*PRODUCTS, "linear", "addmm"):
            continue
        if operation(user) in ("softmax", "_softmax"):
            return True
        seen.add(user)
        waiting += user.users
    return False


def computed_in_heads(trace: Trace, function: Any, args: Any, kwargs: Any, actual: Any, shape: Sequence[int]) -> Any:
    """The value of an operation on queries or keys.

    Args:
        trace: the layers so far.
        function: the operation (aten).
        args: its arguments, with traced values.
        kwargs: its named arguments.
        actual: (args, kwargs) as the module has them.
        shape: of its result.

    Raises:
        Refusal: it does not compute each head alike.
    """
    if function is operator.getitem:  # one of several views
        return args[0][args[1]]
    name = str(function).split(".")[1].rstrip("_")
    leaves, _ = _pytree.tree_flatten((args, kwargs), is_leaf=is_traced)
    values, _ = _pytree.tree_flatten(actual)
    operands = list(zip(leaves, values, strict=True))
    of_heads = [leaf for leaf in leaves if isinstance(leaf, OfHeads)]
    if name in LINEAR and not of_heads:
        return _linear(trace, name, function, args, kwargs, operands)
    if not of_heads and not any(_is_split(leaf) for leaf in leaves):
        trace.refuse("a function of channels that are not cut into heads")
    return _alike(trace, name, function, (args, kwargs), operands, shape)


def _is_split(value: Any) -> bool:
    """Whether channels lie along the last axis, and heads along another."""
    if isinstance(value, Turned):
        return True
    return isinstance(value, Neurons) and sum(not is_constant_along(value.ids, a) for a in range(value.ids.ndim)) > 1


def _linear(trace: Trace, name: str, function: Any, args: Any, kwargs: Any, operands: Sequence[tuple[Any, Any]]) -> Any:
    """An operation that keeps sums of neurons with constant factors."""
    if name in STACKS:
        parts = [as_turned(trace, value) for value in args[0]]
        if _are_positions(parts, args[1] if len(args) > 1 else kwargs.get("dim", 0)):
            return _alike(trace, name, function, (args, kwargs), operands, ())
        return _side_by_side(parts, lambda tensors: function(tensors, *args[1:], **kwargs))
    if name in ("mul", "div", "add", "sub", "neg"):
        return _sum(trace, name, operands)
    turned = as_turned(trace, args[0])
    if name == "view_as_complex":
        pairs = [(ids.unbind(-1), factors.unbind(-1)) for ids, factors in turned.terms]
        return Turned(
            tuple(term for ids, (x, y) in pairs for term in ((ids[0], x.to(x.dtype.to_complex())), (ids[1], y * 1j)))
        )
    if name == "view_as_real":
        return Turned(
            tuple((ids[..., None].expand(*ids.shape, 2), torch.view_as_real(x.contiguous())) for ids, x in turned.terms)
        )
    if name in UNCHANGED:
        return turned

    def moved(tensor: Tensor) -> Any:
        tensor = tensor.contiguous() if name in ("view", "view_as", "_unsafe_view") else tensor
        given = [value if index else tensor for index, value in enumerate(args)]
        return function(*given, **kwargs)

    terms = [(moved(ids), moved(factors)) for ids, factors in turned.terms]
    if isinstance(terms[0][0], Tensor):
        return Turned(tuple(terms))
    return [Turned(tuple((ids[i], x[i]) for ids, x in terms)) for i in range(len(terms[0][0]))]


def _are_positions(parts: Sequence[Turned], axis: int) -> bool:
    """Whether places along an axis are positions, of several layers: of queries of two streams, for example."""
    ids = [ids for part in parts for ids, _ in part.terms]
    sizes = {item.shape[axis] for item in ids}
    first = [item.narrow(axis, 0, 1) for item in ids]
    is_same = all(torch.equal(first[0], other) for other in first[1:] if other.shape == first[0].shape)
    return sizes != {1} and not is_same and all(is_constant_along(item, axis) for item in ids)


def _side_by_side(parts: Sequence[Turned], join: Any) -> Turned:
    """Sums in different places, each with as many terms, those that are missing with factors of 0."""
    count = max(len(part.terms) for part in parts)
    dtype = parts[0].terms[0][1].dtype
    terms = []
    for place in range(count):
        found = [part.terms[min(place, len(part.terms) - 1)] for part in parts]
        kept = [place < len(part.terms) for part in parts]
        pairs = zip(found, kept, strict=True)
        factors = [x.to(dtype) if keep else torch.zeros_like(x, dtype=dtype) for (_, x), keep in pairs]
        terms.append((join([ids for ids, _ in found]), join(factors)))
    return Turned(tuple(terms))


def _sum(trace: Trace, name: str, operands: Sequence[tuple[Any, Any]]) -> Turned:
    """Sums, differences, negatives, and products with constants."""
    parts = [as_turned(trace, leaf) if isinstance(leaf, Neurons | Turned) else None for leaf, _ in operands]
    first = parts[0]
    if name == "neg" and first is not None:
        return Turned(tuple((ids, -factors) for ids, factors in first.terms))
    if len(parts) != 2:
        trace.refuse(f"{name} with options")
    second = parts[1]
    if name in ("add", "sub") and first is not None and second is not None:
        sign = 1 if name == "add" else -1
        terms = [*first.terms, *((ids, sign * factors) for ids, factors in second.terms)]
    elif name in ("mul", "div") and (first is None) != (second is None) and (name == "mul" or second is None):
        (leaf, constant), turned = operands[first is not None], first or second
        if isinstance(leaf, Elements) and not leaf.is_buffer:
            trace.refuse("queries or keys are multiplied by parameters")
        assert turned is not None
        is_of_neurons = not any(isinstance(value, Turned) for value, _ in operands)
        if isinstance(leaf, Opaque) and is_of_neurons and _is_uniform(turned, constant):
            trace.refuse("a factor that all channels have, such as of a norm")
        terms = [(ids, factors / constant if name == "div" else factors * constant) for ids, factors in turned.terms]
    else:
        trace.refuse(f"{name} of what is no sum of neurons with constant factors")
    shape = torch.broadcast_shapes(*(factors.shape for _, factors in terms))
    return Turned(tuple((ids.expand(shape), factors.expand(shape)) for ids, factors in terms))


def _is_uniform(turned: Turned, constant: Any) -> bool:
    """Whether a factor is the same for all channels."""
    if not isinstance(constant, Tensor):
        return True
    ids, constant = torch.broadcast_tensors(turned.terms[0][0], constant)
    return all(is_constant_along(ids, axis) or is_constant_along(constant, axis) for axis in range(ids.ndim))


def _alike(
    trace: Trace, name: str, function: Any, reads: Any, operands: Sequence[tuple[Any, Any]], shape: Sequence[int]
) -> Any:
    """An operation that computes each head alike."""
    operands = [
        (as_of_heads(trace, leaf) if isinstance(leaf, Neurons | Turned) else leaf, value) for leaf, value in operands
    ]
    values = [leaf for leaf, _ in operands if isinstance(leaf, OfHeads)]
    first = values[0]
    if any(not torch.equal(value.heads, first.heads) for value in values):
        if name not in JOINS:
            trace.refuse("heads of several layers meet")
        return _joined(trace, function, reads, values)
    if name in UNCHANGED:
        return first
    if name in STACKS:
        if len(values) < len(reads[0][0]):
            trace.refuse("heads are concatenated with other values")
        labels = function([value.labels for value in values], *reads[0][1:], **reads[1])
        return replace(first, labels=labels, channels=None)
    if name in (*VIEWS, "index"):
        return _moved(first, function, reads)
    is_whole = first.channels is not None and first.labels.shape[-1] == first.heads.shape[1]
    if name in OF_ALL:
        labels = _reduced(trace, first.labels, shape)
        return replace(first, labels=labels, channels=torch.full_like(labels, -1) if is_whole else None)
    if name in NORMS and (len(reads[0][1]) != 1 or not is_constant_along(first.labels, -1)):
        trace.refuse("a norm over several heads")
    result = _elementwise(trace, operands, shape)
    return result if name not in NORMS or is_whole else replace(result, channels=None)


def _joined(trace: Trace, function: Any, reads: Any, values: Sequence[OfHeads]) -> OfHeads:
    """Positions of heads of several layers, one behind the other: heads in the same places, and their channels, are
    permuted alike."""
    axis = reads[0][1] if len(reads[0]) > 1 else reads[1].get("dim", 0)
    labels = [value.labels for value in values]
    places = [item.narrow(axis, 0, 1) for item in labels]
    is_aligned = all(torch.equal(places[0], other) for other in places[1:] if other.shape == places[0].shape)
    is_whole = len(values) == len(reads[0][0]) and len({value.heads.shape for value in values}) == 1
    if not is_whole or not is_aligned or not all(is_constant_along(item, axis) for item in labels):
        trace.refuse("heads of several layers meet")
    nodes = coupled_layer(trace, [value.heads.flatten() for value in values])
    channels = [value.channels for value in values if value.channels is not None]
    return replace(
        values[0],
        heads=nodes.reshape(values[0].heads.shape),
        labels=function(labels, *reads[0][1:], **reads[1]),
        channels=function(channels, *reads[0][1:], **reads[1]) if len(channels) == len(values) else None,
    )


def _moved(value: OfHeads, function: Any, reads: Any) -> Any:
    """A view of heads."""

    def moved(tensor: Tensor) -> Any:
        args = (tensor.contiguous() if isinstance(leaf, OfHeads) else leaf for leaf in reads[0])
        return function(*args, **reads[1])

    labels = moved(value.labels)
    channels = None if value.channels is None else moved(value.channels)
    if isinstance(labels, Tensor):
        return replace(value, labels=labels, channels=channels)
    parts = [None] * len(labels) if channels is None else channels
    return [replace(value, labels=x, channels=y) for x, y in zip(labels, parts, strict=True)]


def _elementwise(trace: Trace, operands: Sequence[tuple[Any, Any]], shape: Sequence[int]) -> OfHeads:
    """A function of heads and of what they all have alike, element by element."""
    shape = tuple(shape)
    operands = _with_gains(trace, operands, shape)
    values = [leaf for leaf, _ in operands if isinstance(leaf, OfHeads)]
    labels, *others = (value.labels.expand(shape) for value in values)
    if any(not torch.equal(labels, other) for other in others):
        trace.refuse("heads meet one another")
    channels = torch.full(shape, -1)
    are_alike = all(value.channels is not None for value in values)
    for value in values if are_alike else ():
        assert value.channels is not None
        own = value.channels.expand(shape)
        are_alike = are_alike and bool(((own == channels) | (own < 0) | (channels < 0)).all())
        channels = torch.maximum(channels, own)
    for leaf, value in operands:
        if isinstance(leaf, OfHeads) or not isinstance(value, Tensor):
            continue
        axes = [axis for axis in range(len(shape)) if not is_constant_along(value.expand(shape), axis)]
        if not all(is_constant_along(labels, axis) for axis in axes):
            trace.refuse("heads meet values that differ by head")
        are_alike = are_alike and all(is_constant_along(channels, axis) for axis in axes)
        pin(trace, [leaf] if isinstance(leaf, Elements) else [], "all heads have the same parameter")
    return replace(values[0], labels=labels, channels=channels if are_alike else None)


def _with_gains(trace: Trace, operands: Sequence[tuple[Any, Any]], shape: tuple[int, ...]) -> list[tuple[Any, Any]]:
    """Heads, and a parameter for each channel of each head, as heads alone: those of a layer without weights that reads
    both."""
    heads = [leaf for leaf, _ in operands if isinstance(leaf, OfHeads)]
    gains = [leaf for leaf, _ in operands if isinstance(leaf, Elements) and not leaf.is_buffer]
    if len(heads) != 1 or len(gains) != 1 or heads[0].channels is None:
        return [*operands]
    (value,), (gain,) = heads, gains
    assert value.channels is not None
    index = gain.index.expand(shape)
    places = torch.stack([value.labels.expand(shape), value.channels.expand(shape), index]).flatten(1).unique(dim=1)
    is_for_each = places.shape[1] == value.heads.numel() == len(places[2].unique()) and int(places[1].min()) >= 0
    if not is_for_each or bool(index.movedim(-1, 0).flatten(1).diff(dim=1).eq(0).all()):
        return [*operands]
    rows = replace(gain, index=places[2].reshape(-1, 1), counted=None)
    constants = trace.new_layer(value.heads.numel(), None, rows, options={"constant": True})
    trace.add_layer(constants)
    nodes = coupled_layer(trace, [value.heads.flatten(), constants.nodes])
    new = replace(value, heads=nodes.reshape(value.heads.shape))
    return [
        (new, actual) if leaf is value else (None, None) if leaf is gain else (leaf, actual)
        for leaf, actual in operands
    ]


def _reduced(trace: Trace, labels: Tensor, shape: Sequence[int]) -> Tensor:
    """The heads of sums or means over the last axis."""
    if len(shape) not in (labels.ndim, labels.ndim - 1) or tuple(shape[: labels.ndim - 1]) != labels.shape[:-1]:
        trace.refuse("a sum over other axes than that of the channels")
    if not is_constant_along(labels, -1):
        trace.refuse("a sum over several heads")
    return labels[..., :1] if len(shape) == labels.ndim else labels[..., 0]
