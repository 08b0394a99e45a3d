"""Factors near 1 of neurons that know how large the neurons' weights are (quasi-equivariant models)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams
from scalegmn.nn.mlp import MLP
from scalegmn.symmetry.statistics import NUM_NEURON_STATISTICS, neuron_statistics


class NeuronFactors(nn.Module):
    """alpha_i = 1 + epsilon sin(MLP(s_i)), componentwise, of each hidden neuron i.

        s_i = log10 ||[W_i, b_i]||, log10 ||outgoing weights of i||, |b_i| / ||[W_i, b_i]||

    Factors are permuted with the neurons and the same for all signs. Positive scales q of relu neurons shift s_i by
    log10 q, which moves no factor by more than 2 epsilon.

    See Tran et al., Quasi-Equivariant Metanetworks, ICLR 2026, https://arxiv.org/abs/2604.23720. The equations are
    written from a summary.

    Args:
        hidden_dim: width of the MLP.
        out_dim: factors of each neuron.
        epsilon: between 0 and 1.
    """

    def __init__(self, hidden_dim: int, out_dim: int, epsilon: float) -> None:
        super().__init__()
        self.mlp = MLP(NUM_NEURON_STATISTICS, (hidden_dim,), out_dim)
        self.epsilon = epsilon

    def forward(self, params: NetParams) -> list[Tensor]:
        """B networks -> per hidden layer [B, n_l, out_dim]."""
        return [1 + self.epsilon * torch.sin(self.mlp(s)) for s in neuron_statistics(params)[:-1]]


def epsilon_problems(epsilon: float, without: str) -> list[str]:
    """What is wrong with the bound of factors in a configuration.

    Args:
        epsilon: the bound.
        without: the model that has no factors.
    """
    if 0 < epsilon < 1:
        return []
    return [f"epsilon: found {epsilon}, expected between 0 and 1; for no factors use model {without}"]
