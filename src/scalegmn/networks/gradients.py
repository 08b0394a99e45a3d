"""Gradients of what networks answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

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
    return derivatives(lambda z: activate_layer(z, layer, params), [z], lambda x: [torch.ones_like(x)])[0][0]


def derivatives(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], signals: Callable[[Tensor], Iterable[Tensor]]
) -> list[tuple[Tensor, ...]]:
    """The derivatives of <v, y> by each of the inputs, y = function(*inputs), for every v of signals(y), v fixed."""
    if torch.compiler.is_compiling():
        y, propagate = torch.func.vjp(function, *inputs)  # type: ignore[misc]  # no third without has_aux
        return [propagate(v) for v in signals(y)]
    create_graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():  # `torch.func` does not run where saved tensors are counted
        leaves = [x if x.requires_grad else x.clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        return [torch.autograd.grad(y, leaves, v, retain_graph=True, create_graph=create_graph) for v in signals(y)]
