"""Initial values with which training starts at once: `init: balanced` of models.

PyTorch's initial values let features shrink from layer to layer, and leave little in them that depends on the input
networks (`benchmarks/signals.py`). Here a rule per type of module sets values, and nothing else. The rules follow from

- size: a map of D features of root mean square (RMS) 1 has weights of variance 1/D (He et al., 2015), and gives RMS 1;
- factors: the invariant factor g of (W x) * g(x) starts around 1;
- sums: a node's messages are divided by the root of how many there are, the mean over nodes; halves that are added, by
  the root of 2;
- signs: what does not know the sign symmetry of neurons starts odd. A neuron's features then change sign when its
  incoming weights and its bias do, as in models that know it, and messages are products of such features. Hidden units
  come in pairs of opposite weights ("mirrored", Balduzzi et al., 2017, https://arxiv.org/abs/1702.08591); what adds the
  same to all neurons of a layer starts at 0. Training is free to leave this.

A rule of one's own is registered for a type: `@balance.register`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import singledispatch
from itertools import pairwise
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from scalegmn.networks import NetSpec
from scalegmn.nn.attention import RelationalAttention, RelationalEdgeUpdate, RelationalLayer
from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, MLPLayer, SineUpdate
from scalegmn.nn.fourier import Encoder, FourierFeatures
from scalegmn.nn.invariant import ByScalarGroup, InvariantLayer, ScaleInvariant
from scalegmn.nn.message_passing import MessagePassingLayer
from scalegmn.nn.messages import ConcatEdgeUpdate, ConcatMessage, ProductMessage, ScaleEdgeUpdate, ScaleMessage
from scalegmn.nn.mlp import MLP
from scalegmn.nn.neural_graph import NeuralGraphFeatures
from scalegmn.nn.pna import NUM_AGGREGATORS, EdgeUpdate, PNALayer
from scalegmn.nn.positional import TypedLinear
from scalegmn.nn.readout import DeepSetReadout, GraphReadout
from scalegmn.nn.universal import UniversalLayer
from scalegmn.nn.weight_space import AffineMaps, Features, HiddenNeuronLayer, NeuronLayer

Model = TypeVar("Model", bound=nn.Module)

Init = Literal["published", "balanced"]
"""Initial values: those of the published code, or those of the rules here."""


def initialized(model: Model, init: Init, spec: NetSpec) -> Model:
    """A new model for input networks of `spec`, with the initial values that `init` names."""
    if init == "balanced":
        with torch.no_grad():
            balance(model, spec)
    return model


@singledispatch
def balance(module: nn.Module, spec: NetSpec) -> None:
    """Sets the initial values of a module, by its type; where there is no rule, those of its children."""
    for child in module.children():
        balance(child, spec)


balance_children = balance.dispatch(nn.Module)
"""balance_children(module, spec): what rules call that only add to those of a module's children."""


# Sizes


def resize(linear: nn.Linear, gain: float = 1.0) -> None:
    """Scales weights so that independent inputs of RMS 1 give outputs of RMS `gain`, and sets the bias to 0.

    Columns of zeros read nothing, so they do not count.
    """
    size = linear.weight.square().sum(1).mean().sqrt()
    if size > 0:
        linear.weight.mul_(gain / size)
    if linear.bias is not None:
        linear.bias.zero_()


def num_messages(spec: NetSpec, against: bool = False) -> float:
    """How many messages along (or against) the edges come to a node, the mean over nodes that get any."""
    return spec.num_edges / (spec.num_nodes - spec.layout[-1 if against else 0])


@balance.register
def _(linear: nn.Linear, spec: NetSpec) -> None:
    """Those with a bias belong to MLPs, which normalise."""
    if linear.bias is None:
        resize(linear)


@balance.register
def _(typed: TypedLinear, spec: NetSpec) -> None:
    typed.table.mul_(3**0.5)


def last_maps(module: nn.Module | None) -> Iterator[nn.Linear]:
    """The Linears whose output a net, message function or MLP returns, as it is or times a factor; none of others."""
    match module:
        case nn.Linear():
            yield module
        case MLP():
            yield module.linears[-1]
        case MLPLayer() | ConcatMessage():
            yield module.mlp.linears[-1]
        case InvariantLayer():
            yield module.phi.linears[-1]
        case EquivariantLayer() | SineUpdate():
            yield module.linear
        case ProductMessage():
            yield module.node_linear
        case ScaleMessage():
            yield from last_maps(module.net)
        case ByRole() | ByScalarGroup():
            for branch in module.branches:
                yield from last_maps(branch)
        case EquivariantNet():
            for last in (*module.layers[-1:], *module.skips[-1:]):
                yield from last_maps(last)


def scale_output(module: nn.Module | None, factor: float) -> None:
    """Multiplies what a module returns (`last_maps`)."""
    for linear in last_maps(module):
        for parameter in linear.parameters():
            parameter.mul_(factor)


# ScaleGMN


@balance.register
def _(layer: EquivariantLayer, spec: NetSpec) -> None:
    balance_children(layer, spec)
    for linear in last_maps(layer.factor):
        linear.bias.add_(1)


@balance.register
def _(layer: InvariantLayer, spec: NetSpec) -> None:
    balance_children(layer, spec)
    if isinstance(layer.invariant, ScaleInvariant):  # the RMS of x / ||x|| is 1 / sqrt(D)
        first = layer.phi.linears[0]
        in_dim = first.in_features - layer.extra_dim
        first.weight[:, :in_dim].mul_(in_dim**0.5)


@balance.register
def _(update: ScaleEdgeUpdate, spec: NetSpec) -> None:
    balance_children(update, spec)
    update.phi.linears[-1].bias.add_(1)
    if isinstance(update.invariant, ScaleInvariant):
        first = update.phi.linears[0]
        first.weight.mul_((first.in_features / 2) ** 0.5)


@balance.register
def _(update: SineUpdate, spec: NetSpec) -> None:
    balance_children(update, spec)
    scale_output(update, 1 / 30)


@balance.register
def _(layer: MessagePassingLayer, spec: NetSpec) -> None:
    balance_children(layer, spec)
    if isinstance(layer.update, MLPLayer):
        start_odd(layer.update.mlp)
    power = -0.5 if layer.aggregator == "add" else 0.5
    scale_output(layer.forward_message, num_messages(spec) ** power)
    scale_output(layer.backward_message, num_messages(spec, against=True) ** power)
    if layer.skip is not None:
        for term in (layer.skip, layer.update):
            scale_output(term, 0.5**0.5)


@balance.register
def _(readout: GraphReadout, spec: NetSpec) -> None:
    scale_output(readout.invariant_layer, sum(spec.layout[1:-1]) ** -0.5)


@balance.register
def _(readout: DeepSetReadout, spec: NetSpec) -> None:
    scale_output(readout.local_mlp, spec.num_nodes**-0.5)


# Odd starts

PAIR = (1.0, -1.0)
"""Signs of the two copies of a mirrored unit."""


def repeat_rows(rows: Tensor, signs: Sequence[Tensor | float]) -> None:
    """Rows become copies of the first of them, times one sign (or one per column) for each copy; what is left over, 0.

    Nothing happens to fewer rows than copies.
    """
    size = len(rows) // len(signs)
    if size:
        own = rows[:size].clone()
        rows.zero_()
        for index, sign in enumerate(signs):
            rows[index * size : (index + 1) * size] = sign * own


def mirror(
    first: nn.Linear, last: nn.Linear, signs: Sequence[Tensor | float] = PAIR, of: Sequence[float] = PAIR
) -> None:
    """Makes last(sigma(first(x))) a sum over copies of hidden units: `signs` of x, `of` of what the copies add.

    For (1, -1) and (1, -1): sigma(W x + b) - sigma(-W x + b), which is odd in x. b starts standard normal.
    """
    repeat_rows(first.weight, signs)
    if first.bias is not None:
        first.bias.normal_()
        repeat_rows(first.bias, [1.0] * len(signs))
    repeat_rows(last.weight.T, of)
    resize(last, len(signs) ** 0.5)


def start_odd(mlp: MLP) -> None:
    """An MLP that is at first an odd function of its input."""
    resize(mlp.linears[0])
    for first, last in pairwise(mlp.linears):
        mirror(first, last)


def zero_hidden_positions(positions: Tensor | None, spec: NetSpec) -> None:
    """Sets positional embeddings of hidden layers, between those of inputs and outputs, to 0."""
    if positions is not None:
        positions[spec.layout[0] : len(positions) - spec.layout[-1] - spec.num_places] = 0


@balance.register
def _(message: ScaleMessage, spec: NetSpec) -> None:
    balance_children(message, spec)
    if isinstance(message.net, MLPLayer):
        start_odd(message.net.mlp)


@balance.register
def _(message: ConcatMessage, spec: NetSpec) -> None:
    """Odd in the edge, and odd in the sender: sigma(e + x) + sigma(-e - x) - sigma(e - x) - sigma(-e + x)."""
    first, last = message.mlp.linears[:2]
    resize(first)
    sender = torch.ones_like(first.weight[0])
    sender[: len(sender) // 2] = -1
    mirror(first, last, (1.0, -1.0, sender, -sender), (1.0, 1.0, -1.0, -1.0))
    for inner, outer in pairwise(message.mlp.linears[1:]):
        mirror(inner, outer)
    scale_output(message, 2)  # for small e and x the sum is 4 sigma''(b) e x


@balance.register
def _(update: ConcatEdgeUpdate, spec: NetSpec) -> None:
    """Odd in the edge, and of its ends nothing."""
    first = update.phi.linears[0]
    first.weight[:, first.in_features // 3 :] = 0
    start_odd(update.phi)


# Neural graphs


@balance.register
def _(encoder: Encoder, spec: NetSpec) -> None:
    """Sines are read alone, of RMS sqrt(1/2)."""
    first, *others = cast("Sequence[nn.Linear]", encoder.linears)
    if isinstance(encoder.fourier, FourierFeatures):
        first.weight[:, : first.in_features // 2] = 0
    resize(first, 1.0 if isinstance(encoder.fourier, nn.Identity) else 2**0.5)
    for inner, outer in pairwise([first, *others]):
        mirror(inner, outer)


@balance.register
def _(features: NeuralGraphFeatures, spec: NetSpec) -> None:
    balance_children(features, spec)
    probe_linears = features.probe_linears if features.points is not None else ()
    for linear in (features.node_linear, features.edge_linear, *probe_linears):
        resize(linear)
    zero_hidden_positions(features.node_positions, spec)
    if features.activations is not None:
        features.activations.zero_()


@balance.register
def _(layer: PNALayer, spec: NetSpec) -> None:
    """Messages gamma(e_ij) * M x_i, of which only the mean is read."""
    message, dim = layer.message, layer.message.dim
    for linear in (message.edge_linear, message.linear):
        resize(linear)
    if message.modulation == "film":
        message.edge_linear.weight[dim:] = 0  # beta
        message.linear.weight[:, :dim] = 0  # of the receiver
        repeat_rows(message.linear.weight[:, dim:].T, PAIR)
        resize(message.linear)
    own, *aggregates = layer.update.weight.split(dim, dim=1)
    repeat_rows(own.T, PAIR)
    for index, columns in enumerate(aggregates):
        columns.mul_(0 if index % NUM_AGGREGATORS else 1)
    resize(layer.update)
    for mean in aggregates[::NUM_AGGREGATORS]:
        mean.mul_(num_messages(spec) ** 0.5)
    resize(layer.last)


@balance.register
def _(update: EdgeUpdate, spec: NetSpec) -> None:
    """Odd in the edge, and of its ends nothing."""
    for linear in (update.sender_linear, update.receiver_linear):
        linear.weight.zero_()
        resize(linear)
    resize(update.edge_linear)
    mirror(update.edge_linear, update.last)


def constant_features(dim: int) -> slice:
    """Those features in NG-T that are at first the same for all nodes, or for all pairs of nodes: LayerNorm, which
    divides by the size of all features, then keeps the size of the others."""
    return slice(dim - dim // 8 * 2, dim)


EDGE_SCORE = 2.0
"""What NG-T's attention gives at first to an edge whose features have RMS 1; pairs without an edge get 0."""


@balance.register
def _(attention: RelationalAttention, spec: NetSpec) -> None:
    """Nearly the mean of ue_ij * v_j over the edges: queries and keys read edges alone, by the same map, so that the
    score of an edge is the square of what they read, and of the many pairs without an edge 0."""
    of_edges = (EDGE_SCORE / attention.scale / attention.head_dim) ** 0.5
    for linear, gain in ((attention.node_linear, 0.0), (attention.edge_linear, of_edges)):
        linear.weight[:, constant_features(linear.in_features)] = 0
        resize(linear)
        heads = linear.weight.view(attention.num_heads, -1, attention.head_dim, linear.in_features)
        heads[:, :2] *= gain  # queries and keys
    heads[:, 1] = heads[:, 0]
    if heads.shape[1] == 4:
        heads[:, 2] = 0  # ve
    size, weight = num_messages(spec), math.exp(EDGE_SCORE)
    share = size * weight / (size * weight + spec.num_nodes - size)  # of edges
    resize(attention.last, size**0.5 / share)


@balance.register
def _(layer: RelationalLayer, spec: NetSpec) -> None:
    balance_children(layer, spec)
    constant = constant_features(layer.mlp_first.in_features)
    layer.mlp_first.weight[:, constant] = 0
    resize(layer.linear)
    mirror(layer.mlp_first, layer.mlp_last)
    for writes in (layer.linear, layer.mlp_last):
        writes.weight[constant] = 0


@balance.register
def _(update: RelationalEdgeUpdate, spec: NetSpec) -> None:
    """Odd in the edge and its reverse, and of its ends nothing."""
    dim = update.mlp_first.in_features
    constant = constant_features(dim)
    for linear in (update.sender_linear, update.receiver_linear):
        linear.weight.zero_()
        resize(linear)
    for reads in (*update.edge_linear.weight.split(dim, dim=1), update.mlp_first.weight):
        reads[:, constant] = 0
    for first, last in ((update.edge_linear, update.last), (update.mlp_first, update.mlp_last)):
        resize(first)
        mirror(first, last)
        last.weight[constant] = 0


# Weight spaces

TANH_GAIN = 5 / 3
"""What keeps the size of features through tanh."""


def channel_groups(dim: int) -> tuple[slice, slice, slice]:
    """Channels of weights that at first change sign with both neurons of a weight, with its receiver alone, and with
    its sender alone; the last two are even numbers."""
    size = dim // 6 * 2
    return slice(0, dim - 2 * size), slice(dim - 2 * size, dim - size), slice(dim - size, dim)


def odd_features(layer: NeuronLayer | HiddenNeuronLayer, spec: NetSpec) -> Features:
    """What `layer` reads at first, of networks with a neuron of either sign in each hidden layer: means over neurons of
    what changes sign with them are 0. Of size 1, but sqrt(n) in channels that are added up over n neurons."""
    hidden = [torch.tensor([1.0, -1.0])] * (spec.num_layers - 1)
    signs = [torch.ones(spec.layout[0]), *hidden, torch.ones(spec.layout[-1])]
    weights, biases = [], [sign[None, :, None].repeat(1, 1, layer.in_dim) for sign in signs[1:]]
    for maps, of_layer, (sender, receiver) in zip(layer.maps, spec.layers, pairwise(signs), strict=True):
        weight = (receiver[:, None] * sender)[None, ..., None].repeat(1, 1, 1, layer.in_dim)
        if "position" in cast("AffineMaps", maps).weight_maps:
            _, forward, backward = channel_groups(layer.in_dim)
            weight[..., forward] = receiver[:, None, None] * of_layer.in_dim**0.5
            weight[..., backward] = sender[:, None] * of_layer.out_dim**0.5
        weights.append(weight.repeat_interleave(math.prod(of_layer.kernel or ()), dim=-1))
    return weights, biases


def read_odd(linear: nn.Linear, features: Tensor) -> None:
    """Reads those of `odd_features` that are not 0, times their size."""
    linear.weight.normal_().mul_(features != 0)
    resize(linear, TANH_GAIN)
    linear.weight.mul_(features.abs())


@balance.register(NeuronLayer)
@balance.register(HiddenNeuronLayer)
def _(layer: NeuronLayer | HiddenNeuronLayer, spec: NetSpec) -> None:
    """Products of what is odd: P W of the first group of channels times 1, R rho and C kappa, group by group."""
    weights, biases = odd_features(layer, spec)
    inputs = layer.map_inputs(weights, biases)
    signs = [torch.ones(spec.layout[0], 1), *(bias[0, :, :1] for bias in biases)]
    for index, (maps, x, of_layer) in enumerate(zip(layer.maps, inputs, spec.layers, strict=True)):
        weight_maps, bias_maps = (
            {kind: cast("nn.Linear", linear) for kind, linear in of_kind.items()}
            for of_kind in (cast("AffineMaps", maps).weight_maps, cast("AffineMaps", maps).bias_maps)
        )
        reads = {"all": torch.zeros_like(x.all[0])}
        if x.position is not None:
            reads["position"] = (x.position * x.position[..., :1]).mean((0, 1, 2))
        for kind, features, sign in (("sender", x.sender, signs[index]), ("receiver", x.receiver, signs[index + 1])):
            if features is not None:
                reads[kind] = (sign * features).mean((0, 1))
        for kind, linear in (*weight_maps.items(), *bias_maps.items()):
            read_odd(linear, reads[kind])
        if index == spec.num_layers - 1:  # outputs have no sign
            read_odd(bias_maps["all"], x.all[0])
        if x.position is not None:
            kernel = math.prod(of_layer.kernel or ())
            edges, *messages = (slice(kernel * g.start, kernel * g.stop) for g in channel_groups(layer.out_dim))
            weight_maps["all"].bias[edges] = 1
            for kind, group in zip(("sender", "receiver"), messages, strict=True):
                weight_maps[kind].weight[: group.start] = 0
                weight_maps[kind].weight[group.stop :] = 0


@balance.register
def _(layer: UniversalLayer, spec: NetSpec) -> None:
    """As of NFN's layers; what is added to diagonals starts at 0."""
    features = odd_blocks(layer)
    of_class, g = layer.vectors(features)
    maps = iter(cast("Sequence[nn.Linear]", layer.of_vectors))
    for place, (block, reads) in enumerate(zip(layer.blocks, layer.reads, strict=True)):
        of_globals, of_vectors = cast("nn.Linear", layer.of_globals[place]), [next(maps) for _ in reads]
        read_odd(of_globals, torch.zeros_like(g[0]) if block.axes else g[0])  # outputs have no sign
        for linear, index in zip(of_vectors, block.axes, strict=False):
            read_odd(linear, (SIGNS[:, None] * of_class[index][0]).mean(0))
        for linear in of_vectors[len(block.axes) :]:
            linear.weight.zero_()
        if len(block.axes) == 2:
            alike = SIGNS[:, None, None] * SIGNS[:, None] * layer.alike_features(place, features)[0]
            read_odd(cast("nn.Linear", layer.alike_maps[str(place)]), alike.mean((0, 1)))
            edges, forward, backward = channel_groups(layer.out_dim)
            of_globals.bias.view(-1, layer.out_dim)[: block.width, edges] = 1
            for linear, group in zip(of_vectors, (backward, forward), strict=False):
                of_channels = linear.weight.view(block.width, layer.out_dim, -1)
                of_channels[:, : group.start] = 0
                of_channels[:, group.stop :] = 0


SIGNS = torch.tensor([1.0, -1.0])
"""Of the two neurons of each class in `odd_blocks`."""


def odd_blocks(layer: UniversalLayer) -> list[Tensor]:
    """The features of `odd_features` in blocks, of networks with two neurons of each class."""
    features = []
    for block in layer.blocks:
        x = torch.ones(layer.in_dim)
        if len(block.axes) == 1:
            x = SIGNS[:, None] * x
        elif block.axes:
            assert block.columns is not None
            x = SIGNS[:, None, None] * SIGNS[:, None] * x
            _, forward, backward = channel_groups(layer.in_dim)
            x[..., forward] = SIGNS[:, None, None] * (block.columns.stop - block.columns.start) ** 0.5
            x[..., backward] = SIGNS[:, None] * (block.rows.stop - block.rows.start) ** 0.5
        features.append(x.repeat(*[1] * len(block.axes), block.width)[None])
    return features
