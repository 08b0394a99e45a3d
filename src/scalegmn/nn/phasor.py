"""Features of sine neurons by character: how they change when the neuron's sign and phase do.

A sine neuron s = sin(w0 (W x + b)) of angle theta = w0 b has a symmetry for each q = +-1 and each integer k, the
half-turns: (W, b) -> (q W, q b + k pi / w0), outgoing weights times q (-1)^k, for sin(q z + k pi) = q (-1)^k sin z.
Together they are the infinite dihedral group, which acts on the line of angles: theta -> q theta + k pi. Its harmonics
change by factors:

    cos theta -> (-1)^k cos theta      sin theta -> q (-1)^k sin theta
    cos 2 theta -> cos 2 theta         sin 2 theta -> q sin 2 theta

The factors are the four characters q^a (-1)^(k c), a, c in {0, 1}. Exponents of products are added, modulo 2: the
product of features of two characters other than 1 has the third one, that of a feature with itself is invariant.

Shape letters: B networks, n neurons, d features. Graded features of a layer are [4, B, n, d], in the order of
`INVARIANT, SIGN, PHASE, BOTH`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from scalegmn.nn.mlp import MLP

INVARIANT, SIGN, PHASE, BOTH = range(4)
"""The characters 1, q, (-1)^k and q (-1)^k. Incoming weights of a neuron have the second, outgoing ones the last."""

NUM_CHARACTERS = 4


def harmonics(angles: Tensor) -> Tensor:
    """cos 2 theta, sin 2 theta, cos theta and sin theta, each of its own character; [B, n] -> [4, B, n]."""
    return torch.stack([(2 * angles).cos(), (2 * angles).sin(), angles.cos(), angles.sin()])


class GradedLinear(nn.Module):
    """x_c -> A_c x_c for each character c, and + bias for invariant features alone.

    Args:
        in_dim: width of x_c.
        out_dim: width of the result.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        bound = math.sqrt(3 / in_dim)  # features keep their size
        self.weight = nn.Parameter(torch.empty(NUM_CHARACTERS, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[4, B, n, in_dim] -> [4, B, n, out_dim]."""
        y = torch.matmul(x.flatten(1, 2), self.weight).unflatten(1, x.shape[1:3])
        return torch.cat([y[:1] + self.bias, y[1:]])


def products(x: Tensor) -> Tensor:
    """Products of each character: (x_s^2 + x_p^2 + x_b^2) / 3, x_p x_b, x_s x_b, x_s x_p.

    [4, B, n, d] -> [4, B, n, d].
    """
    s, p, b = x[SIGN], x[PHASE], x[BOTH]
    return torch.stack([(s * s + p * p + b * b) / 3, p * b, s * b, s * p])


def invariants(x: Tensor) -> Tensor:
    """Invariant features, and the squares of the others; [4, B, n, d] -> [B, n, 4 d]."""
    return torch.cat([x[INVARIANT], *x[SIGN:].square()], dim=-1)


class PhasorLayer(nn.Module):
    """One round of messages along the weights, in both directions, and an update of all neurons.

    For neuron i of layer l, w the weights of layers l (below) and l + 1 (above), n the neurons of the layer that sends:

        below   m_s = sum_j w_ij x_b,j / sqrt(n)       m_1 = sum_j w_ij^2 x_1,j / n
        above   u_b = sum_k w_ki x_s,k / sqrt(n)       u_1 = sum_k w_ki^2 x_1,k / n
        h_c = rms_norm(A_c [x_c, m_c, u_c])            h' = h + B products(h)
        (x_1, f) = MLP([h'_1, h'_s^2, h'_p^2, h'_b^2]) x_c' = x_c + f_c h'_c,  x_1' = x_1 + f_1

    Index 1, s, p, b: invariant, sign, phase, both. Terms that are not named are 0. A weight into i has the character s
    of i, a weight out of j the character b of j, so each product above has a single character of its receiver, and none
    of its sender.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = GradedLinear(3 * dim, dim)
        self.multiply = GradedLinear(dim, dim)
        self.factors = MLP(4 * dim, (2 * dim,), 4 * dim)

    def forward(self, nodes: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Graded features per layer of nodes 0..L, [4, B, n_l, d] -> the same.

        Args:
            nodes: graded features.
            weights: per layer 1..L, [B, n_l, n_{l-1}].
        """
        received = [[x.new_zeros(x.shape), x.new_zeros(x.shape)] for x in nodes]
        for index, weight in enumerate(weights):
            below, above = nodes[index], nodes[index + 1]
            received[index + 1][0] = _messages(weight, below[BOTH], below[INVARIANT], SIGN)
            received[index][1] = _messages(weight.mT, above[SIGN], above[INVARIANT], BOTH)
        return [self.update(x, torch.cat([x, *messages], -1)) for x, messages in zip(nodes, received, strict=True)]

    def update(self, x: Tensor, read: Tensor) -> Tensor:
        """x' of x, [4, B, n, d], and of x, m and u side by side, [4, B, n, 3 d]."""
        h = rms_norm(self.mix(read), (x.shape[-1],), eps=1e-6)
        h = h + self.multiply(products(h))
        factors = self.factors(invariants(h)).unflatten(-1, (NUM_CHARACTERS, -1)).movedim(-2, 0)
        return x + torch.cat([factors[:1], factors[1:] * h[1:]])


def _messages(weight: Tensor, odd: Tensor, even: Tensor, character: int) -> Tensor:
    """Messages of one direction, [4, B, n, d]: sum w x / sqrt(n), of a character, and sum w^2 x / n, invariant.

    Args:
        weight: [B, n, senders].
        odd: features of the senders that w is multiplied by, [B, senders, d].
        even: those that w^2 is.
        character: of the first sum.
    """
    count = weight.shape[2]
    messages = [torch.zeros_like(even[:, :1]).expand(-1, weight.shape[1], -1)] * NUM_CHARACTERS
    messages[INVARIANT] = weight.square() @ even / count
    messages[character] = weight @ odd / math.sqrt(count)
    return torch.stack(messages)
