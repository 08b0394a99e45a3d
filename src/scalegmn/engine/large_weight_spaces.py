"""NFN and DWSNet on large networks, in chunks of weights.

Features of the weights between two hidden layers are not kept: those of a chunk are computed from the weights, and from
terms that are constant along senders or receivers, wherever they are read, again in the backward pass.

Shape letters: B networks, n receivers, m senders (of DWSNet, whose weights have the sender first, the other way round),
K raw values per weight, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from scalegmn.engine.chunks import ChunkPlan, EdgeFunction, EdgeInputs
from scalegmn.engine.dispatch import FastForms
from scalegmn.engine.edges import DenseEdges, Edges, EdgeUpdate
from scalegmn.engine.rows import GatheredRows, Rows
from scalegmn.nn.mlp import Dropout
from scalegmn.nn.normalization import FeatureBatchNorm
from scalegmn.nn.sets import Reduction, reduced
from scalegmn.nn.weight_space import (
    ActivationDropout,
    AffineMaps,
    ChannelDropout,
    ChannelNorm,
    ChannelProducts,
    HiddenNeuronLayer,
    InputOutputEmbedding,
    MapInputs,
    NeuronLayer,
    NeuronNorm,
    PointwiseLayer,
    SinusoidalPositions,
    WeightSpaceFourier,
    channel_norm,
    channel_products,
)

_ROWS = Rows("hidden", ())
"""What the engine's edges know of their ends; nothing here reads it."""


@dataclass(frozen=True)
class LargeWeights:
    """Features of the weights between two layers, [B, n, m, D], that are computed wherever they are read.

    Attributes:
        edges: raw values [B, n, m, K], with what makes features of them.
        dim: D.
        chunks: how they are worked through.
    """

    edges: DenseEdges
    dim: int
    chunks: ChunkPlan

    @classmethod
    def of(cls, weight: Tensor, chunks: ChunkPlan) -> LargeWeights:
        """Of raw values [B, n, m, K]."""
        return cls(DenseEdges(weight, receivers=_ROWS, senders=_ROWS), weight.shape[-1], chunks)

    @property
    def shape(self) -> torch.Size:
        """(B, n, m, D)."""
        return torch.Size((*self.edges.values.shape[:3], self.dim))

    def then(
        self,
        dim: int,
        function: Callable[..., Tensor],
        module: nn.Module | None = None,
        receivers: Tensor | None = None,
        senders: Tensor | None = None,
        others: tuple[Tensor, ...] = (),
        product: bool = False,
    ) -> LargeWeights:
        """x -> function(x, *others) + receivers at each receiver + senders at each sender.

        Args:
            dim: the number of new features.
            function: of each weight, [.., D] -> [.., dim].
            module: whose parameters it reads.
            receivers: [B, n or 1, dim]; None: 0.
            senders: [B, m or 1, dim]; None: 0.
            others: further tensors that have gradients.
            product: function(x, *others) * (receivers + senders) instead, which are both given.
        """
        values = self.edges.values
        num_receivers, num_senders = values.shape[1:3]
        update = EdgeUpdate(
            module or nn.Module(),
            partial(_with_ends, function, product),
            values.new_zeros(len(values), num_senders, 0) if senders is None else senders.expand(-1, num_senders, -1),
            values.new_zeros(len(values), num_receivers, 0)
            if receivers is None
            else receivers.expand(-1, num_receivers, -1),
            others,
        )
        edges = self.edges.updated(update)
        if self.chunks.materialize:
            edges = edges.holding(self.chunks.features(edges))
        return LargeWeights(cast("DenseEdges", edges), dim, self.chunks)

    def features(self) -> Tensor:
        """[B, n, m, D]."""
        return self.chunks.features(self.edges)

    def mean(self, axes: int | tuple[int, ...]) -> Tensor:
        """Over receivers (1) [B, m, D], senders (2) [B, n, D] or both [B, D]."""
        return self._reduced(axes, Tensor.mean)

    def amax(self, axes: int | tuple[int, ...]) -> Tensor:
        """The maximum, as `mean`."""
        return self._reduced(axes, Tensor.amax)

    def _reduced(self, axes: int | tuple[int, ...], reduction: Callable[..., Tensor]) -> Tensor:
        """The mean or maximum over some axes."""
        if axes in (1, (1,)):
            return self.turned()._reduced(2, reduction)
        rows = self.of_receivers(lambda x: reduction(x, 2))
        return rows if axes in (2, (2,)) else reduction(rows, 1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The variance, without Bessel's correction, and the mean of each feature, [D] each."""
        rows = self.of_receivers(lambda x: torch.cat(torch.var_mean(x, 2, correction=0), -1))
        variances, means = rows.flatten(0, 1).chunk(2, dim=-1)
        between, mean = torch.var_mean(means, 0, correction=0)
        return variances.mean(0) + between, mean

    def of_receivers(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """function [B, r, m, D] -> [B, r, D'] of all receivers, [B, n, D']."""

        def of_chunk(edges: Edges, *rest: Tensor | GatheredRows | None) -> Tensor:
            return function(edges.multiplied_out())

        return self.chunks.messages(cast("EdgeFunction", of_chunk), EdgeInputs(self.edges), ())

    def turned(self) -> LargeWeights:
        """The same with receivers and senders in each other's place."""
        updates = tuple(u._replace(senders=u.receivers, receivers=u.senders) for u in self.edges.updates)
        return replace(self, edges=replace(self.edges, values=self.edges.values.transpose(1, 2), updates=updates))


def _with_ends(
    function: Callable[..., Tensor],
    product: bool,
    module: nn.Module,
    edges: Edges,
    senders: Tensor,
    receivers: Tensor,
    *others: Tensor,
) -> Tensor:
    """See `LargeWeights.then`."""
    x = function(edges.values, *others)
    if product:
        return x * (edges.at_receivers(receivers) + edges.at_senders(senders))
    if receivers.shape[-1]:
        x = x + edges.at_receivers(receivers)
    return x + edges.at_senders(senders) if senders.shape[-1] else x


AnyWeights = Tensor | LargeWeights


def held(weights: Sequence[AnyWeights], biases: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Weights as tensors, and biases."""
    return [x if isinstance(x, Tensor) else x.features() for x in weights], biases


# NFN


def run_nfn_layers(
    layers: Iterable[nn.Module], weights: Sequence[Tensor], biases: Sequence[Tensor], chunks: ChunkPlan
) -> tuple[list[AnyWeights], Sequence[Tensor]]:
    """What the layers of NFN make of one network, with the weights between hidden layers as `LargeWeights`.

    Args:
        layers: modules of `scalegmn.nn.weight_space`.
        weights, biases: per layer [1, n_l, n_{l-1}, F_l] and [1, n_l, 1].
        chunks: how large weights are worked through.
    """
    between = range(1, len(weights) - 1)
    mixed: list[AnyWeights] = [LargeWeights.of(w, chunks) if i in between else w for i, w in enumerate(weights)]
    for layer in layers:
        if isinstance(layer, NeuronLayer | HiddenNeuronLayer):
            # the inputs of maps are means of weights
            inputs = layer.map_inputs(cast("Sequence[Tensor]", mixed), biases)
            new = [
                _affine(cast("AffineMaps", maps), of_layer) for maps, of_layer in zip(layer.maps, inputs, strict=True)
            ]
            shaped, biases = layer.shaped(cast("list[tuple[Tensor, Tensor]]", new))
            mixed = list(shaped)
            continue
        if isinstance(layer, ActivationDropout):
            mixed, biases = [_each(layer.activation, x) for x in mixed], list(map(layer.activation, biases))
            layer = layer.dropout
        # one weight of ones in place of the large ones, so that dropout draws as many numbers as it would for them
        small = [x if isinstance(x, Tensor) else biases[0].new_ones(1, 1, 1, x.dim) for x in mixed]
        results, biases = layer(small, biases)
        mixed = [
            result if isinstance(x, Tensor) else _pointwise(layer, index, x, result)
            for index, (x, result) in enumerate(zip(mixed, results, strict=True))
        ]
    return mixed, biases


def _affine(maps: AffineMaps, inputs: MapInputs) -> tuple[AnyWeights, Tensor]:
    """`AffineMaps` of weights that may be large."""
    x = cast("AnyWeights | None", inputs.position)
    if not isinstance(x, LargeWeights):
        return cast("tuple[Tensor, Tensor]", maps(inputs))
    of_receivers, of_senders, bias = maps.at_neurons(inputs)
    linear = cast("nn.Linear", maps.weight_maps["position"])
    return x.then(linear.out_features, linear, linear, of_receivers, of_senders, product=maps.product), bias


_pointwise = FastForms(lambda layer, *args: _unknown(layer))
"""_pointwise(layer, index, x, result): `layer` of the large weights x of layer `index`; `result` is what it makes of a
single weight of ones in their place, [1, 1, 1, D']."""


def _unknown(layer: nn.Module) -> LargeWeights:
    raise NotImplementedError(f"{type(layer).__name__} has no form for large networks")


@_pointwise.register(WeightSpaceFourier)
def _(layer: WeightSpaceFourier, index: int, x: LargeWeights, result: Tensor) -> LargeWeights:
    return x.then(result.shape[-1], layer.features)


@_pointwise.register(SinusoidalPositions)
def _(layer: SinusoidalPositions, index: int, x: LargeWeights, result: Tensor) -> LargeWeights:
    position = result[..., x.dim :]
    return x.then(result.shape[-1], lambda rows: torch.cat([rows, position.expand(*rows.shape[:-1], -1)], dim=-1))


@_pointwise.register(InputOutputEmbedding)
def _(layer: InputOutputEmbedding, index: int, x: LargeWeights, result: Tensor) -> LargeWeights:
    return x


@_pointwise.register(PointwiseLayer)
def _(layer: PointwiseLayer, index: int, x: LargeWeights, result: Tensor) -> LargeWeights:
    linear = layer.weight_maps[index]
    return x.then(result.shape[-1], linear, linear)


@_pointwise.register(ChannelNorm)
def _(layer: ChannelNorm, index: int, x: LargeWeights, result: Tensor) -> LargeWeights:
    return x.then(x.dim, channel_norm, others=(layer.gammas[index], layer.betas[index]))


@_pointwise.register(NeuronNorm)
def _(layer: NeuronNorm, index: int, x: LargeWeights, result: Tensor) -> LargeWeights:
    return x.then(x.dim, layer.weight_norms[index], layer.weight_norms[index])


@_pointwise.register(ChannelDropout)
def _(layer: ChannelDropout, index: int, x: LargeWeights, result: Tensor) -> LargeWeights:
    return x.then(x.dim, lambda rows: rows * result) if layer.training and layer.dropout.p else x


@_pointwise.register(ChannelProducts)
def _(layer: ChannelProducts, index: int, x: LargeWeights, result: Tensor) -> LargeWeights:
    return x.then(result.shape[-1], lambda rows: channel_products(rows, layer.kernels[index]))


# DWSNet


class DWSLayerParts(Protocol):
    """What is read of a DWS layer; see `scalegmn.models.dwsnet.DWSLayer`."""

    reduction: Reduction
    axes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    out_dims: Sequence[int]
    terms: Sequence[tuple[int, int, tuple[int, ...], float]]
    maps: nn.ModuleList
    products: bool

    def sums(self, reduce: Callable[[int, tuple[int, ...]], Tensor | None]) -> list[dict[tuple[int, ...], Tensor]]:
        """Per tensor, the hidden layers along which maps act -> the sum of their results."""
        ...

    def joined(self, terms: dict[tuple[int, ...], Tensor], sets: tuple[int, ...]) -> Tensor:
        """The sum of terms, broadcast, or a product."""
        ...


class DWSNetwork(Protocol):
    """What is read of DWSNet; see `scalegmn.models.dwsnet.DWSNet`."""

    layers: nn.ModuleList
    norms: nn.ModuleList
    dropout: Dropout
    activation: Callable[[Tensor], Tensor]

    @property
    def readout(self) -> nn.Module | None:
        """That of vectors."""
        ...

    def pooled(self, x: Tensor) -> Tensor:
        """Features after the last layer -> those that are reduced."""
        ...


def run_dws_layers(
    model: DWSNetwork, tensors: Sequence[Tensor], chunks: ChunkPlan
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of networks after all layers, if they are the result, else what is left of each where the hidden
    axes are reduced; those between two hidden layers as `LargeWeights`."""
    mixed: list[AnyWeights] = [LargeWeights.of(x, chunks) if x.ndim == 4 else x for x in tensors]
    first, *layers = cast("Sequence[DWSLayerParts]", model.layers)
    mixed = _run_dws_layer(first, mixed)
    for index, layer in enumerate(layers):
        if len(model.norms):
            norms = cast("Sequence[FeatureBatchNorm]", model.norms[index])
            mixed = [
                _batch_norm(norm, x) if isinstance(x, LargeWeights) else norm(x)
                for norm, x in zip(norms, mixed, strict=True)
            ]
        mixed = _run_dws_layer(layer, [_each(lambda rows: model.dropout(model.activation(rows)), x) for x in mixed])
    if model.readout is None:
        return held(mixed, ())[0], []
    pooled: list[AnyWeights] = [
        model.pooled(x) if isinstance(x, Tensor) else x.then(x.dim // (2 if first.products else 1), model.pooled)
        for x in mixed
    ]
    return [], [_reduced(x, tuple(range(1, len(x.shape) - 1)), first.reduction) for x in pooled]


def _run_dws_layer(layer: DWSLayerParts, tensors: Sequence[AnyWeights]) -> list[AnyWeights]:
    """A DWS layer."""

    def reduce(source: int, axes: tuple[int, ...]) -> Tensor | None:
        x = tensors[source]
        return None if isinstance(x, LargeWeights) and not axes else _reduced(x, axes, layer.reduction)

    results: list[AnyWeights] = []
    for target, (x, terms) in enumerate(zip(tensors, layer.sums(reduce), strict=True)):
        sets, _ = layer.axes[target]
        if isinstance(x, Tensor):
            results.append(layer.joined(terms, sets))
            continue
        of_all = next(
            i for i, (source, to, kept, _) in enumerate(layer.terms) if source == to == target and kept == sets
        )
        map_, factor = layer.maps[of_all], layer.terms[of_all][3]
        ends = terms[()][:, None] + terms[sets[:1]], terms[sets[1:]]
        results.append(
            x.then(layer.out_dims[target], partial(_scaled, map_, factor), map_, *ends, product=layer.products)
        )
    return results


def _scaled(map_: nn.Module, factor: float, x: Tensor) -> Tensor:
    """factor * map_(x)."""
    new: Tensor = factor * map_(x)
    return new


def _each(function: Callable[[Tensor], Tensor], x: AnyWeights) -> AnyWeights:
    """`function` of each weight or bias."""
    return function(x) if isinstance(x, Tensor) else x.then(x.dim, function)


def _reduced(x: AnyWeights, axes: tuple[int, ...], reduction: Reduction) -> Tensor:
    """`reduced` of any tensor."""
    if isinstance(x, Tensor):
        return reduced(x, axes, reduction)
    return x.amax(axes) if reduction == "max" else x.mean(axes)


def _batch_norm(norm: FeatureBatchNorm, x: AnyWeights) -> AnyWeights:
    """`FeatureBatchNorm` of any tensor."""
    if isinstance(x, Tensor):
        normalized: Tensor = norm(x)
        return normalized
    if not norm.training:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = norm.running_mean, norm.running_var
    else:
        variance, mean = x.moments()
        _update_statistics(norm, mean.detach(), variance.detach(), x.shape[:3].numel())
    scale = norm.weight / (variance + norm.eps).sqrt()
    shift = norm.bias - mean * scale
    return x.then(x.dim, lambda rows, scale, shift: torch.addcmul(shift, rows, scale), others=(scale, shift))


def _update_statistics(norm: FeatureBatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics of a batch norm that has seen `count` values of each feature."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
