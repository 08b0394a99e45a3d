"""NFT (Zhou et al., NeurIPS 2023): attention over the weights and biases of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.heads import changes_by_head
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.weight_space import Features


@dataclass(frozen=True)
class NFTConfig(ModelConfig):
    """NFT: attention between the weights of neurons of one layer, equivariant to permutations of them."""

    name = "nft"

    hidden_dim: int = 64
    """Width d of the features of each weight (each kernel) and bias."""

    num_layers: int = 3
    """Attention layers, an MLP after each."""

    num_heads: int = 4
    """Heads of attention; they share hidden_dim."""

    num_latents: int = 8
    """For vectors: learned queries that read all weights and biases."""

    readout_dim: int = 128
    """For vectors: width of the hidden layer of the readout."""

    dropout: float = 0.0
    """In MLPs, after every activation."""

    def __post_init__(self) -> None:
        counts = ["hidden_dim", "num_layers", "num_heads", "num_latents", "readout_dim", "out_dim"]
        problems = self.wrong_choices() + self.wrong_numbers(counts, ["dropout"])
        if not problems and self.hidden_dim % self.num_heads:
            problems.append(f"num_heads: found {self.num_heads}, expected a divisor of hidden_dim, {self.hidden_dim}")
        self.refuse(problems)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations of hidden neurons."""
        return frozenset({"permutation"})

    def build(self, spec: NetSpec) -> NFT:
        """The model for networks of `spec`."""
        return NFT(self, spec)


METANETWORKS.register(NFTConfig.name, NFTConfig)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(size)) V between tokens that are tensors of any shape, with heads.

    Queries, keys and values are linear in the last axis of a token; scores are sums over all of its entries.

    Args:
        dim: of the last axis.
        num_heads: a divisor of dim.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.queries, self.keys, self.values = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.last = nn.Linear(dim, dim)

    def forward(self, reads: Tensor, tokens: Tensor) -> Tensor:
        """Tokens that read, [B, T, ..., d], and that are read, [B, S, ..., d] -> [B, T, ..., d]."""
        queries, keys, values = self.queries(reads), self.keys(tokens), self.values(tokens)
        q, k, v = (self._by_head(x) for x in (queries, keys, values))
        new = scaled_dot_product_attention(q.flatten(3), k.flatten(3), v.flatten(3))
        result: Tensor = self.last(new.reshape(q.shape).movedim(1, -2).flatten(-2))
        return result

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, T, ..., d] -> [B, heads, T, ..., d / heads]."""
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).movedim(-2, 1)
        return heads


class WeightAttention(nn.Module):
    """Attention between all that belongs to the neurons of a layer, for every layer.

    The tokens of layer l are vectors over its n_l neurons: the columns of W_l, the rows of W_{l+1}, and b_l. Their
    scores are inner products, which permutations of its neurons leave as they are, so that a row of W_{l+1} and a
    column of W_l meet as in W_{l+1} W_l (NFT, section 3). A weight is in tokens of two layers, whose results are added.

    Args:
        dim: d.
        num_heads: of attention.
        dropout: in the MLP.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.mlp = MLP(dim, (2 * dim,), dim, "gelu", False, dropout)

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """Weights [B, n_l, n_{l-1}, d] and biases [B, n_l, d] -> the same."""
        read = [list(map(self.attention_norm, tensors)) for tensors in (weights, biases)]
        new_weights, new_biases = list(weights), list(biases)
        for place in range(len(weights) + 1):
            tokens = [] if place == 0 else [read[0][place - 1].transpose(1, 2), read[1][place - 1][:, None]]
            tokens += [] if place == len(weights) else [read[0][place]]
            together = torch.cat(tokens, dim=1)
            parts = self.attention(together, together).split([x.shape[1] for x in tokens], dim=1)
            if place > 0:
                new_weights[place - 1] = new_weights[place - 1] + parts[0].transpose(1, 2)
                new_biases[place - 1] = new_biases[place - 1] + parts[1][:, 0]
            if place < len(weights):
                new_weights[place] = new_weights[place] + parts[-1]
        return [x + self.mlp(self.mlp_norm(x)) for x in new_weights], [
            x + self.mlp(self.mlp_norm(x)) for x in new_biases
        ]


class NFT(Metanetwork):
    """Attention over the weights and biases of chains, invariant (changes of parameters: equivariant) to permutations
    of hidden neurons.

        w = A_l W_l[i, j] + P_l  (+ R_j for inputs j, + S_i for outputs i)       b likewise, of b_l[i]
        w, b <- WeightAttention(w, b)                                            num_layers times
        vector      MLP([Attention(z_m, all w and b)])    z_1..z_M learned queries (inr2array)
        parameters  a linear map per layer

    A_l, of a whole kernel for convolutions, and P_l are those of weights or biases. This is the self-attention of NFT
    (https://arxiv.org/abs/2305.13546) with features of weights that are linear rather than Gaussian Fourier ones, and
    with the learned queries of its inr2array in place of a pool; nothing here is trained to draw the image. It does not
    keep signs, scales or phases. Weights and biases are normalised per layer unless `normalize` is false.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the networks are no chains of linear layers and convolutions without residual connections.
    """

    def __init__(self, config: NFTConfig, spec: NetSpec) -> None:
        config.refuse_residuals(spec)
        normalization = None if config.normalize is False else InputNormalization(spec.num_layers, centred=True)
        super().__init__(config, spec, normalization)
        self.config, d = config, config.hidden_dim
        kernels = [math.prod(layer.kernel or ()) for layer in spec.layers]
        self.weight_lifts = nn.ModuleList(nn.Linear(kernel, d) for kernel in kernels)
        self.bias_lifts = nn.ModuleList(nn.Linear(1, d) for _ in kernels)
        self.inputs, self.outputs = (nn.Parameter(torch.randn(n, d)) for n in (spec.layout[0], spec.layout[-1]))
        self.layers = nn.ModuleList(
            WeightAttention(d, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(d)
        self.readout = None
        if config.changes_parameters:
            self.weight_changes = nn.ModuleList(nn.Linear(d, kernel * config.heads) for kernel in kernels)
            self.bias_changes = nn.ModuleList(nn.Linear(d, config.heads) for _ in kernels)
        else:
            self.latents = nn.Parameter(torch.randn(config.num_latents, d))
            self.pool = Attention(d, config.num_heads)
            readout_dims = (config.readout_dim,)
            self.readout = MLP(config.num_latents * d, readout_dims, config.out_dim, dropout=config.dropout)

    def forward(self, params: NetParams) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        self.validate_spec(params.spec)
        self.config.refuse_residuals(params.spec)
        weights, biases = self.embedded(self.normalized(params))
        for layer in self.layers:
            weights, biases = layer(weights, biases)
        weights, biases = (list(map(self.norm, tensors)) for tensors in (weights, biases))
        if self.readout is None:
            new_weights = [linear(x) for linear, x in zip(self.weight_changes, weights, strict=True)]
            new_biases = [linear(x) for linear, x in zip(self.bias_changes, biases, strict=True)]
            return self.joined_heads(changes_by_head(params, new_weights, new_biases, self.config.heads))
        every = torch.cat([*(x.flatten(1, 2) for x in weights), *biases], dim=1)
        output: Tensor = self.readout(self.pool(self.latents.expand(len(params), -1, -1), every).flatten(1))
        return output

    def embedded(self, read: NetParams) -> Features:
        """Features of weights and biases before the first layer."""
        weights = [lift(w.reshape(*w.shape[:3], -1)) for lift, w in zip(self.weight_lifts, read.weights, strict=True)]
        biases = [lift(b[..., None]) for lift, b in zip(self.bias_lifts, read.biases, strict=True)]
        weights[0] = weights[0] + self.inputs
        weights[-1] = weights[-1] + self.outputs[:, None]
        biases[-1] = biases[-1] + self.outputs
        return weights, biases
