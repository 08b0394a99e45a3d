"""Monomial-NFN (Tran et al., NeurIPS 2024): NFN's layers that also keep the signs or scales of neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.heads import changes_by_head
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.weight_space import Features


@dataclass(frozen=True)
class MonomialNFNConfig(ModelConfig):
    """Monomial-NFN: NFN's layers for permutations with signs (tanh, sine) or positive scales (relu) of neurons."""

    name = "monomial_nfn"

    hidden_dims: tuple[int, ...] = (64, 64, 64)
    """Channels after each layer; with output parameters, one more layer follows."""

    readout_dim: int = 256
    """For vectors: width of the readout's two hidden layers."""

    readout_dropout: float = 0.0
    """After each of them."""

    def __post_init__(self) -> None:
        problems = self.wrong_choices() + self.wrong_numbers(["out_dim", "readout_dim"], ["readout_dropout"])
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            problems.append(f"hidden_dims: found {list(self.hidden_dims)}, expected one or more positive widths")
        self.refuse(problems)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations of hidden neurons, and the signs or scales that their activation admits."""
        return frozenset({"permutation", "sign", "scale"})

    def build(self, spec: NetSpec) -> MonomialNFN:
        """The model for networks of `spec`."""
        return MonomialNFN(self, spec)


METANETWORKS.register(MonomialNFNConfig.name, MonomialNFNConfig)


class MonomialLayer(nn.Module):
    """All affine maps that are equivariant to permutations and scalars of hidden neurons (Tran et al., section 4).

    A hidden neuron's scalar q_i multiplies W_l[i] and b_l[i] and divides W_{l+1}[:, i], so that the sums over neurons
    of NFN's layers are not allowed. What remains are linear maps of what has the same scalar, and a constant in b_L':

        [W_1'[i], b_1'[i]] = A_1 [W_1[i], b_1[i]]           all inputs together
        W_l'[i, j] = A_l W_l[i, j],  b_l'[i] = B_l b_l[i]    1 < l < L
        W_L'[:, j] = A_L W_L[:, j],  b_L' = B_L b_L + c      all outputs together

    Signs are their own inverses: of these A_L also reads and writes b_{L-1}[j], and for L = 2 is one with A_1.

    Args:
        layout: n = (n_0, ..., n_L), L > 1.
        kernels: F_1..F_L, kernel values.
        signs: whether scalars are signs, rather than positive numbers.
        in_dim: channels.
        out_dim: channels of the result.
    """

    def __init__(self, layout: Sequence[int], kernels: Sequence[int], signs: bool, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.num_inputs, self.num_outputs, self.signs = layout[0], layout[-1], signs
        self.in_dim, self.out_dim = in_dim, out_dim
        first, last, num_between = layout[0] * kernels[0] + 1, layout[-1] * kernels[-1], len(kernels) - 2
        joined = signs and not num_between
        num_biases = max(num_between - 1, 0) if signs else num_between
        self.first = _linear(in_dim * (first + last * joined), out_dim * (first + last * joined))
        self.last = None
        if not joined:
            width = last + signs
            self.last = _linear(in_dim * width, out_dim * width)
        self.weights = nn.ModuleList(_linear(in_dim * f, out_dim * f) for f in kernels[1:-1])
        self.biases = nn.ModuleList(_linear(in_dim, out_dim) for _ in range(num_biases))
        self.last_bias = _linear(in_dim * layout[-1], out_dim * layout[-1], bias=True)

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """Weights [B, n_l, n_{l-1}, c F_l] and biases [B, n_l, c] -> the same with c'."""
        rows = [weights[0].flatten(2), biases[0]]
        columns = [weights[-1].transpose(1, 2).flatten(2)]
        if self.last is None:
            *rows, column = self._mixed(self.first, [*rows, *columns])
            last_hidden = []
        else:
            rows = self._mixed(self.first, rows)
            column, *last_hidden = self._mixed(self.last, [*columns, *([biases[-2]] if self.signs else [])])
        inner = biases[1 : 1 + len(self.biases)]
        last_bias = self.last_bias(biases[-1].flatten(1)).unflatten(-1, (self.num_outputs, -1))
        return (
            [
                rows[0].unflatten(-1, (self.num_inputs, -1)),
                *(linear(w) for linear, w in zip(self.weights, weights[1:-1], strict=True)),
                column.unflatten(-1, (self.num_outputs, -1)).transpose(1, 2),
            ],
            [rows[1], *(linear(b) for linear, b in zip(self.biases, inner, strict=True)), *last_hidden, last_bias],
        )

    def _mixed(self, linear: nn.Linear, parts: Sequence[Tensor]) -> list[Tensor]:
        """A linear map of parts [B, n, c k] together, cut into parts [B, n, c' k]."""
        widths = [part.shape[-1] // self.in_dim * self.out_dim for part in parts]
        return list(linear(torch.cat(list(parts), -1)).split(widths, -1))


def rescaled(features: Features, scalars: Sequence[Tensor]) -> Features:
    """Scalars q_i of hidden neurons act on features, per channel: q_i W_l[i], q_i b_l[i] and W_{l+1}[:, i] / q_i.

    Args:
        features: as `MonomialLayer` returns them.
        scalars: per hidden layer [B, n_l, c].
    """
    weights, biases = (list(tensors) for tensors in features)
    for index, q in enumerate(scalars):
        biases[index] = biases[index] * q
        for place, factor in ((index, q[:, :, None, None]), (index + 1, 1 / q[:, None, :, None])):
            weights[place] = (weights[place].unflatten(-1, (-1, q.shape[-1])) * factor).flatten(3)
    return weights, biases


def path_norms(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """How large what comes to each neuron, and what leaves it, can be; of hidden layers 1..L-1, [B, n_l] each.

        in_i^2  = b_i^2 + mean over j of w_ij^2 in_j^2       in = 1 of inputs
        out_j^2 = mean over i of w_ij^2 out_i^2              out = 1 of outputs

    w_ij^2 of a kernel is the sum of its squares. in_i is multiplied by |q_i|, and out_i divided by it.

    Args:
        weights: per layer, [B, n_l, n_{l-1}, F_l].
        biases: per layer, [B, n_l].
    """
    sizes = [torch.linalg.vector_norm(w, dim=3) / math.sqrt(w.shape[2]) for w in weights]
    incoming, outgoing = [torch.ones_like(sizes[0][:, 0])], [torch.ones_like(biases[-1])]
    for size, bias in zip(sizes[:-1], biases[:-1], strict=True):
        read = torch.cat([size * incoming[-1][:, None], bias[..., None]], dim=2)
        incoming.append(torch.linalg.vector_norm(read, dim=2))
    for size in reversed(sizes[1:]):
        spread = math.sqrt(size.shape[2] / size.shape[1])  # mean over receivers rather than senders
        outgoing.append(spread * torch.linalg.vector_norm(size * outgoing[-1][:, :, None], dim=1))
    return incoming[1:], outgoing[:0:-1]


class MonomialNFN(Metanetwork):
    """A function of a network's parameters that is invariant, or equivariant, to permutations and scalars of neurons.

    `MonomialLayer`, then leaky ReLU where scalars are positive (relu, leaky relu) or tanh where they are signs (tanh,
    sine), per width. These commute with the scalars. For parameters, another layer and a learned factor per tensor
    follow; for vectors, the means over hidden neurons of invariant features, and an MLP:

        W_1[i] out_i,  W_l[i, j] in_j out_i,  W_L[:, j] in_j,  b_l[i] out_i,  b_L

    whose absolute values are taken where scalars are signs. in and out are the `path_norms` of the input network, which
    scalars multiply and divide. They take the place of the published invariant layer, which divides features by their
    own norm: of weights between hidden layers of relu networks, that would leave the signs only.

    See Tran et al., Monomial Matrix Group Equivariant Neural Functional Networks, NeurIPS 2024,
    https://arxiv.org/abs/2409.11697. The phase of sines is not kept. Weights and biases are divided by their root mean
    square over the training split, one number per layer, unless `normalize` is false.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the networks have no hidden layer, residual connections, or hidden layers that do not all admit
            signs, or all positive scales, with chi(q) = q.
    """

    def __init__(self, config: MonomialNFNConfig, spec: NetSpec) -> None:
        config.refuse_residuals(spec)
        if spec.num_layers < 2:
            raise ValueError(f"model: {config.name} reads hidden neurons, found {spec}; use mlp")
        if set(spec.symmetries) not in ({"sign"}, {"scale"}):
            found = f"{spec}, of {' and '.join(sorted(set(spec.symmetries)))}"
            raise ValueError(f"model: {config.name} reads networks of one scalar group, sign or scale, found {found}")
        super().__init__(config, spec, None if config.normalize is False else InputNormalization(spec.num_layers))
        self.config = config
        self.has_signs = spec.symmetries[0] == "sign"
        self.activation = nn.Tanh() if self.has_signs else nn.LeakyReLU(0.1)
        kernels = [math.prod(layer.kernel or ()) for layer in spec.layers]
        dims = [1, *config.hidden_dims, *([config.heads] if config.changes_parameters else [])]
        layout, d = spec.layout, dims[-1]
        self.layers = nn.ModuleList(MonomialLayer(layout, kernels, self.has_signs, i, o) for i, o in pairwise(dims))
        self.readout = None
        if not config.changes_parameters:
            ends = layout[0] * kernels[0] + layout[-1] * (kernels[-1] + 1)
            width = d * (ends + sum(kernels[1:-1]) + spec.num_layers - 1)
            hidden, p = (config.readout_dim, config.readout_dim), config.readout_dropout
            self.readout = MLP(width, hidden, config.out_dim, dropout=p)

    def forward(self, params: NetParams) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        self.validate_spec(params.spec)
        read = self.normalized(params)
        features = [w.reshape(*w.shape[:3], -1) for w in read.weights], [b[..., None] for b in read.biases]
        norms, scalars = path_norms(features[0], read.biases), self.scalars(read)
        for index, layer in enumerate(self.layers):
            weights, biases = layer(*features)
            if self.readout is not None or index < len(self.layers) - 1:
                weights, biases = list(map(self.activation, weights)), list(map(self.activation, biases))
            features = weights, biases
            if index < len(scalars):
                features = rescaled(features, scalars[index])
        if self.readout is None:
            return self.joined_heads(changes_by_head(params, *features, self.config.heads))
        output: Tensor = self.readout(*self.pooled(features, *norms))
        return output

    def scalars(self, read: NetParams) -> list[list[Tensor]]:
        """By what the results of the first layers are `rescaled`, one list for each. Here: of no layer.

        Args:
            read: the networks as the model reads them.
        """
        return []

    def pooled(self, features: Features, incoming: Sequence[Tensor], outgoing: Sequence[Tensor]) -> list[Tensor]:
        """Means of invariant features, [B, widths]."""
        (first, *between, last), (*biases, last_bias) = features
        invariant = [first * outgoing[0][..., None, None], last * incoming[-1][:, None, :, None]]
        for weight, below, above in zip(between, incoming, outgoing[1:], strict=False):
            invariant.append(weight * below[:, None, :, None] * above[:, :, None, None])
        of_biases = [bias * out[..., None] for bias, out in zip(biases, outgoing, strict=True)]
        if self.has_signs:
            invariant, of_biases = [x.abs() for x in invariant], [x.abs() for x in of_biases]
        first, last, *between = invariant
        pooled = [first.mean(1), last.mean(2), last_bias, *(x.mean((1, 2)) for x in between)]
        return [x.flatten(1) for x in (*pooled, *(x.mean(1) for x in of_biases))]


def _linear(in_dim: int, out_dim: int, bias: bool = False) -> nn.Linear:
    """A linear map that keeps the size of features."""
    linear = nn.Linear(in_dim, out_dim, bias)
    nn.init.normal_(linear.weight, std=in_dim**-0.5)
    return linear
