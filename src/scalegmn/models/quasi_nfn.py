"""Quasi-equivariant NFN: Monomial-NFN whose layers also rescale neurons, by how large the neurons' weights are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scalegmn.models.monomial_nfn import MonomialNFN, MonomialNFNConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.factors import NeuronFactors, epsilon_problems


@dataclass(frozen=True)
class QuasiNFNConfig(MonomialNFNConfig):
    """Monomial-NFN whose features of neurons are rescaled by factors near 1, which break scales in a bounded way."""

    name = "quasi_nfn"

    epsilon: float = 0.1
    """Factors are between 1 - epsilon and 1 + epsilon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(epsilon_problems(self.epsilon, "monomial_nfn"))

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations of hidden neurons, and signs where their activation admits these; scales are kept up to
        epsilon."""
        return frozenset({"permutation", "sign"})

    def build(self, spec: NetSpec) -> QuasiNFN:
        """The model for networks of `spec`."""
        return QuasiNFN(self, spec)


METANETWORKS.register(QuasiNFNConfig.name, QuasiNFNConfig)


class QuasiNFN(MonomialNFN):
    """F_k = alpha_k(theta) beta_k: Monomial-NFN's layers, each with a group element that depends on the network.

    beta_k is a layer of `MonomialNFN` with its activation. alpha_k are, for each channel, positive numbers alpha_i of
    the hidden neurons (`NeuronFactors`), which act on what the layer returns as scalars do:

        alpha_i W_l[i],  alpha_i b_l[i],  W_{l+1}[:, i] / alpha_i

    Each channel has numbers of its own, so that the next layer mixes channels by the sizes of a neuron's weights.
    Permutations and signs are kept exactly: of tanh and sine networks the model is as exact as Monomial-NFN. Positive
    scales of relu neurons move the output in proportion to epsilon. Monomial-NFN is the base because NFN itself keeps
    permutations alone, of which factors would break none.

    See Tran et al., Quasi-Equivariant Metanetworks, ICLR 2026, https://arxiv.org/abs/2604.23720. The equations are
    written from a summary.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: as `MonomialNFN`.
    """

    config: QuasiNFNConfig

    def __init__(self, config: QuasiNFNConfig, spec: NetSpec) -> None:
        super().__init__(config, spec)
        self.factors = NeuronFactors(config.hidden_dims[0], sum(config.hidden_dims), config.epsilon)

    def scalars(self, read: NetParams) -> list[list[Tensor]]:
        """alpha_1, alpha_2, ..., per hidden layer [B, n_l, c] each."""
        of_layers = [factors.split(self.config.hidden_dims, dim=-1) for factors in self.factors(read)]
        return [list(of_layer) for of_layer in zip(*of_layers, strict=True)]
