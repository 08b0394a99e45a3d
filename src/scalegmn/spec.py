"""The input network: what it is (`NetSpec`) and a batch of its parameters (`NetParams`).

Everything that follows from the architecture alone (node roles and types, edge order, admissible symmetry, the way
from parameters to the parameter graph and back) is derived here, once, from the frozen description.

Shape letters: B networks, L layers, N nodes, E edges, K kernel values; n = [n_0, ..., n_L] the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
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


NORMS = ("batch", "layer", "group")
"""Normalisation layers: what the statistics are over. Root mean square norms are `layer` norms too."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer, x -> sigma(W x + b), or sigma(w0 (W x + b)) for a sine.

    A residual connection adds the activations x_s of an earlier layer before the activation: the first
    min(n_s, n_l) channels of W x + b + x_s.

    Args:
        in_dim: neurons (or channels) that it reads; of a `constant` layer, its own inputs.
        out_dim: neurons (or channels) that it has, n_l.
        kernel: (kh, kw) of a convolution, or of a linear layer that reads all positions of an image; None for a
            linear layer.
        activation: one of `ACTIVATIONS` (of the last layer, `"identity"`), or `"hetero"` where networks differ.
        w0: the frequency of the sines; 1 where there are none.
        residual: s, the earlier layer, counted from 0, that a residual connection comes from, -1 for the network's
            input; None: there is none.
        residual_after: the residual connection is added after the activation.
        reads: the earlier layer whose neurons it reads, -1 for the network's input; None: the one before.
        constant: it reads `in_dim` constant inputs of its own, such as the positions of a learned position embedding.
        groups: neurons and what they read are cut into so many groups, each of which reads its own; `out_dim` for a
            depthwise convolution.
        norm: one of `NORMS`: a normalisation layer, whose weight is the scale and whose bias is the shift.
        norm_groups: of a group norm.
        epsilon: what a normalisation layer adds to the variance.
        affine: false: the weights are no parameters but ones.
        bias: false: the biases are no parameters but zeros.
        attention: (query layer, key layer, heads): the layer says the values of a multi-head attention,
            softmax(q k^T) v, and whatever reads it reads the heads' results.
        tied: the earlier layer whose weights these are, transposed.
        maximum: whatever reads it reads the largest of its values at several positions (max pooling), with which no
            sign commutes.
    """

    in_dim: int
    out_dim: int
    kernel: tuple[int, int] | None = None
    activation: str = "identity"
    w0: float = 1.0
    residual: int | None = None
    residual_after: bool = False
    reads: int | None = None
    constant: bool = False
    groups: int = 1
    norm: str | None = None
    norm_groups: int = 1
    epsilon: float = 0.0
    affine: bool = True
    bias: bool = True
    attention: tuple[int, int, int] | None = None
    tied: int | None = None
    maximum: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in / groups) or (out, in / groups, kh, kw)."""
        return (self.out_dim, self.in_dim // self.groups, *(self.kernel or ()))

    @property
    def is_plain(self) -> bool:
        """Whether it is a linear layer or a convolution that reads all of the layer before, in a chain."""
        return (
            self.reads is None
            and self.norm is None
            and self.attention is None
            and self.tied is None
            and not self.maximum
            and not self.constant
            and not self.residual_after
            and self.groups == 1
        )

    @property
    def is_diagonal(self) -> bool:
        """Whether each neuron reads one of its own: normalisation, depthwise convolutions."""
        return self.groups == self.in_dim == self.out_dim > 1 or self.norm is not None


class Residual(NamedTuple):
    """A residual connection: channel c of one layer (-1: of the input) is added to channel c of a later one, for
    c < channels."""

    source: int
    receiver: int
    channels: int


class Tie(NamedTuple):
    """Neurons that must move together so that the function is unchanged: for each c in `channels`, channel c of all
    `layers`."""

    layers: tuple[int, ...]
    """Hidden layers, counted from 0, ascending."""

    channels: slice

    blocks: int = 1
    """The channels are cut into so many blocks; blocks are permuted as a whole, and channels within each. See
    `NetSpec.block_order`."""


@dataclass(frozen=True)
class NetSpec:
    """The frozen, hashable description of a feed-forward network: a chain of layers, or any graph of them.

    x_l = sigma_l(W_l x_{l-1} + b_l) for l = 1..L-1, output W_L x_{L-1} + b_L; layers may read another earlier layer
    than the one before, and add residual connections. Its parameter graph has one node per neuron or channel, input and
    output included, and one edge j -> i per weight W_l[i, j]; residual connections and attention, which have no
    parameters, are not in it (`residual_index`, `attention_index`).

    Node layers: the input, then each layer in turn, before it the constant inputs that it reads, if any; the last one
    is the output. In a chain node layer l is what layer l - 1, counted from 0, says.

    Raises:
        ValueError: layers do not fit what they read, an activation is unknown, or a connection leads from nowhere; the
            message names the layer.
    """

    layers: tuple[LayerSpec, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a network needs at least one layer")
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)
        for name in ("ties", "scale_ties", "node_layers", "reciprocal_layers", "_unscaled", "_attended"):
            getattr(self, name)  # now: torch.compile cannot trace the lock of a cached property still to be computed

    def _check_layer(self, index: int, layer: LayerSpec) -> None:
        """Raises ValueError unless a layer fits those before it."""

        def refuse(problem: str) -> None:
            raise ValueError(f"layer {index}: {problem}")

        last = index == len(self.layers) - 1
        allowed = ("identity",) if last else (*ACTIVATIONS, MIXED)
        if layer.activation not in allowed:
            refuse(f"unknown activation {layer.activation!r}, expected one of {', '.join(allowed)}")
        if min(layer.in_dim, *layer.weight_shape, layer.groups) < 1:
            refuse(f"every size must be at least 1, found weight {layer.weight_shape}")
        if layer.in_dim % layer.groups or layer.out_dim % layer.groups:
            refuse(f"groups: found {layer.groups} of {layer.in_dim} and {layer.out_dim} channels, expected a divisor")
        if layer.norm is not None and (layer.norm not in NORMS or layer.out_dim != layer.groups):
            refuse(f"norm: found {layer.norm!r} of {layer.groups} groups, expected one of {NORMS}, channel by channel")
        earlier = {"reads": layer.reads, "residual": layer.residual, "tied": layer.tied}
        if layer.attention is not None:
            earlier |= {"query": layer.attention[0], "key": layer.attention[1]}
        for name, source in earlier.items():
            lowest = -1 if name in ("reads", "residual") else 0
            if source is not None and source not in range(lowest, index):
                refuse(f"{name}: found {source!r}, expected a layer from {lowest} to {index - 1}")
        reads = index - 1 if layer.reads is None else layer.reads
        if not layer.constant and layer.in_dim != self._width(reads) and (index or layer.reads is not None):
            refuse(f"reads {layer.in_dim} neurons, but layer {reads} has {self._width(reads)}")
        if layer.attention is not None:
            query, key, heads = layer.attention
            widths = {self.layers[query].out_dim, self.layers[key].out_dim}
            if heads < 1 or len(widths) > 1 or any(width % heads for width in (*widths, layer.out_dim)):
                refuse(f"attention: found {heads} heads of queries, keys {sorted(widths)} and values {layer.out_dim}")
        added = self.layers[layer.residual] if self.is_chain and layer.residual not in (None, -1) else layer
        if (layer.kernel is None) != (added.kernel is None):
            refuse(f"residual: found {layer.residual}, but only one of the two layers is a convolution")

    def _width(self, layer: int) -> int:
        """Channels of a layer, -1 for the network's input."""
        if layer >= 0:
            return self.layers[layer].out_dim
        first = next((one for index, one in enumerate(self.layers) if self.sender(index) == -1), self.layers[0])
        return first.in_dim

    @classmethod
    def mlp(cls, layout: Sequence[int], activation: str, w0: float = 30.0) -> NetSpec:
        """The spec of a multi-layer perceptron with `layout` n and one hidden activation (w0 counts for a sine)."""
        w0 = float(w0) if activation in ("sine", MIXED) else 1.0
        *hidden, last = pairwise(layout)
        return cls((*(LayerSpec(i, o, None, activation, w0) for i, o in hidden), LayerSpec(*last)))

    @classmethod
    def covering(cls, specs: Collection[NetSpec]) -> NetSpec:
        """What a model is built for that reads networks of all of `specs`; of one, itself.

        A chain of as many hidden layers as they have at most. Its hidden layer l has the largest width and kernel of
        all l-th hidden layers (or of the last of them), an activation that admits what theirs admit (`"hetero"` where
        that differs) and one of their residual connections; likewise the last layer.

        Raises:
            ValueError: they have other inputs or other outputs.
        """
        first, *others = specs
        if not others:
            return first
        for spec in others:
            if (spec.layout[0], spec.layout[-1]) != (first.layout[0], first.layout[-1]):
                raise ValueError(f"expected architectures with the same inputs and outputs, found {first} and {spec}")
        depth = max(spec.num_hidden_layers for spec in specs)
        alike = [[spec.layers[index] for spec in specs if index < spec.num_layers - 1] for index in range(depth)]
        alike = [own or next(filter(None, reversed(alike))) for own in alike]  # constant inputs are layers of nodes too
        layers: list[LayerSpec] = []
        for own in [*alike, [spec.layers[-1] for spec in specs]]:
            kernels = [layer.kernel for layer in own if layer.kernel]
            layer = LayerSpec(
                layers[-1].out_dim if layers else first.layout[0],
                max(layer.out_dim for layer in own),
                tuple(map(max, zip(*kernels, strict=True))) if kernels else None,
                _covering_activation({layer.activation for layer in own}),
                max(layer.w0 for layer in own),
            )
            sources = [source for source in (layer.residual for layer in own) if source is not None]
            fitting = [s for s in sources if s < 0 or (layers[s].kernel is None) == (layer.kernel is None)]
            layers.append(replace(layer, residual=fitting[0] if fitting else None))
        return cls(tuple(layers))

    def with_activation(self, activation: str) -> NetSpec:
        """The same layers with another hidden activation."""
        *hidden, last = self.layers
        return NetSpec((*(replace(layer, activation=activation) for layer in hidden), last))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> NetSpec:
        """The inverse of `to_dict`, from plain JSON types."""
        pairs = ("kernel", "attention")
        return cls(
            tuple(
                LayerSpec(**{key: tuple(value) if key in pairs and value else value for key, value in layer.items()})
                for layer in content["layers"]
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; fields at their defaults are left out, but for those of every layer."""
        always = ("in_dim", "out_dim", "kernel", "activation", "w0", "residual")
        defaults = {item.name: item.default for item in fields(LayerSpec)}
        return {
            "layers": [
                {key: value for key, value in asdict(layer).items() if key in always or value != defaults[key]}
                for layer in self.layers
            ]
        }

    def __str__(self) -> str:
        activations = sorted({layer.activation for layer in self.layers[:-1]})
        kind = "CNN" if self.is_cnn else "MLP"
        if not self.is_chain:
            kinds = {"norm": [one.norm for one in self.layers], "attention": [one.attention for one in self.layers]}
            also = "".join(f", {name}" for name, found in kinds.items() if any(found))
            layers = f"{self.num_layers} layers{also}, {self.num_parameters:,} parameters"
            return f"network of {layers} ({', '.join(activations)})"
        residuals = "".join(f", residual {source} -> {receiver}" for source, receiver, _ in self.residuals)
        return f"{kind} {list(self.layout)} ({', '.join(activations) or 'linear'}{residuals})"

    # Sizes

    @property
    def is_chain(self) -> bool:
        """Whether each layer reads all of the layer before; residual connections may be there."""
        return all(layer.is_plain for layer in self.layers)

    @property
    def layout(self) -> tuple[int, ...]:
        """Sizes of the node layers; of a chain n = (n_0, ..., n_L)."""
        sizes = [self._width(-1)]
        for layer in self.layers:
            sizes += [layer.in_dim, layer.out_dim] if layer.constant else [layer.out_dim]
        return tuple(sizes)

    @property
    def num_layers(self) -> int:
        """L, the number of weight matrices."""
        return len(self.layers)

    @property
    def num_hidden_layers(self) -> int:
        """Node layers between input and output: L - 1 in a chain."""
        return len(self.layout) - 2

    @property
    def num_nodes(self) -> int:
        """N."""
        return sum(self.layout)

    @property
    def num_edges(self) -> int:
        """E."""
        return sum(layer.out_dim * (layer.in_dim // layer.groups) for layer in self.layers)

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

    def sender(self, layer: int) -> int:
        """The layer that a layer reads; -1 for the network's input, and for a layer of constant inputs."""
        reads = self.layers[layer].reads
        return -1 if self.layers[layer].constant else layer - 1 if reads is None else reads

    @cached_property
    def node_layers(self) -> tuple[tuple[int, int], ...]:
        """Per layer, the node layers (sender, receiver) of its block of edges."""
        place, receivers, found = 0, {-1: 0}, []
        for index, layer in enumerate(self.layers):
            place += 1
            sender = place if layer.constant else receivers[self.sender(index)]
            place += layer.constant
            receivers[index] = place
            found.append((sender, place))
        return tuple(found)

    @property
    def input_value(self) -> float:
        """The raw feature of input nodes, which have no bias: 1 for MLPs, 0 for CNNs."""
        return 0.0 if self.is_cnn else 1.0

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each node layer: `input` (also of constant inputs), `hidden` or `output`."""
        roles = ["input"]
        for layer in self.layers:
            roles += ["input", "hidden"] if layer.constant else ["hidden"]
        return (*roles[:-1], "output")

    @cached_property
    def node_types(self) -> tuple[Tensor, ...]:
        """Per node layer, [n_l] long: a type per input node, one per hidden layer, one per output node. Constant
        inputs of a layer have one type, as a hidden layer's nodes."""
        n_in, n_out, num_hidden = self.layout[0], self.layout[-1], self.num_hidden_layers
        hidden = (torch.full((n,), n_in + index) for index, n in enumerate(self.layout[1:-1]))
        return (torch.arange(n_in), *hidden, n_in + num_hidden + torch.arange(n_out))

    @property
    def num_node_types(self) -> int:
        """n_0 + (number of node layers between) + n_L."""
        return self.layout[0] + self.num_hidden_layers + self.layout[-1]

    @cached_property
    def edge_types(self) -> tuple[Tensor, ...]:
        """Per block, by sender where they leave the network's input, else by receiver into the output, else one type
        per hidden layer that receives: broadcasts to [n_l, n_{l-1}], or to [n_l, n_{l-1} / groups]."""
        types, n_in, output = [], self.layout[0], len(self.layout) - 1
        for layer, (sender, receiver) in zip(self.layers, self.node_layers, strict=True):
            if sender == 0:
                types.append(_senders(layer) if layer.groups > 1 else torch.arange(layer.in_dim)[None, :])
            else:
                own = torch.arange(layer.out_dim) if receiver == output else torch.zeros(1, dtype=torch.long)
                types.append(n_in + receiver - 2 + own[:, None])
        return tuple(types)

    @property
    def num_edge_types(self) -> int:
        """n_0 + (hidden layers - 1) + n_L; n_0 for a single layer."""
        return self.layout[0] + (self.num_hidden_layers - 1 + self.layout[-1] if self.num_hidden_layers else 0)

    @cached_property
    def edge_index(self) -> Tensor:
        """[2, E] long, rows sender j and receiver i. Edge order: block by block, then receiver, then sender."""
        starts = torch.tensor([0, *self.layout]).cumsum(0)
        blocks = []
        for layer, (sender, receiver) in zip(self.layers, self.node_layers, strict=True):
            senders = _senders(layer)
            receivers = torch.arange(layer.out_dim)[:, None].expand_as(senders)
            blocks.append(torch.stack([senders.flatten() + starts[sender], receivers.flatten() + starts[receiver]]))
        return torch.cat(blocks, dim=1)

    @cached_property
    def residual_index(self) -> Tensor:
        """[2, C] long, rows sender and receiver: nodes that residual connections join."""
        starts = torch.tensor([0, *self.layout]).cumsum(0)
        places = {-1: 0, **{index: receiver for index, (_, receiver) in enumerate(self.node_layers)}}
        joined = [torch.empty(2, 0, dtype=torch.long)]
        for source, receiver, channels in self.residuals:
            both = torch.stack([starts[places[source]], starts[places[receiver]]])
            joined.append(both[:, None] + torch.arange(channels))
        return torch.cat(joined, dim=1)

    @cached_property
    def attention_index(self) -> Tensor:
        """[2, C] long, rows sender and receiver: each query and each key of a head, and all values of this head."""
        starts = torch.tensor([0, *self.layout]).cumsum(0)
        joined = [torch.empty(2, 0, dtype=torch.long)]
        for index, layer in enumerate(self.layers):
            *sources, heads = layer.attention or (0,)
            for source in sources:
                places = starts[self.node_layers[source][1]], starts[self.node_layers[index][1]]
                senders = torch.arange(self.layers[source].out_dim).reshape(heads, 1, -1)
                receivers = torch.arange(layer.out_dim).reshape(heads, -1, 1)
                senders, receivers = torch.broadcast_tensors(senders, receivers)
                joined.append(torch.stack([places[0] + senders.flatten(), places[1] + receivers.flatten()]))
        return torch.cat(joined, dim=1)

    # Symmetry

    @property
    def symmetries(self) -> tuple[str, ...]:
        """Per hidden layer, the scalars that commute with its activation: `sign`, `scale`, `permutation` or `hetero`
        (each network its own). They leave the function unchanged where nothing ties the layer."""
        return tuple(ACTIVATION_SYMMETRY.get(layer.activation, MIXED) for layer in self.layers[:-1])

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """The residual connections, by receiver."""
        return tuple(
            Residual(layer.residual, index, min(layer.out_dim, self._width(layer.residual)))
            for index, layer in enumerate(self.layers)
            if layer.residual is not None
        )

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """Which hidden neurons must be permuted together; those that may not be permuted at all are in none.

        A residual connection adds channel c to channel c; a normalisation layer or a depthwise convolution reads one
        channel for each; attention multiplies channel c of queries and of keys; a tied layer has the columns of another
        one's rows: the two have one permutation. So channel c of all layers that are so joined, among those that have
        a channel c, is one component. Two components can be exchanged if and only if they consist of the same layers;
        these are one tie, and their channels are a range, since layers only fall out as c grows. Blocks of channels
        (groups, heads) stay together. In the order of first layer, then channel.
        """
        links = list(self.residuals)
        for index, layer in enumerate(self.layers):
            if layer.is_diagonal and not layer.constant:
                links.append(Residual(self.sender(index), index, layer.out_dim))
            if layer.attention is not None:
                links.append(Residual(layer.attention[1], layer.attention[0], self.layers[layer.attention[0]].out_dim))
        links += [Residual(one, other, self._width(one)) for one, other in self._transposed]
        blocks = self._blocks
        ties = []
        for tie in self._tied(links):
            count = math.lcm(*(number for layer in tie.layers for number in blocks.get(layer, ())))
            if count > 1 and any(self._width(layer) != tie.channels.stop for layer in tie.layers):
                raise ValueError(
                    f"layer {tie.layers[0]}: its channels are cut into {count} blocks, those tied to it not"
                )
            ties.append(tie._replace(blocks=count))
        return tuple(ties)

    @cached_property
    def scale_ties(self) -> tuple[Tie, ...]:
        """Which hidden neurons must have one scalar: those that residual connections join; see `ties`."""
        return self._tied(self.residuals)

    def _tied(self, links: Sequence[Residual]) -> tuple[Tie, ...]:
        """What `ties` are without blocks, of these links."""
        layers, found = range(-1, self.num_layers), {}
        for first, last in pairwise(sorted({0, *map(self._width, layers)})):
            joined = {layer: {layer} for layer in layers if self._width(layer) > first}
            for source, receiver, channels in links:
                if channels > first:
                    both = joined[source] | joined[receiver]
                    joined |= dict.fromkeys(both, both)
            for tied in {tuple(sorted(tied)) for tied in joined.values()}:
                start = found[tied].start if tied in found else first
                found[tied] = slice(start, last)
        fixed = {-1, self.num_layers - 1}  # nobody permutes a network's input and output
        ties = (Tie(*tie) for tie in found.items() if not fixed & set(tie[0]))
        return tuple(sorted(ties, key=lambda tie: (tie.layers[0], tie.channels.start)))

    @cached_property
    def _blocks(self) -> dict[int, set[int]]:
        """Layer -> into how many blocks its channels are cut, by whatever cuts them."""
        found: dict[int, set[int]] = {}
        for index, layer in enumerate(self.layers):
            counts = [(self.sender(index), layer.norm_groups)]
            if layer.groups > 1 and not layer.is_diagonal:
                counts += [(self.sender(index), layer.groups), (index, layer.groups)]
            if layer.attention is not None:
                counts += [(one, layer.attention[2]) for one in (*layer.attention[:2], index)]
            for place, count in counts:
                if count > 1:
                    found.setdefault(place, set()).add(count)
        return found

    @cached_property
    def block_order(self) -> dict[int, int]:
        """Layer -> the first of the layers whose blocks are permuted alike; -1 where they stay: blocks of the input and
        of the output, and of layers that are cut in two ways.

        Both sides of a grouped convolution, and queries, keys and values, have one order of groups or heads.
        """
        links = [(index, index) for index in range(self.num_layers - 1)]
        for index, layer in enumerate(self.layers):
            if layer.groups > 1 and not layer.is_diagonal:
                links.append((self.sender(index), index))
            if layer.attention is not None:
                links.append((layer.attention[0], index))
        links += [(tie.layers[0], layer) for tie in self.ties for layer in tie.layers]
        free = set()
        for tie in self.ties:
            if len(set().union(*(self._blocks.get(layer, ()) for layer in tie.layers))) < 2:
                free |= set(tie.layers)
        order = {layer: layer if layer in free else -1 for link in links for layer in link}
        for _ in order:
            for one, other in links:
                order[one] = order[other] = min(order[one], order[other])
        return order

    @cached_property
    def reciprocal_layers(self) -> dict[int, int]:
        """Key layer -> query layer of attention where keys may be divided by what queries are multiplied by."""
        free = {tie.layers[0] for tie in self.scale_ties if len(tie.layers) == 1}
        pairs = [layer.attention[:2] for layer in self.layers if layer.attention is not None]
        return {
            key: query
            for query, key in pairs
            if query != key and all(self.layers[one].activation == "identity" for one in (query, key))
            if {query, key} <= free - self._unscaled
        }

    @cached_property
    def _unscaled(self) -> frozenset[int]:
        """Layers that layer and group norms read, whose mean and variance mix channels; and norms without scale."""
        found = {self.sender(index) for index, layer in enumerate(self.layers) if layer.norm in ("layer", "group")}
        return frozenset(found | {index for index, layer in enumerate(self.layers) if not layer.affine})

    def tie_symmetry(self, tie: Tie, own: str = MIXED) -> str:
        """The scalars that commute with the activations of all layers of a tie, and with all that reads them.

        Keys of attention have those of their queries (`reciprocal_layers`), inverted, and none of their own.

        Args:
            tie: one of `scale_ties`.
            own: the network's activation in layers where networks differ.
        """
        if set(tie.layers) & self._unscaled or set(tie.layers) & self._attended:
            return "permutation"
        names = {self.layers[layer].activation for layer in tie.layers}
        if MIXED in names and own == MIXED:
            return MIXED
        names = {own if name == MIXED else name for name in names} - {"identity"}  # which commutes with all scalars
        kinds = {ACTIVATION_SYMMETRY[name] for name in names} or {"scale"}
        for pair in self._transposed:  # q of one is 1 / q of the other
            if set(pair) & set(tie.layers):
                odd = kinds == {"sign"} or not names
                kinds = {"sign"} if odd and set(pair) <= set(tie.layers) else set()
        if kinds == {"sign"} and any(self.layers[layer].maximum for layer in tie.layers):
            return "permutation"
        return kinds.pop() if len(kinds) == 1 else "permutation"

    @cached_property
    def _attended(self) -> frozenset[int]:
        """Keys, and queries whose keys are not free to follow."""
        pairs = [layer.attention[:2] for layer in self.layers if layer.attention is not None]
        return frozenset({key for _, key in pairs} | {q for q, key in pairs if self.reciprocal_layers.get(key) != q})

    @property
    def _transposed(self) -> list[tuple[int, int]]:
        """Pairs of layers whose neurons are rows of one weight and columns of its transpose: the tied layer and what
        the later one reads, what the tied one reads and the later one; -1 for the network's input."""
        layers = [(index, layer.tied) for index, layer in enumerate(self.layers) if layer.tied is not None]
        pairs = ((tied, self.sender(index), self.sender(tied), index) for index, tied in layers)
        return [pair for a, b, c, d in pairs for pair in ((a, b), (c, d))]


def _senders(layer: LayerSpec) -> Tensor:
    """Which of the channels that a layer reads each neuron reads, [n_l, n_{l-1} / groups]."""
    size = layer.in_dim // layer.groups
    group = torch.arange(layer.out_dim)[:, None] // (layer.out_dim // layer.groups)
    return group * size + torch.arange(size)


def _covering_activation(names: set[str]) -> str:
    """One activation that admits the scalars of all; `MIXED` where these differ."""
    names = names - {"identity"} or names  # which commutes with all scalars
    kinds = {ACTIVATION_SYMMETRY.get(name, MIXED) for name in names}
    return min(names, key=ACTIVATIONS.index) if len(kinds) == 1 and MIXED not in kinds else MIXED


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
        statistics: per layer, of batch norms, running mean and variance [B, 2, n_l], None of other layers; None where
            the spec has no batch norm.
    """

    spec: NetSpec
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Tensor | None = None
    statistics: tuple[Tensor | None, ...] | None = None

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
        statistics = None
        if parts[0].statistics is not None:
            columns = zip(*(part.statistics for part in parts), strict=True)
            statistics = tuple(None if column[0] is None else torch.cat(column) for column in columns)
        return cls(parts[0].spec, tuple(map(torch.cat, weights)), tuple(map(torch.cat, biases)), activation, statistics)

    def __len__(self) -> int:
        return len(self.biases[0])

    @property
    def parts(self) -> tuple[NetParams, ...]:
        """The networks, as in `MixedNets`."""
        return (self,)

    def tensors(self) -> list[Tensor]:
        """All that has a row per network."""
        return [x for x in (*self.weights, *self.biases, self.activation, *(self.statistics or ())) if x is not None]

    def map(self, fn: Callable[[Tensor], Tensor]) -> NetParams:
        """`fn` applied to every weight and bias, and to all statistics."""
        statistics = self.statistics and tuple(one if one is None else fn(one) for one in self.statistics)
        return NetParams(
            self.spec, tuple(map(fn, self.weights)), tuple(map(fn, self.biases)), self.activation, statistics
        )

    def to(self, *args: Any, **kwargs: Any) -> NetParams:
        """`Tensor.to` for every weight and bias; activation indices follow to the device."""
        moved = self.map(lambda tensor: tensor.to(*args, **kwargs))
        activation = None if self.activation is None else self.activation.to(moved.biases[0].device)
        return replace(moved, activation=activation)

    def __getitem__(self, index: slice | Tensor) -> NetParams:
        """The networks that a slice, a [M] index tensor or a [B] mask selects."""
        if isinstance(index, Tensor) and index.dtype == torch.long:  # faster than indexing
            picked = self.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))
        else:
            picked = self.map(lambda tensor: tensor[index])
        activation = None if self.activation is None else self.activation[index]
        return replace(picked, activation=activation)

    def flatten(self) -> Tensor:
        """[B, num_parameters]: weight and bias of each layer in turn, row-major."""
        pairs = zip(self.weights, self.biases, strict=True)
        return torch.cat([tensor.flatten(1) for pair in pairs for tensor in pair], dim=1)

    def unflatten(self, flat: Tensor) -> NetParams:
        """[B, num_parameters], in the order of `flatten`, in the shapes of these networks."""
        shapes = [shape for layer in self.spec.layers for shape in (layer.weight_shape, (layer.out_dim,))]
        parts = flat.split([math.prod(shape) for shape in shapes], dim=1)
        tensors = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return replace(self, weights=tuple(tensors[::2]), biases=tuple(tensors[1::2]))

    def folded(self) -> NetParams:
        """The same functions with each batch norm, as it evaluates, as scale a = weight / sqrt(variance + epsilon) and
        shift, bias - a mean, of each channel: a layer of `groups` without statistics."""
        if self.statistics is None:
            return self
        layers, weights, biases = list(self.spec.layers), list(self.weights), list(self.biases)
        for index, found in enumerate(self.statistics):
            if found is not None:
                mean, variance = found.unbind(1)
                scale = weights[index][..., 0] / (variance + layers[index].epsilon).sqrt()
                layers[index] = replace(layers[index], norm=None, epsilon=0.0, affine=True, bias=True)
                weights[index], biases[index] = scale[..., None], biases[index] - scale * mean
        return NetParams(NetSpec(tuple(layers)), tuple(weights), tuple(biases), self.activation)

    # To the parameter graph and back

    def node_features(self) -> list[Tensor]:
        """Raw node features, per node layer [B, n_l, 1]: the biases; `spec.input_value` for input nodes.

        Of batch norms, here and on edges, those of the `folded` networks.
        """
        layout, own = self.spec.layout, self.folded().biases
        found = [own[0].new_full((len(self), size), self.spec.input_value) for size in layout]
        for bias, (_, place) in zip(own, self.spec.node_layers, strict=True):
            found[place] = bias
        return [layer[..., None] for layer in found]

    def edge_features(self, kernel: tuple[int, int] | None = None) -> list[Tensor]:
        """Raw edge features, per block [B, n_l, n_{l-1}, K]; [B, n_l, n_{l-1} / groups, K] of layers with groups.

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
            for weight, slots in zip(self.folded().weights, _kernel_slots(self.spec, kernel), strict=True)
        ]

    @classmethod
    def from_features(
        cls, spec: NetSpec, nodes: Sequence[Tensor], edges: Sequence[Tensor], activation: Tensor | None = None
    ) -> NetParams:
        """The inverse of `node_features` and `edge_features` (same shapes), without batch norms."""
        weights = tuple(
            block[..., slots.to(block.device)].reshape(len(block), *layer.weight_shape)
            for layer, block, slots in zip(spec.layers, edges, _kernel_slots(spec, spec.kernel), strict=True)
        )
        return cls(spec, weights, tuple(nodes[place][..., 0] for _, place in spec.node_layers), activation)

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
        """The inverse of `to_pyg`, for networks without batch norms.

        Raises:
            ValueError: the graphs are not parameter graphs of `spec`, or it has batch norms: graphs lack statistics.
        """
        if any(layer.norm == "batch" for layer in spec.layers):
            raise ValueError(f"a parameter graph has no statistics of batch norms, found {spec}; fold them first")
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
        sizes = [layer.out_dim * (layer.in_dim // layer.groups) for layer in spec.layers]
        edges = [
            block.reshape(num, layer.out_dim, layer.in_dim // layer.groups, spec.edge_dim)
            for layer, block in zip(
                spec.layers, batch.edge_attr.reshape(num, spec.num_edges, -1).split(sizes, dim=1), strict=True
            )
        ]
        activation = batch.get("activation")
        if MIXED in spec.symmetries and activation is None:
            raise ValueError(f"activation: missing, expected [{num}] indices for {spec}")
        return cls.from_features(spec, nodes, edges, activation)


@dataclass(frozen=True)
class MixedNets:
    """B networks of several architectures: batches of one architecture, one after the other.

    Iterating gives these batches; the length and slices count networks.

    Attributes:
        parts: the batches.
    """

    parts: tuple[NetParams, ...]

    @classmethod
    def of(cls, parts: Iterable[NetParams]) -> NetParams | MixedNets:
        """The networks of batches, in order; a single batch stays what it is."""
        parts = tuple(parts)
        return parts[0] if len(parts) == 1 else cls(parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[NetParams]:
        return iter(self.parts)

    def __getitem__(self, index: slice) -> NetParams | MixedNets:
        """The networks of a slice without step; of an empty one, none of the first architecture."""
        start, stop, _ = index.indices(len(self))
        found, first = [], 0
        for part in self.parts:
            own = slice(max(start - first, 0), min(stop - first, len(part)))
            found += [part[own]] if own.start < own.stop else []
            first += len(part)
        return MixedNets.of(found or [self.parts[0][:0]])

    def to(self, *args: Any, **kwargs: Any) -> MixedNets:
        """`NetParams.to` for all."""
        return MixedNets(tuple(part.to(*args, **kwargs) for part in self.parts))


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
