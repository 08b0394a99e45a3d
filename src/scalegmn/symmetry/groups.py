"""Group elements that act on parameters and on features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalegmn.spec import ACTIVATIONS, MIXED, NetParams


@dataclass(frozen=True)
class GroupElement:
    """One element g = (P_l, q_l) per network and hidden layer l = 1..L-1.

    W_l -> P_l diag(q_l) W_l diag(q_{l-1})^-1 P_{l-1}^T,   b_l -> P_l diag(q_l) b_l,   P and q trivial at 0 and L.
    The function is unchanged when sigma_l commutes with q_l (ScaleGMN, section 3) and neurons that residual connections
    tie move together (`NetSpec.ties`).

    Attributes:
        permutations: per hidden layer [B, n_l] long; new neuron i is old neuron `permutations[l][b, i]`.
        scales: per hidden layer [B, n_l], non-zero, indexed by the old neuron.
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
        """A random element of the group that each network's own activations admit.

        Neurons that are tied move together. Permutations of a tie's channels are redrawn until they are not the
        identity (where there are two channels). Scalars are +-1 for odd activations and 10**u, u uniform in
        [-decades, decades], for homogeneous ones.
        """
        spec = params.spec
        permutations = [_identity((len(params), size)) for size in spec.layout[1:-1]]
        scales = [torch.ones(p.shape).double() for p in permutations]
        for tie in spec.ties:
            channels = tie.channels
            shape = (len(params), channels.stop - channels.start)
            permutation = _permutation(shape, generator) if permute else _identity(shape)
            signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
            powers = torch.exp(math.log(10) * decades * (torch.rand(shape, generator=generator).double() * 2 - 1))
            choices = {"sign": signs, "scale": powers, "permutation": torch.ones(shape).double()}
            kind = spec.tie_symmetry(tie) if scale else "permutation"
            if kind == MIXED:
                own = [spec.tie_symmetry(tie, ACTIVATIONS[index]) for index in params.activation.tolist()]
                factors = torch.stack([choices[kind][row] for row, kind in enumerate(own)])
            else:
                factors = choices[kind]
            for layer in tie.layers:
                permutations[layer][:, channels] = channels.start + permutation
                scales[layer][:, channels] = factors
        reference = params.biases[0]
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

    def act(self, params: NetParams) -> NetParams:
        """The transformed parameters: biases act as node features, weights as edge features."""
        biases = [b[..., None] for b in params.biases]
        nodes = self.act_on_nodes([biases[0].new_zeros(len(params), params.spec.layout[0], 1), *biases])
        edges = self.act_on_edges([w.flatten(3) if w.ndim == 5 else w[..., None] for w in params.weights])
        weights = tuple(block.reshape(w.shape) for block, w in zip(edges, params.weights, strict=True))
        return NetParams(params.spec, weights, tuple(b[..., 0] for b in nodes[1:]), params.activation)

    def act_on_changes(self, changes: NetParams) -> NetParams:
        """Changes of parameters, transformed along: the action is linear."""
        return self.act(changes)

    def act_on_nodes(self, nodes: Sequence[Tensor]) -> list[Tensor]:
        """x_i -> q_i x_i and permuted; `nodes` per node layer 0..L: [B, n_l, D]. Inputs and outputs stay."""
        hidden = (
            torch.take_along_dim(x * q[..., None], p[..., None], dim=1)
            for x, p, q in zip(nodes[1:-1], self.permutations, self.scales, strict=True)
        )
        return [nodes[0], *hidden, nodes[-1]]

    def act_on_edges(self, edges: Sequence[Tensor]) -> list[Tensor]:
        """e_ij -> (q_i / q_j) e_ij and permuted; `edges` per block: [B, n_l, n_{l-1}, D]."""
        moved = []
        for index, block in enumerate(edges):
            if index < len(edges) - 1:  # receivers are hidden
                p, q = self.permutations[index], self.scales[index]
                block = torch.take_along_dim(block * q[:, :, None, None], p[:, :, None, None], dim=1)
            if index > 0:  # senders are hidden
                p, q = self.permutations[index - 1], self.scales[index - 1]
                block = torch.take_along_dim(block / q[:, None, :, None], p[:, None, :, None], dim=2)
            moved.append(block)
        return moved


@dataclass(frozen=True)
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
            if layer.activation == MIXED:
                k = k * (params.activation == ACTIVATIONS.index("sine"))[:, None]
            elif layer.activation != "sine":
                k = torch.zeros_like(k)
            turns.append(k)
        for source, _, channels in params.spec.residuals:
            turns[source][:, :channels] = 0
        return cls(tuple(turns))

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
        return NetParams(params.spec, moved.weights, (*shifted, params.biases[-1]), params.activation)

    def act_on_changes(self, changes: NetParams) -> NetParams:
        """Changes of parameters, transformed along: outgoing weights times (-1)^k; biases are only shifted."""
        weights = list(changes.weights)
        for index, k in enumerate(self.turns, start=1):
            parity = 1 - 2 * k.remainder(2)
            weights[index] = weights[index] * parity.reshape(len(changes), 1, -1, *[1] * (weights[index].ndim - 3))
        return NetParams(changes.spec, tuple(weights), changes.biases, changes.activation)


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
