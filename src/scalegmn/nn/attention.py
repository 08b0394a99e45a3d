"""Relational transformer layers (Diao & Loynd, ICLR 2023): attention among all nodes that knows and updates edges."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from scalegmn.nn.mlp import Dropout


class RelationalAttention(nn.Module):
    """Attention with edges in queries, keys and values (Neural Graphs, section 3.2). Per head, of width c = dim / H:

    s_ij = (q_i + qe_ij) . (k_j + ke_ij) / sqrt(dim),   o_i = sum_j softmax_j(s_ij) (ue_ij * v_j + ve_ij),   W_o [o ...]

    Args:
        node_dim, edge_dim: d and d_e.
        dim: of all heads together.
        num_heads: H.
        modulate: false: v_j + ve_ij.
    """

    def __init__(self, node_dim: int, edge_dim: int, dim: int, num_heads: int, modulate: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.node_linear = nn.Linear(node_dim, 3 * dim, bias=False)
        self.edge_linear = nn.Linear(edge_dim, (4 if modulate else 3) * dim, bias=False)
        self.last = nn.Linear(dim, node_dim)

    def forward(self, x: Tensor, e: Tensor, rows: slice, real: Tensor | None = None) -> Tensor:
        """Of some nodes: x [B, N, d], e [B, their number R, N, d_e], e_ij at i, j -> [B, R, dim], before W_o.

        `real` [B, N] says which nodes there are, where networks differ in their number: of others nobody hears.
        """
        num, c = self.num_heads, self.last.in_features // self.num_heads
        q, k, v = linear(x, self.node_linear.weight).unflatten(-1, (num, 3, c)).unbind(3)  # [B, N, H, c] each
        qe, ke, ve, *ue = self.edge_linear.weight.unflatten(0, (num, -1, c)).unbind(1)  # [H, c, d_e] each
        parts = [linear(e, w.flatten(0, 1)).unflatten(-1, (num, c)) for w in (qe, ke, *ue)]  # [B, R, N, H, c] each
        scores = ((parts[0] + q[:, rows, None]) * (parts[1] + k[:, None])).sum(-1)  # [B, R, N, H]
        if real is not None:
            scores = scores.masked_fill(~real[:, None, :, None], -torch.inf)
        shares = (scores * self.scale).softmax(2)
        # what is the same for all components of a head is joined over senders before it meets W_edge
        joined = shares.transpose(2, 3) @ e  # [B, R, H, d_e]
        out = torch.einsum("brhe,hce->brhc", joined, ve)
        if ue:
            return (out + (shares[..., None] * parts[2] * v[:, None]).sum(2)).flatten(2)
        return (out + torch.einsum("brnh,bnhc->brhc", shares, v)).flatten(2)


class RelationalEdgeUpdate(nn.Module):
    """e_ij <- LN(e_ij + G_2 GELU(G_e [e_ij, e_ji] + G_s x_i + G_t x_j)), then LN(e_ij + H_2 GELU(H_1 e_ij)).

    Args:
        node_dim, edge_dim, hidden_dim: widths of nodes, edges and hidden layers.
        dropout: of what is added to e.
        norm: false: no LN.
    """

    def __init__(self, node_dim: int, edge_dim: int, hidden_dim: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.edge_linear = nn.Linear(2 * edge_dim, hidden_dim)
        self.sender_linear = nn.Linear(node_dim, hidden_dim)
        self.receiver_linear = nn.Linear(node_dim, hidden_dim)
        self.last = nn.Linear(hidden_dim, edge_dim)
        self.first_norm = nn.LayerNorm(edge_dim) if norm else nn.Identity()
        self.mlp_first = nn.Linear(edge_dim, hidden_dim, bias=False)
        self.mlp_last = nn.Linear(hidden_dim, edge_dim)
        self.second_norm = nn.LayerNorm(edge_dim) if norm else nn.Identity()
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, e: Tensor, rows: slice) -> Tensor:
        """x [B, N, d], e [B, N, N, d_e] -> e of some senders, [B, R, N, d_e]."""
        own, opposite = self.edge_linear.weight.chunk(2, dim=1)
        bias = self.edge_linear.bias + self.sender_linear.bias
        sender = linear(x[:, rows], self.sender_linear.weight, bias)[:, :, None]
        receiver = self.receiver_linear(x)[:, None]
        against = e[:, :, rows].transpose(1, 2)
        z = linear(torch.cat([e[:, rows], against], dim=-1), torch.cat([own, opposite], dim=1)) + sender + receiver
        e = self.first_norm(e[:, rows] + self.dropout(self.last(gelu(z))))
        return self.second_norm(e + self.dropout(self.mlp_last(gelu(self.mlp_first(e)))))


class RelationalLayer(nn.Module):
    """Attention, x <- LN(x + W_0 W_o [o ...]), x <- LN(x + W_2 GELU(W_1 x)), and the edge update with the new x.

    All Linears start Xavier uniform, biases at 0.

    Args:
        attention: what makes [o ...] of nodes and edges.
        edge_update: what updates edges; None: nothing reads new edges.
        node_dim, hidden_dim: widths of nodes and of their hidden layer.
        dropout: of what is added to x.
        norm: false: no LN.
    """

    def __init__(
        self,
        attention: RelationalAttention,
        edge_update: RelationalEdgeUpdate | None,
        node_dim: int,
        hidden_dim: int,
        dropout: float,
        norm: bool,
    ) -> None:
        super().__init__()
        self.attention, self.edge_update = attention, edge_update
        self.linear = nn.Linear(node_dim, node_dim)
        self.first_norm = nn.LayerNorm(node_dim) if norm else nn.Identity()
        self.mlp_first = nn.Linear(node_dim, hidden_dim, bias=False)
        self.mlp_last = nn.Linear(hidden_dim, node_dim)
        self.second_norm = nn.LayerNorm(node_dim) if norm else nn.Identity()
        self.dropout = Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, e: Tensor, rows: slice, real: Tensor | None = None) -> Tensor:
        """New features of some nodes, of x [B, N, d] and the edges that they send, [B, R, N, d_e] -> [B, R, d]; `real`
        as in `RelationalAttention`."""
        inner = self.attention.last
        new = linear(self.attention(x, e, rows, real), self.linear.weight @ inner.weight, self.linear(inner.bias))
        x = self.first_norm(x[:, rows] + self.dropout(new))
        return self.second_norm(x + self.dropout(self.mlp_last(gelu(self.mlp_first(x)))))
