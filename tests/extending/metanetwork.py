"""A metanetwork: an MLP of the norms of each layer's weights and biases.

scalegmn train classification --import metanetwork.py --model layer_norms --conf FILE

Permutations and signs of hidden neurons change no norm, so that the model keeps both exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec


@dataclass(frozen=True)
class LayerNormsConfig(ModelConfig):
    """An MLP of the norms of each layer's weights and biases."""

    name = "layer_norms"

    hidden_dim: int = 16
    """Width of the hidden layer."""

    def __post_init__(self) -> None:
        self.refuse(self.wrong_choices() + self.wrong_numbers(["hidden_dim", "out_dim"]))

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations and signs of hidden neurons."""
        return frozenset({"permutation", "sign"})

    def build(self, spec: NetSpec) -> LayerNorms:
        """The model for networks of `spec`."""
        self.check_output("vector", self.name)
        return LayerNorms(self, spec)


METANETWORKS.register(LayerNormsConfig.name, LayerNormsConfig)


class LayerNorms(Metanetwork):
    """y = MLP([|W_1|, |b_1|, ..., |W_L|, |b_L|])."""

    def __init__(self, config: LayerNormsConfig, spec: NetSpec) -> None:
        super().__init__(config, spec, normalization=None)
        dims = (2 * spec.num_layers, config.hidden_dim)
        self.mlp = nn.Sequential(nn.Linear(*dims), nn.SiLU(), nn.Linear(config.hidden_dim, config.out_dim))

    def forward(self, params: NetParams) -> Tensor:
        """B networks -> [B, out_dim]."""
        self.validate_spec(params.spec)
        norms = [tensor.flatten(1).norm(dim=1) for tensor in (*params.weights, *params.biases)]
        return self.mlp(torch.stack(norms, dim=1))
