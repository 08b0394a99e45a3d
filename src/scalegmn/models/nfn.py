"""Neural functional networks (Zhou et al., NeurIPS 2023): linear layers on weights and biases with ReLU between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.large_weight_spaces import held, run_nfn_layers
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.heads import changes_by_head
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.initialization import Init, balance, balance_children, initialized, resize
from scalegmn.nn.mlp import MLP, Dropout
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.statistics import NUM_STATISTICS, raw_statistics
from scalegmn.nn.weight_space import (
    ActivationDropout,
    ChannelNorm,
    ChannelProducts,
    HiddenNeuronLayer,
    InputOutputEmbedding,
    NeuronLayer,
    NeuronNorm,
    PointwiseLayer,
    SinusoidalPositions,
    WeightSpaceFourier,
    WeightSpacePool,
)


@dataclass(frozen=True)
class NFNConfig(ModelConfig):
    """NFN: layers that permutations of neurons allow, applied to all weights and biases of a network."""

    name = "nfn"

    layer: Literal["NP", "HNP", "pointwise"] = "HNP"
    """NP: permutations of all neurons, inputs and outputs too, unless positions or io_embed tell these apart; HNP:
    those of hidden neurons only; pointwise: each weight and bias by itself."""

    hidden_dims: tuple[int, ...] = (512, 512, 512)
    """Channels after each layer; with output parameters, one more layer follows."""

    products: bool = False
    """Layers multiply what they read at a weight (HNP: between hidden layers) by what they read at its ends, where the
    published ones add; tanh in place of ReLU; for vectors, the means are of products of two channels."""

    init: Init = "published"
    """Initial parameters. balanced, for products of weights as they are (no frequencies, bands, io_embed or norm):
    features keep their size and start odd, as if the model knew the signs of neurons (`scalegmn.nn.initialization`).
    published: as in the published code."""

    num_frequencies: int = 128
    """Number of Gaussian Fourier features of each weight and bias, a sine and a cosine each; 0: none."""

    fourier_scale: float = 10.0
    """Standard deviation of their frequencies."""

    num_bands: int = 0
    """Number of bands of the sinusoidal positions of inputs and outputs; 0: no positions."""

    max_frequency: float = 10.0
    """Twice the largest frequency of the bands."""

    layer_positions: bool = False
    """Positions of layers as well."""

    io_embed: bool = False
    """NP: learned vectors for inputs and outputs, added before every layer."""

    norm: Literal["none", "channels", "neurons"] = "none"
    """After every layer: over the channels at each position, or at each hidden neuron over all channels of its first or
    last weights."""

    dropout: float = 0.0
    """Between layers: of whole channels of weights, of single entries of biases."""

    pool: Literal["NP", "HNP"] = "HNP"
    """For vectors: means over all neurons, or over hidden neurons only."""

    append_statistics: bool = False
    """For vectors: the readout also reads mean, variance and quartiles of each layer's weights and biases."""

    readout_dim: int = 1000
    """Width of the readout's two hidden layers."""

    readout_dropout: float = 0.0
    """After each of them."""

    readout_input_dropout: float = 0.0
    """Before the first of them."""

    def __post_init__(self) -> None:
        probabilities = ["dropout", "readout_dropout", "readout_input_dropout"]
        problems = self.wrong_choices() + self.wrong_numbers(["out_dim", "readout_dim"], probabilities)
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            problems.append(f"hidden_dims: found {list(self.hidden_dims)}, expected one or more positive widths")
        elif self.norm != "none" and min(self.hidden_dims) < 2:
            problems.append(f"norm: found {self.norm}, but one channel has no variance; use none")
        for key in ("num_frequencies", "num_bands"):
            if getattr(self, key) < 0:
                problems.append(f"{key}: found {getattr(self, key)}, expected at least 0")
        if self.io_embed and self.layer != "NP":
            problems.append(f"io_embed: is for layer NP, found {self.layer}; leave it false")
        if self.layer_positions and not self.num_bands:
            problems.append("layer_positions: needs num_bands, found 0")
        if self.products and self.layer == "pointwise":
            problems.append("products: are of layers NP and HNP, found pointwise; leave it false")
        elif self.products and self.hidden_dims and self.hidden_dims[-1] % 2 and not self.changes_parameters:
            problems.append(f"hidden_dims: found {list(self.hidden_dims)}, expected an even last one for products")
        if self.init == "balanced":  # features would not start odd
            needed = {"products": True, "num_frequencies": 0, "num_bands": 0, "io_embed": False, "norm": "none"}
            problems += self.wrong_for("init balanced", **needed)
        if self.append_statistics and self.changes_parameters:
            problems.append("append_statistics: is for vectors, found output parameters")
        self.refuse(problems)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations of hidden neurons."""
        return frozenset({"permutation"})

    def build(self, spec: NetSpec) -> NFN:
        """The model for networks of `spec`."""
        return initialized(NFN(self, spec), self.init, spec)


METANETWORKS.register(NFNConfig.name, NFNConfig)


class NFN(Metanetwork):
    """A function of a network's parameters that is invariant, or equivariant, to permutations of hidden neurons.

    [Fourier features], [positions], then linear layer, [norm], ReLU per width; for vectors, a pool and an MLP; for
    parameters, another linear layer and a learned factor per tensor (NFN, section 2). With `products`, which are not
    published, layers are quadratic.

    Args:
        config: the hyper-parameters; inputs are normalised only if `normalize` is true.
        spec: the input networks.

    Raises:
        ValueError: the networks have no hidden layer, residual connections, or convolutions, which the norm is not for.
    """

    def __init__(self, config: NFNConfig, spec: NetSpec) -> None:
        config.refuse_residuals(spec)
        if spec.num_layers < 2:
            raise ValueError(f"nfn_args: expected networks with at least one hidden layer, found {spec}")
        if config.norm == "neurons" and spec.is_cnn:
            raise ValueError(f"nfn_args.norm: neurons is for linear layers, found {spec}; use channels")
        super().__init__(config, spec, InputNormalization(spec.num_layers, centred=True) if config.normalize else None)
        self.config = config
        self.kernels = [torch.Size(layer.kernel or ()).numel() for layer in spec.layers]
        self.layers, dim = nn.ModuleList(), 1
        if config.num_frequencies:
            self.layers.append(WeightSpaceFourier(config.num_frequencies, config.fourier_scale))
            dim = 2 * config.num_frequencies
        if config.num_bands:
            self.layers.append(SinusoidalPositions(config.num_bands, config.max_frequency, config.layer_positions))
            dim += 2 * config.num_bands + 1
        for width in config.hidden_dims:
            self._add_layer(dim, width)
            if config.norm == "channels":
                self.layers.append(ChannelNorm(self.kernels, width))
            elif config.norm == "neurons":
                self.layers.append(NeuronNorm(spec.layout, width))
            self.layers.append(ActivationDropout(torch.tanh if config.products else torch.relu, config.dropout))
            dim = width
        self.readout = None
        if config.changes_parameters:
            self._add_layer(dim, config.heads)
            return
        if config.products:
            self.layers.append(ChannelProducts(self.kernels))
            dim //= 2
        self.pool = WeightSpacePool(self.kernels, config.pool == "HNP")
        positions = sum(self.kernels) + spec.num_layers
        if config.pool == "HNP":
            ends = (spec.layout[0] - 1) * self.kernels[0] + (spec.layout[-1] - 1) * (self.kernels[-1] + 1)
            positions += ends
        width = dim * positions + (2 * NUM_STATISTICS * spec.num_layers if config.append_statistics else 0)
        readout_dims, p = (config.readout_dim, config.readout_dim), config.readout_dropout
        self.readout = nn.Sequential(
            Dropout(config.readout_input_dropout), MLP(width, readout_dims, config.out_dim, "relu", False, p)
        )

    def _add_layer(self, in_dim: int, out_dim: int) -> None:
        """One linear layer."""
        layout = self.spec.layout
        if self.config.io_embed:
            self.layers.append(InputOutputEmbedding(layout, self.kernels, in_dim))
        if self.config.layer == "pointwise":
            self.layers.append(PointwiseLayer(self.kernels, in_dim, out_dim))
        else:
            kind = NeuronLayer if self.config.layer == "NP" else HiddenNeuronLayer
            self.layers.append(kind(layout, self.kernels, in_dim, out_dim, self.config.products))

    def forward(self, params: NetParams) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        self.validate_spec(params.spec)
        self.config.refuse_residuals(params.spec)
        chunks = self.chunks(params.biases[0].device)
        if chunks.num_edges is not None and len(params) > 1:  # large networks one by one
            outputs = [self.forward(params[row : row + 1]) for row in range(len(params))]
            if self.readout is None:
                return NetParams.cat(cast("list[NetParams]", outputs))
            return torch.cat(cast("list[Tensor]", outputs))
        read = self.normalized(params)
        features: tuple[list[Any], Sequence[Tensor]]  # of large networks, weights that are computed where they are read
        features = [w.reshape(*w.shape[:3], -1) for w in read.weights], [b[..., None] for b in read.biases]
        if chunks.num_edges is not None:
            features = run_nfn_layers(self.layers, *features, chunks)
        else:
            for layer in self.layers:
                features = layer(*features)
        if self.readout is None:
            return self.joined_heads(changes_by_head(params, *held(*features), self.config.heads))
        pooled = self.pool(*features)
        if self.config.append_statistics:
            pooled = torch.cat([pooled, *raw_statistics([(read.weights, read.biases)])], dim=1)
        output: Tensor = self.readout(pooled)
        return output

    def chunks(self, device: torch.device) -> ChunkPlan:
        """Whether the weights between hidden layers of one network are run at once, or in chunks whose features are
        computed again."""
        layers = zip(self.spec.layers[1:-1], self.kernels[1:-1], strict=True)
        num_weights = sum(layer.out_dim * layer.in_dim * kernel for layer, kernel in layers)
        widths = (2 * self.config.num_frequencies, *self.config.hidden_dims)
        size = max(widths) * next(self.parameters()).element_size()
        return ChunkPlan.plan(num_weights, size, 3 * len(widths), device)


@balance.register
def _(model: NFN, spec: NetSpec) -> None:
    balance_children(model, spec)
    if model.readout is not None:
        for linear in cast("MLP", model.readout[1]).linears:
            resize(linear, 2**0.5)
