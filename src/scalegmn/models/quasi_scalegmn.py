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
from scalegmn.nn.mlp import MLP
from scalegmn.symmetry.statistics import NUM_NEURON_STATISTICS, neuron_statistics


@dataclass(frozen=True)
class QuasiScaleGMNConfig(ScaleGMNConfig):
    """ScaleGMN whose features of neurons are multiplied by factors near 1, which break scales in a bounded way."""

    name = "quasi_scalegmn"

    epsilon: float = 0.1
    """Factors are between 1 - epsilon and 1 + epsilon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epsilon < 1:
            self.refuse([f"epsilon: found {self.epsilon}, expected between 0 and 1; for no factors use model scalegmn"])

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

        x_i = alpha_i * (A_v b_i + probes_i)       alpha_i = 1 + epsilon sin(MLP(s_i)),  componentwise
        s_i = log10 ||[W_i, b_i]||, log10 ||outgoing weights of i||, |b_i| / ||[W_i, b_i]||

    s_i moves with permutations and is the same for all signs, so these are kept exactly: of tanh and sine networks the
    model is as exact as ScaleGMN, and knows sizes. Positive scales q of relu neurons shift s_i by log10 q, and the
    result moves: no factor by more than 2 epsilon, and the output in proportion to epsilon.

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
        self.factors = MLP(NUM_NEURON_STATISTICS, (config.hidden_dim,), config.hidden_dim)

    def added_features(
        self, nets: Sequence[NetParams], read: Sequence[NetParams], probes: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        """What makes x_i = A_v b_i the product above, per batch and layer of nodes [B, n_l, d]."""
        added = []
        for index, (params, of_model) in enumerate(zip(nets, read, strict=True)):
            features = [self.node_linear(x) for x in of_model.node_features()]
            of_probes = probes[index] if probes else [torch.zeros_like(x) for x in features]
            new, hidden = list(of_probes), zip(params.spec.node_layers[:-1], neuron_statistics(params), strict=False)
            for (_, place), statistics in hidden:
                change = self.config.epsilon * torch.sin(self.factors(statistics))
                new[place] = of_probes[place] + change * (features[place] + of_probes[place])
            added.append(new)
        return added
