"""Message passing with a covariant and a contravariant stream, on chains of layers.

When neurons are rescaled by q, covariant features of nodes are multiplied by q_i, as biases are, contravariant ones by
1 / q_i, as gradients with respect to biases are; those of edges by q_i / q_j (receiver i, sender j), as weights are,
and by q_j / q_i, as gradients with respect to weights are. Invariant features stay. A product of a covariant and a
contravariant feature of the same node or edge is invariant. ScaleGMN (https://arxiv.org/abs/2406.10685, section 5) has
the first stream alone, which cannot carry what back-propagation computes.

Shape letters: B networks, l = 0..L layers of n_l nodes, N nodes in all, d width of all features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.nn.invariant import BuildInvariant
from scalegmn.nn.mlp import BuildMLP


class Streams(NamedTuple):
    """Features of the nodes or of one block of edges, [..., d] each."""

    covariant: Tensor
    contravariant: Tensor
    invariant: Tensor


@dataclass(frozen=True)
class StreamGraph:
    """Features of B networks.

    Attributes:
        nodes: of all nodes, layer by layer, [B, N, ...].
        edges: per block l = 1..L, [B, n_l, n_{l-1}, ...].
        layout: n_0..n_L.
    """

    nodes: Streams
    edges: Sequence[Streams]
    layout: tuple[int, ...]

    @property
    def hidden(self) -> slice:
        """The rows of hidden nodes."""
        return slice(self.layout[0], sum(self.layout[:-1]))


class Unchanged(nn.Module):
    """inv(x) = x, of neurons that have no scalars."""

    def forward(self, context: None, x: Tensor) -> Tensor:
        """x of any shape -> x."""
        return x


class PairInvariant(nn.Module):
    """[inv(X), inv(Y), (P X) * (Q Y)] of covariant X and contravariant Y, P and Q linear without bias.

    Args:
        dim: width of X and of Y.
        product_dim: width of the product.
        build_invariant: builds inv.
    """

    def __init__(self, dim: int, product_dim: int, build_invariant: BuildInvariant) -> None:
        super().__init__()
        self.covariant_map, self.contravariant_map = build_invariant(dim), build_invariant(dim)
        self.covariant_linear = nn.Linear(dim, product_dim, bias=False)
        self.contravariant_linear = nn.Linear(dim, product_dim, bias=False)
        self.out_dim = 2 * dim + product_dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """X and Y [..., dim] -> [..., 2 dim + product_dim]."""
        product = self.covariant_linear(x) * self.contravariant_linear(y)
        maps = (
            self.covariant_map(None, x),
            self.contravariant_map(None, y),
        )  # all nodes have one scalar group: no context
        return torch.cat([*maps, product], dim=-1)


class PairFactors(nn.Module):
    """The invariant factors of both streams: MLP([PairInvariant(X, Y), s]), cut in two.

    Args:
        dim: width of X and of Y.
        extra_dim: width of the invariant features s.
        out_dim: width of each factor.
        build_invariant: builds inv.
        build_mlp: builds the MLP.
    """

    def __init__(
        self, dim: int, extra_dim: int, out_dim: int, build_invariant: BuildInvariant, build_mlp: BuildMLP
    ) -> None:
        super().__init__()
        self.invariant = PairInvariant(dim, out_dim, build_invariant)
        self.mlp = build_mlp(self.invariant.out_dim + extra_dim, 2 * out_dim)

    def forward(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """X, Y [..., dim] and s [..., extra_dim] -> two factors [..., out_dim]."""
        first, second = self.mlp(self.invariant(x, y), s).chunk(2, dim=-1)
        return first, second


class StreamNodeUpdate(nn.Module):
    """x_i' = (W X_i) * g(X_i, Y_i, s_i),  y_i' = (V Y_i) * h(X_i, Y_i, s_i) with X = [x, m, l] and Y = [y, k, n]; in
    forward layers, X = [x, m] and Y = [y, k].

    Input and output nodes, whose q is 1, read both: x_i' = (W_io [X_i, Y_i]) * g_io, y_i' likewise.

    Args:
        dim: d.
        num_parts: how many of x, m, l there are.
        build_invariant: builds the invariant map of hidden nodes.
        build_mlp: builds MLPs.
    """

    def __init__(self, dim: int, num_parts: int, build_invariant: BuildInvariant, build_mlp: BuildMLP) -> None:
        super().__init__()
        width = num_parts * dim
        self.covariant_linear = nn.Linear(width, dim, bias=False)
        self.contravariant_linear = nn.Linear(width, dim, bias=False)
        self.factors = PairFactors(width, dim, dim, build_invariant, build_mlp)
        self.io_linear = nn.Linear(2 * width, 2 * dim, bias=False)
        self.io_factors = build_mlp(2 * width + dim, 2 * dim)

    def forward(self, graph: StreamGraph, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """X and Y of all nodes, [B, N, num_parts d] -> x' and y' [B, N, d]."""
        s, hidden = graph.nodes.invariant, graph.hidden
        parts = []
        for rows in (slice(0, hidden.start), slice(hidden.stop, None)):
            both = torch.cat([x[:, rows], y[:, rows]], dim=-1)
            parts.append(self.io_linear(both) * self.io_factors(both, s[:, rows]))
        first, last = (part.chunk(2, dim=-1) for part in parts)
        g, h = self.factors(x[:, hidden], y[:, hidden], s[:, hidden])
        new_x = torch.cat([first[0], self.covariant_linear(x[:, hidden]) * g, last[0]], dim=1)
        new_y = torch.cat([first[1], self.contravariant_linear(y[:, hidden]) * h, last[1]], dim=1)
        return new_x, new_y


class StreamEdgeUpdate(nn.Module):
    """e_ij' = (C e_ij + (D x_i) * (G y_j)) * g_ij,  f_ij' = (C' f_ij + (D' y_i) * (G' x_j)) * h_ij.

    x, y are covariant and contravariant features of nodes, e, f of edges, i the receiver, j the sender. (D' y_i) *
    (G' x_j) has the form of a gradient, delta_i a_j. With s_i = `PairInvariant`(x_i, y_i) and t_ij the invariant
    features of the edge, the factors are

        [g_ij, h_ij] = MLP([R s_i + S s_j, (P e_ij) * (Q f_ij), t_ij])

    Args:
        dim: d.
        build_invariant: builds the invariant map of hidden nodes.
        build_mlp: builds the MLP.
    """

    def __init__(self, dim: int, build_invariant: BuildInvariant, build_mlp: BuildMLP) -> None:
        super().__init__()
        self.edge_linears = nn.ModuleList(nn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.node_linears = nn.ModuleList(nn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.invariant = PairInvariant(dim, dim, build_invariant)
        self.receiver_linear = nn.Linear(self.invariant.out_dim, dim)
        self.sender_linear = nn.Linear(self.invariant.out_dim, dim, bias=False)
        self.mlp = build_mlp(3 * dim, 2 * dim)

    def forward(self, graph: StreamGraph, x: Tensor, y: Tensor) -> list[Streams]:
        """Node features [B, N, d] -> new features of every block of edges."""
        s = self.invariant(x, y)
        layers = zip(
            *(
                features.split(graph.layout, dim=1)
                for features in (
                    self.receiver_linear(s),
                    self.sender_linear(s),
                    self.node_linears[0](x),
                    self.node_linears[1](y),
                )
            ),
            strict=True,
        )
        ends = [(receiver, sender, u.chunk(2, -1), v.chunk(2, -1)) for receiver, sender, u, v in layers]
        edges = []
        for index, (e, f, t) in enumerate(graph.edges):
            (_, sender, x_j, y_j), (receiver, _, x_i, y_i) = ends[index], ends[index + 1]
            new_e, left = self.edge_linears[0](e).chunk(2, dim=-1)
            new_f, right = self.edge_linears[1](f).chunk(2, dim=-1)
            new_e = new_e + x_i[0][:, :, None] * y_j[0][:, None]
            new_f = new_f + y_i[1][:, :, None] * x_j[1][:, None]
            both = receiver[:, :, None] + sender[:, None]
            g, h = self.mlp(both, left * right, t).chunk(2, dim=-1)
            edges.append(Streams(new_e * g, new_f * h, t))
        return edges


class StreamMessages(nn.Module):
    """sum_j (A v_j) * (B w_ij) of every receiver i, or sum_i (A v_i) * (B w_ij) of every sender j.

    Args:
        dim: d.
        against: from receivers to senders.
        mean: averages rather than sums.
    """

    def __init__(self, dim: int, against: bool, mean: bool) -> None:
        super().__init__()
        self.against, self.mean = against, mean
        self.node_linear = nn.Linear(dim, dim, bias=False)
        self.edge_linear = nn.Linear(dim, dim, bias=False)

    def forward(self, nodes: Tensor, edges: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
        """v [B, N, d] and w, per block [B, n_l, n_{l-1}, d] -> [B, N, d]; zero where nothing arrives."""
        layers = self.node_linear(nodes).split(layout, dim=1)
        equation = "bid,bijd->bjd" if self.against else "bjd,bijd->bid"
        sent = layers[1:] if self.against else layers[:-1]
        received = []
        for x, w in zip(sent, edges, strict=True):
            messages = torch.einsum(equation, x, self.edge_linear(w))
            received.append(messages / x.shape[1] if self.mean else messages)
        nothing = torch.zeros_like(layers[-1 if self.against else 0])
        return torch.cat([*received, nothing] if self.against else [nothing, *received], dim=1)


class StreamLayer(nn.Module):
    """One round of messages and updates on both streams:

    m_i = sum_j (A x_j) * (B e_ij),  l_j = sum_i (A x_i) * (B f_ij),  covariant: along the edges, against them;
    k_i = sum_j (A y_j) * (B f_ij),  n_j = sum_i (A y_i) * (B e_ij),  contravariant: along the edges, against them,

    with A and B of their own for each, then `StreamNodeUpdate` and `StreamEdgeUpdate`. m is the step of evaluation, n
    that of back-propagation. No message against an edge needs 1 / w. A forward layer has m and k alone.

    Args:
        dim: d.
        bidirectional: whether there are messages against the edges.
        build_invariant: builds the invariant map of hidden nodes.
        build_mlp: builds MLPs.
        mean: messages are averages rather than sums.
    """

    def __init__(
        self, dim: int, bidirectional: bool, build_invariant: BuildInvariant, build_mlp: BuildMLP, mean: bool = False
    ) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.covariant_along = StreamMessages(dim, False, mean)
        self.contravariant_along = StreamMessages(dim, False, mean)
        if bidirectional:
            self.covariant_against = StreamMessages(dim, True, mean)
            self.contravariant_against = StreamMessages(dim, True, mean)
        self.node_update = StreamNodeUpdate(dim, 3 if bidirectional else 2, build_invariant, build_mlp)
        self.edge_update = StreamEdgeUpdate(dim, build_invariant, build_mlp)

    def forward(self, graph: StreamGraph) -> StreamGraph:
        """The graph with new covariant and contravariant features."""
        x, y, s = graph.nodes
        e, f, _ = zip(*graph.edges, strict=True)
        covariant = [x, self.covariant_along(x, e, graph.layout)]
        contravariant = [y, self.contravariant_along(y, f, graph.layout)]
        if self.bidirectional:
            covariant.append(self.covariant_against(x, f, graph.layout))
            contravariant.append(self.contravariant_against(y, e, graph.layout))
        new_x, new_y = self.node_update(graph, torch.cat(covariant, dim=-1), torch.cat(contravariant, dim=-1))
        return StreamGraph(Streams(new_x, new_y, s), self.edge_update(graph, x, y), graph.layout)
