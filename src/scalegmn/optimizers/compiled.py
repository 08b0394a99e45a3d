"""Steps of optimisers that read each parameter by itself, by compiled code (`scalegmn.engine.coordinate_steps`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from scalegmn.engine.coordinate_steps import Encoding, Rule, State, is_compiled, step
from scalegmn.optimizers.coordinates import Coordinates
from scalegmn.optimizers.features import (
    ADAM_BETAS,
    FeatureSet,
    LogarithmicFeatures,
    NormalizedFeatures,
    OptimizerState,
    time_channels,
)
from scalegmn.optimizers.networks import CoordinateMLP, UpdateNetwork
from scalegmn.optimizers.rules import AdamRelativeRule, ExponentialRule, MomentumRule, UpdateRule

_ENCODINGS = {LogarithmicFeatures: Encoding.LOGARITHMS, NormalizedFeatures: Encoding.UNITS}
_RULES = {ExponentialRule: Rule.EXPONENTIAL, MomentumRule: Rule.MOMENTUM, AdamRelativeRule: Rule.ADAM}


def has_compiled_step(
    features: FeatureSet,
    network: UpdateNetwork,
    rule: UpdateRule,
    own: Mapping[str, Tensor],
    others: Iterable[Tensor],
) -> bool:
    """Whether there is compiled code for the steps of an optimiser of these parts, with its own parameters by name
    and other tensors."""
    if type(features) not in _ENCODINGS or type(network) is not CoordinateMLP or type(rule) not in _RULES:
        return False
    return len(_layers(own)) == len(network.mlp.linears) and is_compiled([*own.values(), *others])


def _layers(own: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of a `CoordinateMLP`'s layers, up to the first that is parametrised or pruned."""
    layers: list[tuple[Tensor, Tensor]] = []
    while (name := f"network.mlp.linears.{len(layers)}.weight") in own:
        layers.append((own[name], own[name.replace("weight", "bias")]))
    return layers


def compiled_step(
    features: FeatureSet,
    rule: UpdateRule,
    own: Mapping[str, Tensor],
    flat: Tensor,
    gradients: Tensor,
    state: OptimizerState,
    coordinates: Coordinates,
) -> tuple[Tensor, OptimizerState]:
    """Parameters [B, P] and state after a step.

    Args:
        features, rule: of the optimiser, whose network is a `CoordinateMLP`.
        own: its parameters by name, for all networks, or those of each, [B, ...].
        flat, gradients: [B, P].
        state: before the step, which is used up.
        coordinates: of the parameters.
    """
    steps = state.steps + 1
    layers = _layers(own)
    if isinstance(features, NormalizedFeatures):  # the time is the same for all parameters: a part of the bias
        weight, bias = layers[0]
        time = time_channels(steps)
        layers[0] = weight[..., : features.num_odd], bias + (weight[..., features.num_odd :] * time[:, None]).sum(-1)
    new = step(
        State(flat, state.momenta, state.first, state.second),
        gradients,
        [*features.decays, *((beta, 1 - beta) for beta in ADAM_BETAS)],
        coordinates.sizes,
        _ENCODINGS[type(features)],
        layers,
        _RULES[type(rule)],
        torch.stack([number.expand(len(flat)) for number in _constants(rule, own, steps)], dim=1),
    )
    return new.parameters, OptimizerState(new.momenta, new.first, new.second, steps)


def _constants(rule: UpdateRule, own: Mapping[str, Tensor], steps: Tensor) -> list[Tensor]:
    """Those of `Rule`, [B] or one number."""
    if isinstance(rule, ExponentialRule):
        return [steps.new_tensor(rule.size)]
    rate = -own["rule.log_rate"].exp()
    if isinstance(rule, MomentumRule):
        return [rate, own["rule.log_share"].exp()]
    assert isinstance(rule, AdamRelativeRule)
    gains = own["rule.gains"] * rule.share(steps)[:, None]
    return [rate, *gains.unbind(-1), *(1 - beta**steps for beta in ADAM_BETAS)]
