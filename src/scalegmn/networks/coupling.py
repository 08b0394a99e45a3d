"""Which neurons of a network must move together, and which scalars they may be multiplied by.

Everything here follows from a `NetSpec` alone; layers are counted from 0, and -1 is the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from scalegmn.networks.activations import ACTIVATIONS, HETERO
from scalegmn.networks.heads import Axis, Heads
from scalegmn.networks.scalar_groups import ALL_SCALARS, SCALES, SIGNS, TRIVIAL, ScalarGroup, shared_group

if TYPE_CHECKING:
    from scalegmn.networks.spec import NetSpec


class Residual(NamedTuple):
    """A residual connection: channel c of one layer (-1: of the input) is added to channel c of a later one, for
    c < channels."""

    source: int
    receiver: int
    channels: int


class CoupledChannels(NamedTuple):
    """A class of neurons that must move together so that the function is unchanged: for each c in `channels`, channel c
    of all `layers`."""

    layers: tuple[int, ...]
    """Hidden layers, counted from 0, ascending."""

    channels: slice

    num_blocks: int = 1
    """The channels are cut into so many blocks; blocks are permuted as a whole, and channels within each. See
    `block_order`."""

    axes: tuple[Axis, ...] = ()
    """Of the channels within a block, where they do not all move freely (`heads`)."""

    @property
    def num_channels(self) -> int:
        """Channels of each layer."""
        return int(self.channels.stop - self.channels.start)


class UnequalBlocks(ValueError):
    """Layers of a class of which some are cut into blocks, and others have other channels.

    Args:
        layers: of the class.
        problem: the message.
    """

    def __init__(self, layers: Sequence[int], problem: str) -> None:
        super().__init__(problem)
        self.layers = tuple(layers)


def residuals(spec: NetSpec) -> tuple[Residual, ...]:
    """The residual connections, by receiver."""
    return tuple(
        Residual(layer.residual, index, min(layer.out_dim, spec.width(layer.residual)))
        for index, layer in enumerate(spec.layers)
        if layer.residual is not None
    )


def permutation_classes(spec: NetSpec) -> tuple[CoupledChannels, ...]:
    """Which hidden neurons must be permuted together; those that may not be permuted at all are in no class.

    A residual connection adds channel c to channel c; a normalisation layer or a depthwise convolution reads one
    channel for each, as layers do that are `coupled` to others; attention multiplies channel c of queries and of keys;
    a tied layer has the columns of another one's rows; a layer that is used twice has one order of rows, and one of
    columns: the two have one permutation. So channel c of all layers that are so joined, among those that have
    a channel c, is one component. Two components can be exchanged if and only if they consist of the same layers;
    these are one class, and their channels are a range, since layers only drop out as c grows. Blocks of channels
    (groups, heads) stay together. In the order of first layer, then channel.

    Raises:
        UnequalBlocks: some layers of a class are cut into blocks and others have other channels; names the first.
    """
    links = list(residuals(spec))
    for index, layer in enumerate(spec.layers):
        if layer.is_diagonal and not layer.constant:
            links.append(Residual(spec.sender(index), index, layer.out_dim))
        links += [Residual(source, index, layer.out_dim) for source in layer.coupled or ()]
    links += [Residual(heads.key, heads.query, spec.width(heads.key)) for heads in spec.heads if heads.num_repeats == 1]
    links += [Residual(first, second, spec.width(first)) for first, second in transposed_pairs(spec)]
    links += _same_neurons(spec)
    counts, classes = _block_counts(spec), []
    for channels in _classes(spec, links):
        num_blocks = math.lcm(*(count for layer in channels.layers for count in counts.get(layer, ())))
        if num_blocks > 1 and any(spec.width(layer) != channels.channels.stop for layer in channels.layers):
            raise UnequalBlocks(
                channels.layers,
                f"layer {channels.layers[0]}: its channels are cut into {num_blocks} blocks (groups or heads), but it "
                f"is coupled to layers {channels.layers[1:]}; expected equal widths of all",
            )
        classes.append(channels._replace(num_blocks=num_blocks))
    return _with_axes(spec, classes)


def _with_axes(spec: NetSpec, classes: Sequence[CoupledChannels]) -> tuple[CoupledChannels, ...]:
    """The classes with the axes that heads of attention give their layers.

    Axes of one class have one permutation. Those of layers that are in no class stay.
    """
    named: dict[int, list[tuple[Axis, ...]]] = {}
    for heads in spec.heads:
        for layer, axes in heads.axes(spec):
            named.setdefault(layer, []).append(axes)
    moved = {layer for channels in classes for layer in channels.layers}
    same = {axis.number: -1 for layer in {*named} - moved for axes in named[layer] for axis in axes}

    def number(axis: Axis) -> int:
        first = axis.number
        while same.get(first, first) != first:
            first = same[first]
        return first

    for channels in classes:
        lists = [axes for layer in channels.layers for axes in named.get(layer, ())]
        size = channels.num_channels // channels.num_blocks
        sizes = {tuple((axis.size, axis.fixed) for axis in axes) for axes in lists}
        if lists and (len(sizes) > 1 or math.prod(axis.size for axis in lists[0]) != size):
            raise UnequalBlocks(
                channels.layers,
                f"layer {channels.layers[0]}: heads of attention cut its channels in different ways, or into others "
                f"than {channels.num_blocks} blocks",
            )
        for axes in zip(*lists, strict=True):
            numbers = sorted({number(axis) for axis in axes})
            same |= dict.fromkeys(numbers, numbers[0])
    axes_of = {layer: tuple(axis._replace(number=number(axis)) for axis in axes[0]) for layer, axes in named.items()}
    return tuple(
        channels._replace(axes=next((axes_of[layer] for layer in channels.layers if layer in axes_of), ()))
        for channels in classes
    )


def scaling_classes(spec: NetSpec) -> tuple[CoupledChannels, ...]:
    """Which hidden neurons must have one scalar: those that residual connections join, those that are the same at
    another place, and the values of gates and their products; see `permutation_classes`."""
    gates = [
        Residual(spec.sender(index), index, layer.out_dim) for index, layer in enumerate(spec.layers) if layer.linear
    ]
    return _classes(spec, [*residuals(spec), *_same_neurons(spec), *gates])


def _same_neurons(spec: NetSpec) -> list[Residual]:
    """Pairs of layers that `LayerSpec.same_neurons` names, and of those that they read."""
    links = []
    for index, layer in enumerate(spec.layers):
        for source in layer.same_neurons:
            links.append(Residual(source, index, layer.out_dim))
            earlier, senders = spec.layers[source], (spec.sender(source), spec.sender(index))
            if not (earlier.constant or layer.constant) and earlier.in_dim == layer.in_dim and len({*senders}) > 1:
                links.append(Residual(min(senders), max(senders), layer.in_dim))
    return links


def _classes(spec: NetSpec, links: Sequence[Residual]) -> tuple[CoupledChannels, ...]:
    """The components of channels that links join, without those of the input, the output and pinned layers, which
    stay."""
    layers = range(-1, spec.num_layers)
    ranges: dict[tuple[int, ...], slice] = {}
    for start, stop in pairwise(sorted({0, *map(spec.width, layers)})):
        component = {layer: {layer} for layer in layers if spec.width(layer) > start}
        for source, receiver, num_channels in links:
            if num_channels > start:
                both = component[source] | component[receiver]
                component |= dict.fromkeys(both, both)
        for members in {tuple(sorted(members)) for members in component.values()}:
            ranges[members] = slice(ranges[members].start if members in ranges else start, stop)
    fixed = {-1, spec.num_layers - 1, *(index for index, layer in enumerate(spec.layers) if layer.pinned)}
    classes = (CoupledChannels(members, channels) for members, channels in ranges.items() if not fixed & set(members))
    return tuple(sorted(classes, key=lambda channels: (channels.layers[0], channels.channels.start)))


def _block_counts(spec: NetSpec) -> dict[int, set[int]]:
    """Layer -> into how many blocks groups, heads, group norms and experts cut its channels."""
    counts: dict[int, set[int]] = {}
    for index, layer in enumerate(spec.layers):
        cuts = [(spec.sender(index), layer.norm_groups), (index, layer.blocks)]
        if layer.groups > 1 and not layer.is_diagonal and layer.attention is None:
            cuts += [(spec.sender(index), layer.groups), (index, layer.groups)]
        cuts += [(cut_layer, spec.width(gate)) for gate in layer.gates for cut_layer in (index, gate)]
        for cut_layer, count in cuts:
            if count > 1:
                counts.setdefault(cut_layer, set()).add(count)
    for heads in spec.heads:
        for cut_layer in _of_heads(heads):
            if heads.num_heads > 1:
                counts.setdefault(cut_layer, set()).add(heads.num_heads)
    return counts


def _of_heads(heads: Heads) -> tuple[int, ...]:
    """The layers whose blocks are the heads of an attention."""
    return heads.query, heads.key, heads.values, heads.result, *heads.score_biases


def block_order(spec: NetSpec) -> dict[int, int]:
    """Layer -> the first of the layers whose blocks are permuted alike; -1 where they stay: blocks of the input, of
    the output and of pinned layers, of layers that are cut in two ways, and those that `LayerSpec.blocks` cuts.

    Both sides of a grouped convolution, queries, keys and values, and the experts of a mixture with the neurons that
    gate them, have one order of groups, heads or experts.
    """
    links = [(index, index) for index in range(spec.num_layers - 1)]
    for index, layer in enumerate(spec.layers):
        if layer.groups > 1 and not layer.is_diagonal and layer.attention is None:
            links.append((spec.sender(index), index))
        if layer.blocks > 1:
            links.append((-1, index))
        links += [(gate, index) for gate in layer.gates]
    links += [(heads.result, other) for heads in spec.heads for other in _of_heads(heads)]
    counts, movable = _block_counts(spec), set()
    for channels in spec.permutation_classes:
        links += [(channels.layers[0], layer) for layer in channels.layers]
        if len(set().union(*(counts.get(layer, ()) for layer in channels.layers))) < 2:
            movable |= set(channels.layers)
    order = {layer: layer if layer in movable else -1 for link in links for layer in link}
    for _ in order:
        for first, second in links:
            order[first] = order[second] = min(order[first], order[second])
    return order


def transposed_pairs(spec: NetSpec) -> tuple[tuple[int, int], ...]:
    """Pairs of layers whose neurons are rows of one weight and columns of its transpose: the tied layer and what
    the later one reads; what the tied one reads and the later one."""
    pairs: list[tuple[int, int]] = []
    for index, layer in enumerate(spec.layers):
        if layer.tied is not None:
            pairs += [(layer.tied, spec.sender(index)), (spec.sender(layer.tied), index)]
    return tuple(pairs)


def reciprocal_layers(spec: NetSpec) -> dict[int, int]:
    """Key layer -> query layer of attention where keys may be divided by what queries are multiplied by."""
    single = {channels.layers[0] for channels in spec.scaling_classes if len(channels.layers) == 1}
    free = single - _layers_that_norms_fix(spec)
    return {
        key: query
        for _, query, key, *_ in spec.heads
        if query != key and {query, key} <= free
        if spec.layers[query].activation == spec.layers[key].activation == "identity"
    }


def repeated_layers(spec: NetSpec) -> frozenset[int]:
    """Layers with attention that have the scalars of the values which they repeat."""
    single = {channels.layers[0] for channels in spec.scaling_classes if len(channels.layers) == 1}
    free = single - _layers_that_norms_fix(spec)
    return frozenset(
        heads.result
        for heads in spec.heads
        if heads.num_repeats > 1 and {heads.result, heads.values} <= free
        if spec.layers[heads.values].activation == spec.layers[heads.result].activation == "identity"
        if not any(spec.layers[layer].maximum for layer in (heads.result, heads.values))
    )


def layers_without_scalars(spec: NetSpec) -> frozenset[int]:
    """Layers with which no scalar commutes, whatever their activations: those that `_layers_that_norms_fix` names, keys
    of attention, queries whose keys cannot follow (`reciprocal_layers`), values that cannot be repeated with their
    scalars (`repeated_layers`), and biases of scores."""
    fixed = {layer for heads in spec.heads for layer in (heads.key, *heads.score_biases)}
    fixed |= {heads.query for heads in spec.heads if spec.reciprocal_layers.get(heads.key) != heads.query}
    repeated = [heads for heads in spec.heads if heads.num_repeats > 1 and heads.result not in spec.repeated_layers]
    fixed |= {layer for heads in repeated for layer in (heads.values, heads.result)}
    return _layers_that_norms_fix(spec) | fixed


def _layers_that_norms_fix(spec: NetSpec) -> frozenset[int]:
    """Layers that layer and group norms read, whose mean and variance mix channels; layers without weights, and what
    those that are no norms read, but for heads of attention and the values of gates; those that say so
    (`LayerSpec.unscaled`), and gates of experts."""
    fixed: set[int] = set()
    for index, layer in enumerate(spec.layers):
        fixed |= {*layer.gates}
        repeats = layer.attention is not None and layer.coupled is None  # channels of values
        is_unweighted = not layer.affine and not layer.is_zero and not repeats
        if layer.norm in ("layer", "group") or (layer.norm is None and is_unweighted):
            fixed |= {*(layer.coupled or ())} if layer.linear else {spec.sender(index), *(layer.coupled or ())}
        if (is_unweighted and not layer.linear) or layer.unscaled:
            fixed.add(index)
    return frozenset(fixed)


def class_symmetry(
    spec: NetSpec, channels: CoupledChannels, activation: str = HETERO
) -> ScalarGroup | Literal["hetero"]:
    """The scalars that commute with the activations of all layers of a class, and with all that reads them.

    Layers that a residual connection joins share those scalars alone that their activations preserve, chi(q) = q;
    tied weights, transposed, those with q = 1 / q; maxima, and batch norms without weight, those with chi(q) > 0. Keys
    of attention have those of their queries (`reciprocal_layers`), inverted. Values of gates and queries that are
    turned by position have all scalars, other layers without activation the positive ones.

    Args:
        spec: the network.
        channels: one of its `scaling_classes`.
        activation: the network's activation in layers where networks differ.

    Returns:
        `HETERO` where networks differ and `activation` is not given.
    """
    members = set(channels.layers)
    if members & spec.layers_without_scalars:
        return TRIVIAL
    names = [spec.layers[layer].activation for layer in channels.layers]
    if HETERO in names and activation == HETERO:
        return HETERO
    names = [activation if name == HETERO else name for name in names]
    # all scalars commute with an identity, but a class of identities alone has the positive ones, as relu has
    group = shared_group(ALL_SCALARS if name == "identity" else ACTIVATIONS[name].group for name in names)
    for pair in spec.transposed_pairs:
        if members & set(pair):  # q of one is 1 / chi(q) of the other
            group &= SIGNS if set(pair) <= members else TRIVIAL
    if group.sign_exponent == 1 and any(spec.layers[layer].maximum for layer in channels.layers):
        group = replace(group, signs=False)
    signed = {heads.query for heads in spec.heads if heads.rotary}
    signed |= {layer for layer in members if spec.layers[layer].linear}
    group = SCALES if group == ALL_SCALARS and not members & signed else group
    is_normed = any(
        layer.norm == "batch" and not layer.affine and spec.sender(index) in members
        for index, layer in enumerate(spec.layers if group.signs else ())
    )
    return replace(group, signs=False) if is_normed else group  # a norm without weight has nothing that takes the sign
