"""One architecture that stands for several."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from scalegmn.networks.activations import ACTIVATIONS, BUILT_IN, HETERO, not_built_in
from scalegmn.networks.layers import LayerSpec
from scalegmn.networks.spec import NetSpec


def envelope(specs: Collection[NetSpec]) -> NetSpec:
    """The spec that a model is built for which reads networks of all of `specs`; of a single one, itself.

    A chain of as many hidden layers as they have at most. Its hidden layer l has the largest width and kernel of
    all l-th hidden layers (or of the last of them), an activation that admits what theirs admit (`"hetero"` where
    that differs) and one of their residual connections; likewise the last layer. Its `extra_activations` are all that
    occur besides the built-in ones.

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
    by_depth = [[spec.layers[index] for spec in specs if index < spec.num_layers - 1] for index in range(depth)]
    # layers of constant inputs count as hidden layers of nodes, so the deepest ones may have no layer here
    by_depth = [layers or next(filter(None, reversed(by_depth))) for layers in by_depth]
    layers: list[LayerSpec] = []
    for together in [*by_depth, [spec.layers[-1] for spec in specs]]:
        layers.append(_envelope_layer(together, layers, first.layout[0]))
    names = {name for spec in specs for name in (*spec.extra_activations, *(layer.activation for layer in spec.layers))}
    return NetSpec(tuple(layers), not_built_in(names))


def _envelope_layer(together: Sequence[LayerSpec], before: Sequence[LayerSpec], num_inputs: int) -> LayerSpec:
    """A layer that stands for several, after the layers `before`."""
    kernels = [layer.kernel for layer in together if layer.kernel]
    kernel = (max(height for height, _ in kernels), max(width for _, width in kernels)) if kernels else None
    sources = (layer.residual for layer in together if layer.residual is not None)
    fitting = (source for source in sources if source < 0 or (before[source].kernel is None) == (kernel is None))
    return LayerSpec(
        before[-1].out_dim if before else num_inputs,
        max(layer.out_dim for layer in together),
        kernel,
        _envelope_activation({layer.activation for layer in together}),
        max(layer.w0 for layer in together),
        residual=next(fitting, None),
    )


def _envelope_activation(names: set[str]) -> str:
    """A single activation that admits the scalars of all; `HETERO` where these differ."""
    names = names - {"identity"} or names  # all scalars commute with an identity
    groups = {HETERO if name == HETERO else ACTIVATIONS[name].group for name in names}
    order = (*BUILT_IN, *not_built_in(names))
    return min(names, key=order.index) if len(groups) == 1 and HETERO not in groups else HETERO
