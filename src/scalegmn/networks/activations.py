"""The hidden activations of input networks, and the scalars that commute with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scalegmn.networks.scalar_groups import SCALES, SIGNS, TRIVIAL, ScalarGroup
from scalegmn.registry import Registry


@dataclass(frozen=True)
class Activation:
    """An activation by name; creating one does not register it, `register_activation` does.

    Args:
        name: what specs, zoos and configurations call it.
        function: (z, w0) -> sigma(z), componentwise; w0 is the frequency of a layer of sines.
        group: the scalars that commute with it.
    """

    name: str
    function: Callable[[Tensor, float], Tensor]
    group: ScalarGroup = TRIVIAL


REGISTRY: Registry[Activation] = Registry("activation")


def register_activation(activation: Activation) -> Activation:
    """Makes an activation usable everywhere by its name."""
    return REGISTRY.register(activation.name, activation)


for _activation in (
    Activation("sine", lambda z, w0: torch.sin(w0 * z), SIGNS),
    Activation("tanh", lambda z, w0: torch.tanh(z), SIGNS),
    Activation("relu", lambda z, w0: torch.relu(z), SCALES),
    Activation("leaky_relu", lambda z, w0: functional.leaky_relu(z), SCALES),
    Activation("gelu", lambda z, w0: functional.gelu(z)),
    Activation("silu", lambda z, w0: functional.silu(z)),
    Activation("sigmoid", lambda z, w0: torch.sigmoid(z)),
    Activation("identity", lambda z, w0: z, SCALES),  # all commute with an identity; here those of relu
):
    register_activation(_activation)

ACTIVATION_SYMMETRY = {
    name: "scale" if item.group.scales else "sign" if item.group.signs else "permutation"
    for name, item in REGISTRY.items()
}
"""Transitional: reads the registry as it is at import; use `REGISTRY[name].group`."""

ACTIVATIONS = tuple(ACTIVATION_SYMMETRY)
"""Transitional: use `REGISTRY`."""

HETERO = "hetero"
"""The activation of a layer whose networks differ in it, and the symmetry of such a batch."""
