"""MVProbe: products of matrices with learned vectors, from both sides and of first and second order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec, linear_products


@dataclass(frozen=True)
class MVProbeConfig(ModelConfig):
    """Learned probes of single matrices, and of products of matrices, which are never multiplied out."""

    name = "mvprobe"

    num_probes: int = 128
    """r, the vectors that a matrix is multiplied with in each of its four views."""

    projection_dim: int = 128
    """What is read of each of these products."""

    representation_dim: int = 512
    """Width of what the output is a linear function of."""

    def __post_init__(self) -> None:
        counts = ["num_probes", "projection_dim", "representation_dim", "out_dim"]
        problems = self.wrong_choices() + self.wrong_numbers(counts)
        problems += self.wrong_output("probing changes no network")
        if self.normalize:
            problems.append("normalize: found true, but each view is standardised; leave it null")
        self.refuse(problems)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Every basis of the neurons between two linear layers; permutations, signs and scales are some of these."""
        return frozenset({"permutation", "sign", "scale", "basis"})

    def build(self, spec: NetSpec) -> MVProbe:
        """The model for networks of `spec`."""
        return MVProbe(self, spec)


METANETWORKS.register(MVProbeConfig.name, MVProbeConfig)


class MVProbe(Metanetwork):
    """A reader of matrices: of one linear layer, or of products of these, such as low-rank adapters W = B A (LoRA).

    A product X of the network's layers (`linear_products`) [n, m] is read by four views, with learned U, Z [m, r] and
    V, W [n, r]:

        S_1 = X U    S_2 = X X^T W    S_3 = X^T V    S_4 = X^T X Z
        f   = [relu(P_k^T (S_k - mean) / deviation), k = 1..4]

    Mean and deviation are over all numbers of S_k for one network, P_k [n or m, p] is learned, and
    output = linear(linear([f of every product])) (Heo et al., ICML 2026, https://arxiv.org/abs/2605.23410, who read
    one matrix). Layers are multiplied with the learned vectors one after the other, as in B (A U), so nothing of the
    size of X is made. A bias is one more column of X, whose input is 1: X = [B A, B a + b].

    The model depends on X alone, so no basis of the neurons inside a product changes it, exactly, and no canonical form
    of the factors is needed. Inputs and outputs have names, as everywhere: their permutations are no symmetries. Nor
    does it see how large X is.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the networks have other layers than linear ones, or activations between them.
    """

    def __init__(self, config: MVProbeConfig, spec: NetSpec) -> None:
        self.products = linear_products(spec)
        if not self.products:
            raise ValueError(f"model: mvprobe reads linear layers without activations, found {spec}; use scalegmn")
        super().__init__(config, spec, None)
        self.views = nn.ModuleList(
            MatrixViews(
                spec.layers[product[-1]].out_dim,
                spec.layers[product[0]].in_dim + any(spec.layers[layer].bias for layer in product),
                config.num_probes,
                config.projection_dim,
            )
            for product in self.products
        )
        width = 4 * config.num_probes * config.projection_dim * len(self.products)
        self.encoder = nn.Linear(width, config.representation_dim)
        self.readout = nn.Linear(config.representation_dim, config.out_dim)

    def forward(self, params: NetParams) -> Tensor:
        """B networks -> [B, out_dim].

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        self.validate_spec(params.spec)
        views = [views(Product.of(params, layers)) for views, layers in zip(self.views, self.products, strict=True)]
        output: Tensor = self.readout(self.encoder(torch.cat(views, dim=1)))
        return output

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`."""
        super().validate_spec(spec)
        if linear_products(spec) != self.products or [x.bias for x in spec.layers] != [
            x.bias for x in self.spec.layers
        ]:
            raise ValueError(f"the model was built for {self.spec}, found {spec}")


class MatrixViews(nn.Module):
    """What MVProbe reads of one product X of B networks: f, see there.

    Args:
        out_dim: n.
        in_dim: m.
        num_probes: r.
        projection_dim: p.
    """

    def __init__(self, out_dim: int, in_dim: int, num_probes: int, projection_dim: int) -> None:
        super().__init__()
        self.from_right = nn.Parameter(torch.randn(2, in_dim, num_probes) / math.sqrt(num_probes))  # U, Z
        self.from_left = nn.Parameter(torch.randn(2, out_dim, num_probes) / math.sqrt(num_probes))  # V, W
        self.projections = nn.ModuleList(nn.Linear(n, projection_dim, bias=False) for n in (out_dim, in_dim) * 2)

    def forward(self, x: Product) -> Tensor:
        """X of B networks -> [B, 4 r p]."""
        (u, z), (v, w) = self.from_right, self.from_left
        views = (x.times(u), x.transposed_times(v), x.times(x.transposed_times(w)), x.transposed_times(x.times(z)))
        return torch.cat(
            [
                torch.relu(projection(standardized(view).mT)).flatten(1)
                for view, projection in zip(views, self.projections, strict=True)
            ],
            dim=1,
        )


@dataclass(frozen=True)
class Product:
    """X = W_k .. W_1 of B networks, with the biases as its last column where there are any.

    Attributes:
        weights: W_1 to W_k, [B, n_l, n_{l-1}].
        biases: [B, n_l]; None: there are none.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor] | None

    @classmethod
    def of(cls, params: NetParams, layers: Sequence[int]) -> Product:
        """The product of these layers."""
        has_bias = any(params.spec.layers[layer].bias for layer in layers)
        biases = [params.biases[layer] for layer in layers] if has_bias else None
        return cls([params.weights[layer] for layer in layers], biases)

    def times(self, vectors: Tensor) -> Tensor:
        """X u of r vectors, [m, r] or [B, m, r] -> [B, n, r]."""
        if self.biases is None:
            for weight in self.weights:
                vectors = weight @ vectors
            return vectors
        vectors, one = vectors[..., :-1, :], vectors[..., -1:, :]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            vectors = weight @ vectors + bias[..., None] * one
        return vectors

    def transposed_times(self, vectors: Tensor) -> Tensor:
        """X^T v of r vectors, [n, r] or [B, n, r] -> [B, m, r]."""
        of_biases: Tensor | float = 0.0
        for layer in reversed(range(len(self.weights))):
            if self.biases is not None:
                of_biases = of_biases + self.biases[layer][:, None] @ vectors
            vectors = self.weights[layer].mT @ vectors
        return vectors if self.biases is None else torch.cat([vectors, torch.as_tensor(of_biases)], dim=1)


def standardized(views: Tensor) -> Tensor:
    """[B, n, r] with mean 0 and deviation 1 over the numbers of each network; 0 where they are all the same."""
    centred = views - views.mean((1, 2), keepdim=True)
    variance = centred.square().mean((1, 2), keepdim=True)
    return centred / (variance + torch.finfo(views.dtype).tiny).sqrt()
