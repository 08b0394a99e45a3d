"""The hidden activations of input networks, and the scalars that commute with them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

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


HETERO: Final = "hetero"
"""The activation of a layer whose networks differ in it, and the symmetry of such a batch."""


class Activations(Registry[Activation]):
    """Activations by name, those with a parameter too: `leaky_relu(0.2)` has another slope than 0.01, `gelu(tanh)` is
    the approximation by tanh. They are not listed, and have the scalars of `leaky_relu` and `gelu`."""

    def __init__(self) -> None:
        super().__init__("activation")
        # those that were asked for: torch.compile cannot trace regexes
        self._with_parameter: dict[str, Activation] = {}

    def find(self, name: str) -> Activation | None:
        """The activation of a name; None if there is none."""
        activation = super().find(name) or self._with_parameter.get(name)
        if activation is None and (activation := _with_parameter(name)) is not None:
            self._with_parameter[name] = activation
        return activation


def _with_parameter(name: str) -> Activation | None:
    """The activation of a name such as `leaky_relu(0.2)`; None if it is none, or written otherwise."""
    if name == "gelu(tanh)":
        return Activation(name, lambda z, w0: functional.gelu(z, approximate="tanh"))
    match = re.fullmatch(r"leaky_relu\((.+)\)", name)
    try:
        slope = float(match[1]) if match else math.nan
    except ValueError:
        return None
    if not math.isfinite(slope) or leaky_relu(slope) != name:
        return None
    return Activation(name, lambda z, w0: functional.leaky_relu(z, slope), SCALES)


def leaky_relu(slope: float) -> str:
    """The name of max(z, 0) + slope min(z, 0)."""
    return {0.0: "relu", 0.01: "leaky_relu"}.get(float(slope), f"leaky_relu({float(slope)})")


def gelu(approximate: str) -> str:
    """The name of z Phi(z), exact (`none`) or with tanh in it (`tanh`), as PyTorch names them."""
    return "gelu" if approximate == "none" else f"gelu({approximate})"


def without_parameter(name: str) -> str:
    """`leaky_relu` of `leaky_relu(0.2)`; other names as they are."""
    return name.partition("(")[0]


ACTIVATIONS = Activations()
"""All activations by name."""


def register_activation(activation: Activation) -> Activation:
    """Makes an activation usable everywhere by its name, and returns it.

    Raises:
        ValueError: another activation has this name, or it is `hetero`, or has brackets as those with parameters.
    """
    if "(" in activation.name:
        raise ValueError(f"activation: found {activation.name!r}, expected a name without brackets")
    if activation.name == HETERO:
        raise ValueError(f"activation: {HETERO!r} stands for networks that differ in it; choose another name")
    return ACTIVATIONS.register(activation.name, activation)


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

BUILT_IN: Final = tuple(ACTIVATIONS)
"""What numbers in zoos stand for where nothing else is said, in this order for ever: no name moves, none is added. An
activation that comes later is named where it occurs (`NetSpec.extra_activations`), as are those of users."""

for _activation in (
    Activation("relu6", lambda z, w0: functional.relu6(z)),
    Activation("hardtanh", lambda z, w0: functional.hardtanh(z), SIGNS),
    Activation("elu", lambda z, w0: functional.elu(z)),
    Activation("selu", lambda z, w0: functional.selu(z)),
    Activation("softplus", lambda z, w0: functional.softplus(z)),
    Activation("log_sigmoid", lambda z, w0: functional.logsigmoid(z)),
    Activation("mish", lambda z, w0: functional.mish(z)),
    Activation("hardswish", lambda z, w0: functional.hardswish(z)),
    Activation("hardsigmoid", lambda z, w0: functional.hardsigmoid(z)),
):
    register_activation(_activation)


def not_built_in(names: Collection[str]) -> tuple[str, ...]:
    """The names of activations outside `BUILT_IN`, sorted, whatever the order in which modules registered them."""
    return tuple(sorted({*names} - {*BUILT_IN, HETERO}))
