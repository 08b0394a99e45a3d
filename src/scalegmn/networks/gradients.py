"""Gradients of what networks answer, in factors of rank one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad

from scalegmn.networks.evaluate import activate_layer, linear_layers
from scalegmn.networks.layers import LayerSpec
from scalegmn.networks.params import NetParams


def gradient_factors(params: NetParams, inputs: Tensor, signals: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Activations x and signals g of all neurons: the gradients of <v_p, f(u_p)>, in factors of rank one.

        z_l = W_l x_{l-1} + b_l      x_l = sigma_l(z_l)                       x_0 = u_p
        g_L = v_p                    g_l = sigma_l'(z_l) * (W_{l+1}^T g_{l+1})   g_0 = W_1^T g_1

    The gradient of <v_p, f(u_p)> with respect to W_l is g_l x_{l-1}^T, and that with respect to b_l is g_l.

    Args:
        params: B networks of linear layers in a chain, without residual connections.
        inputs: u, [P, n_0].
        signals: v, [P, n_L] for all networks, or [..., B, P, n_L].

    Returns:
        x per layer of nodes 0..L, [B, P, n_l], and g, [..., B, P, n_l].
    """
    layers = linear_layers(params, inputs)
    xs = [inputs.expand(len(params), -1, -1), *(x for _, x in layers)]
    gs = [signals.expand(*signals.shape[:-3], len(params), -1, -1)]
    for layer, (z, _), weight in zip(params.spec.layers[-2::-1], layers[-2::-1], params.weights[:0:-1], strict=True):
        gs.append(_slope(z, layer, params) * (gs[-1] @ weight))
    return xs, [gs[-1] @ params.weights[0], *reversed(gs)]


def _slope(z: Tensor, layer: LayerSpec, params: NetParams) -> Tensor:
    """sigma_l'(z), [B, P, n_l]."""

    def total(z: Tensor) -> Tensor:
        return activate_layer(z, layer, params).sum()

    if torch.compiler.is_compiling():
        slope: Tensor = grad(total)(z)
        return slope
    with torch.enable_grad():  # `grad` does not run where saved tensors are counted
        inputs = z if z.requires_grad else z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(total(inputs), inputs, create_graph=z.requires_grad)
    return slope
