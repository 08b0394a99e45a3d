"""Evaluate B different networks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from scalegmn.spec import ACTIVATIONS, MIXED, LayerSpec, NetParams

_FUNCTIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
}


def activate(z: Tensor, name: str, w0: float = 1.0) -> Tensor:
    """sigma(z) by name; sin(w0 z) for `sine`."""
    return torch.sin(w0 * z) if name == "sine" else _FUNCTIONS[name](z)


def activate_layer(z: Tensor, layer: LayerSpec, activation: Tensor | None) -> Tensor:
    """sigma_l(z) of B networks.

    Args:
        z: [B, ...].
        layer: names the activation.
        activation: [B] indices into `ACTIVATIONS` of a mixed layer.
    """
    if layer.activation != MIXED:
        return activate(z, layer.activation, layer.w0)
    x = torch.empty_like(z)
    for index in activation.unique().tolist():
        rows = activation == index
        x[rows] = activate(z[rows], ACTIVATIONS[index], layer.w0)
    return x


def activations(params: NetParams, inputs: Tensor) -> list[Tensor]:
    """What each layer of B multi-layer perceptrons says (convolutions: `nets.cnn.evaluate_cnn`).

    Args:
        params: B networks of linear layers.
        inputs: [P, n_0] points for all networks, or [B, P, n_0].

    Returns:
        Per layer l = 1..L, [B, P, n_l].

    Raises:
        ValueError: the networks have convolutions.
    """
    if params.spec.is_cnn:
        raise ValueError(f"expected networks of linear layers, found {params.spec}")
    found = [inputs]
    for layer, weight, bias in zip(params.spec.layers, params.weights, params.biases, strict=True):
        found.append(activate_layer(found[-1] @ weight.mT + bias[:, None, :], layer, params.activation))
    return found[1:]


def evaluate(params: NetParams, inputs: Tensor) -> Tensor:
    """The outputs of B multi-layer perceptrons, [B, P, n_L]; arguments and errors as in `activations`."""
    return activations(params, inputs)[-1]
