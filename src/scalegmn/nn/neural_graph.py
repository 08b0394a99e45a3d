"""Features of the nodes and edges of neural graphs (Kofinas et al., ICLR 2024, https://arxiv.org/abs/2403.12143).

Shape letters: N nodes, E edges, d and d_e widths of node and edge features, R raw values per edge, Q probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.networks.activations import without_parameter
from scalegmn.nn.fourier import Encoder

EMBEDDED_ACTIVATIONS = ("identity", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")
"""Built-in activations that have an embedding, in the order of its rows; those that are not built in follow."""


@dataclass(frozen=True)
class NeuralGraphOptions:
    """Which features there are; see the fields of the same names of `NeuralGraphConfig`."""

    reverse_edges: bool
    num_frequencies: int
    frequency_scale: float
    encoder_layers: int
    num_probes: int
    positions: bool
    linear_encoder: bool
    activation_embedding: bool


class NeuralGraphFeatures(nn.Module):
    """x_i = V (enc(b_i) + probe_i) + P[type_i] + A[activation_i] and e_ij = E enc(r_ij).

    b_i is the bias of node i, r_ij the raw values of the edge from i to j: the kernel, or, with reverse edges,
    [w, 0, w] along and [0, w, w] against a weight w.

    Args:
        options: which features there are.
        node_dim, edge_dim: d and d_e.
        layout: nodes per layer, n_0 to n_L, for probes.
        kernel: the largest kernel (kh, kw), of K values.
        max_hidden_layers: hidden layers for which P has rows.
        num_places: places of pinned nodes, for which P has rows too.
        extra_activations: names, besides `EMBEDDED_ACTIVATIONS`, for which A has rows.
    """

    def __init__(
        self,
        options: NeuralGraphOptions,
        node_dim: int,
        edge_dim: int,
        layout: Sequence[int],
        kernel: tuple[int, int],
        max_hidden_layers: int,
        num_places: int = 0,
        extra_activations: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.reverse_edges, self.kernel, self.max_hidden_layers = options.reverse_edges, kernel, max_hidden_layers
        self.raw_dim = kernel[0] * kernel[1] * (3 if options.reverse_edges else 1)
        encoder = (options.num_frequencies, options.frequency_scale, options.encoder_layers)
        self.bias_encoder = Encoder(1, node_dim, *encoder)
        self.weight_encoder = Encoder(self.raw_dim, edge_dim, *encoder)
        self.linear_encoder = Encoder(1, edge_dim, *encoder) if options.linear_encoder else None
        self.node_linear = nn.Linear(node_dim, node_dim)
        self.edge_linear = nn.Linear(edge_dim, edge_dim)
        self.node_positions: nn.Parameter | None = None
        self.activations: nn.Parameter | None = None
        self.points: nn.Parameter | None = None
        if options.positions:
            num_types = layout[0] + layout[-1] + max_hidden_layers + num_places
            self.node_positions = nn.Parameter(torch.randn(num_types, node_dim))
        self.embedded = (*EMBEDDED_ACTIVATIONS, *extra_activations)
        if options.activation_embedding:
            self.activations = nn.Parameter(torch.randn(len(self.embedded), node_dim))
        if options.num_probes:
            self.points = nn.Parameter(2 * torch.rand(options.num_probes, layout[0]) - 1)
            self.probe_linears = nn.ModuleList(nn.Linear(options.num_probes, node_dim) for _ in layout)
            self.probe_norms = nn.ModuleList(nn.LayerNorm(node_dim) for _ in layout)

    def nodes(self, bias: Tensor, node_type: Tensor, activation: Tensor, probes: Tensor | None) -> Tensor:
        """Features x of nodes.

        Args:
            bias: b, [N, 1]; 0 of input nodes.
            node_type: rows of P, [N].
            activation: rows of A, [N]; -1 of nodes without activation.
            probes: [N, d]; None: no probes.

        Returns:
            [N, d].
        """
        encoded = self.bias_encoder(bias)
        x: Tensor = self.node_linear(encoded if probes is None else encoded + probes)
        if self.node_positions is not None:
            x = x + self.node_positions[node_type]
        if self.activations is not None:
            x = x + torch.where((activation >= 0)[:, None], self.activations[activation], 0)
        return x

    def edges(self, raw: Tensor, linear: Tensor) -> Tensor:
        """Features e of edges.

        Args:
            raw: r, [E, R].
            linear: [E] bool, edges of linear layers in a model that has an encoder for them; it reads their first
                raw value.

        Returns:
            [E, d_e].
        """
        encoded = self.weight_encoder(raw)
        if self.linear_encoder is not None:
            encoded = torch.where(linear[:, None], self.linear_encoder(raw[:, :1]), encoded)
        e: Tensor = self.edge_linear(encoded)
        return e

    def rows_of(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Index into `names` -> row of A; -1, of nodes without activation, -> -1. [names + 1] long."""
        rows = {name: row for row, name in enumerate(self.embedded)}
        return torch.tensor([*(rows.get(without_parameter(name), 0) for name in names), -1], device=device)

    def probes(self, activations: Sequence[Tensor]) -> Tensor:
        """probe_i = LN_l(Linear_l(activations of node i at the learned points)), l the layer of node i.

        Args:
            activations: per layer 0..L, [B, n_l, Q].

        Returns:
            [B, N, d].
        """
        layers = zip(activations, self.probe_linears, self.probe_norms, strict=True)
        return torch.cat([norm(linear(values)) for values, linear, norm in layers], dim=1)


def middle_of(kernel: tuple[int, int], like: Tensor) -> Tensor:
    """[K], the flattened kernel that is 1 in its middle and 0 elsewhere: the raw value of a weight 1."""
    height, width = kernel
    places = torch.arange(height * width, device=like.device)
    return (places == (height - 1) // 2 * width + (width - 1) // 2).to(like.dtype)


def linear_as_kernel(edges: Tensor, linear: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Raw edge features [E, K] with the weights of edges of linear layers, `linear` [E] bool, moved from component 0 to
    the middle of the kernel."""
    return torch.where(linear[:, None], edges[:, :1] * middle_of(kernel, edges), edges)
