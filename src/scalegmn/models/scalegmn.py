"""ScaleGMN (Kalogeropoulos et al., NeurIPS 2024) and its permutation-only relative GMN."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from scalegmn.graphs.graph import ParameterGraph
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.nn.equivariant import ByRole, EquivariantLayer
from scalegmn.nn.invariant import InvariantLayer, SignInvariant
from scalegmn.nn.messages import (
    ConcatEdgeUpdate,
    ConcatMessage,
    ConcatUpdate,
    EquivariantEdgeUpdate,
    EquivariantMessage,
)
from scalegmn.nn.mlp import MLP, BuildMLP
from scalegmn.nn.positional import PositionalEmbedding
from scalegmn.nn.readout import DeepSetReadout, EndsReadout, GraphReadout, OutputReadout
from scalegmn.spec import NetParams, NetSpec


@dataclass(frozen=True)
class EquivariantNetConfig:
    """One equivariant net, x -> (W x) * g(x, p), and what rows of input and output nodes do instead.

    `permutation` models replace it by one MLP for all rows and read none of these fields.
    """

    io: Literal["same", "factor"] = "factor"
    """Rows of input and output nodes: `same` as hidden rows; `factor`: the same W, but an MLP of [x, p] for g."""

    io_branches: Literal[1, 2] = 1
    """1: input and output rows share their own branch; 2: one branch each."""

    positions: bool = False
    """Pass the positional embedding p to g."""


@dataclass(frozen=True)
class ScaleGMNConfig(ModelConfig):
    """ScaleGMN: message passing on the parameter graph that respects permutations and rescalings of neurons."""

    symmetry: Literal["permutation", "sign"] = "sign"
    """Symmetry beyond permutations: `sign` for sine and tanh networks, `permutation` for none (GMN)."""

    direction: Literal["forward", "bidirectional"] = "forward"
    """Messages along the input network's edges, or along and against them."""

    readout: Literal["last_layer", "full_graph"] = "last_layer"
    """Read the output nodes (and, bidirectional, the input nodes), or all nodes."""

    num_layers: int = 4
    """Message passing layers."""

    hidden_dim: int = 128
    """Width d of node and edge features."""

    mlp_dims: tuple[int, ...] | None = None
    """Hidden widths of every MLP; null: one hidden layer of width hidden_dim."""

    mlp_activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    """Activation inside every MLP."""

    mlp_layer_norm: bool = True
    """LayerNorm before every activation inside an MLP."""

    readout_dim: int | None = None
    """Width of the sum over nodes in a full_graph readout; null: hidden_dim."""

    out_dim: int = 10
    """Outputs per network: the number of classes."""

    normalize: bool | None = None
    """Divide each layer's weights and biases by one scalar each, their root mean square over the training split; null:
    only for permutation, which hardly learns without."""

    node_positions: bool = True
    """Positional embeddings of node types (each input node, each hidden layer, each output node)."""

    edge_positions: bool = True
    """Positional embeddings of edge types."""

    skip_connections: bool = True
    """x' = S x + layer(x) around every message passing layer."""

    dropout: float = 0.0
    """Dropout on node features after every layer."""

    message: EquivariantNetConfig = field(default_factory=EquivariantNetConfig)
    """The message function MSG. Its p: the receiving node's; in bidirectional models the sending node's."""

    update: EquivariantNetConfig = field(default_factory=EquivariantNetConfig)
    """The update function UPD. Its p: the updated node's."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: found {getattr(self, name)}, expected at least 1"
            for name in ("num_layers", "hidden_dim", "out_dim", "readout_dim")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.mlp_dims is not None and (not self.mlp_dims or min(self.mlp_dims) < 1):
            problems.append(f"mlp_dims: found {list(self.mlp_dims)}, expected one or more positive widths")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout: found {self.dropout}, expected a probability in [0, 1)")
        for name in ("message", "update"):
            if self.symmetry != "permutation" and getattr(self, name).positions and not self.node_positions:
                problems.append(f"{name}.positions: needs node_positions true, found false")
        if problems:
            raise ValueError("; ".join(f"scalegmn_args.{problem}" for problem in problems))

    def build(self, spec: NetSpec) -> ScaleGMN:
        """The model for networks of `spec`."""
        return ScaleGMN(self, spec)


class ScaleGMNLayer(nn.Module):
    """One round of messages and updates.

    m_i  = sum_j MSG((A x_j) * (B e_ji), p)
    x_i' = UPD([x_i, m_i], p_i) (+ S x_i);  bidirectional: UPD([x_i, m_i forward, m_i backward], p_i)
    e_ji' = (C e_ji) * phi([inv(x_j), inv(x_i)])

    (ScaleGMN, eqs. 15, 16 and 18.) It computes only what later layers and the readout read.

    Args:
        config: the model's hyper-parameters.
        spec: the input networks.
        node_layers: node layers 0..L whose x' is computed.
        edge_blocks: blocks 1..L whose e' is computed.
    """

    def __init__(
        self, config: ScaleGMNConfig, spec: NetSpec, node_layers: Collection[int], edge_blocks: Collection[int]
    ) -> None:
        super().__init__()
        self.roles = spec.roles
        self.node_layers, self.edge_blocks = sorted(node_layers), sorted(edge_blocks)
        self.bidirectional = config.direction == "bidirectional"
        self.message_positions, self.update_positions = config.message.positions, config.update.positions
        d, mlp = config.hidden_dim, _mlp_builder(config)
        forward_roles = {spec.roles[layer] for layer in self.node_layers if layer > 0}
        backward_roles = {spec.roles[layer] for layer in self.node_layers if layer < spec.num_layers}
        update_roles = {spec.roles[layer] for layer in self.node_layers}
        update_dim = 3 * d if self.bidirectional else 2 * d

        if config.symmetry == "permutation":
            self.message_positions = self.update_positions = False
            self.forward_message = ConcatMessage(d, mlp)
            self.backward_message = ConcatMessage(d, mlp) if self.bidirectional else None
            self.update = ConcatUpdate(update_dim, d, mlp)
            self.edge_update = ConcatEdgeUpdate(d, d, mlp) if self.edge_blocks else None
        else:
            invariant = partial(SignInvariant, mlp=mlp)

            def net(options: EquivariantNetConfig, in_dim: int, roles: set[str]) -> EquivariantLayer:
                extra_dim = d if options.positions else 0
                hidden = InvariantLayer(in_dim, extra_dim, d, invariant, mlp)
                if options.io == "same":
                    modules = dict.fromkeys(spec.roles, hidden)
                else:
                    io = mlp(in_dim + extra_dim, d)
                    last = io if options.io_branches == 1 else mlp(in_dim + extra_dim, d)
                    modules = {"input": io, "hidden": hidden, "output": last}
                return EquivariantLayer(in_dim, d, ByRole(modules, roles))

            self.forward_message = EquivariantMessage(d, net(config.message, d, forward_roles))
            self.backward_message = (
                EquivariantMessage(d, net(config.message, d, backward_roles)) if self.bidirectional else None
            )
            self.update = net(config.update, update_dim, update_roles)
            self.edge_update = EquivariantEdgeUpdate(d, d, invariant, mlp) if self.edge_blocks else None
        self.skip = nn.Linear(d, d, bias=False) if config.skip_connections else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        nodes: list[Tensor | None],
        edges: list[Tensor | None],
        backward_edges: list[Tensor] | None,
        positions: list[Tensor] | None,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """One layer; entries of layers and blocks that nothing reads are None.

        Args:
            nodes: per node layer [B, n_l, d].
            edges: per block [B, n_l, n_{l-1}, d].
            backward_edges: per block, from receiver to sender, [B, n_{l-1}, n_l, d]; None for forward models.
            positions: per node layer [n_l or 1, d]; None without positional embeddings.

        Returns:
            New nodes and edges.
        """
        num_blocks = len(edges)
        messages: dict[int, list[Tensor]] = {}
        for layer in self.node_layers:
            silent = torch.zeros_like(nodes[layer])
            received = [silent]
            if layer > 0:
                extras = self._message_extras(positions, receiver=layer, sender=layer - 1)
                received = [self.forward_message(self.roles[layer], nodes[layer - 1], edges[layer - 1], *extras)]
            if self.bidirectional:
                if layer < num_blocks:
                    extras = self._message_extras(positions, receiver=layer, sender=layer + 1)
                    block = backward_edges[layer]
                    received.append(self.backward_message(self.roles[layer], nodes[layer + 1], block, *extras))
                else:
                    received.append(silent)
            messages[layer] = received
        return self._update_nodes(nodes, messages, positions), self._update_edges(nodes, edges)

    def _message_extras(self, positions: list[Tensor] | None, receiver: int, sender: int) -> list[Tensor]:
        """p of a message, broadcasting to [R, S, d]."""
        if not self.message_positions:
            return []
        return [positions[sender][None]] if self.bidirectional else [positions[receiver][:, None]]

    def _update_nodes(
        self, nodes: list[Tensor | None], messages: dict[int, list[Tensor]], positions: list[Tensor] | None
    ) -> list[Tensor | None]:
        """UPD, all rows of one role at once."""
        updated: list[Tensor | None] = [None] * len(nodes)
        for role in ("input", "hidden", "output"):
            layers = [layer for layer in self.node_layers if self.roles[layer] == role]
            if not layers:
                continue
            sizes = [nodes[layer].shape[1] for layer in layers]
            x = torch.cat([nodes[layer] for layer in layers], dim=1)
            received = [torch.cat(parts, dim=1) for parts in zip(*(messages[layer] for layer in layers), strict=True)]
            extras = []
            if self.update_positions:
                extras = [torch.cat([positions[n].expand(s, -1) for n, s in zip(layers, sizes, strict=True)])]
            new = self.update(role, torch.cat([x, *received], dim=-1), *extras)
            if self.skip is not None:
                new = new + self.skip(x)
            for layer, rows in zip(layers, self.dropout(new).split(sizes, dim=1), strict=True):
                updated[layer] = rows
        return updated

    def _update_edges(self, nodes: list[Tensor | None], edges: list[Tensor | None]) -> list[Tensor | None]:
        """The edge update, which reads the x that entered the layer."""
        updated: list[Tensor | None] = [None] * len(edges)
        if self.edge_blocks:
            ends = {layer: self.edge_update.ends(nodes[layer]) for layer in _ends_of(self.edge_blocks)}
            for block in self.edge_blocks:
                updated[block - 1] = self.edge_update(edges[block - 1], ends[block - 1], ends[block])
        return updated


class ScaleGMN(Metanetwork):
    """A function of a network's parameters that is invariant to the symmetries of its neurons.

    x = A_v bias, e = A_e weight, positional embeddings, `num_layers` layers, readout (ScaleGMN, section 5).

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the symmetry does not hold for the networks' activations, or they have no hidden layer.
    """

    def __init__(self, config: ScaleGMNConfig, spec: NetSpec) -> None:
        _check_fit(config, spec)
        normalize = config.symmetry == "permutation" if config.normalize is None else config.normalize
        super().__init__(spec, normalize)
        self.config = config
        d, mlp = config.hidden_dim, _mlp_builder(config)
        self.node_linear = nn.Linear(1, d, bias=False)
        self.edge_linear = nn.Linear(spec.edge_dim, d, bias=False)
        self.node_positions = self.edge_positions = None
        if config.node_positions:
            self.node_positions = PositionalEmbedding(spec.node_types, spec.num_node_types, d)
        if config.edge_positions:
            self.edge_positions = PositionalEmbedding(spec.edge_types, spec.num_edge_types, d)
        node_layers, edge_blocks = _receptive_field(config, spec)
        self.layers = nn.ModuleList(
            ScaleGMNLayer(config, spec, *read) for read in zip(node_layers, edge_blocks, strict=True)
        )
        readout_dim = config.readout_dim or d
        n_in, n_out = spec.layout[0], spec.layout[-1]
        if config.readout == "last_layer" and config.direction == "forward":
            self.readout = OutputReadout(d, n_out, config.out_dim, mlp)
        elif config.readout == "last_layer":
            self.readout = EndsReadout(d, n_in, n_out, config.out_dim, mlp)
        elif config.symmetry == "permutation":
            self.readout = DeepSetReadout(d, readout_dim, config.out_dim, mlp)
        else:
            layer = InvariantLayer(d, 0, readout_dim, partial(SignInvariant, mlp=mlp), mlp)
            self.readout = GraphReadout(d, n_in + n_out, layer, readout_dim, config.out_dim, mlp)

    def forward(self, params: NetParams) -> Tensor:
        """B networks -> [B, out_dim].

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        if params.spec != self.spec:  # sizes decide what the parameters fit, symmetries what is still exact
            if (params.spec.layout, params.spec.kernel) != (self.spec.layout, self.spec.kernel):
                raise ValueError(f"the model was built for {self.spec}, found {params.spec}")
            _check_fit(self.config, params.spec)
        graph = ParameterGraph.from_params(self.normalized(params))
        positions = self.node_positions() if self.node_positions else None
        nodes = self._embed_nodes(graph.nodes, positions)
        edges = self._embed_edges(graph.edges)
        backward_edges = [block.transpose(1, 2) for block in edges] if self.config.direction != "forward" else None
        for layer in self.layers:
            nodes, edges = layer(nodes, edges, backward_edges, positions)
        return self.readout(nodes)

    def _embed_nodes(self, raw: tuple[Tensor, ...], positions: list[Tensor] | None) -> list[Tensor]:
        """A_v bias, times P on hidden nodes and plus P on input and output nodes (permutation: plus P)."""
        nodes = [self.node_linear(x) for x in raw]
        if positions is None:
            return nodes
        times = [self.config.symmetry != "permutation" and role == "hidden" for role in self.spec.roles]
        return [x * p if multiply else x + p for x, p, multiply in zip(nodes, positions, times, strict=True)]

    def _embed_edges(self, raw: tuple[Tensor, ...]) -> list[Tensor]:
        """A_e weight, times P_e (permutation: plus P_e)."""
        edges = [self.edge_linear(e) for e in raw]
        if self.edge_positions is None:
            return edges
        pairs = zip(edges, self.edge_positions(), strict=True)
        return [e + p if self.config.symmetry == "permutation" else e * p for e, p in pairs]


def _mlp_builder(config: ScaleGMNConfig) -> BuildMLP:
    """MLPs of the configured hidden widths, activation and normalisation."""
    hidden_dims = config.mlp_dims or (config.hidden_dim,)
    return lambda in_dim, out_dim: MLP(in_dim, hidden_dims, out_dim, config.mlp_activation, config.mlp_layer_norm)


def _ends_of(blocks: Collection[int]) -> set[int]:
    """The node layers at either end of edge blocks."""
    return {block - 1 for block in blocks} | set(blocks)


def _receptive_field(config: ScaleGMNConfig, spec: NetSpec) -> tuple[list[set[int]], list[set[int]]]:
    """Per message passing layer, the node layers and the edge blocks whose new features anything later reads."""
    last = spec.num_layers
    bidirectional = config.direction == "bidirectional"
    ends = {0, last} if bidirectional else {last}
    read = set(range(last + 1)) if config.readout == "full_graph" else ends
    node_layers, edge_blocks, blocks = [], [], set()
    for _ in range(config.num_layers):
        node_layers.append(read)
        edge_blocks.append(blocks)
        blocks = blocks | {layer for layer in read if layer > 0}
        read = read | _ends_of(blocks)
        if bidirectional:
            read = read | {layer + 1 for layer in read if layer < last}
    return node_layers[::-1], edge_blocks[::-1]


def _check_fit(config: ScaleGMNConfig, spec: NetSpec) -> None:
    """Raises ValueError when the symmetry is not one of the networks'."""
    if spec.num_layers < 2:
        raise ValueError(f"expected networks with at least one hidden layer, found {spec}")
    if config.symmetry != "permutation" and set(spec.symmetries) != {config.symmetry}:
        raise ValueError(
            f"scalegmn_args.symmetry: {config.symmetry} does not hold for {spec}, whose activations admit "
            f"{', '.join(sorted(set(spec.symmetries)))}; use permutation"
        )
