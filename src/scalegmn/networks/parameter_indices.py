"""Where the nodes and edges of a network's parameter graph are: their layers, roles, types and order.

Everything here follows from a `NetSpec` alone. Shape letters: N nodes, E edges, C connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scalegmn.networks.layers import LayerSpec
    from scalegmn.networks.spec import NetSpec


ROLES = ("input", "hidden", "output")
"""The roles of nodes: network inputs and constants, neurons or channels of hidden layers, outputs."""


def node_layers(spec: NetSpec) -> tuple[tuple[int, int], ...]:
    """Per layer, the node layers (sender, receiver) of its block of edges."""
    place, receivers, pairs = 0, {-1: 0}, []
    for index, layer in enumerate(spec.layers):
        place += 1
        sender = place if layer.constant else receivers[spec.sender(index)]
        place += layer.constant
        receivers[index] = place
        pairs.append((sender, place))
    return tuple(pairs)


def roles(spec: NetSpec) -> tuple[str, ...]:
    """The role of each node layer: `input` (also of constant inputs), `hidden` or `output`."""
    names = ["input"]
    for layer in spec.layers:
        names += ["input", "hidden"] if layer.constant else ["hidden"]
    return (*names[:-1], "output")


def node_types(spec: NetSpec) -> tuple[Tensor, ...]:
    """Per node layer, [n_l] long: a type per input node, one per hidden layer, one per output node, and one per place
    in a layer for all that have places (`has_places`). Constant inputs of other layers have one type, as a hidden
    layer's nodes."""
    num_inputs, num_outputs, num_hidden = spec.layout[0], spec.layout[-1], spec.num_hidden_layers
    first = num_inputs + num_hidden + num_outputs
    hidden = (
        first + torch.arange(size) % MAX_PLACES if placed else torch.full((size,), num_inputs + index)
        for index, (size, placed) in enumerate(zip(spec.layout[1:-1], has_places(spec)[1:-1], strict=True))
    )
    return (torch.arange(num_inputs), *hidden, num_inputs + num_hidden + torch.arange(num_outputs))


MAX_PLACES = 1024
"""Places of nodes that types tell apart; further ones have the types of the first again."""


def has_places(spec: NetSpec) -> tuple[bool, ...]:
    """Per node layer, whether its nodes are not input or output, and no symmetry moves them: pinned neurons, their
    constant inputs, and those that operations compute which no layer describes."""
    placed = [False]
    for layer in spec.layers:
        placed += [layer.pinned or layer.opaque, layer.pinned] if layer.constant else [layer.pinned]
    return (*placed[:-1], False)


def num_places(spec: NetSpec) -> int:
    """Types of nodes that have places: the largest number of nodes in a layer of them, at most `MAX_PLACES`."""
    sizes = [size for size, placed in zip(spec.layout, has_places(spec), strict=True) if placed]
    return min(max(sizes, default=0), MAX_PLACES)


def edge_types(spec: NetSpec) -> tuple[Tensor, ...]:
    """Per block, by sender where they leave the network's input, else by receiver into the output, else one type
    per hidden layer that receives: broadcasts to [n_l, n_{l-1}], or to [n_l, n_{l-1} / groups]."""
    types, num_inputs, output = [], spec.layout[0], len(spec.layout) - 1
    for layer, (sender, receiver) in zip(spec.layers, spec.node_layers, strict=True):
        if sender == 0:
            types.append(senders_by_group(layer) if layer.groups > 1 else torch.arange(layer.in_dim)[None, :])
        else:
            by_receiver = torch.arange(layer.out_dim) if receiver == output else torch.zeros(1, dtype=torch.long)
            types.append(num_inputs + receiver - 2 + by_receiver[:, None])
    return tuple(types)


def edge_index(spec: NetSpec) -> Tensor:
    """[2, E] long, rows sender j and receiver i. Edge order: block by block, then receiver, then sender."""
    starts = _starts(spec)
    blocks = []
    for layer, (sender, receiver) in zip(spec.layers, spec.node_layers, strict=True):
        senders = senders_by_group(layer)
        receivers = torch.arange(layer.out_dim)[:, None].expand_as(senders)
        blocks.append(torch.stack([senders.flatten() + starts[sender], receivers.flatten() + starts[receiver]]))
    return torch.cat(blocks, dim=1)


def residual_index(spec: NetSpec) -> Tensor:
    """[2, C] long, rows sender and receiver: nodes that residual connections join."""
    starts = _starts(spec)
    places = {-1: 0, **{index: receiver for index, (_, receiver) in enumerate(spec.node_layers)}}
    joined = [torch.empty(2, 0, dtype=torch.long)]
    for source, receiver, num_channels in spec.residuals:
        both = torch.stack([starts[places[source]], starts[places[receiver]]])
        joined.append(both[:, None] + torch.arange(num_channels))
    return torch.cat(joined, dim=1)


def attention_index(spec: NetSpec) -> Tensor:
    """[2, C] long, rows sender and receiver: each query, each key and the bias of the scores of a head, and all values
    of this head; channels of layers that are coupled to others, and of the layer that they are coupled to; the same
    neurons of two layers; each gate and the neurons of its expert."""
    starts = _starts(spec)
    joined = [torch.empty(2, 0, dtype=torch.long)]
    for index, layer in enumerate(spec.layers):
        for source in (*(layer.coupled or ()), *layer.same_neurons):
            ends = torch.stack([starts[spec.node_layers[source][1]], starts[spec.node_layers[index][1]]])
            joined.append(ends[:, None] + torch.arange(layer.out_dim))
        for gate in layer.gates:
            ends = torch.stack([starts[spec.node_layers[gate][1]], starts[spec.node_layers[index][1]]])
            neurons = torch.arange(layer.out_dim)
            joined.append(ends[:, None] + torch.stack([neurons // (layer.out_dim // spec.width(gate)), neurons]))
    for heads in spec.heads:
        results = torch.arange(spec.width(heads.result)).reshape(heads.num_heads, -1, heads.num_repeats).mT
        values = starts[spec.node_layers[heads.result][1]] + results[..., None]
        for source in (heads.query, heads.key, *heads.score_biases):
            repeats = 1 if source == heads.key else heads.num_repeats
            nodes = torch.arange(spec.width(source)).reshape(heads.num_heads, repeats, 1, -1)
            senders = starts[spec.node_layers[source][1]] + nodes
            shape = torch.broadcast_shapes(values.shape, senders.shape)
            joined.append(torch.stack([senders.expand(shape).flatten(), values.expand(shape).flatten()]))
    return torch.cat(joined, dim=1)


def _starts(spec: NetSpec) -> Tensor:
    """The first node of each node layer, and N."""
    return torch.tensor([0, *spec.layout]).cumsum(0)


def senders_by_group(layer: LayerSpec) -> Tensor:
    """Which of the channels that a layer reads each neuron reads, [n_l, n_{l-1} / groups]."""
    size = layer.in_dim // layer.groups
    group = torch.arange(layer.out_dim)[:, None] // (layer.out_dim // layer.groups)
    return group * size + torch.arange(size)
