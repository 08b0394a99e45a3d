"""The input network: what it is (`NetSpec`) and a batch of its parameters (`NetParams`).

Everything that follows from the architecture alone (node roles and types, edge order, admissible symmetry, the way
from parameters to the parameter graph and back) is derived here, once, from the frozen description.

Shape letters: B networks, L layers, N nodes, E edges, K kernel values; n = [n_0, ..., n_L] the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATION_SYMMETRY = {
    "sine": "sign",
    "tanh": "sign",
    "relu": "scale",
    "leaky_relu": "scale",
    "gelu": "permutation",
    "silu": "permutation",
    "sigmoid": "permutation",
    "identity": "scale",
}
"""Activation -> the scalars that commute with it: `sign` {-1, 1}, `scale` positive reals, `permutation` {1}. All
commute with an identity; here it has those of relu."""

ACTIVATIONS = tuple(ACTIVATION_SYMMETRY)
"""Hidden activations; `NetParams.activation` holds indices into this tuple."""

MIXED = "hetero"
"""The activation of a layer whose networks differ in it, and the symmetry of such a batch."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer, x -> sigma(W x + b), or sigma(w0 (W x + b)) for a sine.

    A residual connection adds the activations x_s of an earlier hidden layer before the activation: the first
    min(n_s, n_l) channels of W x + b + x_s.

    Args:
        in_dim: neurons (or channels) that it reads, n_{l-1}.
        out_dim: neurons (or channels) that it has, n_l.
        kernel: (kh, kw) of a convolution; None for a linear layer.
        activation: one of `ACTIVATIONS` (of the last layer, `"identity"`), or `"hetero"` where networks differ.
        w0: the frequency of the sines; 1 where there are none.
        residual: s, the hidden layer, counted from 0, that a residual connection comes from; None: there is none.
    """

    in_dim: int
    out_dim: int
    kernel: tuple[int, int] | None = None
    activation: str = "identity"
    w0: float = 1.0
    residual: int | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in) or (out, in, kh, kw)."""
        return (self.out_dim, self.in_dim, *(self.kernel or ()))


class Residual(NamedTuple):
    """A residual connection: channel c of one hidden layer is added to channel c of a later one, for c < channels."""

    source: int
    receiver: int
    channels: int


class Tie(NamedTuple):
    """Neurons that residual connections bind together: for each c in `channels`, channel c of all `layers`."""

    layers: tuple[int, ...]
    """Hidden layers, counted from 0, ascending."""

    channels: slice


@dataclass(frozen=True)
class NetSpec:
    """The frozen, hashable description of a feed-forward network, with residual connections or without.

    x_l = sigma_l(W_l x_{l-1} + b_l) for l = 1..L-1, output W_L x_{L-1} + b_L. Its parameter graph has one node per
    neuron or channel, input and output included, layer by layer, and one edge j -> i per weight W_l[i, j]; residual
    connections, which have no parameters, are not in it (neural graphs add them).

    Raises:
        ValueError: the layers do not form a chain, an activation is unknown, or a residual connection leads from
            nowhere; the message names the layer.
    """

    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a network needs at least one layer")
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            allowed = ("identity",) if last else (*ACTIVATIONS, MIXED)
            if layer.activation not in allowed:
                raise ValueError(
                    f"layer {index}: unknown activation {layer.activation!r}, expected one of {', '.join(allowed)}"
                )
            if min(layer.weight_shape) < 1:
                raise ValueError(f"layer {index}: every size must be at least 1, found weight {layer.weight_shape}")
            if index and layer.in_dim != self.layers[index - 1].out_dim:
                raise ValueError(
                    f"layer {index}: reads {layer.in_dim} neurons, but layer {index - 1} has "
                    f"{self.layers[index - 1].out_dim}"
                )
            if layer.residual is not None:
                self._check_residual(index, layer)
        _ = self.ties  # now: torch.compile cannot trace the lock of a cached property that is still to be computed

    def _check_residual(self, index: int, layer: LayerSpec) -> None:
        """Raises ValueError unless a layer's residual connection comes from a hidden layer of its kind, before the one
        that it reads anyway."""
        sources = range(index - 1) if index < len(self.layers) - 1 else range(0)
        if layer.residual not in sources:
            expected = f"a hidden layer from 0 to {sources[-1]}" if sources else "null"
            raise ValueError(f"layer {index}: residual: found {layer.residual!r}, expected {expected}")
        if (layer.kernel is None) != (self.layers[layer.residual].kernel is None):
            raise ValueError(
                f"layer {index}: residual: found {layer.residual}, but only one of the two layers is a convolution"
            )

    @classmethod
    def mlp(cls, layout: Sequence[int], activation: str, w0: float = 30.0) -> NetSpec:
        """The spec of a multi-layer perceptron with `layout` n and one hidden activation (w0 counts for a sine)."""
        w0 = float(w0) if activation in ("sine", MIXED) else 1.0
        *hidden, last = pairwise(layout)
        return cls((*(LayerSpec(i, o, None, activation, w0) for i, o in hidden), LayerSpec(*last)))

    def with_activation(self, activation: str) -> NetSpec:
        """The same layers with another hidden activation."""
        *hidden, last = self.layers
        return NetSpec((*(replace(layer, activation=activation) for layer in hidden), last))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> NetSpec:
        """The inverse of `to_dict`, from plain JSON types."""
        return cls(
            tuple(
                LayerSpec(**{**layer, "kernel": tuple(layer["kernel"]) if layer["kernel"] else None})
                for layer in content["layers"]
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        activations = sorted({layer.activation for layer in self.layers[:-1]})
        residuals = "".join(f", residual {source} -> {receiver}" for source, receiver, _ in self.residuals)
        kind = "CNN" if self.is_cnn else "MLP"
        return f"{kind} {list(self.layout)} ({', '.join(activations) or 'linear'}{residuals})"

    # Sizes

    @property
    def layout(self) -> tuple[int, ...]:
        """n = (n_0, ..., n_L)."""
        return (self.layers[0].in_dim, *(layer.out_dim for layer in self.layers))

    @property
    def num_layers(self) -> int:
        """L, the number of weight matrices."""
        return len(self.layers)

    @property
    def num_nodes(self) -> int:
        """N."""
        return sum(self.layout)

    @property
    def num_edges(self) -> int:
        """E."""
        return sum(layer.in_dim * layer.out_dim for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        """Weights and biases of one network."""
        return sum(torch.Size(layer.weight_shape).numel() + layer.out_dim for layer in self.layers)

    @property
    def is_cnn(self) -> bool:
        """Whether any layer is a convolution."""
        return any(layer.kernel for layer in self.layers)

    @property
    def kernel(self) -> tuple[int, int]:
        """The largest kernel height and width; (1, 1) without convolutions."""
        kernels = [layer.kernel or (1, 1) for layer in self.layers]
        return max(k[0] for k in kernels), max(k[1] for k in kernels)

    @property
    def edge_dim(self) -> int:
        """K, the raw values per edge: 1, or those of the largest kernel."""
        return self.kernel[0] * self.kernel[1]

    # The parameter graph

    @property
    def input_value(self) -> float:
        """The raw feature of input nodes, which have no bias: 1 for MLPs, 0 for CNNs."""
        return 0.0 if self.is_cnn else 1.0

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each node layer 0..L: `input`, `hidden` or `output`."""
        return ("input", *("hidden" for _ in self.layers[1:]), "output")

    @cached_property
    def node_types(self) -> tuple[Tensor, ...]:
        """Per node layer, [n_l] long: a type per input node, one per hidden layer, one per output node."""
        n_in, n_out, num_hidden = self.layout[0], self.layout[-1], self.num_layers - 1
        hidden = (torch.full((n,), n_in + index) for index, n in enumerate(self.layout[1:-1]))
        return (torch.arange(n_in), *hidden, n_in + num_hidden + torch.arange(n_out))

    @property
    def num_node_types(self) -> int:
        """n_0 + (L - 1) + n_L."""
        return self.layout[0] + self.num_layers - 1 + self.layout[-1]

    @cached_property
    def edge_types(self) -> tuple[Tensor, ...]:
        """Per block, [1, n_0] (by sender), [1, 1] (hidden to hidden) or [n_L, 1] (by receiver): broadcasts to
        [n_l, n_{l-1}]."""
        first = torch.arange(self.layout[0])[None, :]
        if self.num_layers == 1:
            return (first,)
        middle = (torch.full((1, 1), self.layout[0] + index) for index in range(self.num_layers - 2))
        start = self.layout[0] + self.num_layers - 2
        return (first, *middle, start + torch.arange(self.layout[-1])[:, None])

    @property
    def num_edge_types(self) -> int:
        """n_0 + (L - 2) + n_L; n_0 for a single layer."""
        return self.layout[0] + (self.num_layers - 2 + self.layout[-1] if self.num_layers > 1 else 0)

    @cached_property
    def edge_index(self) -> Tensor:
        """[2, E] long, rows sender j and receiver i. Edge order: block by block, then receiver, then sender."""
        starts = torch.tensor([0, *self.layout]).cumsum(0)
        blocks = []
        for index, layer in enumerate(self.layers):
            receiver, sender = torch.meshgrid(torch.arange(layer.out_dim), torch.arange(layer.in_dim), indexing="ij")
            blocks.append(torch.stack([sender.flatten() + starts[index], receiver.flatten() + starts[index + 1]]))
        return torch.cat(blocks, dim=1)

    # Symmetry

    @property
    def symmetries(self) -> tuple[str, ...]:
        """Per hidden layer, the scalars that commute with its activation: `sign`, `scale`, `permutation` or `hetero`
        (each network its own). They leave the function unchanged where no residual connection ties the layer."""
        return tuple(ACTIVATION_SYMMETRY.get(layer.activation, MIXED) for layer in self.layers[:-1])

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """The residual connections, by receiver."""
        return tuple(
            Residual(layer.residual, index, min(layer.out_dim, self.layers[layer.residual].out_dim))
            for index, layer in enumerate(self.layers)
            if layer.residual is not None
        )

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """Which hidden neurons must move together so that the function is unchanged; every one is in one tie.

        A residual connection adds channel c to channel c: the two have one permutation and one scalar. So channel c of
        all layers that such connections join, among those that have a channel c, is one component. Two components can
        be exchanged if and only if they consist of the same layers; these are one tie, and their channels are a range,
        since layers only fall out as c grows. In the order of first layer, then channel.
        """
        hidden, found = self.layout[1:-1], {}
        for first, last in pairwise(sorted({0, *hidden})):
            joined = {layer: {layer} for layer, size in enumerate(hidden) if size > first}
            for source, receiver, channels in self.residuals:
                if channels > first:
                    both = joined[source] | joined[receiver]
                    joined |= dict.fromkeys(both, both)
            for layers in {tuple(sorted(layers)) for layers in joined.values()}:
                start = found[layers].start if layers in found else first
                found[layers] = slice(start, last)
        return tuple(sorted((Tie(*tie) for tie in found.items()), key=lambda tie: (tie.layers[0], tie.channels.start)))

    def tie_symmetry(self, tie: Tie, own: str = MIXED) -> str:
        """The scalars that commute with the activations of all layers of a tie; one for all of them.

        Args:
            tie: one of `ties`.
            own: the network's activation in layers where networks differ.
        """
        names = {self.layers[layer].activation for layer in tie.layers}
        if MIXED in names and own == MIXED:
            return MIXED
        names = {own if name == MIXED else name for name in names} - {"identity"}  # which commutes with all scalars
        kinds = {ACTIVATION_SYMMETRY[name] for name in names} or {"scale"}
        return kinds.pop() if len(kinds) == 1 else "permutation"


def _activation_indices(activation: str | Sequence[str], num_networks: int) -> tuple[str, Tensor | None]:
    """The spec's activation, and [B] indices into `ACTIVATIONS` where networks differ."""
    if isinstance(activation, str):
        if activation == MIXED:
            raise ValueError(f"activation: found {MIXED!r}, expected one name per network")
        return activation, None
    if len(activation) != num_networks:
        raise ValueError(f"activation: found {len(activation)} names for {num_networks} networks, expected one each")
    for name in activation:
        if name not in ACTIVATIONS:
            raise ValueError(f"activation: unknown name {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if len(set(activation)) == 1:
        return activation[0], None
    return MIXED, torch.tensor([ACTIVATIONS.index(name) for name in activation])


@dataclass(frozen=True)
class NetParams:
    """The parameters of B networks of one `NetSpec`.

    Attributes:
        spec: the architecture that all B networks share.
        weights: per layer [B, n_l, n_{l-1}] or [B, n_l, n_{l-1}, kh, kw].
        biases: per layer [B, n_l].
        activation: [B] indices into `ACTIVATIONS` when the spec's activation is `"hetero"`, else None.
    """

    spec: NetSpec
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Tensor | None = None

    @classmethod
    def from_tensors(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        activation: str | Sequence[str],
        w0: float = 30.0,
    ) -> NetParams:
        """Checked parameters of B networks from one weight and one bias tensor per layer.

        Args:
            weights: per layer [B, out, in] or [B, out, in, kh, kw].
            biases: per layer [B, out].
            activation: the hidden activation, one name for all networks or one per network (B names).
            w0: the frequency of sine layers, sin(w0 (W x + b)).

        Raises:
            ValueError: a shape does not fit, a value is not finite, an activation is unknown; names the layer.
        """
        if not 0 < w0 < float("inf"):
            raise ValueError(f"w0: found {w0}, expected above 0")
        if not weights or len(weights) != len(biases):
            raise ValueError(f"expected one bias per weight, found {len(weights)} weights and {len(biases)} biases")
        num_networks = len(weights[0]) if weights[0].ndim else 0
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if weight.ndim not in (3, 5):
                raise ValueError(
                    f"layer {index}: weight has shape {tuple(weight.shape)}, expected [B, out, in] or "
                    "[B, out, in, kh, kw]"
                )
            if len(weight) != num_networks:
                raise ValueError(f"layer {index}: weight holds {len(weight)} networks, layer 0 holds {num_networks}")
            if bias.shape != weight.shape[:2]:
                raise ValueError(
                    f"layer {index}: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:2])}"
                )
            for kind, tensor in (("weight", weight), ("bias", bias)):
                if not tensor.is_floating_point() or tensor.dtype != weights[0].dtype:
                    raise ValueError(
                        f"layer {index}: {kind} is {tensor.dtype}, expected one floating point type for all"
                    )
                bad = ~tensor.isfinite().flatten(1).all(1)
                if bad.any():
                    raise ValueError(f"layer {index}: {kind} of network {int(bad.nonzero()[0])} has NaN or infinity")
        name, indices = _activation_indices(activation, num_networks)
        layers = []
        for index, weight in enumerate(weights):
            hidden = name if index < len(weights) - 1 else "identity"
            kernel = tuple(weight.shape[3:]) or None
            has_sine = hidden == "sine" or (hidden == MIXED and "sine" in activation)
            frequency = float(w0) if has_sine else 1.0
            layers.append(LayerSpec(weight.shape[2], weight.shape[1], kernel, hidden, frequency))
        if indices is not None:
            indices = indices.to(weights[0].device)
        return cls(NetSpec(tuple(layers)), tuple(weights), tuple(biases), indices)

    @classmethod
    def cat(cls, parts: Sequence[NetParams]) -> NetParams:
        """All networks of several batches of one spec, in order."""
        assert all(part.spec == parts[0].spec for part in parts)
        weights = zip(*(part.weights for part in parts), strict=True)
        biases = zip(*(part.biases for part in parts), strict=True)
        activation = None if parts[0].activation is None else torch.cat([part.activation for part in parts])
        return cls(parts[0].spec, tuple(map(torch.cat, weights)), tuple(map(torch.cat, biases)), activation)

    def __len__(self) -> int:
        return len(self.biases[0])

    def map(self, fn: Callable[[Tensor], Tensor]) -> NetParams:
        """`fn` applied to every weight and bias."""
        return NetParams(self.spec, tuple(map(fn, self.weights)), tuple(map(fn, self.biases)), self.activation)

    def to(self, *args: Any, **kwargs: Any) -> NetParams:
        """`Tensor.to` for every weight and bias; activation indices follow to the device."""
        moved = self.map(lambda tensor: tensor.to(*args, **kwargs))
        activation = None if self.activation is None else self.activation.to(moved.biases[0].device)
        return NetParams(self.spec, moved.weights, moved.biases, activation)

    def __getitem__(self, index: slice | Tensor) -> NetParams:
        """The networks that a slice, a [M] index tensor or a [B] mask selects."""
        if isinstance(index, Tensor) and index.dtype == torch.long:  # faster than indexing
            picked = self.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        else:
            picked = self.map(lambda tensor: tensor[index])
        activation = None if self.activation is None else self.activation[index]
        return NetParams(self.spec, picked.weights, picked.biases, activation)

    def flatten(self) -> Tensor:
        """[B, num_parameters]: weight and bias of each layer in turn, row-major."""
        pairs = zip(self.weights, self.biases, strict=True)
        return torch.cat([tensor.flatten(1) for pair in pairs for tensor in pair], dim=1)

    def unflatten(self, flat: Tensor) -> NetParams:
        """[B, num_parameters], in the order of `flatten`, in the shapes of these networks."""
        shapes = [shape for layer in self.spec.layers for shape in (layer.weight_shape, (layer.out_dim,))]
        parts = flat.split([math.prod(shape) for shape in shapes], dim=1)
        tensors = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return NetParams(self.spec, tuple(tensors[::2]), tuple(tensors[1::2]), self.activation)

    # To the parameter graph and back

    def node_features(self) -> list[Tensor]:
        """Raw node features, per node layer [B, n_l, 1]: the biases; `spec.input_value` for input nodes."""
        inputs = self.biases[0].new_full((len(self), self.spec.layout[0]), self.spec.input_value)
        return [layer[..., None] for layer in (inputs, *self.biases)]

    def edge_features(self, kernel: tuple[int, int] | None = None) -> list[Tensor]:
        """Raw edge features, per block [B, n_l, n_{l-1}, K].

        K = 1: the weight. CNNs: the kernel centred in the largest kernel with zeros around, flattened; a linear
        layer's weight stands in component 0.

        Args:
            kernel: the largest kernel (kh, kw), of K values; None: the largest of these networks.
        """
        kernel = kernel or self.spec.kernel
        return [
            weight.new_zeros(*weight.shape[:3], math.prod(kernel)).index_copy_(
                3, slots.to(weight.device), weight.flatten(3) if weight.ndim == 5 else weight[..., None]
            )
            if len(slots) < math.prod(kernel)
            else weight.reshape(*weight.shape[:3], -1)
            for weight, slots in zip(self.weights, _kernel_slots(self.spec, kernel), strict=True)
        ]

    @classmethod
    def from_features(
        cls, spec: NetSpec, nodes: Sequence[Tensor], edges: Sequence[Tensor], activation: Tensor | None = None
    ) -> NetParams:
        """The inverse of `node_features` and `edge_features` (same shapes)."""
        weights = tuple(
            block[..., slots.to(block.device)].reshape(len(block), *layer.weight_shape)
            for layer, block, slots in zip(spec.layers, edges, _kernel_slots(spec, spec.kernel), strict=True)
        )
        return cls(spec, weights, tuple(layer[..., 0] for layer in nodes[1:]), activation)

    def to_pyg(self) -> Any:
        """A `torch_geometric.data.Batch` of B graphs.

        Each has `x` [N, 1], `edge_index` [2, E] (rows sender, receiver; the spec's edge order), `edge_attr` [E, K],
        `node_type` [N] and, for a mixed batch, `activation` [1].
        """
        from torch_geometric.data import Batch, Data

        nodes = torch.cat(self.node_features(), dim=1)
        edges = torch.cat([block.flatten(1, 2) for block in self.edge_features()], dim=1)
        edge_index = self.spec.edge_index.to(nodes.device)
        node_type = torch.cat(self.spec.node_types).to(nodes.device)
        graphs = [
            Data(x=x, edge_index=edge_index, edge_attr=edge_attr, node_type=node_type)
            for x, edge_attr in zip(nodes, edges, strict=True)
        ]
        if self.activation is not None:
            for graph, activation in zip(graphs, self.activation, strict=True):
                graph.activation = activation[None]
        return Batch.from_data_list(graphs)

    @classmethod
    def from_pyg(cls, batch: Any, spec: NetSpec) -> NetParams:
        """The inverse of `to_pyg`.

        Raises:
            ValueError: the graphs are not parameter graphs of `spec`.
        """
        num = batch.num_graphs
        expected = {"x": (num * spec.num_nodes, 1), "edge_attr": (num * spec.num_edges, spec.edge_dim)}
        for key, shape in expected.items():
            if tuple(batch[key].shape) != shape:
                raise ValueError(f"{key} has shape {tuple(batch[key].shape)}, expected {shape} for {num} x {spec}")
        offsets = torch.arange(num, device=batch.x.device) * spec.num_nodes
        edge_index = spec.edge_index.to(batch.x.device)[:, None, :] + offsets[None, :, None]
        if not torch.equal(batch.edge_index, edge_index.flatten(1)):
            raise ValueError(f"edge_index is not in the edge order of {spec}: build graphs with NetParams.to_pyg")
        nodes = batch.x.reshape(num, spec.num_nodes, 1).split(spec.layout, dim=1)
        sizes = [layer.in_dim * layer.out_dim for layer in spec.layers]
        edges = [
            block.reshape(num, layer.out_dim, layer.in_dim, spec.edge_dim)
            for layer, block in zip(
                spec.layers, batch.edge_attr.reshape(num, spec.num_edges, -1).split(sizes, dim=1), strict=True
            )
        ]
        activation = batch.get("activation")
        if MIXED in spec.symmetries and activation is None:
            raise ValueError(f"activation: missing, expected [{num}] indices for {spec}")
        return cls.from_features(spec, nodes, edges, activation)


def _kernel_slots(spec: NetSpec, kernel: tuple[int, int]) -> list[Tensor]:
    """Per layer, which of the K raw edge values its weights fill: a window centred in `kernel`, or component 0."""
    height, width = kernel
    grid = torch.arange(height * width).reshape(height, width)
    slots = []
    for layer in spec.layers:
        if layer.kernel is None:
            slots.append(grid[0, :1])
        else:
            top, left = (height - layer.kernel[0]) // 2, (width - layer.kernel[1]) // 2
            slots.append(grid[top : top + layer.kernel[0], left : left + layer.kernel[1]].flatten())
    return slots
