"""Experts of a mixture: branches of layers that are alike, each of which the neuron in its place of a router gates.

The experts become one layer with a block for each, sum_i g_i (W_i h_i + b_i) = W [g_1 h_1, ..., g_E h_E] + B g: W has
the columns of all W_i, and B the biases b_i as the weights of the edges that leave the gates. Blocks of hidden neurons
are permuted together with the gates (`LayerSpec.gates`). What the module makes of the router is not looked at: whether
it keeps this symmetry is tried with the module's own operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from scalegmn.interop.torch_modules.layers import JoinedLayer, ReadLayer
from scalegmn.interop.torch_modules.values import Elements, Joined
from scalegmn.networks import LayerSpec, NetSpec

MAX_ROUTERS = 3
"""So many layers with a neuron for each expert are tried, those next to the experts first, alone and together."""

MAX_SHARED = 2
"""So many experts that nothing gates may be like those that a router does."""

Kinds = Sequence[Sequence[int]]
"""Per layer of an expert, the layers of all experts that stand in its place."""


def with_experts(
    layers: Sequence[ReadLayer], spec: NetSpec, keeps: Callable[[Sequence[ReadLayer], NetSpec, set[int]], bool]
) -> tuple[list[ReadLayer], NetSpec]:
    """The layers and their spec, with the experts of each mixture as one.

    Args:
        layers: in the order of the spec.
        spec: the architecture.
        keeps: whether the module keeps the symmetries of layers and a spec, and needs all of a move of these routers.
    """
    tried: set[str] = set()
    while True:
        for kinds, routers in _candidates(layers, spec):
            name = str([[layers[index].place for index in together] for together in (*kinds, routers)])
            if name in tried:
                continue
            tried.add(name)
            joined = _Joining(layers, spec, kinds, routers).result()
            if joined and keeps(*joined):
                layers, spec, _ = joined
                break
        else:
            return list(layers), spec


def _candidates(layers: Sequence[ReadLayer], spec: NetSpec) -> Iterator[tuple[Kinds, tuple[int, ...]]]:
    """Branches that are alike, with layers that may gate them: all of them, or all but some before or behind."""
    for kinds in _branches(layers, spec):
        members = {index for kind in kinds for index in kind}
        first, last = min(members), max(members)
        tied = {index for item in spec.permutation_classes if members & {*item.layers} for index in item.layers}
        for count in range(len(kinds[0]), max(1, len(kinds[0]) - MAX_SHARED - 1), -1):
            wide = {index for index, layer in enumerate(spec.layers[:-1]) if layer.out_dim == count}
            near = sorted(wide - members - tied, key=lambda index: max(first - index, index - last, 0))[:MAX_ROUTERS]
            gates = [routers for size in range(1, len(near) + 1) for routers in combinations(near, size)]
            for start in range(len(kinds[0]) - count + 1):
                for routers in gates:
                    yield [kind[start : start + count] for kind in kinds], routers


# Branches


def _branches(layers: Sequence[ReadLayer], spec: NetSpec) -> Iterator[Kinds]:
    """Sets of branches of layers that nothing tells apart: colour refinement of the graph of layers."""
    sources = _sources(spec)
    colors = _colors(layers, spec, sources)
    sizes = Counter(colors.values())
    for size in sorted({count for count in sizes.values() if count > 1}):
        for is_meant in (size.__eq__, lambda count, size=size: count % size == 0):  # branches may have layers twice
            members = {index for index, color in colors.items() if is_meant(sizes[color])}
            outside: dict[Any, list[list[int]]] = {}
            for branch in _connected(members, sources):
                read = {source for index in branch for _, source in sources[index]} - {*branch}
                key = (*sorted(colors[index] for index in branch), "reads", *sorted(read))
                outside.setdefault(key, []).append(sorted(branch, key=lambda index: (colors[index], index)))
            for alike in outside.values():
                if len(alike) > 1:
                    yield sorted(zip(*sorted(alike, key=min), strict=True))


def _sources(spec: NetSpec) -> list[list[tuple[str, int]]]:
    """What each layer reads, and how. A sum of layers, one added to the next, is read as these; so are layers without
    weights that are coupled to others, where such layers alone read them."""

    def direct(index: int) -> list[tuple[str, int]]:
        layer, own = spec.layers[index], []
        is_alike = layer.coupled is not None and not layer.linear
        if not layer.constant:
            own.append(("coupled" if is_alike else "reads", spec.sender(index)))
        own += [("coupled", source) for source in layer.coupled or ()]
        for kind in ("same_neurons", "score_biases", "gates"):
            own += [(kind, source) for source in getattr(layer, kind)]
        own += [(str(place), source) for place, source in enumerate((layer.attention or ())[:2])]
        own += [("tied", layer.tied)] if layer.tied is not None else []
        if layer.residual is not None and not _is_sum(layer):
            own.append(("residual", layer.residual))
        return own

    own = [direct(index) for index in range(spec.num_layers)]
    readers: dict[int, list[str]] = {}
    for pairs in own:
        for kind, source in pairs:
            readers.setdefault(source, []).append(kind)
    between = {
        index
        for index, layer in enumerate(spec.layers)
        if layer.coupled is not None and not layer.linear and {*readers.get(index, ())} == {"coupled"}
    }

    def expanded(kind: str, source: int) -> Iterator[tuple[str, int]]:
        if source in between:
            for pair in own[source]:
                yield from expanded(*pair)
        else:
            yield kind, source
        residual = spec.layers[source].residual if source >= 0 and _is_sum(spec.layers[source]) else None
        if residual is not None:
            yield from expanded(kind, residual)

    return [
        [] if index in between else [*dict.fromkeys(item for pair in pairs for item in expanded(*pair))]
        for index, pairs in enumerate(own)
    ]


def _is_sum(layer: LayerSpec) -> bool:
    """Whether what is added to a layer is added to what others read of it."""
    return layer.activation == "identity" or layer.residual_after


def _colors(layers: Sequence[ReadLayer], spec: NetSpec, sources: Sequence[Sequence[tuple[str, int]]]) -> dict[int, int]:
    """Layer -> a number that it shares with those which nothing tells apart."""
    names = ("reads", "residual", "attention", "coupled", "same_neurons", "score_biases", "gates", "tied")
    flags = ("residual_after", "pinned", "unscaled")
    plain: dict[str, Any] = {**dict.fromkeys(names), **dict.fromkeys(flags, False)}
    depths = {-1: 0}  # so that fewer rounds tell layers apart
    for index, pairs in enumerate(sources):
        depths[index] = 1 + max((depths[source] for _, source in pairs), default=0)
    first = [
        (depths[index], replace(layer, **plain), _scale(item.weight), _scale(item.bias), frozenset(item.operations))
        for index, (layer, item) in enumerate(zip(spec.layers, layers, strict=True))
    ]
    readers: list[list[tuple[str, int]]] = [[] for _ in first]
    for index, pairs in enumerate(sources):
        for kind, source in pairs:
            if source >= 0:
                readers[source].append((kind, index))
    colors = {-1: -1, **dict(enumerate(_numbered(first)))}
    while True:
        seen = [
            (
                colors[index],
                tuple(sorted((kind, colors[source]) for kind, source in sources[index])),
                tuple(sorted((kind, colors[reader]) for kind, reader in readers[index])),
            )
            for index in range(spec.num_layers)
        ]
        new = {-1: -1, **dict(enumerate(_numbered(seen)))}
        if len({*new.values()}) == len({*colors.values()}):
            del new[-1]
            return new
        colors = new


def _numbered(items: Sequence[Any]) -> list[int]:
    """A number for each item, the same for equal ones."""
    number = {item: place for place, item in enumerate(dict.fromkeys(items))}
    return [number[item] for item in items]


def _scale(elements: Elements | Joined | None) -> float | None:
    return None if elements is None else elements.scale


def _connected(members: set[int], sources: Sequence[Sequence[tuple[str, int]]]) -> list[set[int]]:
    """The components of layers that read one another."""
    branches = [{index} for index in sorted(members)]
    for index in members:
        joined = {index, *(source for _, source in sources[index] if source in members)}
        touched = [branch for branch in branches if branch & joined]
        branches = [branch for branch in branches if not branch & joined] + [set().union(*touched)]
    return branches


# Joining


class _Joining:
    """The layers with those of several branches as one.

    Args:
        layers: in the order of the spec.
        spec: the architecture.
        kinds: of the branches.
        routers: layers with a neuron for each branch.
    """

    def __init__(self, layers: Sequence[ReadLayer], spec: NetSpec, kinds: Kinds, routers: Sequence[int]) -> None:
        self._layers, self._spec, self._kinds, self._routers = layers, spec, kinds, routers
        self._branch_of = {index: place for kind in kinds for place, index in enumerate(kind)}
        self._count = len(kinds[0])
        self._new: dict[int, tuple[LayerSpec, ReadLayer]] = {}
        """Number -> a layer, which names others by the numbers that they had."""

    def result(self) -> tuple[list[ReadLayer], NetSpec, set[int]] | None:
        """The new layers, their spec and the places of the routers; None where the branches are no experts."""
        spec = self._spec
        together: dict[int, set[int]] = {}
        for item in spec.permutation_classes:
            for index in item.layers:
                together.setdefault(index, set()).update(item.layers)

        def is_hidden(index: int) -> bool:
            branch = self._branch_of[index]
            return index in together and all(self._branch_of.get(other) == branch for other in together[index])

        hidden = [kind for kind in self._kinds if all(map(is_hidden, kind))]
        outer = [kind for kind in self._kinds if kind not in hidden]
        constants = [kind for kind in outer if self._is_constant(kind)]
        values = [kind for kind in outer if spec.layers[kind[0]].affine and kind not in constants]
        gated = [kind for kind in hidden if values and [*map(spec.sender, values[0])] == [*kind]]
        all_members = [*map(self._layers.__getitem__, self._branch_of)]
        if len(values) != 1 or not gated or any(isinstance(item, JoinedLayer) for item in all_members):
            return None
        if not all(self._join_hidden(kind, kind is gated[0]) for kind in hidden):
            return None
        if not self._join_values(values[0], constants, outer):
            return None
        same = {index: kind[0] for kind in hidden for index in kind}
        same |= {index: values[0][0] for kind in outer for index in kind}
        return self._ordered(same)

    def _is_constant(self, kind: Sequence[int]) -> bool:
        """Whether layers are parameters in place of activations, such as biases."""
        layer = self._spec.layers[kind[0]]
        return layer.constant and not layer.opaque and layer.affine and layer.in_dim == 1 and not layer.bias

    def _join_hidden(self, kind: Sequence[int], is_gated: bool) -> bool:
        """Joins layers whose neurons are an expert's own; whether that is possible."""
        spec, count = self._spec, self._count
        layer, senders = spec.layers[kind[0]], {*map(spec.sender, kind)}
        is_inside = not layer.constant and senders <= {*self._branch_of}
        named = {*(layer.coupled or ()), *([] if layer.residual is None else [layer.residual])}
        is_special = layer.attention or layer.same_neurons or layer.tied is not None or layer.blocks > 1 or layer.gates
        is_cut = layer.groups > 1 and not (is_inside and layer.is_diagonal)
        if is_special or is_cut or not named <= {*self._branch_of} or not (is_inside or len(senders) == 1):
            return False
        changes: dict[str, Any] = {"out_dim": count * layer.out_dim, "reads": spec.sender(kind[0])}
        if is_inside:
            changes |= {"in_dim": count * layer.in_dim, "groups": count * layer.groups}
        if layer.norm in ("layer", "group"):
            changes |= {"norm": "group", "norm_groups": count * layer.norm_groups}
        if is_gated:
            changes["gates"] = tuple(self._routers)
        self._add(kind, changes, self._joined(kind, 0))
        return True

    def _join_values(self, kind: Sequence[int], constants: Kinds, outer: Kinds) -> bool:
        """Joins the layers that an expert returns, as one of all hidden neurons and one of the gates for each bias;
        whether that is possible."""
        spec, count, layer = self._spec, self._count, self._spec.layers[kind[0]]
        is_plain = layer.activation == "identity" and layer.groups == 1 and layer.norm is None and not layer.gates
        is_special = layer.attention or layer.same_neurons or layer.tied is not None or layer.blocks > 1
        if not is_plain or is_special:
            return False
        members = {index for others in outer for index in others}
        added = {spec.layers[index].residual for index in members} - members - {None}
        named = {source for index in members for source in spec.layers[index].coupled or ()}
        named |= {spec.sender(index) for index in members if not spec.layers[index].constant}
        if len(added) > 1 or not named <= {*self._branch_of}:
            return False
        residual = next(iter(added), None)
        biases = [[layer.weight for layer in map(self._layers.__getitem__, others)] for others in constants]
        biases += [[item.bias for item in map(self._layers.__getitem__, kind)]] if layer.bias else []
        options: dict[str, Any] = {"pinned": any(spec.layers[index].pinned for index in members), "unscaled": True}
        for place, parts in enumerate(biases):
            columns = [replace(part, index=part.index.reshape(-1, 1)) for part in parts if isinstance(part, Elements)]
            new = LayerSpec(count, layer.out_dim, reads=self._routers[0], residual=residual, bias=False, **options)
            residual = spec.num_layers + place
            self._new[residual] = new, replace(self._joined(kind, 1), weight=Joined(tuple(columns), 1), bias=None)
        changes = {"in_dim": count * layer.in_dim, "bias": False, "reads": spec.sender(kind[0]), "residual": residual}
        item = replace(self._joined(kind, 1), bias=None)
        self._add(kind, {**changes, "residual_after": False, **options}, item)
        return True

    def _joined(self, kind: Sequence[int], axis: int) -> JoinedLayer:
        """The parameters of layers, their weights side by side along an axis."""
        items = [self._layers[index] for index in kind]

        def side_by_side(elements: Sequence[Any], along: int) -> Joined | None:
            return None if elements[0] is None else Joined(tuple(elements), along)

        statistics = [item.statistics for item in items]
        return JoinedLayer(
            f"{items[0].place} of {len(items)} experts",
            side_by_side([item.weight for item in items], axis),
            side_by_side([item.bias for item in items], 0),
            statistics[0] and tuple(Joined(tuple(rows), 0) for rows in zip(*statistics, strict=True)),  # type: ignore
            items[0].pinned_by,
            items[0].operations,
        )

    def _add(self, kind: Sequence[int], changes: Mapping[str, Any], item: JoinedLayer) -> None:
        """Puts a joined layer in the place of the first of its kind."""
        own = [self._spec.layers[index] for index in kind]
        flags: dict[str, Any] = {name: any(getattr(layer, name) for layer in own) for name in ("pinned", "unscaled")}
        self._new[kind[0]] = replace(own[0], **{**flags, **changes}), item

    def _ordered(self, same: Mapping[int, int]) -> tuple[list[ReadLayer], NetSpec, set[int]] | None:
        """All layers, each behind those that it reads; None where they read one another, or what experts return stands
        for the routers' neurons.

        Args:
            same: layer of a branch -> the number of that which it is a part of.
        """
        spec, new = self._spec, self._new
        gates = self._aligned_with_routers()
        if gates & {*self._branch_of}:  # what experts are added to
            return None
        for index, (layer, item) in enumerate(zip(spec.layers, self._layers, strict=True)):
            if index not in self._branch_of:
                flags: dict[str, Any] = {"pinned": False, "unscaled": True} if index in gates else {}
                new[index] = replace(layer, reads=spec.sender(index), **flags), item
        named = {index: _renamed(layer, same) for index, (layer, _) in new.items()}
        order: list[int] = []
        waiting: list[int] = []

        def visit(index: int) -> bool:
            if index in order or index < 0:
                return True
            if index in waiting:
                return False
            waiting.append(index)
            is_possible = all(map(visit, _named(named[index])))
            order.append(index)
            return is_possible

        if not all(map(visit, sorted(named))):
            return None
        place = {-1: -1, **{index: place for place, index in enumerate(order)}}
        layers = []
        for number, index in enumerate(order):
            layer = _renamed(named[index], place)
            follows = layer.constant or layer.reads == number - 1
            layers.append(replace(layer, reads=None) if follows else layer)
        try:
            return [new[index][1] for index in order], NetSpec(tuple(layers)), {place[index] for index in gates}
        except ValueError:  # layers are cut into blocks in other ways
            return None

    def _aligned_with_routers(self) -> set[int]:
        """The routers, and the layers whose neurons stand for theirs."""
        spec, aligned = self._spec, {*self._routers}
        links = []
        for index, layer in enumerate(spec.layers[:-1]):
            if layer.out_dim == self._count and index not in self._branch_of:
                named = [*(layer.coupled or ()), *layer.same_neurons]
                named += [] if layer.residual is None else [layer.residual]
                named += [spec.sender(index)] if layer.is_diagonal and not layer.constant else []
                links.append({index, *named} - {-1})
        while new := [link for link in links if link & aligned and not link <= aligned]:
            aligned |= set().union(*new)
        return aligned


def _named(layer: LayerSpec) -> list[int]:
    """The layers that a layer names."""
    single = (layer.reads, layer.residual, layer.tied, *(layer.attention or ())[:2])
    listed = (*(layer.coupled or ()), *layer.same_neurons, *layer.score_biases, *layer.gates)
    return [source for source in (*single, *listed) if source is not None]


def _renamed(layer: LayerSpec, names: Mapping[int, int]) -> LayerSpec:
    """A layer that names others by other numbers; those that have one now, once."""
    changes: dict[str, Any] = {}
    for name in ("reads", "residual", "tied"):
        value = getattr(layer, name)
        changes[name] = names.get(value, value)
    for name in ("same_neurons", "score_biases", "gates"):
        changes[name] = tuple(dict.fromkeys(names.get(source, source) for source in getattr(layer, name)))
    if layer.attention is not None:
        query, key, heads = layer.attention
        changes["attention"] = (names.get(query, query), names.get(key, key), heads)
    if layer.coupled is not None:
        coupled = dict.fromkeys(names.get(source, source) for source in layer.coupled)
        changes["coupled"] = tuple(source for source in coupled if source != changes["reads"])
    return replace(layer, **changes)
