"""The architecture of an input network.

Everything that follows from the architecture alone (node roles and types, edge order, admissible symmetry) is derived
once, from the frozen description: in `parameter_indices` and in `coupling`.

Shape letters: B networks, L layers, N nodes, E edges, K kernel values; n = [n_0, ..., n_L] the layout.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch

from scalegmn.networks import coupling, heads, parameter_indices
from scalegmn.networks.activations import ACTIVATIONS, BUILT_IN, HETERO, not_built_in
from scalegmn.networks.coupling import CoupledChannels
from scalegmn.networks.layer_checks import check_extra_activations, check_layer
from scalegmn.networks.layers import LayerSpec
from scalegmn.networks.scalar_groups import ScalarGroup


@dataclass(frozen=True)
class NetSpec:
    """The frozen, hashable description of a feed-forward network: a chain of layers, or any graph of them.

    x_l = sigma_l(W_l x_{l-1} + b_l) for l = 1..L-1, output W_L x_{L-1} + b_L; layers may read another earlier layer
    than the one before, and add residual connections. Its parameter graph has one node per neuron or channel, input and
    output included, and one edge j -> i per weight W_l[i, j]; residual connections and attention, which have no
    parameters, are not in it (`residual_index`, `attention_index`).

    Node layers: the input, then each layer in turn, before it the constant inputs that it reads, if any; the last one
    is the output. In a chain node layer l is the output of layer l - 1, counted from 0.

    Attributes:
        layers: in the order in which they are computed.
        extra_activations: sorted names, besides `BUILT_IN`, of activations that networks may have where they differ.

    Raises:
        ValueError: layers do not fit what they read, an activation is unknown, or a connection leads from nowhere; the
            message names the layer.
    """

    layers: tuple[LayerSpec, ...]
    extra_activations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a network needs at least one layer, found none")
        for index in range(self.num_layers):
            check_layer(self, index)
        check_extra_activations(self.extra_activations)
        for name in _COMPUTED_AT_ONCE:
            getattr(self, name)

    @classmethod
    def mlp(cls, layout: Sequence[int], activation: str, w0: float = 30.0) -> NetSpec:
        """The spec of a multi-layer perceptron with `layout` n and one hidden activation (w0 counts for a sine)."""
        w0 = float(w0) if activation in ("sine", HETERO) else 1.0
        *hidden, last = pairwise(layout)
        return cls((*(LayerSpec(i, o, None, activation, w0) for i, o in hidden), LayerSpec(*last)))

    @staticmethod
    def envelope(specs: Collection[NetSpec]) -> NetSpec:
        """See `envelope.envelope`."""
        from scalegmn.networks.envelope import envelope

        return envelope(specs)

    def with_activation(self, activation: str, names: Collection[str] = ()) -> NetSpec:
        """The same layers with another hidden activation; of `hetero`, `names` are those that networks may have."""
        *hidden, last = self.layers
        return NetSpec((*(replace(layer, activation=activation) for layer in hidden), last), not_built_in(names))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> NetSpec:
        """The inverse of `to_dict`, from plain JSON types. Zoos of earlier versions may have a w0 where there are no
        sines."""
        layers = []
        for layer in content["layers"]:
            options: dict[str, Any] = dict(layer)
            if options.get("activation") not in ("sine", HETERO):
                options["w0"] = 1.0
            for key in ("kernel", "attention", "rotary", "score_biases", "coupled", "same_neurons", "gates"):
                if options.get(key) is not None:
                    options[key] = tuple(options[key])
            layers.append(LayerSpec(**options))
        return cls(tuple(layers), tuple(content.get("extra_activations", ())))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; fields at their defaults are left out, but for those of every layer."""
        always = ("in_dim", "out_dim", "kernel", "activation", "w0", "residual")
        defaults = {item.name: item.default for item in fields(LayerSpec)}
        content: dict[str, Any] = {
            "layers": [
                {key: value for key, value in asdict(layer).items() if key in always or value != defaults[key]}
                for layer in self.layers
            ]
        }
        return content | ({"extra_activations": list(self.extra_activations)} if self.extra_activations else {})

    def __str__(self) -> str:
        activations = sorted({layer.activation for layer in self.layers[:-1]} | {*self.extra_activations})
        if not self.is_chain:
            names = ("norm", "attention", "pinned")
            kinds = [name for name in names if any(getattr(layer, name) for layer in self.layers)]
            layers = ", ".join([f"{self.num_layers} layers", *kinds, f"{self.num_parameters:,} parameters"])
            return f"network of {layers} ({', '.join(activations)})"
        kind = "CNN" if self.is_cnn else "MLP"
        residuals = "".join(f", residual {source} -> {receiver}" for source, receiver, _ in self.residuals)
        return f"{kind} {list(self.layout)} ({', '.join(activations) or 'linear'}{residuals})"

    # Sizes

    def sender(self, layer: int) -> int:
        """The layer that a layer reads; -1 for the network's input, and for a layer of constant inputs."""
        reads = self.layers[layer].reads
        return -1 if self.layers[layer].constant else layer - 1 if reads is None else reads

    def width(self, layer: int) -> int:
        """Neurons or channels of a layer, -1 for the network's input."""
        if layer >= 0:
            return self.layers[layer].out_dim
        readers = (r for index, r in enumerate(self.layers) if self.sender(index) == -1 and not r.constant)
        return next(readers, self.layers[0]).in_dim

    @property
    def is_chain(self) -> bool:
        """Whether each layer reads all of the layer before; residual connections may be there."""
        return all(layer.is_plain for layer in self.layers)

    @property
    def layout(self) -> tuple[int, ...]:
        """Sizes of the node layers; of a chain n = (n_0, ..., n_L)."""
        sizes = [self.width(-1)]
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
        return max(height for height, _ in kernels), max(width for _, width in kernels)

    @property
    def edge_dim(self) -> int:
        """K, the raw values per edge: 1, or those of the largest kernel."""
        return self.kernel[0] * self.kernel[1]

    # The parameter graph

    node_layers = cached_property(parameter_indices.node_layers)
    roles = property(parameter_indices.roles)
    node_types = cached_property(parameter_indices.node_types)
    num_places = cached_property(parameter_indices.num_places)
    edge_types = cached_property(parameter_indices.edge_types)
    edge_index = cached_property(parameter_indices.edge_index)
    residual_index = cached_property(parameter_indices.residual_index)
    attention_index = cached_property(parameter_indices.attention_index)

    @property
    def input_value(self) -> float:
        """The raw feature of input nodes, which have no bias: 1 for MLPs, 0 for CNNs."""
        return 0.0 if self.is_cnn else 1.0

    @property
    def num_node_types(self) -> int:
        """n_0 + (number of node layers between) + n_L + (places of pinned nodes)."""
        return self.layout[0] + self.num_hidden_layers + self.layout[-1] + self.num_places

    @property
    def num_edge_types(self) -> int:
        """n_0 + (hidden layers - 1) + n_L; n_0 for a single layer."""
        return self.layout[0] + (self.num_hidden_layers - 1 + self.layout[-1] if self.num_hidden_layers else 0)

    @property
    def num_output_edge_types(self) -> int:
        """The last of these, by output node: n_L; none for a single layer, whose edges are told apart by input node."""
        return self.layout[-1] if self.num_hidden_layers else 0

    # Symmetry

    residuals = property(coupling.residuals)
    heads = cached_property(heads.all_heads)
    permutation_classes = cached_property(coupling.permutation_classes)
    scaling_classes = cached_property(coupling.scaling_classes)
    block_order = cached_property(coupling.block_order)
    transposed_pairs = cached_property(coupling.transposed_pairs)
    reciprocal_layers = cached_property(coupling.reciprocal_layers)
    repeated_layers = cached_property(coupling.repeated_layers)
    layers_without_scalars = cached_property(coupling.layers_without_scalars)

    def class_symmetry(self, channels: CoupledChannels, activation: str = HETERO) -> ScalarGroup | Literal["hetero"]:
        """The scalars of a class of neurons, see `coupling.class_symmetry`."""
        return coupling.class_symmetry(self, channels, activation)

    @property
    def symmetries(self) -> tuple[str, ...]:
        """Per hidden layer, the word for the scalars that commute with its activation (`ScalarGroup.symmetry`);
        `hetero` also where networks differ. They leave the function unchanged where nothing is coupled to the layer."""
        names = (layer.activation for layer in self.layers[:-1])
        return tuple(HETERO if name == HETERO else ACTIVATIONS[name].group.symmetry for name in names)

    @property
    def is_hetero(self) -> bool:
        """Whether networks differ in the activation of some layer, so that `NetParams.activation` is needed."""
        return any(layer.activation == HETERO for layer in self.layers)

    @property
    def activations(self) -> tuple[str, ...]:
        """The names that `NetParams.activation` counts."""
        return BUILT_IN + self.extra_activations


_COMPUTED_AT_ONCE = (
    "node_layers",
    "heads",
    "permutation_classes",
    "scaling_classes",
    "transposed_pairs",
    "reciprocal_layers",
    "repeated_layers",
    "layers_without_scalars",
)
"""Properties that are computed with the spec: torch.compile cannot trace the lock of a property not yet computed."""
