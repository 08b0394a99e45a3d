"""Linear layers on the weights and biases of any architecture, equivariant to permutations of its neurons (UNF).

Neurons that must be permuted together are a class (`NetSpec.permutation_classes`). A weight has two axes, its neurons
and those that it reads, a bias has one; each is of a class, or stays: that of inputs, outputs and pinned neurons. Where
an axis has parts of several classes, the tensor is cut into blocks. Axes that stay are counted as values of a position,
as those of a kernel are.

Shape letters: B networks, n_a neurons of class a, F values per position, c channels. Features of a block are
[B, n_a, n_b, F c], [B, n_a, F c] or [B, F c], by how many axes have a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams, NetSpec

Ranges = list[tuple[slice, int | None]]
"""Of a layer's neurons, each with its class; None: they stay."""


@dataclass(frozen=True)
class Block:
    """A part of a weight, or of a bias, whose axes each are of one class, or stay.

    Attributes:
        layer: counted from 0.
        rows: of the layer's neurons.
        columns: of those that it reads; None for a bias.
        classes: of rows and of columns (for a bias, of rows), as counted in `NetSpec.permutation_classes`; None: they
            stay.
        width: F.
    """

    layer: int
    rows: slice
    columns: slice | None
    classes: tuple[int | None, ...]
    width: int

    @property
    def axes(self) -> tuple[int, ...]:
        """The classes of those axes that have one."""
        return tuple(index for index in self.classes if index is not None)

    @property
    def is_square(self) -> bool:
        """Whether both axes are of one class, so that the block has a diagonal."""
        return len(self.axes) == 2 and self.axes[0] == self.axes[1]


def blocks_of(spec: NetSpec) -> tuple[Block, ...]:
    """All blocks of the weights and biases of `spec` that are parameters, layer by layer."""
    blocks = []
    for index, layer in enumerate(spec.layers):
        kernel_size = math.prod(layer.kernel or ())
        columns = _ranges(spec, spec.sender(index))
        if layer.constant or layer.weight_shape[1] == 1:  # constant inputs, or the one channel of a depthwise layer
            columns = [(slice(0, layer.weight_shape[1]), None)]
        for (rows, row_class), (reads, column_class) in product(_ranges(spec, index), columns):
            if layer.affine:
                sizes = [s.stop - s.start for s, c in ((rows, row_class), (reads, column_class)) if c is None]
                width = kernel_size * math.prod(sizes)
                blocks.append(Block(index, rows, reads, (row_class, column_class), width))
        for rows, row_class in _ranges(spec, index) if layer.bias else ():
            width = 1 if row_class is not None else rows.stop - rows.start
            blocks.append(Block(index, rows, None, (row_class,), width))
    return tuple(blocks)


def _ranges(spec: NetSpec, layer: int) -> Ranges:
    """A layer's neurons (-1: the network's input) in ranges, each with its class; None: they stay."""
    classes = [(item.channels, i) for i, item in enumerate(spec.permutation_classes) if layer in item.layers]
    ranges: Ranges = []
    start = 0
    for channels, index in sorted(classes, key=lambda item: item[0].start):
        if channels.start > start:
            ranges.append((slice(start, channels.start), None))
        ranges.append((channels, index))
        start = channels.stop
    if start < spec.width(layer):
        ranges.append((slice(start, spec.width(layer)), None))
    return ranges


def folded(spec: NetSpec) -> NetSpec:
    """The spec of `NetParams.with_batch_norm_folded`."""
    layers = (
        replace(layer, norm=None, epsilon=0.0, affine=True, bias=True) if layer.norm == "batch" else layer
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def cut(blocks: Sequence[Block], params: NetParams) -> list[Tensor]:
    """The features of all blocks, one channel each."""
    features = []
    for block in blocks:
        if block.columns is None:
            x = params.biases[block.layer][:, block.rows, None]
        else:
            weight, layer = params.weights[block.layer], params.spec.layers[block.layer]
            weight = weight.reshape(*weight.shape[:3], -1)
            if layer.groups > 1 and weight.shape[2] > 1:
                weight = _dense(weight, layer.groups)
            x = weight[:, block.rows, block.columns]
        order = [axis for axis, index in enumerate(block.classes, 1) if index is not None]
        order += [axis for axis, index in enumerate(block.classes, 1) if index is None]
        features.append(x.permute(0, *order, x.ndim - 1).flatten(1 + len(block.axes)))
    return features


def joined(blocks: Sequence[Block], features: Sequence[Tensor], params: NetParams) -> NetParams:
    """The inverse of `cut`: weights and biases of the shapes of `params`; 0 where these are no parameters."""
    weights, biases = [], [torch.zeros_like(bias) for bias in params.biases]
    for layer, weight in zip(params.spec.layers, params.weights, strict=True):
        columns = layer.in_dim if layer.weight_shape[1] > 1 else 1
        weights.append(weight.new_zeros(*weight.shape[:2], columns, math.prod(layer.kernel or ())))
    for block, x in zip(blocks, features, strict=True):
        whole = biases[block.layer][..., None] if block.columns is None else weights[block.layer]
        part = whole[:, block.rows] if block.columns is None else whole[:, block.rows, block.columns]
        axes = range(1, len(block.classes) + 1)
        order = [axis for axis in axes if block.classes[axis - 1] is not None]
        order += [axis for axis in axes if block.classes[axis - 1] is None]
        shape = [part.shape[axis] for axis in order]
        back = [0, *(1 + order.index(axis) for axis in axes), len(order) + 1]
        part.copy_(x.reshape(len(x), *shape, -1).permute(back))
    for index, layer in enumerate(params.spec.layers):
        if layer.groups > 1 and layer.weight_shape[1] > 1:
            weights[index] = _grouped(weights[index], layer.groups)
    shaped = (new.reshape(old.shape) for new, old in zip(weights, params.weights, strict=True))
    return params.replace(weights=tuple(shaped), biases=tuple(biases))


def _dense(weight: Tensor, groups: int) -> Tensor:
    """Grouped weights [B, n, m / groups, F] with zeros between groups, [B, n, m, F]."""
    blocks = weight.unflatten(1, (groups, -1)).movedim(1, -1)  # [B, n / groups, m / groups, F, groups]
    whole: Tensor = torch.diag_embed(blocks, dim1=1, dim2=3).flatten(3, 4).flatten(1, 2)
    return whole


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """The inverse of `_dense`."""
    blocks = weight.unflatten(2, (groups, -1)).unflatten(1, (groups, -1))
    within: Tensor = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(1, 2)
    return within


def means(blocks: Sequence[Block], features: Sequence[Tensor]) -> Tensor:
    """The means of each block over all positions, and over its diagonal, [B, sum of F c]."""
    pooled = []
    for block, x in zip(blocks, features, strict=True):
        pooled.append(x.flatten(1, -2).mean(1) if block.axes else x)
        if block.is_square:
            pooled.append(_diagonal(x).mean(1))
    return torch.cat(pooled, dim=1)


def means_width(blocks: Sequence[Block]) -> int:
    """The width of `means` of one channel."""
    return sum(block.width * (2 if block.is_square else 1) for block in blocks)


def _diagonal(x: Tensor) -> Tensor:
    """[B, n, n, D] -> [B, n, D]."""
    return x.diagonal(dim1=1, dim2=2).mT


class UniversalLayer(nn.Module):
    """All affine maps of weights and biases that are equivariant to permutations of the neurons of each class.

        x'_ij = P [y_ij of all blocks y of the classes of x, y_ji of those of the reverse] + Q u_i + R v_j + S g
                + delta_ij (T u_i + U g)                             if i and j count neurons of one class

    u_i and v_j join the means of all blocks over their other axis, at neurons i and j of their class, and the diagonals
    of those with two axes of it; g joins the means of all blocks, and of all diagonals. Blocks with one axis, or none,
    have fewer terms (Zhou et al., 2024, section 3). Parameters start normal, with the variance 1 / (what an entry
    reads); constants start at 0. As a product, P [..] is multiplied by Q u_i + R v_j + S g rather than added to it.

    Args:
        blocks: of the networks.
        in_dim: channels.
        out_dim: channels of the result.
        product: whether blocks with two axes are products.
    """

    def __init__(self, blocks: Sequence[Block], in_dim: int, out_dim: int, product: bool = False) -> None:
        super().__init__()
        self.blocks, self.in_dim, self.out_dim, self.product = tuple(blocks), in_dim, out_dim, product
        classes = sorted({index for block in blocks for index in block.axes})
        self.alike = [self._alike(block) for block in blocks]
        self.reads: list[list[int]] = []  # per block, the classes of its axes, and of its diagonal
        global_dim = in_dim * means_width(blocks)
        vector_dims = {
            index: in_dim * sum(block.width * _num_vectors(block, index) for block in blocks) for index in classes
        }
        self.alike_maps = nn.ModuleDict()
        self.of_globals = nn.ModuleList()
        self.of_vectors = nn.ModuleList()
        for place, block in enumerate(blocks):
            width = out_dim * block.width
            alike_dim = in_dim * sum(blocks[other].width for other, _ in self.alike[place])
            fan_in = alike_dim + global_dim + sum(vector_dims[index] for index in block.axes)
            if block.is_square:
                fan_in += global_dim + vector_dims[block.axes[0]]
            if alike_dim:
                self.alike_maps[str(place)] = _linear(alike_dim, width, fan_in)
            self.of_globals.append(_linear(global_dim, width * (2 if block.is_square else 1), fan_in, bias=True))
            reads = [*block.axes, *(block.axes[:1] if block.is_square else ())]
            self.of_vectors.extend(_linear(vector_dims[index], width, fan_in) for index in reads)
            self.reads.append(reads)

    def _alike(self, block: Block) -> list[tuple[int, bool]]:
        """Blocks of the same two classes, and whether these are reversed."""
        if len(block.axes) < 2:
            return []
        orders = [False, True] if block.is_square else [False]
        same = [(i, order) for i, other in enumerate(self.blocks) if other.axes == block.axes for order in orders]
        if block.is_square:
            return same
        return same + [(i, True) for i, other in enumerate(self.blocks) if other.axes == block.axes[::-1]]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of all blocks, c channels -> c'."""
        of_class, g = self.vectors(features)
        maps, result = iter(self.of_vectors), []
        for place, reads in enumerate(self.reads):
            terms = [next(maps)(of_class[index]) for index in reads]
            result.append(self._joined(place, terms, features, self.of_globals[place](g)))
        return result

    def vectors(self, features: Sequence[Tensor]) -> tuple[dict[int, Tensor], Tensor]:
        """u of each class (as columns of a block: v), [B, n_a, ...], and g, [B, ...]."""
        vectors: dict[int, list[Tensor]] = {}
        for block, x in zip(self.blocks, features, strict=True):
            for axis, index in enumerate(block.axes):
                vectors.setdefault(index, []).append(x.mean(2 - axis) if len(block.axes) == 2 else x)
            if block.is_square:
                vectors[block.axes[0]].append(_diagonal(x))
        of_class = {index: torch.cat(parts, dim=-1) for index, parts in vectors.items()}
        return of_class, means(self.blocks, features)

    def alike_features(self, place: int, features: Sequence[Tensor]) -> Tensor:
        """y_ij of all blocks of the classes of one, and y_ji of those of the reverse."""
        alike = [features[i].transpose(1, 2) if reverse else features[i] for i, reverse in self.alike[place]]
        return torch.cat(alike, dim=-1)

    def _joined(self, place: int, terms: list[Tensor], features: Sequence[Tensor], constant: Tensor) -> Tensor:
        """x' of one block, from what vectors of classes (`terms`) and means (`constant`) add to it."""
        block, axes = self.blocks[place], self.blocks[place].axes
        if not axes:
            new: Tensor = constant
        elif len(axes) == 1:
            new = terms[0] + constant[:, None]
        else:
            constant, *on_diagonal = constant.chunk(2 if block.is_square else 1, dim=1)
            alike = self.alike_maps[str(place)](self.alike_features(place, features))
            of_ends = (terms[0] + constant[:, None])[:, :, None] + terms[1][:, None]
            new = alike * of_ends if self.product else alike + of_ends
            if on_diagonal:
                diagonal = terms[2] + on_diagonal[0][:, None]
                new = new + torch.diag_embed(diagonal.mT, dim1=1, dim2=2)
        return new


def _num_vectors(block: Block, index: int) -> int:
    """How many vectors over the neurons of a class come of a block."""
    return block.axes.count(index) + (block.is_square and block.axes[0] == index)


def _linear(in_dim: int, out_dim: int, fan_in: int, bias: bool = False) -> nn.Linear:
    """A linear map that starts with the variance 1 / fan_in."""
    linear = nn.Linear(in_dim, out_dim, bias)
    nn.init.normal_(linear.weight, std=fan_in**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
