"""Group elements that act on parameters and on features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from scalegmn.networks import ACTIVATIONS, HETERO, CoupledChannels, LayerSpec, NetParams, NetSpec, linear_products
from scalegmn.networks.heads import Axis, tie_scalars
from scalegmn.networks.scalar_groups import TRIVIAL, ScalarGroup, random_scalars


@dataclass(frozen=True, eq=False)
class GroupElement:
    """One element g = (P_l, q_l) per network and hidden layer l = 1..L-1.

    W_l -> P_l diag(q_l) W_l diag(chi(q_{l-1}))^-1 P_{l-1}^T,   b_l -> P_l diag(q_l) b_l,   P and q trivial at 0 and L.
    chi is that of the activation, `ScalarGroup.outgoing`; most often chi(q) = q. The function is unchanged when
    sigma_l(q_l z) = chi(q_l) sigma_l(z) (ScaleGMN, section 3) and neurons that residual connections, normalisation and
    attention couple move together (`NetSpec.permutation_classes`, `NetSpec.scaling_classes`). A batch norm's
    statistics are those of what it reads: mean -> chi mean, variance + epsilon -> chi^2 (variance + epsilon).

    Attributes:
        permutations: per hidden layer [B, n_l] long; new neuron i is old neuron `permutations[l][b, i]`.
        scales: q, per hidden layer [B, n_l], non-zero, indexed by the old neuron.
    """

    permutations: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    @classmethod
    def sample(
        cls,
        params: NetParams,
        generator: torch.Generator | None = None,
        permute: bool = True,
        scale: bool = True,
        decades: float = 1.0,
    ) -> GroupElement:
        """A random element of the group that each network's activations admit.

        Coupled neurons move together. Permutations of a class's channels (of each block's channels, and of its
        blocks) are redrawn until they are not the identity (where there are two). Scalars are +-1 where signs are
        allowed, times 10**u, u uniform in [-decades, decades], where scales are.
        """
        spec, num_networks, reference = params.spec, len(params), params.biases[0]
        hidden = [layer.out_dim for layer in spec.layers[:-1]]
        permutations = [_identity((num_networks, size)) for size in hidden]
        if permute:
            permutations = _sample_permutations(spec, num_networks, generator)
        scales = [torch.ones(num_networks, size, dtype=torch.float64) for size in hidden]
        for coupled in spec.scaling_classes if scale else ():
            draws = random_scalars((num_networks, coupled.num_channels), generator, decades)
            q = by_group(params, coupled, partial(ScalarGroup.project, q=draws))
            for layer in coupled.layers:
                scales[layer][:, coupled.channels] = q
        tie_scalars(spec, scales)
        return cls(
            tuple(permutation.to(reference.device) for permutation in permutations),
            tuple(q.to(reference) for q in scales),
        )

    def compose(self, first: GroupElement) -> GroupElement:
        """The element that acts as `first`, then as `self`."""
        permutations, scales = [], []
        for p2, q2, p1, q1 in zip(self.permutations, self.scales, first.permutations, first.scales, strict=True):
            permutations.append(p1.gather(1, p2))
            scales.append(q1 * q2.gather(1, p1.argsort(1)))
        return GroupElement(tuple(permutations), tuple(scales))

    def inverse(self) -> GroupElement:
        """The element that undoes this one."""
        return GroupElement(
            tuple(p.argsort(1) for p in self.permutations),
            tuple(1 / q.gather(1, p) for p, q in zip(self.permutations, self.scales, strict=True)),
        )

    def contravariant(self) -> GroupElement:
        """The element that acts on gradients (`act_on_changes`, `act_on_nodes`, `act_on_edges`) when this one acts on
        parameters: the same permutations, and 1 / q, where chi(q) = q."""
        return GroupElement(self.permutations, tuple(1 / q for q in self.scales))

    def act(self, params: NetParams) -> NetParams:
        """The transformed parameters: biases act as node features, weights as edge features."""
        return self._act(params, [layer.epsilon for layer in params.spec.layers])

    def act_on_changes(self, changes: NetParams) -> NetParams:
        """Changes of parameters, transformed along, by the derivative of `act`."""
        return self._act(changes, [0.0] * changes.spec.num_layers)

    def _act(self, params: NetParams, epsilons: Sequence[float]) -> NetParams:
        """`act`, with what each layer adds to a variance."""
        spec, outgoing = params.spec, self.outgoing(params.spec, params.activation)
        weights, biases, statistics = [], [], list(params.statistics or ())
        for index, (weight, bias) in enumerate(zip(params.weights, params.biases, strict=True)):
            layer, reads = spec.layers[index], spec.sender(index)
            sender = None if reads < 0 else outgoing[reads]
            moments = statistics[index] if statistics else None
            if moments is not None:  # they follow what is read, so that the weight follows its sign alone
                q = torch.ones_like(bias) if sender is None else sender
                mean, variance = (moments * torch.stack([q, q * q], 1)).unbind(1)
                variance = variance + epsilons[index] * (q * q - 1)
                statistics[index] = self._permuted(torch.stack([mean, variance], 2), index).transpose(1, 2)
                sender = q.sign()
            block = weight.flatten(3) if layer.kernel else weight[..., None]
            weights.append(self._act_on_block(block, spec, index, sender).reshape(weight.shape))
            biases.append(self._act_on_layer(bias[..., None], index)[..., 0])
        return params.replace(weights=tuple(weights), biases=tuple(biases), statistics=tuple(statistics) or None)

    def act_on_nodes(self, nodes: Sequence[Tensor], spec: NetSpec) -> list[Tensor]:
        """x_i -> q_i x_i and permuted; `nodes` per node layer: [B, n_l, D]. Inputs and outputs stay."""
        moved = list(nodes)
        for index, (_, place) in enumerate(spec.node_layers):
            moved[place] = self._act_on_layer(nodes[place], index)
        return moved

    def act_on_edges(self, edges: Sequence[Tensor], spec: NetSpec, activation: Tensor | None = None) -> list[Tensor]:
        """e_ij -> (q_i / chi(q_j)) e_ij and permuted.

        Args:
            edges: per block, [B, n_l, n_{l-1} / groups, D].
            spec: the networks.
            activation: as in `NetParams`.
        """
        outgoing = self.outgoing(spec, activation)
        senders = [spec.sender(index) for index in range(spec.num_layers)]
        return [
            self._act_on_block(block, spec, index, outgoing[reads] if reads >= 0 else None)
            for index, (block, reads) in enumerate(zip(edges, senders, strict=True))
        ]

    def outgoing(self, spec: NetSpec, activation: Tensor | None = None) -> list[Tensor]:
        """chi(q) per hidden layer, [B, n_l], by which outgoing weights are divided.

        Args:
            spec: the networks.
            activation: as in `NetParams`.
        """
        return [outgoing_scalars(q, spec, layer, activation) for layer, q in enumerate(self.scales)]

    def _act_on_layer(self, x: Tensor, layer: int) -> Tensor:
        """Features of a layer's neurons, [B, n_l, D]; outputs stay."""
        return self._permuted(x * self.scales[layer][..., None], layer) if layer < len(self.scales) else x

    def _permuted(self, x: Tensor, layer: int) -> Tensor:
        """[B, n_l, ...] with a layer's neurons in their new order; outputs stay."""
        if layer == len(self.permutations):
            return x
        if len(x) == 1:
            return _selected(x[0], 0, self.permutations[layer][0])[None]
        p = self.permutations[layer].reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        return x.gather(1, p.expand_as(x))

    def _act_on_block(self, block: Tensor, spec: NetSpec, index: int, sender: Tensor | None) -> Tensor:
        """Features of a layer's edges, [B, n_l, n_{l-1} / groups, D], divided by `sender` [B, n_{l-1}]."""
        layer, reads = spec.layers[index], spec.sender(index)
        has_scalars = not layer.linear and index not in spec.repeated_layers  # else q_i = q_j
        divisor = by_receiver(sender, layer)[..., None] if sender is not None and has_scalars else None
        if self.scales:
            block = block.to(torch.promote_types(block.dtype, self.scales[0].dtype))
        if index < len(self.scales):
            block = self._permuted(block, index)
            if divisor is not None and layer.groups > 1:
                divisor = self._permuted(divisor, index)
        if reads >= 0:
            block = self._senders_permuted(block, layer, reads)
            if divisor is not None:
                block = block.div_(self._senders_permuted(divisor, layer, reads))  # new memory takes longer
        if index < len(self.scales) and has_scalars:
            block = block.mul_(self._permuted(self.scales[index], index)[:, :, None, None])
        return block

    def _senders_permuted(self, block: Tensor, layer: LayerSpec, reads: int) -> Tensor:
        """[B, 1 or n_l, n_{l-1} / groups, D] with the neurons that a layer reads in their new order."""
        if layer.groups == 1 and len(block) == 1:
            return _selected(block[0], 1, self.permutations[reads][0])[None]
        order = by_receiver(self.permutations[reads] % block.shape[2], layer)  # within the group
        return block.gather(2, order[..., None].expand_as(block))


def _selected(x: Tensor, axis: int, order: Tensor) -> Tensor:
    """`index_select` along an axis of a tensor or, as this is much faster, of a view of it: without a last axis of size
    1, or of a transposed matrix as it lies in memory."""
    if x.ndim > 2 and x.shape[-1] == 1:
        return _selected(x[..., 0], axis, order)[..., None]
    if x.ndim == 2 and x.stride(0) < x.stride(1):
        return x.T.index_select(1 - axis, order).T
    return x.index_select(axis, order)


def outgoing_scalars(q: Tensor, spec: NetSpec, layer: int, activation: Tensor | None = None) -> Tensor:
    """chi(q) of a layer's neurons, of the shape of q.

    Args:
        q: [B, n].
        spec: the networks.
        layer: counted from 0.
        activation: as in `NetParams`.

    Raises:
        ValueError: networks differ in their activation, which is not given.
    """
    name = spec.layers[layer].activation
    if name != HETERO:
        return ACTIVATIONS[name].group.outgoing(q)
    if activation is None:
        raise ValueError(f"activation: missing, expected [{len(q)}] indices of networks that differ in it")
    result = q
    for index, group in enumerate(ACTIVATIONS[name].group for name in spec.activations):
        if not group.preserves_scalars:
            result = torch.where(torch.eq(activation, index)[:, None], group.outgoing(q), result)
    return result


def by_group(params: NetParams, coupled: CoupledChannels, fn: Callable[[ScalarGroup], Tensor]) -> Tensor:
    """`fn` [B, n] of the scalar group that a class of neurons has; row by row where networks differ in it."""
    spec, group = params.spec, params.spec.class_symmetry(coupled)
    if group != HETERO:
        return fn(group)
    assert params.activation is not None
    groups = [spec.class_symmetry(coupled, name) for name in spec.activations]
    result = fn(TRIVIAL)
    for group in dict.fromkeys(groups):
        has_group = torch.tensor([other == group for other in groups], device=params.activation.device)
        assert group != HETERO
        result = torch.where(has_group[params.activation].to(result.device)[:, None], fn(group), result)
    return result


def by_receiver(senders: Tensor, layer: LayerSpec) -> Tensor:
    """[B, n_{l-1}] of the channels that a layer reads, by neuron: [B, 1 or n_l, n_{l-1} / groups]."""
    if layer.groups == 1:
        return senders[:, None]
    in_groups = senders.reshape(len(senders), layer.groups, -1)
    return in_groups.repeat_interleave(layer.out_dim // layer.groups, dim=1)


@dataclass(frozen=True, eq=False)
class PhaseShift:
    """Whole half-turns of sine neurons: b -> b + k pi / w0, outgoing weights times (-1)^k.

    The function is unchanged, since sin(z + k pi) = (-1)^k sin(z), if no residual connection reads the neuron.

    Attributes:
        turns: per hidden layer, k [B, n_l]; 0 where the activation is not a sine or a residual connection reads it.
    """

    turns: tuple[Tensor, ...]

    @classmethod
    def sample(cls, params: NetParams, generator: torch.Generator | None = None, largest: int = 3) -> PhaseShift:
        """k uniform in [-largest, largest] for the sine neurons of each network."""
        turns = []
        for layer, bias in zip(params.spec.layers[:-1], params.biases, strict=False):
            k = torch.randint(-largest, largest + 1, bias.shape, generator=generator).to(bias)
            if layer.activation == HETERO:
                k = k * is_sine(params)[:, None]
            elif layer.activation != "sine":
                k = torch.zeros_like(k)
            turns.append(k)
        return cls(tuple(without_residual_turns(params.spec, turns)))

    def inverse(self) -> PhaseShift:
        """The element that undoes this one."""
        return PhaseShift(tuple(-k for k in self.turns))

    def act(self, params: NetParams) -> NetParams:
        """The transformed parameters."""
        moved = self.act_on_changes(params)
        shifted = (
            bias + k * (math.pi / layer.w0)
            for layer, bias, k in zip(params.spec.layers[:-1], params.biases[:-1], self.turns, strict=True)
        )
        return moved.replace(biases=(*shifted, params.biases[-1]))

    def act_on_changes(self, changes: NetParams) -> NetParams:
        """Changes of parameters, transformed along: outgoing weights times (-1)^k; biases are only shifted."""
        weights, spec = list(changes.weights), changes.spec
        for index, layer in enumerate(spec.layers):
            if spec.sender(index) >= 0:
                parity = by_receiver(1 - 2 * self.turns[spec.sender(index)].remainder(2), layer)
                weights[index] = weights[index] * parity.reshape(*parity.shape, *[1] * (weights[index].ndim - 3))
        return changes.replace(weights=tuple(weights))


@dataclass(frozen=True, eq=False)
class BasisChange:
    """Other bases of the neurons between linear layers: W -> G W, b -> G b, and outgoing weights W -> W G^-1.

    The function of a network of linear layers alone is unchanged (`linear_products`). Permutations and scalars of such
    neurons are elements of this group, the general linear one.

    Attributes:
        bases: per hidden layer G, [B, n_l, n_l]; the identity where neurons have no other basis.
        inverses: G^-1.
    """

    bases: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]

    @classmethod
    def sample(cls, params: NetParams, generator: torch.Generator | None = None, decades: float = 0.5) -> BasisChange:
        """G = Q diag(s) R, with orthogonal Q and R, and s as of `random_scalars`; the identity in networks with other
        than linear layers."""
        spec = params.spec
        inner = {layer for product in linear_products(spec) for layer in product[:-1]}
        bases, inverses = [], []
        for layer, bias in enumerate(params.biases[:-1]):
            basis = inverse = torch.eye(bias.shape[1], dtype=torch.float64).expand(len(bias), -1, -1)
            if layer in inner:
                shape = (2, *basis.shape)
                q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
                s = random_scalars((len(bias), 1, bias.shape[1]), generator, decades)
                basis, inverse = q * s @ r.mT, r / s @ q.mT
            bases.append(basis.to(bias))
            inverses.append(inverse.to(bias))
        return cls(tuple(bases), tuple(inverses))

    def inverse(self) -> BasisChange:
        """The element that undoes this one."""
        return BasisChange(self.inverses, self.bases)

    def act(self, params: NetParams) -> NetParams:
        """The transformed parameters."""
        weights, biases, spec = list(params.weights), list(params.biases), params.spec
        for product in linear_products(spec):
            for layer, reader in pairwise(product):
                weights[layer] = self.bases[layer] @ weights[layer]
                biases[layer] = (self.bases[layer] @ biases[layer][..., None])[..., 0]
                weights[reader] = weights[reader] @ self.inverses[layer]
        return params.replace(weights=tuple(weights), biases=tuple(biases))

    def act_on_changes(self, changes: NetParams) -> NetParams:
        """Changes of parameters, transformed along: `act` is linear."""
        return self.act(changes)


def is_sine(params: NetParams) -> Tensor:
    """[B] bool, the networks whose activation is the sine, where networks differ in it."""
    assert params.activation is not None
    return torch.eq(params.activation, params.spec.activations.index("sine"))


def without_residual_turns(spec: NetSpec, turns: list[Tensor]) -> list[Tensor]:
    """Half-turns per hidden layer; none where something else than weights reads the neuron, where the maximum of its
    values is read, of pinned neurons, without a bias, where no scalar commutes with what reads the neuron, and where a
    residual connection is added after the activation."""
    for source, receiver, channels in spec.residuals:
        for layer in {source} | ({receiver} if spec.layers[receiver].residual_after else set()):
            if layer in range(len(turns)):
                turns[layer][:, :channels] = 0
    for index, layer in enumerate(spec.layers):
        is_bound = layer.maximum or layer.pinned or layer.unscaled or not layer.bias
        if is_bound and index < len(turns):
            turns[index].zero_()
        is_read = layer.norm or layer.linear or (layer.attention and not layer.affine)
        for reads in (*(layer.attention or ())[:2], *([spec.sender(index)] if is_read else [])):
            if reads >= 0:
                turns[reads].zero_()
    return turns


def _sample_permutations(spec: NetSpec, num_networks: int, generator: torch.Generator | None) -> list[Tensor]:
    """Per hidden layer [B, n_l], random permutations of the channels of each class."""
    permutations = [_identity((num_networks, layer.out_dim)) for layer in spec.layers[:-1]]
    orders: dict[int, Tensor] = {}
    within: dict[int, Tensor] = {}  # axis -> [B, blocks, its size]
    for place, coupled in enumerate(spec.permutation_classes):
        num_blocks, key = coupled.num_blocks, spec.block_order[coupled.layers[0]]
        size = coupled.num_channels // num_blocks
        order = _identity((num_networks, num_blocks))
        if num_blocks > 1 and key >= 0:
            if key not in orders:
                orders[key] = _permutation((num_networks, num_blocks), generator)
            order = orders[key]
        permutation = order
        for axis in coupled.axes or (Axis(-2 - place, size),):
            if axis.number not in within or axis.number == -1:
                within[axis.number] = _within_blocks(axis, (num_networks, num_blocks), generator)
            moved = within[axis.number].reshape(num_networks, num_blocks, *[1] * (permutation.ndim - 2), axis.size)
            permutation = permutation[..., None] * axis.size + moved
        permutation = permutation.flatten(1)
        for layer in coupled.layers:
            permutations[layer][:, coupled.channels] = coupled.channels.start + permutation
    return permutations


def _within_blocks(axis: Axis, blocks: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """[B, blocks, n], permutations of the channels along an axis within each block."""
    order = torch.arange(axis.size).repeat(*blocks, 1)
    free = torch.tensor([not fixed for fixed in axis.fixed or (False,) * axis.size])
    if axis.number != -1 and int(free.sum()):
        drawn = _permutation((blocks[0] * blocks[1], int(free.sum())), generator)
        order[..., free] = order[..., free].flatten(0, 1).gather(1, drawn).reshape(*blocks, -1)
    return order


def _identity(shape: tuple[int, int]) -> Tensor:
    """[B, n] identity permutations."""
    return torch.arange(shape[1]).expand(shape).contiguous()


def _permutation(shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
    """[B, n] random permutations, none the identity unless n = 1."""
    identity = _identity(shape)
    permutation = torch.rand(shape, generator=generator).argsort(1)
    if shape[1] > 1:
        while (same := (permutation == identity).all(1)).any():
            redrawn = torch.rand(int(same.sum()), shape[1], generator=generator).argsort(1)
            permutation[same] = redrawn
    return permutation
