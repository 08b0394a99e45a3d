"""DNG encoder: states of neurons, layer by layer from the inputs to the outputs, by a gated recurrent unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.fourier import FourierFeatures
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization


@dataclass(frozen=True)
class DNGConfig(ModelConfig):
    """DNG encoder: one pass through a network, layer by layer, as data would take it, with a state per neuron."""

    name = "dng"

    hidden_dim: int = 128
    """Width of the state of a neuron."""

    num_frequencies: int = 32
    """Number of Gaussian Fourier features of each weight (each kernel) and bias, a sine and a cosine each."""

    fourier_scale: float = 0.3
    """Standard deviation of their frequencies."""

    readout_dim: int = 128
    """Width of the readout's two hidden layers."""

    dropout: float = 0.0
    """In the readout, after every activation."""

    def __post_init__(self) -> None:
        counts = ["hidden_dim", "num_frequencies", "readout_dim", "out_dim"]
        problems = self.wrong_numbers(counts, ["dropout"])
        self.refuse(problems + self.wrong_output("no state knows what its neuron leads to"))

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations of hidden neurons."""
        return frozenset({"permutation"})

    def build(self, spec: NetSpec) -> DNG:
        """The model for networks of `spec`."""
        return DNG(self, spec)


METANETWORKS.register(DNGConfig.name, DNGConfig)


class DNG(Metanetwork):
    """States in the order in which a network computes, invariant to permutations of hidden neurons:

        m_i = sum_j (A_l F(W_l[i, j])) * (C s_j) / sqrt(n_{l-1})         neuron i of layer l, j of the layer before
        s_i = LN(GRU(F(b_i), m_i))                                       input F(b_i), state m_i
        output = MLP([s_i of all outputs])

    F are Gaussian Fourier features, of a whole kernel for convolutions; s_j of inputs are learned; C and the GRU (Cho
    et al., 2014, https://arxiv.org/abs/1406.1078) are the same in all layers. This is the encoder of Wu et al. (2026,
    https://arxiv.org/abs/2607.02166), written from a summary of its equations; the division by the root of the number
    of neurons, which keeps the size of messages, is of this package.

    It does not keep signs, scales or phases. Weights and biases are normalised per layer unless `normalize` is false.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the networks are no chains of linear layers and convolutions without residual connections.
    """

    def __init__(self, config: DNGConfig, spec: NetSpec) -> None:
        config.refuse_residuals(spec)
        normalization = None if config.normalize is False else InputNormalization(spec.num_layers, centred=True)
        super().__init__(config, spec, normalization)
        d, m = config.hidden_dim, config.num_frequencies
        self.inputs = nn.Parameter(torch.randn(spec.layout[0], d))
        kernels = [math.prod(layer.kernel or ()) for layer in spec.layers]
        self.weight_features = nn.ModuleList(FourierFeatures(k, m, config.fourier_scale) for k in kernels)
        self.bias_features = nn.ModuleList(FourierFeatures(1, m, config.fourier_scale) for _ in kernels)
        self.edges = nn.ModuleList(nn.Linear(2 * m, d) for _ in kernels)
        self.senders = nn.Linear(d, d)
        self.update = nn.GRUCell(2 * m, d)
        self.norm = nn.LayerNorm(d)
        hidden = (config.readout_dim, config.readout_dim)
        self.readout = MLP(d * spec.layout[-1], hidden, config.out_dim, dropout=config.dropout)

    def forward(self, params: NetParams) -> Tensor:
        """B networks -> [B, out_dim].

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        output: Tensor = self.readout(self.encoded(params))
        return output

    def encoded(self, params: NetParams) -> Tensor:
        """The states of all outputs, [B, n_L d]."""
        self.validate_spec(params.spec)
        read = self.normalized(params)
        states = self.inputs.expand(len(params), -1, -1)  # [B, n_l, d]
        layers = zip(read.weights, read.biases, self.weight_features, self.bias_features, self.edges, strict=True)
        for weight, bias, weight_features, bias_features, linear in layers:
            edges = linear(weight_features(weight.reshape(*weight.shape[:3], -1)))  # [B, n_l, n_{l-1}, d]
            messages = (edges * self.senders(states)[:, None]).sum(2) / math.sqrt(weight.shape[2])
            new = self.update(bias_features(bias[..., None]).flatten(0, 1), messages.flatten(0, 1))
            states = self.norm(new.unflatten(0, bias.shape))
        return states.flatten(1)
