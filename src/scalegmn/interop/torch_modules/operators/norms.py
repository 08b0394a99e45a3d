"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    neurons = call.trace.as_neurons(x, axis)
    reads = call.trace.channels_along(neurons, axis)
    if neurons.value is not None:
        parts = (weight, bias, *(statistics or (None, None)))
        call.trace.claimed = evaluated(kind, neurons.value, axis, [*map(call.trace.read_if_any, parts)], options)
    options.pop("is_centred", None)
    options |= {"norm": kind, "groups": len(reads), "affine": weight is not None}
    scale = None if weight is None else replace(weight, index=weight.index[:, None])
    layer = call.trace.new_layer(len(reads), reads, scale, bias=bias, statistics=statistics, options=options)
    return call.trace.output_of(layer, axis, call.shape)


def evaluated(kind: str, x: Tensor, axis: int, parts: Sequence[Tensor | None], options: dict[str, Any]) -> Tensor:
    """The norm, written out: (x - mean) / sqrt(variance + epsilon) weight + bias.

    Args:
        kind: one of `networks.layers.NORMS`.
        x: what it reads.
        axis: the axis of its channels.
        parts: weight, bias, mean and variance.
        options: epsilon, the groups of a group norm, and whether the mean is subtracted.
    """
    weight, bias, mean, variance = (_along(part, axis, x.ndim) for part in parts)
    if mean is None or variance is None:
        rows = x.unflatten(1, (options.get("norm_groups", 1), -1)).flatten(2) if kind == "group" else x
        mean = rows.mean(-1, keepdim=True) if options.get("is_centred", True) else torch.zeros_like(rows[..., :1])
        variance = (rows - mean).square().mean(-1, keepdim=True)
        normal = ((rows - mean) / (variance + options["epsilon"]).sqrt()).reshape(x.shape)
    else:
        normal = (x - mean) / (variance + options["epsilon"]).sqrt()
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


def _along(part: Tensor | None, axis: int, ndim: int) -> Tensor | None:
    return None if part is None else part.reshape([-1 if other == axis % ndim else 1 for other in range(ndim)])


@operator(FAMILY, "batch_norm")
def batch_norm(call: Call, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any) -> Neurons:
    """A batch norm as it evaluates: with its running statistics or, if it has none, those of the batch."""
    is_training, _, epsilon, _ = rest
    if is_training and mean is not None:
        call.trace.refuse("a batch norm that changes its running statistics")
    if mean is None:
        output = norm_layer(call, x, 1, "group", weight, bias, epsilon=epsilon, norm_groups=call.shape[1])
        value = call.trace.as_neurons(x, 1).value
        if value is not None:  # each channel over the batch, too
            scale, shift = map(call.trace.read_if_any, (weight, bias))
            call.trace.claimed = functional.batch_norm(value, None, None, scale, shift, True, 0.0, epsilon)
        return output
    return norm_layer(call, x, 1, "batch", weight, bias, (mean, variance), epsilon=epsilon)


@operator(FAMILY, "instance_norm")
def instance_norm(call: Call, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any) -> Neurons:
    """A norm of each channel over its positions, as one over groups of one channel."""
    reads_input, _, epsilon, _ = rest
    if not reads_input:
        return norm_layer(call, x, 1, "batch", weight, bias, (mean, variance), epsilon=epsilon)
    return norm_layer(call, x, 1, "group", weight, bias, epsilon=epsilon, norm_groups=call.shape[1])


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
    if len(shape) != 1:
        call.trace.refuse(f"a root mean square norm over {len(shape)} axes, expected the last one")
    return norm_layer(call, x, -1, "layer", weight, None, epsilon=epsilon or 0.0, is_centred=False)


@operator(FAMILY, "group_norm")
def group_norm(
    call: Call, x: Any, num_groups: int, weight: Any = None, bias: Any = None, epsilon: float = 1e-5, *_: Any
) -> Neurons:
    """A norm over groups of channels."""
    return norm_layer(call, x, 1, "group", weight, bias, epsilon=epsilon, norm_groups=num_groups)
