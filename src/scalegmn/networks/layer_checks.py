"""Whether the layers of a network fit one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from scalegmn.networks.activations import ACTIVATIONS, HETERO, not_built_in
from scalegmn.networks.layers import NORMS, LayerSpec

if TYPE_CHECKING:
    from scalegmn.networks.spec import NetSpec


_ADVICE = "; one of your own is registered by a module (--import)"


def check_extra_activations(names: Sequence[str]) -> None:
    """Raises ValueError unless these are registered activations besides the built-in ones, sorted."""
    if names != not_built_in(names):
        raise ValueError(f"extra_activations: found {names}, expected sorted names that are not built in")
    for name in names:
        if name not in ACTIVATIONS:
            raise ValueError(f"extra_activations: unknown {name!r}, registered: {', '.join(ACTIVATIONS)}{_ADVICE}")


def check_layer(spec: NetSpec, index: int) -> None:
    """Raises ValueError, which names the layer, unless it fits those before it."""
    layer, is_last = spec.layers[index], index == spec.num_layers - 1
    is_known = layer.activation == HETERO or layer.activation in ACTIVATIONS
    if layer.activation != "identity" if is_last else not is_known:
        allowed = ("identity",) if is_last else (*ACTIVATIONS, HETERO)
        advice = "" if is_last else _ADVICE
        _refuse(index, f"unknown activation {layer.activation!r}, expected one of {', '.join(allowed)}{advice}")
    _check_sizes(index, layer)
    _check_sources(index, layer)
    reads = index - 1 if layer.reads is None else layer.reads
    if not layer.constant and layer.in_dim != spec.width(reads) and (index or layer.reads is not None):
        _refuse(index, f"reads {layer.in_dim} neurons, but layer {reads} has {spec.width(reads)}")
    if layer.attention is not None:
        _check_attention(spec, index)
    for name, together in (("coupled", layer.coupled or ()), ("same_neurons", layer.same_neurons)):
        for source in together:
            if spec.width(source) != layer.out_dim:
                _refuse(index, f"{name}: layer {source} has {spec.width(source)} neurons, expected {layer.out_dim}")
    for gate in layer.gates:
        if layer.out_dim % spec.width(gate):
            _refuse(index, f"gates: layer {gate} has {spec.width(gate)} neurons, expected a divisor of {layer.out_dim}")
    added = spec.layers[layer.residual] if spec.is_chain and layer.residual not in (None, -1) else layer
    if (layer.kernel is None) != (added.kernel is None):
        _refuse(index, f"residual: found {layer.residual}, but only one of the two layers is a convolution")


def _check_attention(spec: NetSpec, index: int) -> None:
    """Raises ValueError unless queries, keys, values and biases of scores have sizes that fit."""
    layer = spec.layers[index]
    assert layer.attention is not None
    query, key, heads = layer.attention
    widths = spec.width(query), spec.width(key)
    repeats, rest = divmod(widths[0], widths[1])
    is_cut = heads > 0 and repeats > 0 and not rest and heads % repeats == 0 and not widths[0] % heads
    if not is_cut or layer.out_dim % heads:
        _refuse(
            index,
            f"attention: found {heads} heads for queries and keys of widths {widths} and values of width "
            f"{layer.out_dim}, expected widths that the heads divide, and as many of queries for each head of keys",
        )
    if repeats > 1 and (layer.affine or layer.groups != layer.in_dim or layer.out_dim != repeats * layer.in_dim):
        _refuse(
            index, f"attention: found {repeats} heads of queries for each of keys, expected as many copies of values"
        )
    if layer.rotary and len(layer.rotary) != widths[0] // heads:
        _refuse(index, f"rotary: found {len(layer.rotary)} channels, expected the {widths[0] // heads} of a head")
    for bias in layer.score_biases:
        if spec.width(bias) != heads:
            _refuse(index, f"score_biases: layer {bias} has {spec.width(bias)} neurons, expected {heads}, one per head")


def _check_sizes(index: int, layer: LayerSpec) -> None:
    """Raises ValueError unless sizes, groups and norm are possible."""
    if min(layer.in_dim, *layer.weight_shape, layer.groups) < 1:
        _refuse(index, f"every size must be at least 1, found weight {layer.weight_shape}")
    if layer.in_dim % layer.groups or layer.out_dim % layer.groups:
        _refuse(
            index, f"groups: found {layer.groups} of {layer.in_dim} and {layer.out_dim} channels, expected a divisor"
        )
    if layer.blocks < 1 or layer.out_dim % layer.blocks:
        _refuse(index, f"blocks: found {layer.blocks} of {layer.out_dim} channels, expected a divisor")
    if layer.coupled is not None and layer.affine:
        _refuse(index, "coupled: found for a layer with weights, expected affine false")
    if layer.linear and layer.coupled is None:
        _refuse(index, "linear: found true for a layer that is coupled to no other, expected coupled")
    if layer.opaque and not layer.constant:
        _refuse(index, "opaque: found true for a layer that reads others, expected constant inputs")
    if layer.norm is not None and (layer.norm not in NORMS or layer.out_dim != layer.groups):
        _refuse(
            index, f"norm: found {layer.norm!r} of {layer.groups} groups, expected one of {NORMS}, channel by channel"
        )


def _check_sources(index: int, layer: LayerSpec) -> None:
    """Raises ValueError unless all that the layer names comes before it."""
    sources = {"reads": layer.reads, "residual": layer.residual, "tied": layer.tied}
    if layer.attention is not None:
        sources |= {"query": layer.attention[0], "key": layer.attention[1]}
    sources |= {f"coupled {place}": source for place, source in enumerate(layer.coupled or ())}
    sources |= {f"score_biases {place}": source for place, source in enumerate(layer.score_biases)}
    sources |= {f"same_neurons {place}": source for place, source in enumerate(layer.same_neurons)}
    sources |= {f"gates {place}": source for place, source in enumerate(layer.gates)}
    for name, source in sources.items():
        lowest = -1 if name in ("reads", "residual") else 0
        if source is not None and source not in range(lowest, index):
            _refuse(index, f"{name}: found {source!r}, expected a layer from {lowest} to {index - 1}")


def _refuse(index: int, problem: str) -> NoReturn:
    raise ValueError(f"layer {index}: {problem}")
