"""Quasi-equivariant ScaleGMN: neurons' features times factors near 1 that know how large the neurons' weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalegmn.models.registry import METANETWORKS
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.scalegmn.model import ScaleGMN
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.factors import NeuronFactors, epsilon_problems


@dataclass(frozen=True)
class QuasiScaleGMNConfig(ScaleGMNConfig):
    """ScaleGMN whose features of neurons are multiplied by factors near 1, which break scales in a bounded way."""

    name = "quasi_scalegmn"

    epsilon: float = 0.1
    """Factors are between 1 - epsilon and 1 + epsilon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(epsilon_problems(self.epsilon, "scalegmn"))

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations, and signs where these are the symmetry; scales are kept up to epsilon."""
        return frozenset({"permutation", *(["sign"] if self.symmetry == "sign" else [])})

    def new_model(self, spec: NetSpec) -> QuasiScaleGMN:
        """The model with published initial values."""
        return QuasiScaleGMN(self, spec)


METANETWORKS.register(QuasiScaleGMNConfig.name, QuasiScaleGMNConfig)


class QuasiScaleGMN(ScaleGMN):
    """F = alpha beta: ScaleGMN's first features of hidden neurons, times factors that are not invariant to scales.

        x_i = alpha_i * (A_v b_i + probes_i)

    alpha_i are the neuron's factors (`NeuronFactors`), which keep permutations and signs exactly: of tanh and sine
    networks the model is as exact as ScaleGMN, and knows sizes. Positive scales of relu neurons move the output in
    proportion to epsilon.

    See Tran et al., Quasi-Equivariant Metanetworks, ICLR 2026, https://arxiv.org/abs/2604.23720. There alpha(theta) is
    an element of the group, such as a positive number per relu neuron, that acts on beta(theta), so that functions are
    the same along an orbit though parameters are not. Acting on all features, such an element would change no invariant
    output and no function of a changed network; here the factors act on features of neurons alone, not on edges. The
    equations are written from a summary.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: as `ScaleGMN`.
    """

    config: QuasiScaleGMNConfig

    def __init__(self, config: QuasiScaleGMNConfig, spec: NetSpec) -> None:
        super().__init__(config, spec)
        self.factors = NeuronFactors(config.hidden_dim, config.hidden_dim, config.epsilon)

    def added_features(
        self, nets: Sequence[NetParams], read: Sequence[NetParams], probes: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """What makes x_i = A_v b_i the product above, per batch and layer of nodes [B, n_l, d]."""
        added = []
        for index, (params, of_model) in enumerate(zip(nets, read, strict=True)):
            features = [self.node_linear(x) for x in of_model.node_features()]
            of_probes = probes[index] if probes else [torch.zeros_like(x) for x in features]
            new = list(of_probes)
            for (_, place), factors in zip(params.spec.node_layers[:-1], self.factors(params), strict=True):
                new[place] = factors * (features[place] + of_probes[place]) - features[place]
            added.append(new)
        return added
