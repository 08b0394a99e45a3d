"""Activation functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from scalegmn.interop.torch_modules.operators.registry import Call, operator
from scalegmn.interop.torch_modules.values import PREPARED, NetworkInput, Neurons
from scalegmn.networks import evaluate

ACTIVATIONS = {
    **{name: name for name in ("tanh", "relu", "leaky_relu", "gelu", "silu", "sigmoid")},
    "sin": "sine",
}
"""Operation -> the activation's name in a `LayerSpec`."""


@operator("activations", *ACTIVATIONS)
def activate(call: Call, value: Any, *args: Any, **kwargs: Any) -> Neurons | NetworkInput:
    """The activation of the layer that computed the value."""
    trace, name = call.trace, ACTIVATIONS[call.name]
    if isinstance(value, NetworkInput) and name == "sine":  # a Fourier feature
        return PREPARED
    if not isinstance(value, Neurons):
        trace.refuse(f"{name} is applied to a value that is not a layer's output")
    trace.check_current(value)
    owners = list(value.versions)
    if -1 in owners:
        trace.refuse(f"{name} is applied to the network's input")
    if any(trace.layers[owner].is_activated for owner in owners):
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
        trace.claimed = evaluated(call, name, value.value, value.factor, args, kwargs)
    return replace(value, versions={owner: trace.layers[owner].version for owner in owners}, factor=1.0)


def evaluated(call: Call, name: str, z: Tensor, w0: float, args: Any, kwargs: Any) -> Tensor:
    """The activation as networks of this package have it; the slope of leaky relu and the approximation of gelu, which
    a spec does not hold, as the module has them."""
    if name in ("leaky_relu", "gelu"):
        return call.function(z, *args, **kwargs) if call.function.__name__[-1] != "_" else evaluate.activate(z, name)
    return evaluate.activate(z, name, w0)
