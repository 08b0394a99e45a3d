"""One round of messages and updates on parameter graphs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.nn.aggregation import aggregate
from scalegmn.nn.context import EdgeContext, NodeContext
from scalegmn.nn.messages import MessageFunction
from scalegmn.nn.mlp import Dropout
from scalegmn.nn.scalars import incoming_messages, outgoing_features


@dataclass(frozen=True)
class NeededParts:
    """What one message passing layer must compute, because something later reads it.

    Nodes are in sets 0.., the layers of a network or the three roles; edges into set k are block k.

    Attributes:
        nodes: sets of nodes, ascending.
        edges: blocks whose edge features are updated, ascending.
        backward_edges: the same of the edge features that messages against the edges read.
    """

    nodes: tuple[int, ...]
    edges: tuple[int, ...]
    backward_edges: tuple[int, ...]


class MessagePassingLayer(nn.Module):
    """One round of messages and updates (ScaleGMN, eqs. 15, 16 and 18, https://arxiv.org/abs/2406.10685).

        m_i   = AGG_j MSG(x_i, chi(x_j), e_ji, p)            along the edges j -> i
        n_j   = psi(AGG_i MSG'(chi(x_j), x_i, f_ji, p))      against them: bidirectional layers alone
        x_i'  = dropout(UPD([x_i, m_i, n_i], p_i) + S x_i)   [x_i, m_i] in forward layers
        e_ji' = edge update of (x_i, x_j, e_ji)
        f_ji' = backward edge update of (x_j, x_i, f_ji)

    e are `edge`, f `backward_edge`. chi and psi are the identity for activations with sigma(q z) = q sigma(z), those of
    the paper; for others chi(x) is multiplied by chi(q), and psi takes messages from chi(q) back to q
    (`scalegmn.nn.scalars`). A residual connection s -> i, whose ends have one scalar, q_s = q_i, adds A_r x_s to m_i
    and, with another matrix, A_r' x_i to n_s.

    Args:
        forward_message: MSG along the edges.
        backward_message: MSG' against them; None: a forward model.
        update: UPD, called as update(context, [x, m...], *p).
        edge_update: called as edge_update(context, receiver, sender, edge); None: the edges stay.
        backward_edge_update: updates backward_edge likewise; None: it stays.
        skip: S; None: nothing is added.
        forward_residual: A_r, or None: residual connections are not read.
        backward_residual: A_r', or None.
        dropout: probability on the new node features.
        aggregator: `add` or `mean`.
        message_positions: MSG reads the receiver's p; in bidirectional models the sender's, in both directions, as in
            the published code.
        update_positions: UPD reads p.
    """

    def __init__(
        self,
        forward_message: MessageFunction,
        backward_message: MessageFunction | None,
        update: nn.Module,
        edge_update: nn.Module | None,
        backward_edge_update: nn.Module | None,
        skip: nn.Linear | None,
        forward_residual: nn.Linear | None,
        backward_residual: nn.Linear | None,
        dropout: float,
        aggregator: str,
        message_positions: bool,
        update_positions: bool,
    ) -> None:
        super().__init__()
        self.forward_message, self.backward_message = forward_message, backward_message
        self.update = update
        self.edge_update, self.backward_edge_update = edge_update, backward_edge_update
        self.skip = skip
        self.dropout = Dropout(dropout)
        self.forward_residual, self.backward_residual = forward_residual, backward_residual
        self.aggregator = aggregator
        self.message_positions, self.update_positions = message_positions, update_positions

    @property
    def bidirectional(self) -> bool:
        """Whether there are messages against the edges."""
        return self.backward_message is not None

    def forward(
        self,
        context: NodeContext,
        edge_index: Tensor,
        residuals: Tensor,
        x: Tensor,
        edge: Tensor,
        backward_edge: Tensor,
        p: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New x, edge and backward_edge.

        Args:
            context: of the N nodes.
            edge_index: [2, E] long, rows sender and receiver.
            residuals: [2, C] long, senders and receivers of residual connections.
            x: node features [N, d].
            edge: edge features [E, d] along the edges.
            backward_edge: [E, d], those that messages against the edges read; unused by forward models.
            p: positional embeddings [N, d], or None.
        """
        against, outgoing = edge_index.flip(0), outgoing_features(context, x)  # chi(x); x where chi(q) = q
        received = [self.receive(self.forward_message, context, edge_index, x, outgoing, edge, p)]
        if self.forward_residual is not None:
            received[0] = received[0] + aggregate(self.forward_residual(x)[residuals[0]], residuals[1], len(x))
        if self.backward_message is not None:
            messages = self.receive(self.backward_message, context, against, outgoing, x, backward_edge, p)
            received.append(incoming_messages(context, messages, x))
        if self.backward_residual is not None:
            received[1] = received[1] + aggregate(self.backward_residual(x)[residuals[1]], residuals[0], len(x))
        new = self.update(context, torch.cat([x, *received], dim=-1), *([p] if self.update_positions else []))
        if self.skip is not None:
            new = new + self.skip(x)
        if self.edge_update is not None:
            edge = self.edge_update(*ends(context, edge_index, x, x), edge)
        if self.backward_edge_update is not None:
            backward_edge = self.backward_edge_update(*ends(context, against, x, x), backward_edge)
        return self.dropout(new), edge, backward_edge

    def receive(
        self,
        message: MessageFunction,
        context: NodeContext,
        edge_index: Tensor,
        receivers: Tensor,
        senders: Tensor,
        edge: Tensor,
        p: Tensor | None,
    ) -> Tensor:
        """AGG_j MSG(x_i, x_j, e_ji, p) per node, [N, d]; arguments of edges as in `ends`."""
        sender, receiver = edge_index
        positions = [] if p is None or not self.message_positions else [p[sender if self.bidirectional else receiver]]
        messages = message(*ends(context, edge_index, receivers, senders), edge, *positions)
        return aggregate(messages, receiver, len(context.role), self.aggregator)


def ends(
    context: NodeContext, edge_index: Tensor, receivers: Tensor, senders: Tensor
) -> tuple[EdgeContext, Tensor, Tensor]:
    """The contexts of the ends of E edges, the features of the receivers and those of the senders, [E, d].

    Args:
        context: of the N nodes.
        edge_index: [2, E] long, rows sender and receiver.
        receivers: features of all nodes as receivers, [N, d].
        senders: as senders, [N, d].
    """
    sender, receiver = edge_index
    return EdgeContext(context[receiver], context[sender]), receivers[receiver], senders[sender]
