"""Phasor reader: exactly invariant to permutation, sign and phase of sine networks, as they are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.phasor import (
    BOTH,
    INVARIANT,
    NUM_CHARACTERS,
    SIGN,
    GradedLinear,
    PhasorLayer,
    harmonics,
    invariants,
    products,
)


@dataclass(frozen=True)
class PhasorConfig(ModelConfig):
    """Phasor reader of sine networks: biases enter as cosines and sines, features are graded by sign and phase."""

    name = "phasor"

    hidden_dim: int = 64
    """Width of each neuron's features of one character; there are four."""

    num_layers: int = 3
    """Rounds of messages."""

    readout_dim: int = 128
    """For vectors: width of the hidden layer of the readout."""

    def __post_init__(self) -> None:
        counts = ["hidden_dim", "num_layers", "readout_dim", "out_dim"]
        self.refuse(self.wrong_choices() + self.wrong_numbers(counts))

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """All known ones of sine networks."""
        return frozenset({"permutation", "sign", "phase"})

    def build(self, spec: NetSpec) -> Phasor:
        """The model for networks of `spec`."""
        return Phasor(self, spec)


METANETWORKS.register(PhasorConfig.name, PhasorConfig)


class Phasor(Metanetwork):
    """Messages along the weights of a sine network, between features that are graded by character.

    A hidden neuron of angle theta = w0 b starts with cos 2 theta, sin 2 theta, cos theta and sin theta, each of one
    character of its group, theta -> q theta + k pi (`scalegmn.nn.phasor`). Inputs, and outputs with their bias, which
    no symmetry moves, have learned features of every character. In each round (`PhasorLayer`) linear maps stay within a
    character, and products add characters. The result is read from what is invariant:

        vector       MLP([x of all inputs and outputs, mean over i in l of r([x_1, x_s^2, x_p^2, x_b^2]) for hidden l])
        parameters   dW_ij = W_ij <A h_1,i, B h_1,j> / d + <U h_s,i, V h_b,j> / sqrt(d),   db_i = c h_s,i

    with h = x + C products(x), of characters 1, s (q), p ((-1)^k) and b (both). A change of b_i has the character s
    alone, for half-turns are added to a bias.

    So the model is invariant (changes of parameters: equivariant) to permutations, signs and whole half-turns of hidden
    neurons of networks as they are stored, with no canonical form. It is smooth in the parameters, where canonical
    biases jump. Weights are divided by their root mean square over the training split, one number per layer, and so is
    the output layer's bias, unless `normalize` is false. Angles are read as they are.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the networks are no chains of linear layers with sines between, and at least one of these.
    """

    def __init__(self, config: PhasorConfig, spec: NetSpec) -> None:
        config.refuse_residuals(spec)
        if spec.is_cnn or spec.num_layers < 2 or any(layer.activation != "sine" for layer in spec.layers[:-1]):
            raise ValueError(f"model: phasor reads linear layers with sines between, found {spec}; use scalegmn")
        normalization = None if config.normalize is False else InputNormalization(spec.num_layers)
        super().__init__(config, spec, normalization)
        d, num_hidden = config.hidden_dim, spec.num_layers - 1
        self.inputs = nn.Parameter(torch.randn(NUM_CHARACTERS, spec.layout[0], d))
        self.outputs = nn.Parameter(torch.randn(NUM_CHARACTERS, spec.layout[-1], d))
        self.output_biases = nn.Parameter(torch.randn(NUM_CHARACTERS, 1, d))
        self.harmonics = nn.Parameter(torch.randn(num_hidden, NUM_CHARACTERS, 1, d))
        self.positions = nn.Parameter(torch.randn(num_hidden, d))
        self.layers = nn.ModuleList(PhasorLayer(d) for _ in range(config.num_layers))
        self.changes_parameters = config.changes_parameters
        if config.changes_parameters:
            self.products = GradedLinear(d, d)
            self.receivers, self.senders = GradedLinear(d, config.heads * d), GradedLinear(d, config.heads * d)
            self.biases = nn.Linear(d, config.heads, bias=False)
        else:
            self.read = MLP(NUM_CHARACTERS * d, (d,), d)
            ends = NUM_CHARACTERS * d * (spec.layout[0] + spec.layout[-1])
            self.readout = MLP(ends + num_hidden * d, (config.readout_dim,), config.out_dim)

    def forward(self, params: NetParams) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        self.validate_spec(params.spec)
        read = self.normalized(params)
        nodes = self.nodes(params, read.biases[-1])
        for layer in self.layers:
            nodes = layer(nodes, read.weights)
        if self.changes_parameters:
            return self.joined_heads(self.changes(params, nodes, read))
        ends = [x.permute(1, 2, 0, 3).flatten(1) for x in (nodes[0], nodes[-1])]
        pooled = [self.read(invariants(x)).mean(1) for x in nodes[1:-1]]
        output: Tensor = self.readout(*ends, *pooled)
        return output

    def nodes(self, params: NetParams, output_bias: Tensor) -> list[Tensor]:
        """Graded features before the first round, per layer of nodes 0..L, [4, B, n_l, d].

        Args:
            params: the networks.
            output_bias: as the model reads it, [B, n_L].
        """
        shape = (-1, len(params), -1, -1)
        nodes = [self.inputs[:, None].expand(shape)]
        hidden = zip(params.spec.layers, params.biases[:-1], self.harmonics, self.positions, strict=False)
        for layer, bias, amplitudes, position in hidden:
            x = harmonics(layer.w0 * bias)[..., None] * amplitudes[:, None]
            nodes.append(torch.cat([x[:1] + position, x[1:]]))
        return [*nodes, self.outputs[:, None] + output_bias[..., None] * self.output_biases[:, None]]

    def changes(self, params: NetParams, nodes: list[Tensor], read: NetParams) -> list[NetParams]:
        """Changes of parameters of each head, before the learned factor of each layer."""
        d = nodes[0].shape[-1]
        features = [x + self.products(products(x)) for x in nodes]
        senders = [self.senders(x).split(d, -1) for x in features[:-1]]
        receivers = [self.receivers(x).split(d, -1) for x in features[1:]]
        biases = [self.biases(x[SIGN]).to(read.biases[0]) for x in features[1:]]  # as changes of weights are
        return [
            params.replace(
                weights=tuple(
                    _changes(weight, above[head], below[head])
                    for weight, above, below in zip(read.weights, receivers, senders, strict=True)
                ),
                biases=tuple(bias[..., head] for bias in biases),
            )
            for head in range(biases[0].shape[-1])
        ]


def _changes(weight: Tensor, receivers: Tensor, senders: Tensor) -> Tensor:
    """dW of a layer, [B, n_l, n_{l-1}]; receivers and senders [4, B, n, d]."""
    d = senders.shape[-1]
    gate = receivers[INVARIANT] @ senders[INVARIANT].mT / d
    return weight * gate + receivers[SIGN] @ senders[BOTH].mT / math.sqrt(d)
