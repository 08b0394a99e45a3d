"""The parameters of a batch of input networks.

Shape letters: B networks, L layers, N nodes, E edges, K kernel values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.networks.activations import ACTIVATIONS, HETERO
from scalegmn.networks.layers import LayerSpec
from scalegmn.networks.spec import NetSpec


def _activation_indices(activation: str | Sequence[str], num_networks: int) -> tuple[str, Tensor | None]:
    """The spec's activation, and [B] indices into `ACTIVATIONS` where networks differ."""
    if isinstance(activation, str):
        if activation == HETERO:
            raise ValueError(f"activation: found {HETERO!r}, expected one name per network")
        return activation, None
    if len(activation) != num_networks:
        raise ValueError(f"activation: found {len(activation)} names for {num_networks} networks, expected one each")
    for name in activation:
        if name not in ACTIVATIONS:
            raise ValueError(f"activation: unknown name {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if len(set(activation)) == 1:
        return activation[0], None
    return HETERO, torch.tensor([ACTIVATIONS.index(name) for name in activation])


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
            has_sine = hidden == "sine" or (hidden == HETERO and "sine" in activation)
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
        """The networks, as in `MultiArchBatch`."""
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

    def with_batch_norm_folded(self) -> NetParams:
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
        layout, own = self.spec.layout, self.with_batch_norm_folded().biases
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
            for weight, slots in zip(
                self.with_batch_norm_folded().weights, _kernel_slots(self.spec, kernel), strict=True
            )
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
        if spec.is_hetero and activation is None:
            raise ValueError(f"activation: missing, expected [{num}] indices for {spec}")
        return cls.from_features(spec, nodes, edges, activation)


@dataclass(frozen=True)
class MultiArchBatch:
    """B networks of several architectures: batches of one architecture, one after the other.

    Iterating gives these batches; the length and slices count networks.

    Attributes:
        parts: the batches.
    """

    parts: tuple[NetParams, ...]

    @classmethod
    def of(cls, parts: Iterable[NetParams]) -> NetParams | MultiArchBatch:
        """The networks of batches, in order; a single batch stays what it is."""
        parts = tuple(parts)
        return parts[0] if len(parts) == 1 else cls(parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[NetParams]:
        return iter(self.parts)

    def __getitem__(self, index: slice) -> NetParams | MultiArchBatch:
        """The networks of a slice without step; of an empty one, none of the first architecture."""
        start, stop, _ = index.indices(len(self))
        found, first = [], 0
        for part in self.parts:
            own = slice(max(start - first, 0), min(stop - first, len(part)))
            found += [part[own]] if own.start < own.stop else []
            first += len(part)
        return MultiArchBatch.of(found or [self.parts[0][:0]])

    def to(self, *args: Any, **kwargs: Any) -> MultiArchBatch:
        """`NetParams.to` for all."""
        return MultiArchBatch(tuple(part.to(*args, **kwargs) for part in self.parts))


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
