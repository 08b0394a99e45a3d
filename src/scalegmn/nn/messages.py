"""Messages along the edges of parameter graphs, and updates of edge features.

Every function reads E edges at once: receiver [E, d] and sender [E, d] are the features of the nodes at their ends,
edge [E, d] are the features of the edges. When neurons are rescaled, a node's features are multiplied by its q, an
edge's by q_i / q_j (receiver i, sender j; https://arxiv.org/abs/2406.10685, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.nn.context import EdgeContext
from scalegmn.nn.invariant import BuildInvariant
from scalegmn.nn.mlp import BuildMLP
from scalegmn.registry import Registry


class MessageFunction(nn.Module):
    """A function from the two ends of an edge and the edge to a message; a new one is a subclass with its own
    `forward`, registered by name in `MESSAGES`.

    The layer adds up (or averages) the messages that each receiver gets. So that the model keeps its symmetries:

    - The message must be multiplied by q_i whenever the receiver's features are by q_i, the sender's by q_j and the
      edge's by q_i / q_j. The product of a linear map of `sender` and one of `edge`, both without bias, is; it may be
      multiplied by anything that does not change: functions of `MessageParts.build_invariant` of `sender`, of
      `receiver`, or of the product.
    - It must not depend on the order of nodes: only on what it is given.
    - Input and output nodes have q = 1.

    Messages against the edges have a message function of their own; its sender is the node at which the edge ends.

    For most activations, sigma(q z) = q sigma(z), as in the paper. For others, such as z^2, sigma(q z) = chi(q)
    sigma(z) with chi(q) != q: outgoing weights are divided by chi(q). The layer brings features to chi(q) before
    the message function and messages back to q after it (`scalegmn.nn.scalars`), so all that is said here holds with
    chi(q) in place of q at the end that the edge leaves. A message function needs no case for them.
    """

    def forward(
        self, context: EdgeContext, receiver: Tensor, sender: Tensor, edge: Tensor, *positions: Tensor
    ) -> Tensor:
        """receiver, sender, edge, positions [E, d] -> messages [E, d].

        Args:
            context: role, scalar group and network of both ends; invariant maps are called as invariant(context.sender,
                sender).
            receiver: features of the receiving nodes.
            sender: features of the sending nodes.
            edge: features of the edges.
            positions: the positional embedding of the receiver (in bidirectional models of the sender), if
                `scalegmn_args.message.positions` is set.
        """
        raise NotImplementedError


class ScaleMessage(MessageFunction):
    """MSG((A x_j) * (B e_ji), p) (ScaleGMN, eq. 15).

    The product is multiplied by q_i under rescaling, since x_j is by q_j and e_ji by q_i / q_j. As in the published
    code, MSG does not read x_i, which the update reads.

    Args:
        dim: width d of node and edge features.
        net: MSG, an equivariant net d -> d.
    """

    def __init__(self, dim: int, net: nn.Module) -> None:
        super().__init__()
        self.node_linear = nn.Linear(dim, dim, bias=False)
        self.edge_linear = nn.Linear(dim, dim, bias=False)
        self.net = net

    def forward(
        self, context: EdgeContext, receiver: Tensor, sender: Tensor, edge: Tensor, *positions: Tensor
    ) -> Tensor:
        """As in `MessageFunction`; MSG has branches for the receiver's role."""
        new: Tensor = self.net(context.receiver, self.node_linear(sender) * self.edge_linear(edge), *positions)
        return new


class ProductMessage(MessageFunction):
    """(A x_j) * (B e_ji): the messages of `ScaleMessage` without MSG.

    Args:
        dim: width d of node and edge features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.node_linear = nn.Linear(dim, dim, bias=False)
        self.edge_linear = nn.Linear(dim, dim, bias=False)

    def forward(
        self, context: EdgeContext, receiver: Tensor, sender: Tensor, edge: Tensor, *positions: Tensor
    ) -> Tensor:
        """As in `MessageFunction`; positions are not read."""
        new: Tensor = self.node_linear(sender) * self.edge_linear(edge)
        return new


class ConcatMessage(MessageFunction):
    """MLP([e_ji, x_j]): the messages of a permutation-equivariant GMN, the same for all roles.

    Args:
        dim: width d of node and edge features.
        mlp: builds the MLP, 2d -> d.
    """

    def __init__(self, dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.mlp = mlp(2 * dim, dim)

    def forward(
        self, context: EdgeContext, receiver: Tensor, sender: Tensor, edge: Tensor, *positions: Tensor
    ) -> Tensor:
        """As in `MessageFunction`; positions are not read."""
        new: Tensor = self.mlp(edge, sender)
        return new


@dataclass(frozen=True)
class MessageParts:
    """What a message function is built from.

    Attributes:
        dim: width d of node and edge features.
        build_mlp: (in_dim, out_dim) -> an MLP as configured.
        build_invariant: width -> the invariant map of the model's symmetry, called as invariant(context, x).
        build_net: (in_dim, out_dim) -> MSG as configured (`scalegmn_args.message`), called as net(context, x, *p) with
            the context of the receivers.
    """

    dim: int
    build_mlp: BuildMLP
    build_invariant: BuildInvariant
    build_net: Callable[[int, int], nn.Module]


MESSAGES: Registry[Callable[[MessageParts], MessageFunction]] = Registry("message function")
"""Name -> what builds a message function, such as its class: `scalegmn_args.message_function: <name>`."""

MESSAGES.register("scale", lambda parts: ScaleMessage(parts.dim, parts.build_net(parts.dim, parts.dim)))
MESSAGES.register("product", lambda parts: ProductMessage(parts.dim))
MESSAGES.register("concat", lambda parts: ConcatMessage(parts.dim, parts.build_mlp))


class ScaleEdgeUpdate(nn.Module):
    """e_ji' = (C e_ji) * phi([inv(x_j), inv(x_i)]), one inv for both ends: multiplied by q_i / q_j as e_ji is.

    Args:
        dim: width d of node and edge features.
        out_dim: width of the new edge features.
        invariant: builds inv from d.
        mlp: builds phi, 2d -> out_dim.
    """

    def __init__(self, dim: int, out_dim: int, invariant: BuildInvariant, mlp: BuildMLP) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim, bias=False)
        self.invariant = invariant(dim)
        self.phi = mlp(2 * dim, out_dim)

    def forward(self, context: EdgeContext, receiver: Tensor, sender: Tensor, edge: Tensor) -> Tensor:
        """receiver, sender, edge [E, d] -> [E, out_dim]."""
        ends = self.invariant(context.sender, sender), self.invariant(context.receiver, receiver)
        new: Tensor = self.linear(edge) * self.phi(*ends)
        return new


class ConcatEdgeUpdate(nn.Module):
    """e_ji' = phi([e_ji, x_j, x_i]), permutation-equivariant.

    Args:
        dim: width d of node and edge features.
        out_dim: width of the new edge features.
        mlp: builds phi, 3d -> out_dim.
    """

    def __init__(self, dim: int, out_dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.phi = mlp(3 * dim, out_dim)

    def forward(self, context: EdgeContext, receiver: Tensor, sender: Tensor, edge: Tensor) -> Tensor:
        """receiver, sender, edge [E, d] -> [E, out_dim]."""
        new: Tensor = self.phi(edge, sender, receiver)
        return new


def reciprocal(edges: Tensor, floor: Tensor) -> Tensor:
    """w -> w / max(||w||, floor)^2 per edge: 1/w for a single weight, zero at zero, finite for padded kernels.

    Multiplied by q_j / q_i when w is by q_i / q_j, as a message against the edge needs, if the floor is by |q_i / q_j|.

    Args:
        edges: raw edge features [..., K].
        floor: broadcasts to [..., 1]; it keeps the result continuous at zero and at most 1 / floor. Where it is zero,
            as for neurons without weights, the result is zero.
    """
    norm = torch.linalg.vector_norm(edges, dim=-1, keepdim=True)
    size = torch.where(floor > 0, torch.maximum(norm, floor), 1)
    return edges / size / size  # its square may underflow
