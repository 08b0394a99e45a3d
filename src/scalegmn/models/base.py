"""What every metanetwork and its configuration have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from scalegmn.nn.normalization import InputNormalization
from scalegmn.spec import NetParams, NetSpec


class Metanetwork(nn.Module):
    """A model whose input is a batch of networks: `model(NetParams)` gives [B, out_dim].

    Args:
        spec: the input networks.
        normalize: divide each layer's weights and biases by one scalar each, set by `fit_normalization`.
    """

    def __init__(self, spec: NetSpec, normalize: bool) -> None:
        super().__init__()
        self.spec = spec
        self.normalization = InputNormalization(spec.num_layers) if normalize else None

    def networks_at_once(self, device: torch.device) -> int:
        """How many networks a training step should pass through the model at once, the rest of a batch after them."""
        raise NotImplementedError

    def fit_normalization(self, batches: Iterable[NetParams]) -> None:
        """Sets the normalisation, if the model has one, from batches of training networks."""
        if self.normalization is not None:
            self.normalization.fit((params.weights, params.biases) for params in batches)

    def normalized(self, params: NetParams) -> NetParams:
        """The networks as the model reads them."""
        if self.normalization is None:
            return params
        return NetParams(params.spec, *self.normalization(params.weights, params.biases), params.activation)


@dataclass(frozen=True)
class ModelConfig:
    """A metanetwork's hyper-parameters; `build` makes the module for one kind of input network."""

    def wrong_choices(self) -> list[str]:
        """One sentence per field whose value is not one of its named ones, also inside sections."""
        problems = []
        for section, prefix in ((self, ""), *((getattr(self, f.name), f"{f.name}.") for f in fields(self))):
            for name, hint in get_type_hints(type(section)).items() if is_dataclass(section) else ():
                value = getattr(section, name)
                if get_origin(hint) is Literal and value not in get_args(hint):
                    problems.append(f"{prefix}{name}: found {value!r}, expected one of {get_args(hint)}")
        return problems

    def build(self, spec: NetSpec) -> Metanetwork:
        """The model for input networks of `spec`.

        Raises:
            ValueError: the configuration does not fit these networks; says what does.
        """
        raise NotImplementedError
