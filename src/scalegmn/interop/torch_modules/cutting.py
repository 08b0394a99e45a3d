"""Layers of which others read parts, cut into cells: the largest sets of neurons that all others treat alike.

A layer that reads all to all tells apart which neurons it reads; one that reads channel by channel, an addition, and a
layer that is used at several places stand for the neurons in their places. The cells are the coarsest partition that
all of this respects (partition refinement). Neurons of a cell are permuted freely, together with those of the cells
that stand in their places: so each cell becomes a layer, with its neurons in an order that these share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.alignment import occurrences
from scalegmn.interop.torch_modules.layers import TracedLayer
from scalegmn.interop.torch_modules.pinning import pin_or_refuse
from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.interop.torch_modules.values import Elements, unique_columns

MAX_CELLS = 64
"""A layer is cut into no more cells or groups than these; the smallest cells are pinned together."""

MAX_SINGLE = 2
"""More cells of one neuron, which no permutation moves, are pinned together."""


def cut(trace: Trace, layers: Sequence[TracedLayer]) -> Iterator[TracedLayer]:
    """The layers, cut into their cells, the last as it is. What cannot be cut is pinned.

    Args:
        trace: the layers so far.
        layers: those that the output depends on, the last that of the output.
    """
    layers = [part for layer in layers[:-1] for part in _without_repeats(layer)] + [layers[-1]]
    while True:
        cells = _Cells(trace, layers)
        broken, unfastened = cells.problems()
        for nodes, *others in unfastened:
            _unfasten(trace, cells.layer_of[int(nodes[0])], nodes, others)
        if not broken and not unfastened:
            break
        layers = [part for layer in layers for part in (_by_group(trace, layer) if id(layer) in broken else [layer])]
    pinned = [layer.nodes[trace.neurons.is_pinned(layer.nodes)] for layer in layers[:-1]]
    apart: list[Tensor] = []
    for nodes in [nodes for nodes, layer in zip(pinned, layers, strict=False) if 0 < len(nodes) < len(layer.nodes)]:
        other = _Cells(trace, layers, [*apart, nodes])
        if not any(other.problems()):
            cells = other
            apart.append(nodes)
    cells.gather_small()
    cells.arrange()
    for layer in layers:
        yield from cells.parts(layer)


def _unfasten(trace: Trace, layer: TracedLayer, nodes: Tensor, others: Sequence[Tensor]) -> None:
    """Cuts neurons whose blocks stay into these blocks; pins neurons of values, and those of their queries and keys."""
    if not others:
        _, blocks = trace.blocks.pop(int(nodes[0]))
        if blocks <= MAX_CELLS:
            trace.parts += nodes.chunk(blocks)
            return
    pin_or_refuse(trace, layer, "queries, keys or values are a part of what others read", nodes, *others)
    layer.options.get("attention", {}).pop(int(nodes[0]), None)
    trace.attended = [joined for joined in trace.attended if joined[0] is not nodes]


def _without_repeats(layer: TracedLayer) -> list[TracedLayer]:
    """A layer that reads some channels several times, channel by channel, cut so that each part reads them once."""
    read = [layer.reads] if _is_by_channel(layer) or layer.options.get("norm") == "layer" else []
    count = torch.zeros(len(layer.nodes), dtype=torch.long)
    for nodes in (*read, layer.residual):
        if nodes is not None:
            count = torch.maximum(count, occurrences(nodes))
    if not count.any():
        return [layer]
    return [_part(layer, (count == number).nonzero()[:, 0]) for number in count.unique()]


def _by_group(trace: Trace, layer: TracedLayer) -> list[TracedLayer]:
    """A layer for each group of a grouped convolution, or of a group norm; where each group reads one channel, a layer
    for each neuron of a group."""
    count, places = _num_groups(layer), torch.arange(len(layer.nodes))
    assert layer.reads is not None, "it has groups"
    if "attention" not in layer.options and len(layer.reads) == count:
        rows = places.reshape(count, -1).mT
        return [layer.rows(row, layer.nodes[row], reads=layer.reads) for row in rows]
    if "attention" in layer.options or count > MAX_CELLS:
        pin_or_refuse(trace, layer, "a part of a layer with groups is read, or it reads parts of others", layer.nodes)
        return [layer]
    return [_part(layer, places) for places in places.chunk(count)]


def _num_groups(layer: TracedLayer) -> int:
    """The groups of a grouped convolution or a group norm; 1 where channels of a layer may be cut at will."""
    if layer.options.get("norm") == "group":
        count = int(layer.options["norm_groups"])
        return 1 if count == len(layer.nodes) else count
    if _is_by_channel(layer) or layer.coupled is not None or layer.reads is None:
        return 1
    return int(layer.options.get("groups", 1))


def _is_by_channel(layer: TracedLayer) -> bool:
    """Whether each neuron reads one channel alone, that in its place."""
    return layer.reads is not None and layer.options.get("groups", 1) == len(layer.nodes) == len(layer.reads) > 1


def _part(layer: TracedLayer, places: Tensor, **options: Any) -> TracedLayer:
    """Some neurons of a layer, as a layer of their own; of a layer with groups, whole groups or a part of one."""
    changes: dict[str, Any] = {}
    options = {**layer.options, **options}
    count, size = options.get("groups", 1), len(places)
    if _is_by_channel(layer):
        assert layer.reads is not None
        changes["reads"] = layer.reads[places]
        options["groups"] = size
        if options.get("norm") == "group":
            options["norm_groups"] = size if options["norm_groups"] == len(layer.nodes) else 1
        if layer.coupled is not None:
            changes["coupled"] = tuple(nodes[places] for nodes in layer.coupled)
    elif count > 1 and layer.reads is not None:
        group = int(places[0]) // (len(layer.nodes) // count)
        changes["reads"], options["groups"] = layer.reads.chunk(count)[group], 1
    return layer.rows(places, layer.nodes[places], options=options, **changes)


class _Cells:
    """The partition of all neurons into cells.

    Args:
        trace: the layers so far.
        layers: those that are cut; the last, of the output, is not, nor are the input and what no layer computes.
        apart: further neurons that are cut from the others of their layers.

    Attributes:
        layer_of: neuron -> its layer.
    """

    def __init__(self, trace: Trace, layers: Sequence[TracedLayer], apart: Sequence[Tensor] = ()) -> None:
        self._trace, self._layers = trace, layers
        self.layer_of = {number: layer for layer in layers for number in layer.nodes.tolist()}
        given = [nodes for nodes in (trace.input, *trace.sources) if nodes is not None]
        owners = [*(layer.nodes for layer in layers), *given]
        self._cell = torch.full((1 + max(int(nodes.max()) for nodes in owners),), -1)
        for number, nodes in enumerate(owners):
            self._cell[nodes] = number
        self._size = torch.tensor([len(nodes) for nodes in owners])
        self._place = torch.zeros_like(self._cell)
        self._is_fixed = self._cell < 0
        whole = [layer.nodes for layer in layers if _num_groups(layer) > 1 and self._is_pinned(layer)]
        for nodes in (layers[-1].nodes, *given, *whole):
            self._is_fixed[nodes] = True
        fastened = [*trace.attended, *((nodes,) for nodes, _ in trace.blocks.values())]
        self._fastened = [joined for joined in fastened if all(map(self._is_known, joined))]
        self._order: dict[int, Tensor] = {}
        self._held: set[int] = set()  # cells whose order others fix
        self._crossed: list[Tensor] = []
        self._pairs = [*_pairs(layers)]
        self._refine([*apart, *(nodes for joined in self._fastened for nodes in joined)])
        self._edges: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for pair in self._pairs:
            self._add_edges(*pair)

    def _is_known(self, nodes: Tensor) -> bool:
        """Whether layers have these neurons, which the output depends on."""
        return int(nodes.max()) < len(self._cell) and int(self._cell[nodes].min()) >= 0

    def _is_pinned(self, layer: TracedLayer) -> bool:
        return bool(self._trace.neurons.is_pinned(layer.nodes).all())

    def _refine(self, sets: Sequence[Tensor]) -> None:
        """Makes the cells the coarsest that sets of neurons, and all layers, tell apart."""
        reads = [layer.reads for layer in self._layers if layer.reads is not None and not _is_by_channel(layer)]
        for nodes in (*sets, *filter(self._is_known, self._trace.parts), *reads):
            self._split(nodes, torch.zeros_like(nodes))
        order, is_new = self._pairs, True
        while is_new:
            is_new = False
            for first, second in order:
                is_new |= self._split(first, self._cell[second]) | self._split(second, self._cell[first])
            order = order[::-1]

    def _split(self, nodes: Tensor, keys: Tensor) -> bool:
        """Cuts neurons from the others of their cells, and from those with another key; whether that is new."""
        is_free = ~self._is_fixed[nodes]
        nodes, keys = nodes[is_free], keys[is_free]
        if not len(nodes):
            return False
        cells = self._cell[nodes]
        is_one = bool((cells == cells[0]).all()) and bool((keys == keys[0]).all())
        if is_one and int(self._size[cells[0]]) == len(nodes):
            return False
        pairs = torch.stack([cells, keys])
        groups, place, counts = unique_columns(pairs)
        is_part = counts < self._size[groups[0]]
        if not is_part.any():
            return False
        numbers = groups[0].clone()
        numbers[is_part] = len(self._size) + torch.arange(int(is_part.sum()))
        self._size = torch.cat([self._size.index_add(0, groups[0][is_part], -counts[is_part]), counts[is_part]])
        self._cell[nodes] = numbers[place]
        return True

    def _is_cell(self, nodes: Tensor) -> bool:
        """Whether neurons are all those of a cell."""
        cells = self._cell[nodes]
        return bool((cells == cells[0]).all()) and int(self._size[cells[0]]) == len(nodes)

    # The order of each cell

    def _add_edges(self, first: Tensor, second: Tensor) -> None:
        """Notes which neurons of cells stand for which of others."""
        is_free = ~(self._is_fixed[first] | self._is_fixed[second])
        first, second = first[is_free], second[is_free]
        for cell in self._cell[first].unique().tolist():
            chosen = self._cell[first] == cell
            a, b = first[chosen], second[chosen]
            self._edges.setdefault(cell, []).append((a, b))
            self._edges.setdefault(int(self._cell[b[0]]), []).append((b, a))

    def _fasten(self, nodes: Tensor) -> bool:
        """Puts a cell, and those that stand for it, in the order of its neurons; false where it has another."""
        if not self._is_cell(nodes):
            return False
        cell = int(self._cell[nodes[0]])
        self._held.add(cell)
        if cell in self._order:
            return torch.equal(self._order[cell], nodes)
        self._order[cell] = nodes
        waiting = [cell]
        while waiting:
            cell = waiting.pop()
            for mine, others in self._edges.get(cell, ()):
                self._place[mine] = torch.arange(len(mine))
                implied = others[self._place[self._order[cell]]]
                known = self._order.setdefault(int(self._cell[others[0]]), implied)
                if known is implied:
                    waiting.append(int(self._cell[others[0]]))
                elif not torch.equal(known, implied):
                    self._crossed.append(mine)
        return True

    def problems(self) -> tuple[set[int], list[tuple[Tensor, ...]]]:
        """Layers (by id) that cannot keep their groups, and neurons of attention, and of values that are mixed, that
        cannot stay together."""
        fastened = [[self._fasten(nodes) for nodes in joined] for joined in self._fastened]
        unfastened = [joined for joined, kept in zip(self._fastened, fastened, strict=True) if not all(kept)]
        broken = set()
        for layer in self._layers[:-1]:
            if _num_groups(layer) > 1 and not self._is_pinned(layer):
                assert layer.reads is not None, "it has groups"
                is_input = bool(self._is_fixed[layer.reads].all()) and bool((layer.reads.diff() == 1).all())
                is_whole = is_input and self._is_cell(layer.reads)
                if not self._fasten(layer.nodes) or not (is_whole or self._fasten(layer.reads)):
                    broken.add(id(layer))
        return broken, unfastened

    def gather_small(self) -> None:
        """Makes many cells of one neuron, and more than `MAX_CELLS` of a layer, one whose neurons are pinned."""
        for layer in self._layers[:-1]:
            cells = self._cell[layer.nodes].unique()
            sizes = self._size[cells]
            is_small = sizes == 1
            if int(is_small.sum()) <= MAX_SINGLE:
                is_small = torch.zeros_like(is_small)
            if int((~is_small).sum()) > MAX_CELLS:
                is_small[sizes.argsort(descending=True)[MAX_CELLS:]] = True
            small = [cell for cell in cells[is_small].tolist() if cell not in self._held]
            if small:
                nodes = layer.nodes[torch.isin(self._cell[layer.nodes], torch.tensor(small))]
                pin_or_refuse(self._trace, layer, "its neurons are read in too many different ways", nodes)
                self._cell[nodes] = small[0]
                self._order[small[0]] = nodes

    def arrange(self) -> None:
        """Puts all cells in an order; pins neurons that stand for others of their cell."""
        for layer in self._layers:
            for cell in self._cell[layer.nodes].unique().tolist():
                if cell not in self._order:
                    self._fasten(layer.nodes[self._cell[layer.nodes] == cell])
        for nodes in self._crossed:
            problem = "its channels meet others in several orders"
            pin_or_refuse(self._trace, self.layer_of[int(nodes[0])], problem, nodes)

    def parts(self, layer: TracedLayer) -> Iterator[TracedLayer]:
        """A layer, cut into its cells."""
        attention, cells = layer.options.get("attention", {}), self._cell[layer.nodes].tolist()
        self._place[layer.nodes] = torch.arange(len(layer.nodes))
        for nodes in [self._order[cell] for cell in dict.fromkeys(cells)]:
            first = int(nodes[0])
            options = {key: value for key, value in layer.options.items() if key != "attention"}
            if first in attention:
                options["attention"] = {first: attention[first]}
            if first in self._trace.blocks:
                options["blocks"] = self._trace.blocks[first][1]
            part = replace(layer, options=options)
            yield part if torch.equal(nodes, layer.nodes) else _part(part, self._place[nodes])


def _pairs(layers: Sequence[TracedLayer]) -> Iterator[tuple[Tensor, Tensor]]:
    """Neurons that stand for others, in one order: what is read channel by channel, what is added, and the neurons of
    layers with the same weights."""
    users: dict[str, list[tuple[TracedLayer, Elements]]] = {}
    for layer in layers:
        others = [*(layer.coupled or ()), *layer.same_neurons]
        if layer.residual is not None:
            others.append(layer.residual)
        if layer.reads is not None and _is_by_channel(layer):
            others.append(layer.reads)
        for nodes in others:
            yield layer.nodes, nodes
        for elements in (layer.weight, layer.bias):
            if elements is None:
                continue
            for earlier, other in users.get(elements.name, ()):
                if layer.is_used_again(elements, earlier, other):
                    yield layer.nodes, earlier.nodes
                    are_weights = elements is layer.weight and other is earlier.weight
                    if are_weights and layer.reads is not None and earlier.reads is not None:
                        yield layer.reads, earlier.reads
                elif elements.scale == other.scale and layer.is_transposed(elements, earlier, other):
                    assert layer.reads is not None, "it is a linear layer"
                    assert earlier.reads is not None, "it is a linear layer"
                    yield layer.nodes, earlier.reads
                    yield layer.reads, earlier.nodes
            users.setdefault(elements.name, []).append((layer, elements))
