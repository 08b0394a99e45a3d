"""Networks of linear layers alone, which are products of matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from scalegmn.networks.layers import LayerSpec

if TYPE_CHECKING:
    from scalegmn.networks.spec import NetSpec


def linear_products(spec: NetSpec) -> tuple[tuple[int, ...], ...]:
    """The layers of each product of matrices that networks of `spec` consist of; () if they have any other layer.

    The network W_2 W_1 x is one product, of layers (0, 1); a single linear layer is one too. Between the layers of a
    product is no activation, and nothing else reads their neurons, so these may have any basis. A network of several
    products (low-rank changes of several layers of another network) has pinned neurons at the end of each.
    """
    products: list[list[int]] = []
    for index, layer in enumerate(spec.layers):
        sender, of_network = spec.sender(index), layer.constant == layer.opaque
        if not (_is_linear(layer) and of_network):
            return ()
        if sender < 0:
            products.append([index])
            continue
        product = next((product for product in products if product[-1] == sender), None)
        if product is None or spec.layers[sender].pinned:
            return ()
        product.append(index)
    *others, _ = sorted(product[-1] for product in products)
    return tuple(map(tuple, products)) if all(spec.layers[end].pinned for end in others) else ()


def _is_linear(layer: LayerSpec) -> bool:
    """Whether a layer computes W x + b of what it reads, and nothing else."""
    plain = LayerSpec(layer.in_dim, layer.out_dim, w0=layer.w0, reads=layer.reads, bias=layer.bias)
    return replace(layer, constant=False, opaque=False, pinned=False) == plain
