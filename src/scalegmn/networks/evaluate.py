"""Evaluate B different networks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from scalegmn.networks import ACTIVATIONS, HETERO, LayerSpec, NetParams


def activate(z: Tensor, name: str, w0: float = 1.0) -> Tensor:
    """sigma(z) of the activation of this name; sin(w0 z) for `sine`."""
    return ACTIVATIONS[name].function(z, w0)


def activate_layer(z: Tensor, layer: LayerSpec, activation: Tensor | None) -> Tensor:
    """sigma_l(z) of B networks.

    Args:
        z: [B, ...].
        layer: names the activation.
        activation: [B] indices into `ACTIVATIONS` of a mixed layer.
    """
    if layer.activation != HETERO:
        return activate(z, layer.activation, layer.w0)
    if torch.compiler.is_compiling():  # shapes may not depend on the data
        x = z
        for index, name in enumerate(ACTIVATIONS):
            chosen = (activation == index).view(-1, *[1] * (z.ndim - 1))
            x = torch.where(chosen, activate(z, name, layer.w0), x)
        return x
    x = torch.empty_like(z)
    for index in activation.unique().tolist():
        rows = activation == index
        x[rows] = activate(z[rows], ACTIVATIONS.at(index), layer.w0)
    return x


def with_residual(z: Tensor, x: Tensor) -> Tensor:
    """z_c + x_c for the channels c that both have, z_c for others.

    Args:
        z: [B, P, n_l, ...], what a residual connection is added to.
        x: [B, P, n_s, ...], what its source says.

    Raises:
        ValueError: their images differ in size.
    """
    if z.shape[3:] != x.shape[3:]:
        sizes = " and ".join("x".join(map(str, part.shape[3:])) for part in (x, z))
        raise ValueError(f"a residual connection joins images of {sizes} pixels; use stride 1 and padding same")
    channels = min(z.shape[2], x.shape[2])
    return torch.cat([z[:, :, :channels] + x[:, :, :channels], z[:, :, channels:]], dim=2)


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
    if params.spec.is_cnn or not params.spec.is_chain:
        raise ValueError(f"expected networks of linear layers, found {params.spec}")
    return linear_layers(params, inputs)


def linear_layers(params: NetParams, inputs: Tensor, first: int = 0) -> list[Tensor]:
    """What each layer from `first` on says, [B, P, n_l], all of them linear.

    Args:
        params: B networks.
        inputs: what layer `first` reads, as in `activations`.
        first: counted from 0.
    """
    x, found = inputs, []
    tensors = params.spec.layers[first:], params.weights[first:], params.biases[first:]
    for layer, weight, bias in zip(*tensors, strict=True):
        z = x @ weight.mT + bias[:, None, :]
        if layer.residual is not None:
            own = layer.residual >= 0  # a linear layer, as `NetSpec` asks for
            source = found[layer.residual - first] if own else inputs.expand(len(params), *inputs.shape[-2:])
            z = with_residual(z, source)
        x = activate_layer(z, layer, params.activation)
        found.append(x)
    return found


def evaluate(params: NetParams, inputs: Tensor) -> Tensor:
    """The outputs of B multi-layer perceptrons, [B, P, n_L]; arguments and errors as in `activations`."""
    return activations(params, inputs)[-1]
