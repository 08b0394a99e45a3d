"""What has been read from a module: its layers, and which of their neurons move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scalegmn.interop.torch_modules.layers import ReadLayer
from scalegmn.networks import LayerSpec, NetParams, NetSpec


@dataclass(frozen=True)
class LayerReading:
    """A layer as it was read.

    Attributes:
        place: where in the module it is computed: `layer1.0.conv1 (Conv2d)`.
        kind: what it is, in words.
        neurons: how many it has.
        state: `free` where its neurons may be permuted, `tied` where they are together with those of other layers,
            `output`, or `pinned`: no symmetry moves them.
        tied_to: the places of the other layers.
        reason: of pinned neurons, the operation that pins them and its place.
        experts: so many experts of a mixture have its neurons, and change places as a whole with the neurons of their
            router; 0 where there are none.
    """

    place: str
    kind: str
    neurons: int
    state: str
    tied_to: tuple[str, ...] = ()
    reason: str = ""
    experts: int = 0


@dataclass(frozen=True)
class Reading:
    """What has been read from a module; `str` gives a table.

    Attributes:
        params: as `from_module` gives them.
        layers: in the order of `params.spec.layers`.
        neurons_moved: the share of the hidden neurons that may be permuted.
        weights_moved: the share of the weights whose neurons, or those that they read, may be permuted.
    """

    params: NetParams
    layers: tuple[LayerReading, ...]
    neurons_moved: float
    weights_moved: float

    @classmethod
    def of(cls, params: NetParams, traced: Sequence[ReadLayer]) -> Reading:
        """The reading of parameters with their traced layers."""
        spec = params.spec
        together = {index: item.layers for item in spec.permutation_classes for index in item.layers}
        order = spec.block_order
        experts = {order[index]: spec.width(layer.gates[0]) for index, layer in enumerate(spec.layers) if layer.gates}
        rows = []
        for index, (layer, item) in enumerate(zip(spec.layers, traced, strict=True)):
            others = tuple(dict.fromkeys(traced[other].place for other in together.get(index, ()) if other != index))
            state = "pinned" if index not in together else "tied" if len(together[index]) > 1 else "free"
            state = "output" if index == spec.num_layers - 1 else state
            reason = (item.pinned_by or "coupled to what is pinned, or to input or output") if state == "pinned" else ""
            count = experts.get(order[index], 0) if order.get(index, -1) >= 0 else 0
            rows.append(LayerReading(item.place, _kind(layer), layer.out_dim, state, others, reason, count))
        return cls(params, tuple(rows), *_shares(spec, set(together)))

    @property
    def pinned_places(self) -> list[str]:
        """The places of layers that an operation pins which no layer describes, each once."""
        pairs = zip(self.layers, self.params.spec.layers, strict=True)
        return list(dict.fromkeys(layer.place for layer, spec in pairs if spec.pinned and layer.state == "pinned"))

    def __str__(self) -> str:
        lines = [f"{self.params.spec}"]
        width = max(len(layer.place) for layer in self.layers)
        for index, layer in enumerate(self.layers):
            note = layer.reason or (f"with {layer.tied_to[0]}" if layer.tied_to else "")
            note += f" and {len(layer.tied_to) - 1} more" if len(layer.tied_to) > 1 else ""
            if layer.experts:
                note += "; " * bool(note) + f"{layer.experts} experts change places as a whole"
            lines.append(
                f"{index:4d}  {layer.place:{width}}  {layer.neurons:6d}  {layer.state:6}  {layer.kind}  {note}".rstrip()
            )
        shares = f"{self.neurons_moved:.1%} of the hidden neurons and {self.weights_moved:.1%} of the weights"
        return "\n".join([*lines, f"{shares} are moved by permutations"])


def _kind(layer: LayerSpec) -> str:
    """What a layer is, in words."""
    if layer.coupled is not None:
        kind = "computed channel by channel"
    elif layer.norm is not None:
        kind = f"{layer.norm} norm"
    elif layer.is_zero:
        kind = "zeros, the state before the first step"
    elif layer.attention is not None and not layer.affine:
        kind = f"values of {layer.attention[2]} heads of queries"
    elif not layer.affine:
        kind = "without weights"
    elif layer.groups > 1:
        kind = "channel by channel" if layer.is_diagonal else f"{layer.groups} groups"
    elif layer.opaque:
        kind = f"reads {layer.in_dim} values that no layer describes"
    elif layer.constant:
        kind = "parameters in place of activations"
    elif layer.attention is not None:
        kind = f"values of {layer.attention[2]} heads"
    else:
        kind = "linear" if layer.kernel is None else f"kernel {layer.kernel[0]}x{layer.kernel[1]}"
    return kind if layer.activation == "identity" else f"{kind}, {layer.activation}"


def _shares(spec: NetSpec, moved: set[int]) -> tuple[float, float]:
    """The shares of hidden neurons, and of weights, that permutations move."""
    channels = sum(item.num_channels * len(item.layers) for item in spec.permutation_classes)
    hidden = sum(layer.out_dim for layer in spec.layers[:-1])
    sizes = [layer.out_dim * (layer.in_dim // layer.groups) * _numbers(layer) for layer in spec.layers]
    touched = [size for index, size in enumerate(sizes) if index in moved or spec.sender(index) in moved]
    return channels / max(hidden, 1), sum(touched) / max(sum(sizes), 1)


def _numbers(layer: LayerSpec) -> int:
    """Weights of an edge."""
    return layer.kernel[0] * layer.kernel[1] if layer.kernel else 1
