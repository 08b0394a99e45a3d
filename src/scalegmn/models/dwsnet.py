"""DWSNet (Navon et al., ICML 2023): linear maps between all weights and biases that permutations of neurons allow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations, pairwise
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.large_weight_spaces import run_dws_layers
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.heads import Head, ParametersHead, VectorHead
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.initialization import TANH_GAIN, Init, balance, balance_children, channel_groups, initialized, resize
from scalegmn.nn.mlp import Dropout
from scalegmn.nn.normalization import FeatureBatchNorm, InputNormalization
from scalegmn.nn.sets import DeepSet, SetAttention, affine, reduced
from scalegmn.nn.weight_space import channel_products

_BIAS_BOUND = 1e-4
"""Biases inside DWS layers start uniform within it."""


@dataclass(frozen=True)
class DWSNetConfig(ModelConfig):
    """DWSNet: every weight and bias tensor reads every other through a map that permutations of neurons allow."""

    name = "dwsnet"

    out_scale: float = 0.0
    """For parameters: the learned factor of each layer's changes starts here; 0: no factor."""

    hidden_dim: int = 32
    """Features per weight and bias."""

    num_hidden: int = 4
    """DWS layers after the first."""

    set_layer: Literal["attention", "deep_set"] = "attention"
    """The map between tensors that share one layer of hidden neurons."""

    num_heads: int = 8
    """Heads of the attention; the last layer has one."""

    reduction: Literal["max", "mean"] = "max"
    """Over the neurons that a tensor has and its reader does not."""

    products: bool = False
    """Layers multiply what they read at a weight between hidden layers by what they read elsewhere, where the published
    ones add; tanh in place of ReLU; for vectors, the readout reads products of two features."""

    init: Init = "published"
    """Initial parameters. balanced, for products: features keep their size and start odd, as if the model knew the
    signs of neurons (`scalegmn.nn.initialization`). published: as in the published code."""

    num_linears: int = 1
    """Linears in each affine map, with ReLU between."""

    full: bool = False
    """The maps to the last weights from those before them, and from the biases of all hidden layers but the last: one
    value per output of the network; false: one for all outputs, as published. The same for networks of one output."""

    batch_norm: bool = True
    """Before every layer but the first; while training, over the networks that pass through the model at once."""

    dropout: float = 0.0
    """Before every layer but the first, and before the readout."""

    num_readout_linears: int = 1
    """For vectors: Linears of the readout, with ReLU between."""

    init_scale: float | None = None
    """Factor of the weights that DWS layers start with; null: 1 for vectors, 1e-4 for parameters."""

    def __post_init__(self) -> None:
        counts = ["hidden_dim", "num_hidden", "num_heads", "num_linears", "num_readout_linears", "out_dim"]
        problems = self.wrong_choices() + self.wrong_numbers(counts, ["dropout"])
        if self.init_scale is not None and self.init_scale <= 0:
            problems.append(f"init_scale: found {self.init_scale}, expected above 0")
        if self.products and self.hidden_dim % 2 and not self.changes_parameters:
            problems.append(f"hidden_dim: found {self.hidden_dim}, expected an even one for products")
        if self.init == "balanced":  # of means and affine maps
            needed = {"set_layer": "deep_set", "reduction": "mean", "num_linears": 1, "output": "vector"}
            problems += self.wrong_for("init balanced", products=True, **needed)
        if self.set_layer == "attention" and self.num_heads > 0 and self.hidden_dim % self.num_heads:
            problems.append(f"num_heads: found {self.num_heads}, expected a divisor of hidden_dim {self.hidden_dim}")
        self.refuse(problems)

    @property
    def head(self) -> Head:
        """As in `ModelConfig`; changes have no learned factors where `out_scale` is 0."""
        return (
            ParametersHead(self.out_scale or None, self.heads) if self.changes_parameters else VectorHead(self.out_dim)
        )

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations of hidden neurons."""
        return frozenset({"permutation"})

    def build(self, spec: NetSpec) -> DWSNet:
        """The model for networks of `spec`."""
        return initialized(DWSNet(self, spec), self.init, spec)


METANETWORKS.register(DWSNetConfig.name, DWSNetConfig)


class Axes(NamedTuple):
    """The axes of one weight or bias tensor."""

    sets: tuple[int, ...]
    """Hidden node layers, whose neurons permute."""

    fixed: tuple[int, ...]
    """Input or output layer, whose neurons do not."""


class Term(NamedTuple):
    """One map between two tensors, weights 0..L-1 and biases L..2L-1."""

    source: int
    target: int
    kept: tuple[int, ...]
    """The hidden node layers along which it acts."""

    factor: float
    """That the map's result is multiplied by: 1 / how many tensors are read / how many maps there are between the two;
    with `products` 1."""


def tensor_axes(num_layers: int) -> list[Axes]:
    """Of W_1..W_L (sender before receiver), then b_1..b_L."""
    axes: list[tuple[int, ...]] = [(layer - 1, layer) for layer in range(1, num_layers + 1)]
    axes += [(layer,) for layer in range(1, num_layers + 1)]
    ends = (0, num_layers)
    return [Axes(tuple(a for a in tensor if a not in ends), tuple(a for a in tensor if a in ends)) for tensor in axes]


class DWSLayer(nn.Module):
    """T' = 1/(2L) sum over all tensors S of map_{S,T}(S) (DWSNets, section 5).

    A tensor T has features [B, *sets, fixed * f]: an axis for each hidden node layer that it has and, in the last axis,
    f features for each neuron of its input or output layer, neuron by neuron, if it has such a layer. map_{S,T} reduces
    S over the hidden layers that T lacks, acts along those that they share, and is broadcast over those that S lacks.
    It is affine where they share none and a set layer where they share one. Between the two hidden layers of
    S = T = W_l it is the mean of four affine maps: of S, of S reduced over either layer, and over both. With
    `products`, all means are sums, of which training takes larger steps, and W_l' = map(W_l) * (the sum of all others).

    Args:
        config: the hyper-parameters.
        layout: n = (n_0, ..., n_L).
        in_dim: f.
        out_dim: f'.
        num_heads: of the attention.
    """

    def __init__(self, config: DWSNetConfig, layout: Sequence[int], in_dim: int, out_dim: int, num_heads: int) -> None:
        super().__init__()
        last = len(layout) - 1
        self.in_dim, self.out_dim = in_dim, out_dim
        self.reduction, self.axes, self.products = config.reduction, tensor_axes(last), config.products
        self.out_dims = [out_dim * math.prod(layout[a] for a in axes.fixed) for axes in self.axes]
        share = 1.0 if config.products else 1 / len(self.axes)
        self.terms: list[Term] = []
        self.maps = nn.ModuleList()
        narrow = {last - 2, *range(last, 2 * last - 2)}  # W_{L-1} and b_1..b_{L-2}, as sources of W_L
        for source, source_axes in enumerate(self.axes):
            for target, target_axes in enumerate(self.axes):
                width = in_dim * math.prod(layout[a] for a in source_axes.fixed)
                is_narrow = target == last - 1 and source in narrow and not config.full
                new_width = out_dim if is_narrow else self.out_dims[target]
                shared = tuple(a for a in source_axes.sets if a in target_axes.sets)
                node_layers = [{*axes.sets, *axes.fixed} for axes in (source_axes, target_axes)]
                apart = node_layers[0].isdisjoint(node_layers[1]) and (source < last) != (target < last)
                num_linears = 1 if apart else config.num_linears  # the published code does not pass the option on
                if len(shared) == 1:
                    self.terms.append(Term(source, target, shared, share))
                    self.maps.append(
                        SetAttention(width, new_width, num_heads)
                        if config.set_layer == "attention"
                        else DeepSet(width, new_width, num_linears, config.reduction)
                    )
                else:
                    kept = [axes for count in range(len(shared) + 1) for axes in combinations(shared, count)]
                    factor = 1.0 if config.products else share / len(kept)
                    self.terms += [Term(source, target, axes, factor) for axes in kept]
                    self.maps.extend(affine(width, new_width, num_linears) for _ in kept)

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Per tensor [B, *sets, fixed * f] -> [B, *sets, fixed * f']."""
        sums = self.sums(lambda source, axes: reduced(tensors[source], axes, self.reduction))
        return [self.joined(terms, axes.sets) for terms, axes in zip(sums, self.axes, strict=True)]

    def sums(self, reduce: Callable[[int, tuple[int, ...]], Tensor | None]) -> list[dict[tuple[int, ...], Tensor]]:
        """Per tensor, the hidden layers along which maps act -> the sum of their results.

        Args:
            reduce: a tensor without some of its axes, over which it is reduced; None: maps of it are left out.
        """
        read: dict[tuple[int, tuple[int, ...]], Tensor | None] = {}
        sums: list[dict[tuple[int, ...], Tensor]] = [{} for _ in self.axes]
        for (source, target, kept, factor), map_ in zip(self.terms, self.maps, strict=True):
            if (source, kept) not in read:
                lacking = tuple(1 + i for i, a in enumerate(self.axes[source].sets) if a not in kept)
                read[source, kept] = reduce(source, lacking)
            x = read[source, kept]
            if x is None:
                continue
            new = map_(x)
            if new.shape[-1] < self.out_dims[target]:  # one value for all outputs
                new = new.repeat(*(1,) * (new.ndim - 1), self.out_dims[target] // new.shape[-1])
            old = sums[target].get(kept)
            sums[target][kept] = factor * new if old is None else torch.add(old, new, alpha=factor)
        return sums

    def joined(self, terms: dict[tuple[int, ...], Tensor], sets: tuple[int, ...]) -> Tensor:
        """The sum of terms [B, *kept, ...], broadcast over the other axes; small ones first. With `products`, between
        hidden layers the last of them times the sum of the others."""
        broadcast = []
        for kept in sorted(terms, key=len):
            new = terms[kept]
            for index, axis in enumerate(sets):
                new = new if axis in kept else new.unsqueeze(1 + index)
            broadcast.append(new)
        if self.products and len(sets) == 2:
            *others, weights = broadcast
            return reduce(torch.add, others) * weights
        return reduce(torch.add, broadcast)


class DWSNet(Metanetwork):
    """A function of a network's parameters that is invariant, or equivariant, to permutations of hidden neurons.

    DWS layers with batch normalisation, ReLU and dropout between; for vectors, an affine map of what is left of all
    tensors when the hidden axes are reduced (DWSNets, section 5). With `products`, which are not published, layers are
    quadratic.

    Args:
        config: the hyper-parameters; inputs are normalised unless `normalize` is false.
        spec: the input networks.

    Raises:
        ValueError: the networks have convolutions, residual connections or no hidden layer.
    """

    def __init__(self, config: DWSNetConfig, spec: NetSpec) -> None:
        config.refuse_residuals(spec)
        if spec.is_cnn or spec.num_layers < 2:
            raise ValueError(f"dwsnet_args: expected networks of linear layers, at least one hidden, found {spec}")
        normalization = None if config.normalize is False else InputNormalization(spec.num_layers, centred=True)
        super().__init__(config, spec, normalization)
        self.config = config
        editing = config.changes_parameters
        dims = [1, *[config.hidden_dim] * config.num_hidden, config.heads if editing else config.hidden_dim]
        heads = [*[config.num_heads] * config.num_hidden, 1]
        sizes = zip(dims[:-1], dims[1:], heads, strict=True)
        self.layers = nn.ModuleList(DWSLayer(config, spec.layout, *args) for args in sizes)
        norms = range(config.num_hidden if config.batch_norm else 0)
        self.norms = nn.ModuleList(
            nn.ModuleList(FeatureBatchNorm(config.hidden_dim) for _ in range(2 * spec.num_layers)) for _ in norms
        )
        self.dropout = Dropout(config.dropout)
        self.activation: Callable[[Tensor], Tensor] = torch.tanh if config.products else torch.relu
        self._init_layers((1e-4 if editing else 1.0) if config.init_scale is None else config.init_scale)
        self.readout = None
        if not editing:
            width = sum(cast("DWSLayer", self.layers[-1]).out_dims) // (2 if config.products else 1)
            self.readout = affine(width, config.out_dim, config.num_readout_linears)

    @torch.no_grad()
    def _init_layers(self, scale: float) -> None:
        """W ~ N(0, scale^2 * 2/(a+b) * 2a/b) for W of a -> b, biases within `_BIAS_BOUND`, in all DWS layers."""
        for name, parameter in self.layers.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-_BIAS_BOUND, _BIAS_BOUND)
            else:
                parts = (
                    parameter.chunk(3) if "query_key_value" in name else [parameter]
                )  # each with a width b of its own
                for part in parts:
                    b, a = part.shape
                    part.normal_(0, scale * math.sqrt(2 / (a + b) * 2 * a / b))

    def forward(self, params: NetParams) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        self.validate_spec(params.spec)
        self.config.refuse_residuals(params.spec)
        chunks = self.chunks(params.biases[0].device)
        if chunks.num_edges is not None:
            tensors, rows = run_dws_layers(self, self._tensors(self.normalized(params)), chunks)
        else:
            tensors, rows = self._run_layers(self._tensors(self.normalized(params)))
        if self.readout is None:
            return self.joined_heads([self._changes(tensors, params, head) for head in range(self.config.heads)])
        output: Tensor = self.readout(self.dropout(torch.cat(rows, dim=-1)))
        return output

    def _run_layers(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors after all layers and, for vectors, what is left of each where the hidden axes are reduced."""
        new: list[Tensor] = self.layers[0](tensors)
        for index, layer in enumerate(self.layers[1:]):
            if self.norms:
                new = [norm(x) for norm, x in zip(cast("nn.ModuleList", self.norms[index]), new, strict=True)]
            new = layer([self.dropout(self.activation(x)) for x in new])
        if self.readout is None:
            return new, []
        return new, [reduced(self.pooled(x), tuple(range(1, x.ndim - 1)), self.config.reduction) for x in new]

    def pooled(self, x: Tensor) -> Tensor:
        """Features of a tensor after the last layer -> those that are reduced over hidden layers."""
        x = self.activation(x)
        return channel_products(x, 1) if self.config.products else x

    def chunks(self, device: torch.device) -> ChunkPlan:
        """Whether the weights between hidden layers of one network are run at once, or in chunks whose features are
        computed again."""
        config, layout = self.config, self.spec.layout
        num_weights = sum(n * m for n, m in pairwise(layout[1:-1]))
        size = config.hidden_dim * next(self.parameters()).element_size()
        plan = ChunkPlan.plan(num_weights, size, 4 * len(self.layers), device)
        # dropout inside a chunk would be drawn anew wherever features are read
        return replace(plan, materialize=True) if config.dropout else plan

    def _tensors(self, params: NetParams) -> list[Tensor]:
        """The parameters as DWS layers read them."""
        first, *middle, last = params.weights
        *hidden, output = params.biases
        weights = [first, *(weight.mT[..., None] for weight in middle), last.mT]
        return [*weights, *(bias[..., None] for bias in hidden), output]

    def _changes(self, tensors: Sequence[Tensor], params: NetParams, head: int) -> NetParams:
        """The inverse of `_tensors`, of one of the `heads` features."""
        of_head = [tensor[..., head :: self.config.heads] for tensor in tensors]
        first, *middle, last = of_head[: self.spec.num_layers]
        *hidden, output = of_head[self.spec.num_layers :]
        weights = (first, *(weight[..., 0].mT for weight in middle), last.mT)
        return params.replace(weights=weights, biases=(*(bias[..., 0] for bias in hidden), output))


@balance.register
def _(layer: DWSLayer, spec: NetSpec) -> None:
    """As of NFN's layers (`scalegmn.nn.initialization`): between hidden layers, the first group of features is W
    times 1, the others are W times what changes sign with the sender, or with the receiver."""
    active: list[tuple[Term, Tensor, float]] = []
    for term, map_ in zip(layer.terms, layer.maps, strict=True):
        for parameter in map_.parameters():
            parameter.zero_()
        linear = cast("nn.Linear", (map_.own if isinstance(map_, DeepSet) else cast("nn.Sequential", map_))[0])
        source, target = (layer.axes[tensor].sets for tensor in (term.source, term.target))
        columns, rows, count = slice(None), slice(None), 1
        if len(source) == 2:
            edges, forward, backward = channel_groups(layer.in_dim)
            columns = {source: edges, source[1:]: forward, source[:1]: backward, (): slice(0)}[term.kept]
            count = math.prod(spec.layout[axis] for axis in source if axis not in term.kept)
        elif term.kept != source:
            continue
        if len(target) == 2:
            edges, forward, backward = channel_groups(layer.out_dim)
            rows = {target: slice(None), target[:1]: forward, target[1:]: backward, (): slice(0)}[term.kept]
            if term.source == term.target and not term.kept:
                linear.bias[edges] = 1
        elif term.kept != target:
            continue
        weight = linear.weight[rows, columns]
        if weight.numel():
            active.append((term, weight, count**0.5))
    num_terms = Counter((term.target, term.kept) for term, *_ in active)
    for term, weight, size in active:
        num_read = weight.shape[1] * num_terms[term.target, term.kept]
        weight.normal_(std=TANH_GAIN * size / num_read**0.5)


@balance.register
def _(model: DWSNet, spec: NetSpec) -> None:
    balance_children(model, spec)
    for linear in cast("nn.Sequential", model.readout):
        if isinstance(linear, nn.Linear):
            resize(linear)
