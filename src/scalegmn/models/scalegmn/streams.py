"""ScaleGMN with a contravariant stream beside the covariant one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from scalegmn.networks.scalar_groups import ScalarGroup
from scalegmn.nn.context import ROLES
from scalegmn.nn.invariant import Normalized, ScaleInvariant, SignInvariant
from scalegmn.nn.mlp import MLP
from scalegmn.nn.streams import StreamGraph, StreamLayer, Streams, Unchanged


@dataclass(frozen=True)
class StreamWidths:
    """How many raw features of each kind nodes and edges have, covariant, contravariant, invariant."""

    nodes: tuple[int, int, int]
    edges: tuple[int, int, int]


class StreamScaleGMN(nn.Module):
    """Covariant, contravariant and invariant features of nodes and edges of chains, `num_layers` times updated.

    Linear embeddings of raw features, without bias where scalars act, then `StreamLayer`s (`scalegmn.nn.streams`). It
    reads chains of any widths and depths: nodes of one role (input, hidden, output) are told apart by their features
    alone.

    This is no `Metanetwork` that a configuration can name, but the network of a learned optimiser
    (`scalegmn.optimizers.networks`) and of the hand-set weights in `scalegmn.theory`.

    Args:
        group: the scalars of all hidden neurons, with chi(q) = q.
        widths: of raw features.
        dim: d, the width of all features.
        num_layers: message passing layers.
        bidirectional: whether messages go against the edges, too.
        mlp_dims: hidden widths of MLPs.
        mlp_activation: inside MLPs, as in `MLP`.
        mlp_layer_norm: a LayerNorm before each.
        mean: messages are averages rather than sums.

    Raises:
        ValueError: chi(q) is not q.
    """

    def __init__(
        self,
        group: ScalarGroup,
        widths: StreamWidths,
        dim: int,
        num_layers: int,
        bidirectional: bool,
        mlp_dims: tuple[int, ...],
        mlp_activation: str = "silu",
        mlp_layer_norm: bool = True,
        mean: bool = False,
    ) -> None:
        super().__init__()
        if not group.preserves_scalars:
            raise ValueError(f"expected scalars with chi(q) = q, found {group}; use a model of permutations alone")
        mlp = partial(_mlp, mlp_dims, mlp_activation, mlp_layer_norm)

        def invariant(width: int) -> nn.Module:
            if not (group.signs or group.scales):
                return Unchanged()
            scale, sign = ScaleInvariant(), SignInvariant(width, mlp)
            if group.signs:
                return Normalized(scale, sign) if group.scales else sign
            return scale

        self.group = group
        self.node_linears = _embeddings(widths.nodes, dim)
        self.edge_linears = _embeddings(widths.edges, dim)
        self.roles = nn.Embedding(len(ROLES), dim)
        layers = (StreamLayer(dim, bidirectional, invariant, mlp, mean) for _ in range(num_layers))
        self.layers = nn.ModuleList(layers)

    def forward(self, graph: StreamGraph) -> StreamGraph:
        """Raw features -> features of width d."""
        x, y, s = (linear(raw) for linear, raw in zip(self.node_linears, graph.nodes, strict=True))
        graph = StreamGraph(
            Streams(x, y, s + self._roles(graph)),
            [
                Streams(*(linear(raw) for linear, raw in zip(self.edge_linears, block, strict=True)))
                for block in graph.edges
            ],
            graph.layout,
        )
        for layer in self.layers:
            graph = layer(graph)
        return graph

    def _roles(self, graph: StreamGraph) -> Tensor:
        """The embedding of each node's role, [N, d]."""
        hidden, num_nodes = graph.hidden, sum(graph.layout)
        sizes = (hidden.start, hidden.stop - hidden.start, num_nodes - hidden.stop)
        return torch.cat([self.roles.weight[role].expand(size, -1) for role, size in enumerate(sizes)])


def _embeddings(widths: tuple[int, int, int], dim: int) -> nn.ModuleList:
    """Linear maps of covariant, contravariant and invariant features; the last with bias."""
    return nn.ModuleList(nn.Linear(width, dim, bias=kind == 2) for kind, width in enumerate(widths))


def _mlp(hidden_dims: tuple[int, ...], activation: str, layer_norm: bool, in_dim: int, out_dim: int) -> MLP:
    """An MLP as configured."""
    return MLP(in_dim, hidden_dims, out_dim, activation, layer_norm)
