"""A message function of one's own: the published message with a gate that reads both ends of the edge.

scalegmn train classification --import tests/extending/message.py --scalegmn_args.message_function gated
"""

from torch import Tensor, nn

from scalegmn.nn.context import EdgeContext
from scalegmn.nn.messages import MESSAGES, MessageFunction, MessageParts


class GatedMessage(MessageFunction):
    """(A x_j) * (B e_ji) * phi([inv(x_i), inv(x_j)]): multiplied by q_j * q_i / q_j = q_i.

    Args:
        parts: the width of features, and what builds invariant maps and MLPs.
    """

    def __init__(self, parts: MessageParts) -> None:
        super().__init__()
        self.node_linear = nn.Linear(parts.dim, parts.dim, bias=False)
        self.edge_linear = nn.Linear(parts.dim, parts.dim, bias=False)
        self.invariant = parts.build_invariant(parts.dim)
        self.gate = parts.build_mlp(2 * parts.dim, parts.dim)

    def forward(
        self, context: EdgeContext, receiver: Tensor, sender: Tensor, edge: Tensor, *positions: Tensor
    ) -> Tensor:
        """receiver, sender, edge [E, d] -> messages [E, d]."""
        ends = self.invariant(context.receiver, receiver), self.invariant(context.sender, sender)
        return self.node_linear(sender) * self.edge_linear(edge) * self.gate(*ends)


MESSAGES.register("gated", GatedMessage)
