"""Features of neurons with chi(q) != q, where sigma(q z) = chi(q) sigma(z).

When a neuron's incoming weights are multiplied by q, its features are multiplied by q, and the features of its outgoing
edges are divided by chi(q) (`ScalarGroup`). For sigma(z) = z^2, chi(q) = q^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalegmn.nn.context import ROLES, NodeContext


def outgoing_features(context: NodeContext, x: Tensor) -> Tensor:
    """Features that are multiplied by chi(q) where x [N, d] is by q: chi(x), componentwise; x where chi(q) = q."""
    for index, group in enumerate(context.groups):
        if not group.preserves_scalars:
            rows = _hidden(context, index)
            x = x.index_put((rows,), group.outgoing(x[rows]))
    return x


def incoming_messages(context: NodeContext, messages: Tensor, x: Tensor) -> Tensor:
    """Messages [N, d] that are multiplied by q where the given ones are by chi(q); the same where chi(q) = q.

    m -> m ||m||^(1 / exponent - 1), and for even activations, where chi has lost the sign of q, times x / ||x||.

    Args:
        context: of the receivers.
        messages: what came against the neurons' outgoing edges.
        x: features of the receivers [N, d], multiplied by q.
    """
    for index, group in enumerate(context.groups):
        if group.preserves_scalars:
            continue
        rows = _hidden(context, index)
        m = messages[rows]
        if group.scales and group.exponent != 1:
            m = m * _norm(m) ** (1 / group.exponent - 1)
        if group.signs and group.sign_exponent == 0:
            m = m * (x[rows] / _norm(x[rows]))
        messages = messages.index_put((rows,), m)
    return messages


def _hidden(context: NodeContext, group: int) -> Tensor:
    """[n] long, the rows of hidden nodes of a group; input and output nodes have no scalars."""
    return ((context.group == group) & (context.role == ROLES.index("hidden"))).nonzero()[:, 0]


def _norm(x: Tensor) -> Tensor:
    """||x|| per row, 1 for zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > torch.finfo(norm.dtype).tiny ** 0.5, norm, 1)
