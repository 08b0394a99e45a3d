"""Operations that only move elements: they do to the numbers of neurons what they do to activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import (
    ComputedParameters,
    ComputedWeights,
    Elements,
    NetworkInput,
    Neurons,
    Opaque,
    Scores,
    is_constant_along,
    is_traced,
)

VIEWS = (
    *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "numpy_T", "movedim"),
    *("squeeze", "unsqueeze", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "expand"),
    *("getitem", "repeat", "tile", "mT", "swapaxes", "swapdims", "tensor_split", "expand_as", "view_as", "reshape_as"),
    *("roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat_interleave", "unfold"),
    *("unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "dsplit"),
)
"""Operations whose result may share memory with their argument, and others that only move elements."""

UNCHANGED = (
    *("dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach", "alias", "lift_fresh_copy"),
    *("_to_copy", "to", "type_as", "float", "double", "half", "bfloat16"),
)
"""Operations that change nothing when a module evaluates."""


@operator("views", *VIEWS)
def move(call: Call, *args: Any, **kwargs: Any) -> Any:
    """A view, split or repetition of one traced value."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs), is_leaf=is_traced)
    first = next(value for value in leaves if is_traced(value))
    if isinstance(first, Scores):
        return first
    if isinstance(first, ComputedWeights):
        call.trace.refuse("a view of weights that are computed from parameters")
    if isinstance(first, ComputedParameters):
        return _move_parts(call, first, (args, kwargs))

    def numbers(value: Any) -> Any:
        if not is_traced(value):
            return value
        tensor: Tensor = value.ids if isinstance(value, Neurons) else value.index
        return tensor.contiguous() if call.name in ("view", "view_as", "_unsafe_view") else tensor

    def value(tensor: Tensor) -> Elements | Neurons | NetworkInput:
        if isinstance(first, NetworkInput):
            return replace(first, index=tensor, parts=None)
        return replace(first, ids=tensor) if isinstance(first, Neurons) else replace(first, index=tensor)

    positional, named = torch.utils._pytree.tree_map(numbers, (args, kwargs), is_leaf=is_traced)
    moved = call.function(*positional, **named)
    return list(map(value, moved)) if isinstance(moved, list | tuple) else value(moved)


def _move_parts(call: Call, value: ComputedParameters, reads: Any) -> Any:
    """`move` of each parameter from which a value is computed."""
    moved = []
    for part in value.parts:
        args, kwargs = torch.utils._pytree.tree_map(
            lambda leaf, part=part: part if leaf is value else leaf, reads, is_leaf=is_traced
        )
        moved.append(move(call, *args, **kwargs))
    if isinstance(moved[0], list):
        return [ComputedParameters(parts) for parts in zip(*moved, strict=True)]
    return ComputedParameters(tuple(moved))


@operator("views", "index", "index_select", "gather")
def index(call: Call, x: Any, *places: Any) -> Any:
    """Elements at constant places; of neurons, positions at any places that no symmetry moves; of zeros, zeros."""
    if isinstance(x, Tensor) and not x.any():
        return None  # zeros, wherever they stood
    leaves = torch.utils._pytree.tree_leaves(places, is_leaf=is_traced)
    if not isinstance(x, Neurons | NetworkInput | Elements) or (
        any(map(is_traced, leaves)) and not (isinstance(x, Neurons) and _are_positions(call, x, *places))
    ):
        call.trace.refuse("elements at places that depend on the input")
    known = [leaf.value if isinstance(leaf, Opaque) else leaf for leaf in leaves]
    structure = torch.utils._pytree.tree_structure(places, is_leaf=is_traced)
    return move(call, x, *torch.utils._pytree.tree_unflatten(known, structure))


def _are_positions(call: Call, x: Neurons, places: Any, *chosen: Any) -> bool:
    """Whether places that no layer computes are those of positions."""
    given = chosen or places
    if not all(isinstance(place, Opaque | Tensor | None) for place in given):
        return False
    tensors = [place.value if isinstance(place, Opaque) else place for place in given]
    axes = [places % x.ids.ndim] if chosen else indexed_axes(tensors)
    varying = [axis for axis in range(x.ids.ndim) if not is_constant_along(x.ids, axis)]
    if call.name == "gather" and not all(is_constant_along(tensors[0], axis) for axis in varying):
        return False
    return not {*axes} & {*varying}


def indexed_axes(places: Sequence[Tensor | None]) -> list[int]:
    """The axes at whose places an index reads: of a mask, as many as it has."""
    axes: list[int] = []
    first = 0
    for place in places:
        size = place.ndim if place is not None and place.dtype == torch.bool else 1
        axes += [] if place is None else range(first, first + size)
        first += size
    return axes


@operator("no change when evaluated", *UNCHANGED)
def keep(call: Call, value: Any, *args: Any, **kwargs: Any) -> Any:
    """The value itself."""
    if isinstance(value, NetworkInput) and not call.result.is_floating_point() and value.value is not None:
        return value if not value.value.is_floating_point() else call.trace.refuse("the input is rounded")
    if isinstance(value, Neurons) and not call.result.is_floating_point():
        call.trace.refuse("a layer's output is rounded to whole numbers")
    return value
