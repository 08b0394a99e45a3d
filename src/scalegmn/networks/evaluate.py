"""Evaluate B different networks at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalegmn.networks.activations import ACTIVATIONS, HETERO
from scalegmn.networks.layers import LayerSpec
from scalegmn.networks.params import NetParams


def activate(z: Tensor, name: str, w0: float = 1.0) -> Tensor:
    """sigma(z) of the activation of this name; sin(w0 z) for `sine`."""
    return ACTIVATIONS[name].function(z, w0)


def activate_layer(z: Tensor, layer: LayerSpec, params: NetParams) -> Tensor:
    """sigma_l(z) of B networks.

    Args:
        z: [B, ...].
        layer: names the activation.
        params: the networks, which have one each where they differ in it.
    """
    if layer.activation != HETERO:
        return activate(z, layer.activation, layer.w0)
    activation, names = params.activation, params.spec.activations
    assert activation is not None
    if torch.compiler.is_compiling():  # shapes may not depend on the data
        x = z
        for index, name in enumerate(names):
            is_chosen = torch.eq(activation, index).view(-1, *[1] * (z.ndim - 1))
            x = torch.where(is_chosen, activate(z, name, layer.w0), x)
        return x
    x = torch.empty_like(z)
    for index in sorted(set(activation.tolist())):
        rows = torch.eq(activation, index)
        x[rows] = activate(z[rows], names[index], layer.w0)
    return x


def with_residual(z: Tensor, x: Tensor) -> Tensor:
    """z_c + x_c for the channels c that both have, z_c for others.

    Args:
        z: [B, P, n_l, ...], the values that a residual connection is added to.
        x: [B, P, n_s, ...], the output of its source.

    Raises:
        ValueError: their images differ in size.
    """
    if z.shape[3:] != x.shape[3:]:
        sizes = " and ".join("x".join(map(str, image.shape[3:])) for image in (x, z))
        raise ValueError(f"a residual connection joins images of {sizes} pixels; use stride 1 and padding same")
    channels = min(z.shape[2], x.shape[2])
    return torch.cat([z[:, :, :channels] + x[:, :, :channels], z[:, :, channels:]], dim=2)


def activations(params: NetParams, inputs: Tensor) -> list[Tensor]:
    """The output of each layer of B multi-layer perceptrons (convolutions: `networks.cnn.evaluate_cnn`).

    Args:
        params: B networks of linear layers.
        inputs: [P, n_0] points for all networks, or [B, P, n_0].

    Returns:
        Per layer l = 1..L, [B, P, n_l].

    Raises:
        ValueError: the networks have convolutions, or are no chain of layers.
    """
    return [x for _, x in _layers(params, inputs)]


def pre_activations(params: NetParams, inputs: Tensor, shifts: Sequence[Tensor] | None = None) -> list[Tensor]:
    """What each layer of B multi-layer perceptrons computes before its activation, with shifts, if any, added, per
    layer [B, P, n_l]; as `activations` otherwise."""
    return [z for z, _ in _layers(params, inputs, shifts)]


def _layers(params: NetParams, inputs: Tensor, shifts: Sequence[Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
    """`linear_layers` of networks without others."""
    if params.spec.is_cnn or not params.spec.is_chain:
        raise ValueError(f"expected networks of linear layers, found {params.spec}")
    return linear_layers(params, inputs, shifts=shifts)


def linear_layers(
    params: NetParams, inputs: Tensor, first: int = 0, shifts: Sequence[Tensor] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """z and sigma(z) of each layer from `first` on, [B, P, n_l] each, all of them linear.

    Args:
        params: B networks.
        inputs: what layer `first` reads, as in `activations`.
        first: counted from 0.
        shifts: what is added to z, [B, P, n_l] per layer, from the first one of the networks on.
    """
    x = inputs
    outputs: list[tuple[Tensor, Tensor]] = []
    for index, layer in enumerate(params.spec.layers[first:], first):
        z = x @ params.weights[index].mT + params.biases[index][:, None, :]
        if shifts is not None:
            z = z + shifts[index]
        if layer.residual is not None:
            if layer.residual >= 0:  # a linear layer, too, as `NetSpec` asks for
                source = outputs[layer.residual - first][1]
            else:
                source = inputs.expand(len(params), *inputs.shape[-2:])
            z = with_residual(z, source)
        x = activate_layer(z, layer, params)
        outputs.append((z, x))
    return outputs


def evaluate(params: NetParams, inputs: Tensor) -> Tensor:
    """The outputs of B multi-layer perceptrons, [B, P, n_L]; arguments and errors as in `activations`."""
    return activations(params, inputs)[-1]
