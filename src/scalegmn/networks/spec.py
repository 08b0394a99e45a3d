"""The architecture of an input network.

Everything that follows from the architecture alone (node roles and types, edge order, admissible symmetry, the way
from parameters to the parameter graph and back) is derived here, once, from the frozen description.

Shape letters: B networks, L layers, N nodes, E edges, K kernel values; n = [n_0, ..., n_L] the layout.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scalegmn.networks.activations import ACTIVATIONS, HETERO
from scalegmn.networks.layers import NORMS, LayerSpec
from scalegmn.networks.scalar_groups import ALL_SCALARS, SCALES, SIGNS, TRIVIAL, ScalarGroup, shared_group


class Residual(NamedTuple):
    """A residual connection: channel c of one layer (-1: of the input) is added to channel c of a later one, for
    c < channels."""

    source: int
    receiver: int
    channels: int


class CoupledChannels(NamedTuple):
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
        for name in (
            "permutation_classes",
            "scaling_classes",
            "node_layers",
            "reciprocal_layers",
            "_unscaled",
            "_attended",
        ):
            getattr(self, name)  # now: torch.compile cannot trace the lock of a cached property still to be computed

    def _check_layer(self, index: int, layer: LayerSpec) -> None:
        """Raises ValueError unless a layer fits those before it."""

        def refuse(problem: str) -> None:
            raise ValueError(f"layer {index}: {problem}")

        last = index == len(self.layers) - 1
        allowed = ("identity",) if last else (*ACTIVATIONS, HETERO)
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
        w0 = float(w0) if activation in ("sine", HETERO) else 1.0
        *hidden, last = pairwise(layout)
        return cls((*(LayerSpec(i, o, None, activation, w0) for i, o in hidden), LayerSpec(*last)))

    @classmethod
    def envelope(cls, specs: Collection[NetSpec]) -> NetSpec:
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
                _envelope_activation({layer.activation for layer in own}),
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
        names = (layer.activation for layer in self.layers[:-1])
        return tuple(HETERO if name == HETERO else ACTIVATIONS[name].group.symmetry for name in names)

    @property
    def is_hetero(self) -> bool:
        """Whether networks differ in the activation of some layer: `NetParams.activation` is needed."""
        return any(layer.activation == HETERO for layer in self.layers)

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """The residual connections, by receiver."""
        return tuple(
            Residual(layer.residual, index, min(layer.out_dim, self._width(layer.residual)))
            for index, layer in enumerate(self.layers)
            if layer.residual is not None
        )

    @cached_property
    def permutation_classes(self) -> tuple[CoupledChannels, ...]:
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
    def scaling_classes(self) -> tuple[CoupledChannels, ...]:
        """Which hidden neurons must have one scalar: those that residual connections join; see `permutation_classes`."""
        return self._tied(self.residuals)

    def _tied(self, links: Sequence[Residual]) -> tuple[CoupledChannels, ...]:
        """What `permutation_classes` are without blocks, of these links."""
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
        ties = (CoupledChannels(*tie) for tie in found.items() if not fixed & set(tie[0]))
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
        links += [(tie.layers[0], layer) for tie in self.permutation_classes for layer in tie.layers]
        free = set()
        for tie in self.permutation_classes:
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
        free = {tie.layers[0] for tie in self.scaling_classes if len(tie.layers) == 1}
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

    def class_symmetry(self, channels: CoupledChannels, activation: str = HETERO) -> ScalarGroup | Literal["hetero"]:
        """The scalars that commute with the activations of all layers of a class, and with all that reads them.

        Layers that a residual connection joins share those scalars alone that their activations preserve, chi(q) = q;
        tied weights, transposed, those with q = 1 / q; maxima, those with chi(q) > 0. Keys of attention have those of
        their queries (`reciprocal_layers`), inverted.

        Args:
            channels: one of `scaling_classes`.
            activation: the network's activation in layers where networks differ.

        Returns:
            `HETERO` where networks differ and `activation` is not given.
        """
        members = set(channels.layers)
        if members & self._unscaled or members & self._attended:
            return TRIVIAL
        names = [self.layers[layer].activation for layer in channels.layers]
        if HETERO in names and activation == HETERO:
            return HETERO
        names = [activation if name == HETERO else name for name in names]
        group = shared_group(ALL_SCALARS if name == "identity" else ACTIVATIONS[name].group for name in names)
        pairs = [set(pair) for pair in self._transposed if members & set(pair)]
        for pair in pairs:  # q of one is 1 / chi(q) of the other
            group &= SIGNS if pair <= members else TRIVIAL
        if group.sign_exponent == 1 and any(self.layers[layer].maximum for layer in channels.layers):
            group = replace(group, signs=False)
        return SCALES if group == ALL_SCALARS else group

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


def _envelope_activation(names: set[str]) -> str:
    """One activation that admits the scalars of all; `HETERO` where these differ."""
    names = names - {"identity"} or names  # which commutes with all scalars
    groups = {HETERO if name == HETERO else ACTIVATIONS[name].group for name in names}
    return min(names, key=ACTIVATIONS.index) if len(groups) == 1 and HETERO not in groups else HETERO
