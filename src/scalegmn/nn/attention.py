"""Relational transformer layers: attention among all nodes of a network that reads and updates features of all pairs
(Diao & Loynd, ICLR 2023, https://arxiv.org/abs/2210.05062; Kofinas et al., ICLR 2024, https://arxiv.org/abs/2403.12143).

Shape letters: B networks, N nodes (of the largest; others are padded), H heads, d and d_e widths of nodes and edges.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from scalegmn.nn.mlp import Dropout


class RelationalAttention(nn.Module):
    """Attention with edges in queries, keys and values. Per head, of width c = dim / H:

    s_ij = (q_i + qe_ij) . (k_j + ke_ij) / sqrt(dim),   o_i = sum_j softmax_j(s_ij) (ue_ij * v_j + ve_ij),

    and W_o [o_i^1, ..., o_i^H] of all heads.

    Args:
        node_dim, edge_dim: d and d_e.
        dim: of all heads together.
        num_heads: H.
        modulate: false: v_j + ve_ij.
    """

    def __init__(self, node_dim: int, edge_dim: int, dim: int, num_heads: int, modulate: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, dim // num_heads, dim**-0.5
        self.node_linear = nn.Linear(node_dim, 3 * dim, bias=False)
        self.edge_linear = nn.Linear(edge_dim, (4 if modulate else 3) * dim, bias=False)
        self.last = nn.Linear(dim, node_dim)

    def forward(self, x: Tensor, e: Tensor, exists: Tensor) -> Tensor:
        """x [B, N, d], e [B, N, N, d_e] with e_ij at i, j, and which nodes are no padding [B, N] -> [B, N, d]."""
        q, k, v = self.node_linear(x).unflatten(-1, (self.num_heads, 3, -1)).unbind(3)  # [B, N, H, c] each
        qe, ke, ve, *ue = self.edge_linear(e).unflatten(-1, (self.num_heads, -1, self.head_dim)).unbind(4)
        scores = self.scale * ((q[:, :, None] + qe) * (k[:, None] + ke)).sum(-1)  # [B, N, N, H]
        shares = scores.masked_fill(~exists[:, None, :, None], -torch.inf).softmax(2)
        values = v[:, None] * ue[0] + ve if ue else v[:, None] + ve
        new: Tensor = self.last((shares[..., None] * values).sum(2).flatten(2))
        return new


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

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, N, d], e [B, N, N, d_e] -> [B, N, N, d_e]."""
        pairs = self.edge_linear(torch.cat([e, e.transpose(1, 2)], dim=-1))
        z = pairs + self.sender_linear(x)[:, :, None] + self.receiver_linear(x)[:, None]
        e = self.first_norm(e + self.dropout(self.last(gelu(z))))
        new: Tensor = self.second_norm(e + self.dropout(self.mlp_last(gelu(self.mlp_first(e)))))
        return new


class RelationalLayer(nn.Module):
    """x <- LN(x + W_0 W_o [o ...]), x <- LN(x + W_2 GELU(W_1 x)), then the edge update, which reads the new x.

    All Linears start Xavier uniform, biases at 0.

    Args:
        attention: W_o [o ...].
        edge_update: None: edges stay as they are.
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

    def forward(self, x: Tensor, e: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
        """New nodes and edges, of the shapes of the old ones; arguments as in `RelationalAttention`."""
        x = self.first_norm(x + self.dropout(self.linear(self.attention(x, e, exists))))
        x = self.second_norm(x + self.dropout(self.mlp_last(gelu(self.mlp_first(x)))))
        return x, e if self.edge_update is None else self.edge_update(x, e)
