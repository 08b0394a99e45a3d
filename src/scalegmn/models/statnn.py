"""StatNN: an MLP of statistics of a network's weights and biases (Unterthiner et al., 2020), or of invariant ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization, StatisticsNormalization
from scalegmn.nn.statistics import NUM_STATISTICS, raw_statistics
from scalegmn.symmetry.statistics import NUM_LAYER_STATISTICS, NUM_NETWORK_STATISTICS, at_depth, invariant_statistics


@dataclass(frozen=True)
class StatNNConfig(ModelConfig):
    """An MLP of the mean, variance and quantiles of each layer's weights and biases."""

    name = "statnn"
    supports_multiple_architectures = True

    features: Literal["raw", "invariant"] = "raw"
    """raw: mean, variance and quantiles of weights and biases as they are, which move when neurons are rescaled;
    invariant: statistics that no permutation, sign or scale of neurons moves, standardised over the training split."""

    hidden_dim: int = 1000
    """Width of both hidden layers."""

    max_hidden_layers: int | None = None
    """Hidden layers that there is room for; null: as many as the networks have. More than they have: the model reads
    networks of different depths, and statistics of layers that a network lacks are 0."""

    dropout: float = 0.0
    """Dropout after every activation."""

    def __post_init__(self) -> None:
        counts = ["hidden_dim", "out_dim", "max_hidden_layers"]
        problems = self.wrong_choices() + self.wrong_numbers(counts, ["dropout"])
        if self.features == "invariant" and self.normalize:
            problems.append("normalize: found True, but invariant features are standardised themselves; use null")
        self.refuse(problems + self.wrong_output("statistics describe no single parameter"))

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations; of invariant features also signs and scales."""
        return frozenset({"permutation"} if self.features == "raw" else {"permutation", "sign", "scale"})

    def build(self, spec: NetSpec) -> StatNN:
        """The model for networks of `spec`."""
        return StatNN(self, spec)


METANETWORKS.register(StatNNConfig.name, StatNNConfig)


class StatNN(Metanetwork):
    """Per layer the statistics of weights and biases, then Linear, ReLU, Linear, ReLU, Linear.

    `features: invariant` reads those of `scalegmn.symmetry.statistics`.

    It reads networks of any widths and, with `max_hidden_layers`, of other depths.

    Args:
        config: the hyper-parameters; inputs are read as they are unless `normalize` is true.
        spec: the input networks.
    """

    one_pass = True

    def __init__(self, config: StatNNConfig, spec: NetSpec) -> None:
        max_layers = config.max_hidden_layers + 1 if config.max_hidden_layers else spec.num_layers
        super().__init__(config, spec, InputNormalization(max_layers, centred=True) if config.normalize else None)
        self.max_layers = max_layers
        hidden = (config.hidden_dim, config.hidden_dim)
        in_dim = 2 * NUM_STATISTICS * self.max_layers
        if config.features == "invariant":
            in_dim = NUM_LAYER_STATISTICS * self.max_layers + NUM_NETWORK_STATISTICS
            self.statistics_normalization = StatisticsNormalization(in_dim)
        self.mlp = MLP(in_dim, hidden, config.out_dim, "relu", layer_norm=False, dropout=config.dropout)

    def forward(self, nets: NetParams | Sequence[NetParams]) -> Tensor:
        """B networks -> [B, out_dim].

        Raises:
            ValueError: the networks have too many layers.
        """
        batches = [nets] if isinstance(nets, NetParams) else nets
        for params in batches:
            self.validate_spec(params.spec)
        if self.statistics_normalization is not None:
            invariant: Tensor = self.mlp(self.statistics_normalization(torch.cat(list(map(self.statistics, batches)))))
            return invariant
        read = [self.normalized(params) for params in batches]
        rows = raw_statistics([(params.weights, params.biases) for params in read])  # [B, 14 L] each
        width = 2 * NUM_STATISTICS * self.max_layers
        output: Tensor = self.mlp(torch.cat([pad(row, (0, width - row.shape[1])) for row in rows]))
        return output

    def statistics(self, params: NetParams) -> Tensor:
        """The invariant statistics, [B, S]; NaN of layers that the networks do not have."""
        layers, network = invariant_statistics(params)
        return torch.cat([at_depth(layers, self.max_layers).flatten(1), network], dim=1)

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`."""
        if spec.num_layers > self.max_layers:
            raise ValueError(f"the model was built for {self.max_layers} layers, as in {self.spec}, found {spec}")
