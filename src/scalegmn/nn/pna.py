"""Principal neighbourhood aggregation (Corso et al., NeurIPS 2020) with edge features, on dense blocks or on rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

NUM_AGGREGATORS = 4
"""Mean, minimum, maximum and standard deviation."""

_LEAST_VARIANCE = 1e-5
"""Smaller ones count as none."""


def joined(outer: nn.Linear, inner: nn.Linear | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of outer(inner(x)); of `outer` where there is no inner one."""
    if inner is None:
        return outer.weight, outer.bias
    return outer.weight @ inner.weight, outer(inner.bias)


class Message(nn.Module):
    """m_ij = gamma_ij * M [x_j, x_i] + beta_ij, [gamma, beta] = A e_ij (Neural Graphs, section 3; Perez et al., 2018).

    `gate`: sigmoid(gamma) for gamma and no beta; `concat`: M [x_j, x_i, A e_ij]. Receiver j, sender i.

    Args:
        dim: width d of nodes, edges and messages.
        modulation: `film`, `gate` or `concat`.
    """

    def __init__(self, dim: int, modulation: str) -> None:
        super().__init__()
        self.dim, self.modulation = dim, modulation
        self.edge_linear = nn.Linear(dim, 2 * dim if modulation == "film" else dim)
        self.linear = nn.Linear(3 * dim if modulation == "concat" else 2 * dim, dim)

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What messages read of nodes [B, n, d] as receivers and as senders: their parts of M."""
        receiver, sender = self.linear.weight[:, : 2 * self.dim].chunk(2, dim=1)
        return linear(x, receiver, self.linear.bias), linear(x, sender)

    def edge_map(self, inner: nn.Linear | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of what messages read of edges `inner(h)`, as a map of h."""
        weight, bias = joined(self.edge_linear, inner)
        if self.modulation != "concat":
            return weight, bias
        own = self.linear.weight[:, 2 * self.dim :]
        return own @ weight, own @ bias

    def forward(self, read: Tensor, ends: Tensor) -> Tensor:
        """What `edge_map` makes of edges [B, R, S, ..], and the sum of what `ends` makes of either end, [B, R, S, d] ->
        [B, R, S, d]."""
        if self.modulation == "film":
            gamma, beta = read.chunk(2, dim=-1)
            return torch.addcmul(beta, gamma, ends)
        return read.sigmoid() * ends if self.modulation == "gate" else read + ends


class Reduced(NamedTuple):
    """Messages, joined per receiver, R of them; zeros where there are none."""

    degree: Tensor
    """Their number, [R, 1]; 1 where there are none."""

    total: Tensor
    """[.., R, d]."""

    squares: Tensor
    """The sum of their squares, [.., R, d]."""

    least: Tensor
    """[.., R, d]."""

    most: Tensor
    """[.., R, d]."""

    @classmethod
    def of_block(cls, messages: Tensor) -> Reduced:
        """[B, R, S, d]: S messages each."""
        degree = messages.new_full((messages.shape[1], 1), messages.shape[2])
        return cls(degree, messages.sum(2), messages.square().sum(2), messages.amin(2), messages.amax(2))

    @classmethod
    def of_rows(cls, messages: Tensor, degrees: Tensor) -> Reduced:
        """[1, E, d], those to each receiver in a row: degrees [R] of them."""
        rows, silent = messages[0], (degrees == 0)[:, None]

        def joined(rows: Tensor, way: str) -> Tensor:
            """[1, R, d]."""
            return torch.segment_reduce(rows, way, lengths=degrees, axis=0).masked_fill(silent, 0)[None]

        degree = degrees.clamp_min(1)[:, None].to(rows.dtype)
        return cls(degree, joined(rows, "sum"), joined(rows.square(), "sum"), joined(rows, "min"), joined(rows, "max"))


class Aggregate(nn.Module):
    """[mean, min, max, std] of a node's messages, times each scaler (PNA, eqs. 5 to 8); zero where there are none.

    Scalers, of nodes with n messages: identity 1, amplification log(n + 1) / delta, attenuation delta / log(n + 1).

    Args:
        scalers: their names, in order.
        mean_log_degree: delta, the mean of log(n + 1) over the nodes of the data.
    """

    def __init__(self, scalers: Sequence[str], mean_log_degree: float) -> None:
        super().__init__()
        self.scalers = scalers
        self.register_buffer("mean_log_degree", torch.tensor(mean_log_degree))

    def forward(self, messages: Sequence[Reduced], like: Tensor) -> Tensor:
        """Messages in blocks, to the first r of R nodes each -> [B, R, scalers 4 d]; `like` is [B, R, d]."""
        if not messages:
            return like.new_zeros(*like.shape[:2], len(self.scalers) * NUM_AGGREGATORS * like.shape[2])

        def to_all(rows: Tensor, value: float = 0.0) -> Tensor:
            """[.., r, d] -> [.., R, d], `value` where a block has no messages."""
            missing = like.shape[1] - rows.shape[-2]
            return nn.functional.pad(rows, (0, 0, 0, missing), value=value) if missing else rows

        degree = sum(to_all(block.degree) for block in messages)  # [R, 1]
        mean = sum(to_all(block.total) for block in messages) / degree
        variance = sum(to_all(block.squares) for block in messages) / degree - mean.square()
        deviation = torch.where(variance > _LEAST_VARIANCE, variance.clamp_min(_LEAST_VARIANCE).sqrt(), 0)
        least = torch.stack([to_all(block.least, torch.inf) for block in messages]).amin(0)
        most = torch.stack([to_all(block.most, -torch.inf) for block in messages]).amax(0)
        joint = torch.cat([mean, least, most, deviation], dim=-1)
        share = torch.log(degree + 1) / self.mean_log_degree
        factors = {"identity": 1, "amplification": share, "attenuation": 1 / share}
        return torch.cat([joint * factors[name] for name in self.scalers], dim=-1)


class GraphNorm(nn.Module):
    """g * (x - mean) / (sd + 1e-5) + c, over all nodes and features of each network (Neural Graphs' code, "layernorm").

    Args:
        dim: width of nodes.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, network: Tensor | None = None, num_networks: int = 1) -> Tensor:
        """The same shape as x.

        Args:
            x: [B, N, d], of B networks; [1, N, d], of all.
            network: in the latter case that of each node, [N] long.
            num_networks: how many there are.
        """
        if network is None:
            variance, mean = torch.var_mean(x, dim=(1, 2), correction=0, keepdim=True)
            return (x - mean) / (variance.sqrt() + 1e-5) * self.weight + self.bias

        def mean_of(rows: Tensor) -> Tensor:
            """[N, d] -> [N, 1], over all nodes and features of a node's network."""
            none = rows.new_zeros(num_networks)
            return none.scatter_reduce(0, network, rows.mean(1), "mean", include_self=False)[network, None]

        x = x - mean_of(x[0])
        return x / (mean_of(x[0].square()).sqrt() + 1e-5) * self.weight + self.bias


class EdgeUpdate(nn.Module):
    """e_ij <- R SiLU(C e_ij + S x_i + D x_j), sender i, receiver j (Neural Graphs, section 3).

    Args:
        dim: width of nodes and edges.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.edge_linear = nn.Linear(dim, dim)
        self.sender_linear = nn.Linear(dim, dim)
        self.receiver_linear = nn.Linear(dim, dim)
        self.last = nn.Linear(dim, dim)

    def forward(self, read: Tensor, ends: Tensor) -> Tensor:
        """C e and S x_i + D x_j, [B, R, S, d] -> [B, R, S, d] before R, `last`, which what follows joins."""
        return silu(read + ends)
