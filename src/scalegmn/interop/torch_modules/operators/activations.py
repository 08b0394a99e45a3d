"""Activation functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import Neurons

ACTIVATIONS = {
    **{name: name for name in ("tanh", "relu", "leaky_relu", "gelu", "silu", "sigmoid")},
    "sin": "sine",
}
"""Operation -> the activation's name in a `LayerSpec`."""


@operator("activations", *ACTIVATIONS)
def activate(call: Call, value: Any, *args: Any, **kwargs: Any) -> Neurons:
    """The activation of the layer that computed the value."""
    trace, name = call.trace, ACTIVATIONS[call.name]
    if not isinstance(value, Neurons):
        trace.refuse(f"{name} is applied to a value that is not a layer's output")
    trace.check_current(value)
    owners = list(value.versions)
    if -1 in owners:
        trace.refuse(f"{name} is applied to the network's input")
    if any(trace.layers[owner].is_activated for owner in owners):
        trace.refuse(f"{name} is a second activation of one layer")
    if value.factor != 1 and name != "sine":
        trace.refuse(f"{name} is applied to the multiple {value.factor:g} x of a layer's output x")
    for owner in owners:
        layer = trace.layers[owner]
        layer.options["activation"], layer.is_activated = name, True
        if name == "sine":
            layer.options["w0"] = float(value.factor)
        layer.version += 1
    return replace(value, versions={owner: trace.layers[owner].version for owner in owners}, factor=1.0)
