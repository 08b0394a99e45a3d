"""Activation functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import PREPARED, NetworkInput, Neurons, is_number
from scalegmn.networks import evaluate
from scalegmn.networks.activations import gelu, leaky_relu

_SAME_NAME = (
    *("tanh", "relu", "leaky_relu", "gelu", "silu", "sigmoid"),
    *("elu", "selu", "softplus", "log_sigmoid", "mish", "hardswish", "hardsigmoid", "relu6"),
)
ACTIVATIONS = {**{name: name for name in _SAME_NAME}, "sin": "sine", "celu": "elu"}
"""Operation -> the activation's name in a `LayerSpec`, for the parameters that the operation has by default."""

_PARAMETERS: dict[str, tuple[str, Any, Callable[[Any], str]]] = {
    "leaky_relu": ("negative_slope", 0.01, leaky_relu),
    "gelu": ("approximate", "none", gelu),
}
"""Operation -> its parameter, the default, and the activation's name for a value of it."""

BOUNDS = {(0.0, None): "relu", (0.0, 6.0): "relu6", (-1.0, 1.0): "hardtanh"}
"""Lower and upper bound -> the activation that keeps values between them."""


@operator("activations", *ACTIVATIONS)
def activate(call: Call, value: Any, *args: Any, **kwargs: Any) -> Neurons | NetworkInput:
    """The activation of the layer that computed the value."""
    name = ACTIVATIONS[call.name]
    if call.name in _PARAMETERS:
        key, default, named = _PARAMETERS[call.name]
        name = named(args[0] if args else kwargs.get(key, default))
    return activated(call, name, value)


@operator("activations", "rrelu")
def middle_slope(call: Call, value: Any, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any) -> Neurons | NetworkInput:
    """A leaky relu whose slope is drawn in training, and the middle of its range when it evaluates."""
    return activated(call, leaky_relu((lower + upper) / 2), value)


@operator("activations", "clamp", "hardtanh", "clamp_min", "clamp_max")
def bound(call: Call, value: Any, *args: Any, **kwargs: Any) -> Neurons | NetworkInput:
    """An activation that keeps values between two numbers; other bounds are for the network's output."""
    if isinstance(value, NetworkInput):
        return PREPARED
    names = {"hardtanh": ("min_val", "max_val"), "clamp_max": ("max",)}.get(call.name, ("min", "max"))
    given = {"min_val": -1, "max_val": 1} if call.name == "hardtanh" else {}
    given |= dict(zip(names, args, strict=False)) | kwargs
    bounds = [next((given[key] for key in keys if given.get(key) is not None), None) for keys in _BOUND_KEYS]
    if any(item is not None and not is_number(item) for item in bounds):
        call.trace.refuse("an activation is bounded by other values, expected numbers")
    name = BOUNDS.get(tuple(None if item is None else float(item) for item in bounds))  # type: ignore[arg-type]
    is_used = isinstance(value, Neurons) and any(call.trace.is_activated(owner) for owner in value.versions)
    if not isinstance(value, Neurons) or (name and not is_used and not value.is_output):
        return activated(call, name or call.name, value)
    return replace(value, is_output=True, is_uniform=value.is_uniform or not value.is_output)


_BOUND_KEYS = (("min", "min_val"), ("max", "max_val"))


def activated(call: Call, name: str, value: Any) -> Neurons | NetworkInput:
    """The value after the activation of this name."""
    trace = call.trace
    if isinstance(value, NetworkInput) and name == "sine":  # a Fourier feature
        return PREPARED
    if not isinstance(value, Neurons):
        trace.refuse(f"{name} is applied to a value that is not a layer's output")
    trace.check_current(value)
    trace.refuse_sources(value)
    owners = list(value.versions)
    if owners == [-1]:
        trace.refuse(f"{name} is applied to the network's input")
    if call.is_read_elsewhere or -1 in owners:
        return of_its_own(call, name, value)
    if any(map(trace.is_activated, owners)):
        trace.refuse(f"{name} is a second activation of one layer")
    if name != "sine" or value.factor < 0:
        value = trace.settled(value)
    for owner in owners:
        layer = trace.layers[owner]
        layer.options["activation"], layer.is_activated = name, True
        if name == "sine":
            layer.options["w0"] = float(value.factor)
        layer.version += 1
    if value.value is not None:
        trace.claimed = evaluate.activate(value.value, name, value.factor)
    return replace(value, versions={owner: trace.layers[owner].version for owner in owners}, factor=1.0)


def of_its_own(call: Call, name: str, value: Neurons) -> Neurons:
    """The activation as a layer without weights, beside the value itself, which others read too."""
    trace, factor = call.trace, value.factor if name == "sine" and value.factor > 0 else 1.0
    if factor != 1:
        value = replace(value, factor=1.0)
    axis = trace.channel_axis(value)
    neurons = trace.as_neurons(value, axis)
    reads = trace.channels_along(neurons, axis)
    options = {"groups": len(reads), "affine": False, "activation": name, "w0": factor}
    layer = trace.new_layer(len(reads), reads, None, is_activated=True, options=options)
    if neurons.value is not None:
        trace.claimed = evaluate.activate(neurons.value, name, factor)
    return trace.output_of(layer, axis, call.shape)
