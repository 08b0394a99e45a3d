"""Steps of optimisers that read each parameter by itself, by compiled code (`scalegmn.engine.coordinate_steps`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from scalegmn.engine.coordinate_steps import CoordinateOptimizer, Encoding, Rule, State, step
from scalegmn.engine.inner_training import train
from scalegmn.engine.native import has_library_for
from scalegmn.engine.relu_classifiers import Classifiers
from scalegmn.nn.mlp import MLP
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
    and other tensors: its parts are those that it was built of, neither replaced, parametrised, pruned nor tied."""
    if type(features) not in _ENCODINGS or type(network) is not CoordinateMLP or type(rule) not in _RULES:
        return False
    mlp, count = network.mlp, len(network.mlp.linears)
    kinds = [MLP, nn.ReLU, *[nn.Linear] * count, *[nn.Identity] * (count - 1)]
    if [type(module) for module in (mlp, mlp.activation, *mlp.linears, *mlp.norms)] != kinds:
        return False
    names = {f"network.mlp.linears.{index}.{name}" for index in range(count) for name in ("weight", "bias")}
    names |= {f"rule.{name}" for name, _ in rule.named_parameters()}
    return own.keys() == names and has_library_for(*own.values(), *others)


def _layers(own: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of a `CoordinateMLP`'s layers."""
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
    optimizer = _coordinate_optimizer(features, rule, own, state.steps, 1, coordinates)
    new = step(optimizer, State(flat, state.momenta, state.first, state.second), gradients)
    return new.parameters, OptimizerState(new.momenta, new.first, new.second, state.steps + 1)


def compiled_training(
    features: FeatureSet,
    rule: UpdateRule,
    own: Mapping[str, Tensor],
    flat: Tensor,
    state: OptimizerState,
    coordinates: Coordinates,
    classifiers: Classifiers,
    max_loss: float,
) -> tuple[Tensor, OptimizerState, Tensor, Tensor]:
    """Parameters [B, P] and state after the steps of `classifiers`, the losses before each [B, T], and which networks
    diverged [B] (`scalegmn.engine.inner_training.train`). Arguments as of `compiled_step`."""
    num_steps = len(classifiers.rows)
    optimizer = _coordinate_optimizer(features, rule, own, state.steps, num_steps, coordinates)
    before = State(flat, state.momenta, state.first, state.second)
    new, losses, diverged = train(optimizer, classifiers, before, max_loss)
    after = OptimizerState(new.momenta, new.first, new.second, state.steps + num_steps)
    return new.parameters, after, losses, diverged


def _coordinate_optimizer(
    features: FeatureSet,
    rule: UpdateRule,
    own: Mapping[str, Tensor],
    before: Tensor,
    num_steps: int,
    coordinates: Coordinates,
) -> CoordinateOptimizer:
    """For the T steps after those that B networks have taken."""
    steps = before.double() + torch.arange(1, num_steps + 1)[:, None]  # rounded, all steps and networks are alike
    layers = _layers(own)
    if isinstance(features, NormalizedFeatures):  # the time is the same for all parameters: a part of the bias
        weight, bias = layers[0]
        time = time_channels(steps)[:, :, None].float()
        layers[0] = weight[..., : features.num_odd], bias + (weight[..., features.num_odd :] * time).sum(-1)
    constants = torch.stack([number.float().expand(steps.shape) for number in _constants(rule, own, steps)], dim=-1)
    decays = [*features.decays, *((beta, 1 - beta) for beta in ADAM_BETAS)]
    encoding = _ENCODINGS[type(features)]
    return CoordinateOptimizer(decays, coordinates.sizes, encoding, layers, _RULES[type(rule)], constants)


def _constants(rule: UpdateRule, own: Mapping[str, Tensor], steps: Tensor) -> list[Tensor]:
    """Those of `Rule`, [T, B] or what expands to it."""
    if isinstance(rule, ExponentialRule):
        return [steps.new_tensor(rule.size)]
    rate = -own["rule.log_rate"].exp()
    if isinstance(rule, MomentumRule):
        return [rate, own["rule.log_share"].exp()]
    assert isinstance(rule, AdamRelativeRule)
    gains = own["rule.gains"] * rule.share(steps)[..., None]
    return [rate, *gains.unbind(-1), *(1 - beta**steps for beta in ADAM_BETAS)]
