"""An MLP of all parameters of a network: the baseline that is blind to every symmetry."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.heads import ParametersHead
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.mlp import Dropout
from scalegmn.nn.normalization import FeatureBatchNorm, InputNormalization


@dataclass(frozen=True)
class FlatMLPConfig(ModelConfig):
    """An MLP of all weights and biases in a row (baseline of DWSNets, section 7, and of NFN, section 4)."""

    name = "mlp"

    hidden_dim: int = 32
    """Width of the hidden layers."""

    num_hidden: int = 4
    """Layers of this width after the first."""

    batch_norm: bool = True
    """BatchNorm before the activation of each of them."""

    dropout: float = 0.0
    """Dropout after every activation."""

    def __post_init__(self) -> None:
        counts = ["hidden_dim", "num_hidden", "out_dim"]
        self.refuse(self.wrong_choices() + self.wrong_numbers(counts, ["dropout"]))

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """None."""
        return frozenset()

    def build(self, spec: NetSpec) -> FlatMLP:
        """The model for networks of `spec`."""
        return FlatMLP(self, spec)


METANETWORKS.register(FlatMLPConfig.name, FlatMLPConfig)


class FlatMLP(Metanetwork):
    """Linear(D -> h), ReLU, then num_hidden times Linear(h -> h), [BatchNorm], ReLU, and Linear(h -> out_dim or k D).

    D parameters in the order of `NetParams.flatten`, k heads.

    Args:
        config: the hyper-parameters; inputs are normalised unless `normalize` is false.
        spec: the input networks.
    """

    def __init__(self, config: FlatMLPConfig, spec: NetSpec) -> None:
        normalization = None if config.normalize is False else InputNormalization(spec.num_layers, centred=True)
        super().__init__(config, spec, normalization)
        h, d = config.hidden_dim, spec.num_parameters
        layers = [nn.Linear(d, h), nn.ReLU(), Dropout(config.dropout)]
        for _ in range(config.num_hidden):
            norm = [FeatureBatchNorm(h)] if config.batch_norm else []
            layers += [nn.Linear(h, h), *norm, nn.ReLU(), Dropout(config.dropout)]
        out_dim = config.heads * d if config.changes_parameters else config.out_dim
        self.layers = nn.Sequential(*layers, nn.Linear(h, out_dim))

    def forward(self, params: NetParams) -> Tensor | NetParams:
        """B networks -> [B, out_dim], or changes of their parameters.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        self.validate_spec(params.spec)
        output: Tensor = self.layers(self.normalized(params).flatten())
        if not isinstance(self.head, ParametersHead):
            return output
        return self.joined_heads([params.unflatten(rows) for rows in output.chunk(self.head.heads, dim=1)])
