"""The parameters of a batch of input networks.

Shape letters: B networks, L layers, N nodes, E edges, K kernel values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalegmn.networks import features, pyg
from scalegmn.networks.activations import ACTIVATIONS, HETERO, not_built_in
from scalegmn.networks.layers import LayerSpec
from scalegmn.networks.params_checks import check_params
from scalegmn.networks.spec import NetSpec


@dataclass(frozen=True, eq=False)
class NetParams:
    """The parameters of B networks of one `NetSpec`.

    Batches are compared by identity, as tensors cannot be compared by a single truth.

    Attributes:
        spec: the architecture that all B networks share.
        weights: per layer [B, *layer.weight_shape]: [B, n_l, n_{l-1}] or [B, n_l, n_{l-1}, kh, kw].
        biases: per layer [B, n_l].
        activation: [B] indices into `spec.activations` when a layer's activation is `"hetero"`, else None.
        statistics: per layer, of batch norms, running mean and variance [B, 2, n_l], None of other layers; None where
            the spec has no batch norm.

    Raises:
        ValueError: the tensors are not parameters of `spec`, or differ in their type or device; names the layer.
    """

    spec: NetSpec
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Tensor | None = None
    statistics: tuple[Tensor | None, ...] | None = None

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():  # what is traced has run before, and checks would be traced as guards
            check_params(self)

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
        if not 0 < w0 < math.inf:
            raise ValueError(f"w0: found {w0}, expected above 0")
        if not weights or len(weights) != len(biases):
            raise ValueError(f"expected one bias per weight, found {len(weights)} weights and {len(biases)} biases")
        for index, weight in enumerate(weights):
            if weight.ndim not in (3, 5):
                raise ValueError(
                    f"layer {index}: weight has shape {tuple(weight.shape)}, expected [B, out, in] or "
                    "[B, out, in, kh, kw]"
                )
            if len(weight) != len(weights[0]):
                raise ValueError(f"layer {index}: weight holds {len(weight)} networks, layer 0 holds {len(weights[0])}")
        name, extra = _hidden_activation(activation, len(weights[0]))
        frequency = float(w0) if name == "sine" or (name == HETERO and "sine" in activation) else 1.0
        layers = []
        for index, weight in enumerate(weights):
            is_hidden = index < len(weights) - 1
            kernel = (weight.shape[3], weight.shape[4]) if weight.ndim == 5 else None
            options: tuple[str, float] = (name, frequency) if is_hidden else ("identity", 1.0)
            layers.append(LayerSpec(weight.shape[2], weight.shape[1], kernel, *options))
        spec, indices = NetSpec(tuple(layers), extra), None
        if name == HETERO:
            indices = torch.tensor([spec.activations.index(of_one) for of_one in activation], device=weights[0].device)
        params = cls(spec, tuple(weights), tuple(biases), indices)
        for kind, tensors in (("weight", weights), ("bias", biases)):
            for index, tensor in enumerate(tensors):
                bad = ~tensor.isfinite().flatten(1).all(1)
                if bad.any():
                    raise ValueError(f"layer {index}: {kind} of network {int(bad.nonzero()[0])} has NaN or infinity")
        return params

    @classmethod
    def cat(cls, batches: Sequence[NetParams]) -> NetParams:
        """All networks of several batches of one spec, in order.

        Raises:
            ValueError: the specs differ.
        """
        first = batches[0]
        for params in batches:
            if params.spec != first.spec:
                raise ValueError(f"expected networks of one spec, found {first.spec} and {params.spec}")

        def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
            return None if tensors[0] is None else torch.cat(tensors)  # type: ignore[arg-type]  # all or none are None

        columns = zip(*(params.statistics or () for params in batches), strict=True)
        return first.replace(
            weights=tuple(map(torch.cat, zip(*(params.weights for params in batches), strict=True))),
            biases=tuple(map(torch.cat, zip(*(params.biases for params in batches), strict=True))),
            activation=joined([params.activation for params in batches]),
            statistics=tuple(map(joined, columns)) or None,
        )

    @classmethod
    def interleave(cls, batches: Sequence[NetParams]) -> NetParams:
        """The networks of k batches of B: the first of each batch, then the second of each; see `of_heads`."""
        order = torch.arange(len(batches) * len(batches[0])).view(len(batches), -1)
        return cls.cat(batches)[order.T.flatten()]

    def of_heads(self, num_networks: int) -> list[NetParams]:
        """The k batches of `num_networks` networks that `interleave` has joined, one for each head of a model."""
        heads = len(self) // max(num_networks, 1)
        return [self[head::heads] for head in range(heads)]

    def replace(self, **changes: Any) -> NetParams:
        """The same networks with other values of the named attributes, checked anew."""
        return dataclasses.replace(self, **changes)

    def __len__(self) -> int:
        return len(self.biases[0])

    @property
    def parts(self) -> tuple[NetParams, ...]:
        """The networks, as in `MultiArchBatch`."""
        return (self,)

    def tensors(self) -> list[Tensor]:
        """All tensors, each with a row per network."""
        every = (*self.weights, *self.biases, self.activation, *(self.statistics or ()))
        return [tensor for tensor in every if tensor is not None]

    def map(self, fn: Callable[[Tensor], Tensor]) -> NetParams:
        """`fn`, which changes the type, device or graph of a tensor but not what it stands for, applied to every weight
        and bias, and to all statistics."""
        return self.replace(
            weights=tuple(map(fn, self.weights)), biases=tuple(map(fn, self.biases)), statistics=self._statistics(fn)
        )

    def to(self, *args: Any, **kwargs: Any) -> NetParams:
        """`Tensor.to` for every weight and bias; activation indices follow to the device."""
        biases = tuple(bias.to(*args, **kwargs) for bias in self.biases)
        return self.replace(
            weights=tuple(weight.to(*args, **kwargs) for weight in self.weights),
            biases=biases,
            activation=None if self.activation is None else self.activation.to(biases[0].device),
            statistics=self._statistics(lambda tensor: tensor.to(*args, **kwargs)),
        )

    def __getitem__(self, index: slice | Tensor) -> NetParams:
        """The networks that a slice, a [M] index tensor or a [B] mask selects."""

        def picked(tensor: Tensor) -> Tensor:
            if isinstance(index, Tensor) and index.dtype == torch.long:  # faster than indexing
                return tensor.index_select(0, index.to(tensor.device))
            return tensor[index]

        return self.replace(
            weights=tuple(map(picked, self.weights)),
            biases=tuple(map(picked, self.biases)),
            activation=None if self.activation is None else picked(self.activation),
            statistics=self._statistics(picked),
        )

    def _statistics(self, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, ...] | None:
        """`fn` applied to all statistics."""
        if self.statistics is None:
            return None
        return tuple(None if item is None else fn(item) for item in self.statistics)

    def flatten(self) -> Tensor:
        """[B, num_parameters]: weight and bias of each layer in turn, row-major."""
        pairs = zip(self.weights, self.biases, strict=True)
        return torch.cat([tensor.flatten(1) for pair in pairs for tensor in pair], dim=1)

    def unflatten(self, flat: Tensor) -> NetParams:
        """[B, num_parameters], in the order of `flatten`, in the shapes of these networks."""
        shapes = [shape for layer in self.spec.layers for shape in (layer.weight_shape, (layer.out_dim,))]
        tensors = [
            values.reshape(len(flat), *shape)
            for values, shape in zip(torch.split(flat, list(map(math.prod, shapes)), dim=1), shapes, strict=True)
        ]
        return self.replace(weights=tuple(tensors[::2]), biases=tuple(tensors[1::2]))

    def with_batch_norm_folded(self) -> NetParams:
        """The same functions with each batch norm, as it evaluates, as scale a = weight / sqrt(variance + epsilon) and
        shift, bias - a mean, of each channel: a layer of `groups` without statistics."""
        if self.statistics is None:
            return self
        layers, weights, biases = list(self.spec.layers), list(self.weights), list(self.biases)
        for index, item in enumerate(self.statistics):
            if item is not None:
                mean, variance = item.unbind(1)
                scale = weights[index][..., 0] / (variance + layers[index].epsilon).sqrt()
                layers[index] = dataclasses.replace(layers[index], norm=None, epsilon=0.0, affine=True, bias=True)
                weights[index], biases[index] = scale[..., None], biases[index] - scale * mean
        spec = dataclasses.replace(self.spec, layers=tuple(layers))
        return NetParams(spec, tuple(weights), tuple(biases), self.activation)

    # To the parameter graph and back

    def node_features(self) -> list[Tensor]:
        """Raw node features, per node layer [B, n_l, 1], see `features.node_features`."""
        return features.node_features(self)

    def edge_features(self, kernel: tuple[int, int] | None = None) -> list[Tensor]:
        """Raw edge features, per block [B, n_l, n_{l-1}, K], see `features.edge_features`."""
        return features.edge_features(self, kernel)

    def kernels(self, kernel: tuple[int, int] | None = None) -> list[features.Kernels]:
        """Raw edge features, each block as wide as its own kernels, see `features.kernels`."""
        return features.kernels(self, kernel)

    @classmethod
    def from_features(
        cls, spec: NetSpec, nodes: Sequence[Tensor], edges: Sequence[Tensor], activation: Tensor | None = None
    ) -> NetParams:
        """The inverse of `node_features` and `edge_features` (same shapes), without batch norms."""
        return cls(spec, *features.parameters_of(spec, nodes, edges), activation)

    def to_pyg(self) -> Any:
        """A `torch_geometric.data.Batch` of B graphs, see `pyg.to_pyg`."""
        return pyg.to_pyg(self)

    @classmethod
    def from_pyg(cls, batch: Any, spec: NetSpec) -> NetParams:
        """The inverse of `to_pyg`, for networks without batch norms; of a `Batch`, or of one of its `Data`.

        Raises:
            ValueError: the graphs are not parameter graphs of `spec`, or it has batch norms: graphs lack statistics.
        """
        return cls.from_features(spec, *pyg.features_of_pyg(batch, spec))


def _hidden_activation(activation: str | Sequence[str], num_networks: int) -> tuple[str, tuple[str, ...]]:
    """The spec's activation and its `extra_activations`."""
    if isinstance(activation, str):
        if activation == HETERO:
            raise ValueError(f"activation: found {HETERO!r}, expected one name per network")
        return activation, ()
    if len(activation) != num_networks:
        raise ValueError(f"activation: found {len(activation)} names for {num_networks} networks, expected one each")
    for name in activation:
        if name not in ACTIVATIONS:
            raise ValueError(f"activation: unknown name {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if len(set(activation)) == 1:
        return activation[0], ()
    return HETERO, not_built_in(activation)
