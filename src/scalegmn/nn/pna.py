"""Message passing of NG-GNN: principal neighbourhood aggregation (Corso et al., NeurIPS 2020,
https://arxiv.org/abs/2004.05718) with edge features (Kofinas et al., ICLR 2024, https://arxiv.org/abs/2403.12143).

Shape letters: N nodes, E edges, d width of nodes, edges and messages. An edge leads from sender i to receiver j
(in ScaleGMN's modules, as in its paper, from j to i).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from scalegmn.nn.aggregation import aggregate

NUM_AGGREGATORS = 4
"""Mean, minimum, maximum and standard deviation."""

LEAST_VARIANCE = 1e-5
"""Smaller variances of messages count as 0."""


class Message(nn.Module):
    """m_ij = gamma_ij * M [x_j, x_i] + beta_ij with [gamma_ij, beta_ij] = A e_ij (Perez et al., 2018).

    `gate`: sigmoid(A e_ij) * M [x_j, x_i]; `concat`: M [x_j, x_i, A e_ij].

    Args:
        dim: d.
        modulation: `film`, `gate` or `concat`.
    """

    def __init__(self, dim: int, modulation: str) -> None:
        super().__init__()
        self.dim, self.modulation = dim, modulation
        self.edge_linear = nn.Linear(dim, 2 * dim if modulation == "film" else dim)
        self.linear = nn.Linear(3 * dim if modulation == "concat" else 2 * dim, dim)

    def forward(self, receiver: Tensor, sender: Tensor, edge: Tensor) -> Tensor:
        """x_j, x_i and e_ij of every edge, [E, d] each -> [E, d]."""
        read: Tensor = self.edge_linear(edge)
        message: Tensor
        if self.modulation == "concat":
            message = self.linear(torch.cat([receiver, sender, read], dim=-1))
            return message
        message = self.linear(torch.cat([receiver, sender], dim=-1))
        if self.modulation == "gate":
            return read.sigmoid() * message
        gamma, beta = read.chunk(2, dim=-1)
        return gamma * message + beta


class Aggregate(nn.Module):
    """[mean, min, max, std] of a node's messages, times each scaler (PNA, eqs. 5 to 8); 0 where there are none.

    Scalers, of nodes with n messages: identity 1, amplification log(n + 1) / delta, attenuation delta / log(n + 1).

    Args:
        scalers: their names, in order.
        mean_log_degree: delta, the mean of log(n + 1) over the nodes of the data.
    """

    mean_log_degree: Tensor

    def __init__(self, scalers: Sequence[str], mean_log_degree: float) -> None:
        super().__init__()
        self.scalers = scalers
        self.register_buffer("mean_log_degree", torch.tensor(mean_log_degree))

    def forward(self, messages: Tensor, receiver: Tensor, num_nodes: int) -> Tensor:
        """Messages [E, d] and their receivers [E] -> [N, scalers 4 d]."""
        mean = aggregate(messages, receiver, num_nodes, "mean")
        variance = aggregate(messages.square(), receiver, num_nodes, "mean") - mean.square()
        deviation = torch.where(variance > LEAST_VARIANCE, variance.clamp_min(LEAST_VARIANCE).sqrt(), 0)
        least, most = (aggregate(messages, receiver, num_nodes, way) for way in ("min", "max"))
        joint = torch.cat([mean, least, most, deviation], dim=-1)
        return self.scaled(joint, receiver.bincount(minlength=num_nodes)[:, None])

    def scaled(self, joint: Tensor, degree: Tensor) -> Tensor:
        """[.., N, 4 d], of nodes with `degree` [N, 1] messages -> [.., N, scalers 4 d]."""
        share = torch.log(degree.clamp_min(1).to(joint.dtype) + 1) / self.mean_log_degree
        factors: dict[str, Tensor | int] = {"identity": 1, "amplification": share, "attenuation": 1 / share}
        return torch.cat([joint * factors[name] for name in self.scalers], dim=-1)


class PNALayer(nn.Module):
    """x_j' = O U [x_j, a_j], a_j the aggregate of all messages m_ij to node j.

    Args:
        dim: d.
        modulation: of messages.
        scalers, mean_log_degree: as in `Aggregate`.
    """

    def __init__(self, dim: int, modulation: str, scalers: Sequence[str], mean_log_degree: float) -> None:
        super().__init__()
        self.message = Message(dim, modulation)
        self.aggregate = Aggregate(scalers, mean_log_degree)
        self.update = nn.Linear((1 + NUM_AGGREGATORS * len(scalers)) * dim, dim)
        self.last = nn.Linear(dim, dim)

    def forward(self, x: Tensor, e: Tensor, edge_index: Tensor) -> Tensor:
        """x [N, d], e [E, d], `edge_index` [2, E], rows sender and receiver -> [N, d]."""
        sender, receiver = edge_index
        messages = self.message(x[receiver], x[sender], e)
        new: Tensor = self.last(self.update(torch.cat([x, self.aggregate(messages, receiver, len(x))], dim=-1)))
        return new


class GraphNorm(nn.Module):
    """g * (x - mean) / (sd + 1e-5) + c, over all nodes and features of each network (Neural Graphs' code, "layernorm").

    Args:
        dim: d.
    """

    epsilon = 1e-5

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, network: Tensor, num_networks: int) -> Tensor:
        """x [N, d] and the network of each node, [N] -> [N, d]."""
        mean = aggregate(x.mean(1, keepdim=True), network, num_networks, "mean")
        x = x - mean[network]
        variance = aggregate(x.square().mean(1, keepdim=True), network, num_networks, "mean")
        return x / (variance.sqrt() + self.epsilon)[network] * self.weight + self.bias


class EdgeUpdate(nn.Module):
    """e_ij' = R SiLU(C e_ij + S x_i + D x_j) (Neural Graphs, section 3).

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.edge_linear = nn.Linear(dim, dim)
        self.sender_linear = nn.Linear(dim, dim)
        self.receiver_linear = nn.Linear(dim, dim)
        self.last = nn.Linear(dim, dim)

    def forward(self, receiver: Tensor, sender: Tensor, edge: Tensor) -> Tensor:
        """x_j, x_i and e_ij of every edge, [E, d] each -> [E, d]."""
        ends = self.sender_linear(sender) + self.receiver_linear(receiver)
        new: Tensor = self.last(silu(self.edge_linear(edge) + ends))
        return new
