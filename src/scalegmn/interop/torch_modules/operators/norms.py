"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import Elements, Neurons

FAMILY = "normalisation"


def norm_layer(
    call: Call,
    x: Any,
    axis: int,
    kind: str,
    weight: Elements | None,
    bias: Elements | None,
    statistics: tuple[Elements, Elements] | None = None,
    **options: Any,
) -> Neurons:
    """A normalisation layer, which reads channel by channel.

    Args:
        call: the operation.
        x: what it reads.
        axis: the axis of its channels.
        kind: one of `networks.layers.NORMS`.
        weight: [n] scales or None.
        bias: [n] shifts or None.
        statistics: running mean and variance [n].
        **options: further fields of its `LayerSpec`.
    """
    reads = call.trace.channels_along(call.trace.as_neurons(x, axis), axis)
    options |= {"norm": kind, "groups": len(reads), "affine": weight is not None}
    scale = None if weight is None else replace(weight, index=weight.index[:, None])
    layer = call.trace.new_layer(len(reads), reads, scale, bias=bias, statistics=statistics, options=options)
    return call.trace.output_of(layer, axis, call.shape)


@operator(FAMILY, "batch_norm")
def batch_norm(call: Call, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any) -> Neurons:
    """A batch norm as it evaluates, with its running statistics."""
    is_training, _, epsilon, _ = rest
    if is_training or mean is None:
        call.trace.refuse("a batch norm without running statistics, which depends on the other inputs of its batch")
    return norm_layer(call, x, 1, "batch", weight, bias, (mean, variance), epsilon=epsilon)


@operator(FAMILY, "layer_norm")
def layer_norm(
    call: Call, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
) -> Neurons:
    """A layer norm over the last axis."""
    if len(shape) != 1:
        call.trace.refuse(f"a layer norm over {len(shape)} axes, expected the last one")
    return norm_layer(call, x, -1, "layer", weight, bias, epsilon=epsilon)


@operator(FAMILY, "rms_norm")
def rms_norm(call: Call, x: Any, shape: Sequence[int], weight: Any = None, epsilon: float | None = None) -> Neurons:
    """A root mean square norm over the last axis."""
    return layer_norm(call, x, shape, weight, None, epsilon or 0.0)


@operator(FAMILY, "group_norm")
def group_norm(
    call: Call, x: Any, num_groups: int, weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
) -> Neurons:
    """A norm over groups of channels."""
    return norm_layer(call, x, 1, "group", weight, bias, epsilon=epsilon, norm_groups=num_groups)
