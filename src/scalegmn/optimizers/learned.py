"""Learned optimisers: features, a network, and a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.networks import ACTIVATIONS, NetParams, NetSpec
from scalegmn.optimizers.compiled import compiled_step, compiled_training, has_compiled_step
from scalegmn.optimizers.coordinates import Coordinates, all_finite
from scalegmn.optimizers.features import FEATURES, OptimizerState
from scalegmn.optimizers.networks import (
    CoordinateMLP,
    NeuralGraphGNN,
    NeuralGraphTransformer,
    StreamOptimizer,
    TensorLSTM,
    UniversalNFN,
    UpdateNetwork,
)
from scalegmn.optimizers.problems import InnerProblem, Problem
from scalegmn.optimizers.rules import RULES, Moments
from scalegmn.registry import Registry
from scalegmn.symmetry.canonicalize import scale_to_canonical


@dataclass(frozen=True)
class LearnedOptimizerConfig:
    """A learned optimiser."""

    network: str = "scalegmn"
    """What reads the channels of all parameters: ff, mlp_lopt and small_fc_lopt (an MLP of each parameter), lstm, nfn,
    ng_gnn, ng_t, scalegmn_forward, scalegmn (bidirectional)."""

    features: Literal["ng", "unf", "factored"] = "unf"
    """The channels of a parameter: 14 of Neural Graphs, 19 of UNF; factored: 29 after small_fc_lopt, with means over
    rows and columns of weights."""

    rule: Literal["ng", "mlp_lopt", "unf", "adam"] = "adam"
    """How outputs change a parameter; adam: relative to Adam's step, which it is before training."""

    rate: float = 3e-3
    """rule adam: Adam's learning rate before training."""

    half_life: float | None = None
    """rule adam: steps in which what the network adds to Adam's step loses half of its size, so that long trainings end
    as untrained ones do; null: it stays."""

    canonical: bool | None = None
    """Read and update networks whose positive scales are removed (each neuron of relu networks has incoming weights of
    norm 1), and take the change back: the optimiser commutes with rescaling. null: for scalegmn alone."""

    hidden_dim: int = 32
    """Width d of the network."""

    num_layers: int = 2
    """Layers of networks on graphs."""

    def __post_init__(self) -> None:
        problems = []
        if self.network not in UPDATE_NETWORKS:
            problems.append(f"network: found {self.network!r}, expected one of {', '.join(UPDATE_NETWORKS)}")
        for name in ("hidden_dim", "num_layers"):
            if getattr(self, name) < 1:
                problems.append(f"{name}: found {getattr(self, name)}, expected at least 1")
        if not self.rate > 0:
            problems.append(f"rate: found {self.rate}, expected above 0")
        if self.half_life is not None and not self.half_life > 0:
            problems.append(f"half_life: found {self.half_life}, expected above 0, or null")
        if self.half_life is not None and self.rule != "adam":
            problems.append(f"half_life: found {self.half_life} with rule {self.rule}, expected rule adam, or null")
        if self.network == "ng_t" and self.hidden_dim % 4:
            problems.append(f"hidden_dim: found {self.hidden_dim}, expected a multiple of 4 heads")
        if problems:
            raise ValueError("; ".join(f"optimizer.{problem}" for problem in problems))

    @property
    def is_canonical(self) -> bool:
        """`canonical`, or what null stands for."""
        return self.network.startswith("scalegmn") if self.canonical is None else self.canonical

    def build(self, spec: NetSpec) -> LearnedOptimizer:
        """The optimiser for networks such as those of `spec`."""
        return LearnedOptimizer(self, spec)


STEPS_AT_ONCE = 32
"""Of compiled code, which draws the images of all of them before the first one."""


class UpdateInputs(NamedTuple):
    """What an optimiser reads in one step, in the networks' own coordinates."""

    parameters: Tensor
    """[B, P]."""

    gradients: Tensor
    """[B, P]."""

    momenta: Tensor
    """[B, P, M], with the gradients."""

    first: Tensor
    """[B, P]."""

    second: Tensor
    """[B, P]."""

    steps: Tensor
    """[B], from 1."""

    units: Tensor
    """[B, P]: a parameter divided by it, and a gradient times it, are those of the canonical network."""


class Trained(NamedTuple):
    """B networks after T steps."""

    parameters: Tensor
    """[B, P]; of networks that diverged, the last finite ones."""

    state: OptimizerState
    """Of use for networks that did not diverge."""

    losses: Tensor
    """[B, T], on the batch of each step, before the step; infinite from where a network diverged."""

    diverged: Tensor
    """[B] bool."""


class LearnedOptimizer(nn.Module):
    """p <- p + rule(network(features of all parameters)).

    With `canonical`, all is done in the coordinates p / r, r_i the factor that takes a neuron of the canonical network
    to that of the given one: gradients are multiplied by r, and the change is, too. So the optimiser commutes with
    rescaling exactly: r of rescaled networks is q r.

    Args:
        config: the hyper-parameters.
        spec: networks under training. It trains others, too: of other widths and depths, and with `nfn` of other
            widths.
    """

    def __init__(self, config: LearnedOptimizerConfig, spec: NetSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.features = FEATURES[config.features]
        self.network = UPDATE_NETWORKS[config.network](config, spec)
        self.rule = RULES[config.rule](config.rate, config.half_life or math.inf)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """With which symmetries of networks of `spec` the optimiser commutes."""
        scales = any(ACTIVATIONS[layer.activation].group.scales for layer in self.spec.layers[:-1])
        return self.network.exact_symmetries | ({"scale"} if self.config.is_canonical and scales else set())

    def networks_at_once(self, device: torch.device) -> int:
        """All that there are: inner problems have one size, which the configuration chooses."""
        return 2**31

    def inputs(
        self, params: NetParams, flat: Tensor, gradients: Tensor, state: OptimizerState
    ) -> tuple[UpdateInputs, OptimizerState]:
        """What `forward` reads in a step, and the state after it.

        Args:
            params: B networks, for their architecture.
            flat: their parameters, [B, P].
            gradients: [B, P].
            state: before the step.
        """
        state = self.features.advanced(state, gradients)
        units = torch.ones_like(flat)
        if self.config.is_canonical:
            element = scale_to_canonical(params.unflatten(flat)).inverse()
            units = element.act_on_changes(params.unflatten(units)).flatten()
        return UpdateInputs(flat, gradients, state.momenta, state.first, state.second, state.steps, units), state

    def forward(self, inputs: UpdateInputs, coordinates: Coordinates) -> Tensor:
        """The changes of all parameters, [B, P]."""
        r = inputs.units
        numbers = torch.cat(
            [(inputs.parameters / r)[..., None], (inputs.gradients * r)[..., None], inputs.momenta * r[..., None]], -1
        )
        moments = Moments(inputs.first * r, inputs.second * r.square(), inputs.steps)
        channels = self.features.encode(numbers, moments.second, inputs.steps, coordinates)
        changes: Tensor = r * self.rule(self.network(channels, coordinates), moments)
        return changes

    @torch.no_grad()
    def step(
        self,
        params: NetParams,
        flat: Tensor,
        gradients: Tensor,
        state: OptimizerState,
        coordinates: Coordinates,
        own: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, OptimizerState]:
        """Parameters [B, P] and the state after a step; no derivatives.

        Args:
            params, flat, gradients, state: as in `inputs`; the state is used up, and its memory may hold the new one.
            coordinates: of the parameters.
            own: parameters of the optimiser by name, others for each network, [B, ...]; None: this one's for all.
        """
        given = dict(self.named_parameters()) if own is None else own
        if self._is_compiled(given, (flat, gradients, *state)):
            return compiled_step(self.features, self.rule, given, flat, gradients, state, coordinates)
        inputs, state = self.inputs(params, flat, gradients, state)
        changes = self(inputs, coordinates) if own is None else self._each(own, inputs, coordinates)
        return flat + changes, state

    def _is_compiled(self, own: Mapping[str, Tensor], others: Iterable[Tensor]) -> bool:
        """Whether there is compiled code for its steps, with parameters of its own by name, and other tensors."""
        has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        is_plain = type(self) is LearnedOptimizer and not self.config.is_canonical and not has_hooks
        return is_plain and has_compiled_step(self.features, self.network, self.rule, own, others)

    @torch.no_grad()
    def train_networks(
        self,
        problem: Problem,
        flat: Tensor,
        state: OptimizerState,
        num_steps: int,
        own: Mapping[str, Tensor] | None = None,
        max_loss: float = math.inf,
    ) -> Trained:
        """T steps of networks. One diverges, and stays as it is, where its loss is not below `max_loss` or its loss,
        gradient or new parameters are not finite.

        Args:
            problem: B networks, and their batches from step 0 on.
            flat: the parameters [B, P], or [k B, P] of k copies of all networks, which see the same batches.
            state: before the steps; it is used up.
            num_steps: T.
            own: as in `step`.
            max_loss: of networks that have not diverged.
        """
        coordinates, given = Coordinates(problem.params.spec), dict(self.named_parameters()) if own is None else own
        copies = len(flat) // max(1, len(problem.params))
        alive, losses = torch.ones(len(flat), dtype=torch.bool, device=flat.device), [flat.new_empty(len(flat), 0)]
        if (
            type(problem) is InnerProblem
            and problem.is_relu_chain
            and self._is_compiled(given, (flat, *state, problem.data.pixels["train"]))
        ):
            for start in range(0, num_steps, STEPS_AT_ONCE):
                steps = range(start, min(start + STEPS_AT_ONCE, num_steps))
                classifiers = problem.classifiers(steps, copies)
                new, state, part, diverged = compiled_training(
                    self.features, self.rule, given, flat, state, coordinates, classifiers, max_loss
                )
                losses.append(torch.where(alive[:, None], part, torch.inf))
                flat = torch.where(alive[:, None], new, flat)
                alive &= ~diverged
        else:
            for step in range(num_steps):
                images, labels = problem.batch(step)
                if copies > 1:
                    images, labels = torch.cat([images] * copies), torch.cat([labels] * copies)
                loss, gradients = problem.losses_and_gradients(flat, (images, labels))
                alive &= loss.isfinite() & (loss < max_loss) & all_finite(gradients)
                losses.append(torch.where(alive, loss, torch.inf)[:, None])
                gradients = torch.where(alive[:, None], gradients, 0)
                new, state = self.step(problem.params, flat, gradients, state, coordinates, own)
                alive &= all_finite(new)
                flat = torch.where(alive[:, None], new, flat)
        return Trained(flat, state, torch.cat(losses, dim=1), ~alive)

    def _each(self, own: Mapping[str, Tensor], inputs: UpdateInputs, coordinates: Coordinates) -> Tensor:
        """The changes by as many optimisers as networks."""

        def one(parameters: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
            given = UpdateInputs(*(tensor[None] for tensor in inputs))
            changes: Tensor = torch.func.functional_call(self, dict(parameters), (given, coordinates))
            return changes[0]

        if self.network.is_batched:
            changes: Tensor = torch.func.vmap(one)(own, tuple(inputs))
            return changes
        networks = range(len(inputs.parameters))
        rows = [
            ({name: part[b] for name, part in own.items()}, tuple(tensor[b] for tensor in inputs)) for b in networks
        ]
        return torch.stack([one(*row) for row in rows])


def _ff(config: LearnedOptimizerConfig, spec: NetSpec) -> UpdateNetwork:
    """Neural Graphs' FF: two hidden layers of twice the width."""
    return CoordinateMLP(FEATURES[config.features], (2 * config.hidden_dim, 2 * config.hidden_dim))


def _streams(config: LearnedOptimizerConfig, spec: NetSpec, bidirectional: bool) -> UpdateNetwork:
    """ScaleGMN."""
    features = FEATURES[config.features]
    return StreamOptimizer(features, spec, config.hidden_dim, config.num_layers, bidirectional)


BuildNetwork = Callable[[LearnedOptimizerConfig, NetSpec], UpdateNetwork]

UPDATE_NETWORKS: Registry[BuildNetwork] = Registry("network of a learned optimiser")
"""Name -> what builds a network."""

UPDATE_NETWORKS.register("ff", _ff)
UPDATE_NETWORKS.register(
    "mlp_lopt", lambda config, spec: CoordinateMLP(FEATURES[config.features], (config.hidden_dim, config.hidden_dim))
)
UPDATE_NETWORKS.register("small_fc_lopt", lambda config, spec: CoordinateMLP(FEATURES[config.features], (4, 4)))
UPDATE_NETWORKS.register("lstm", lambda config, spec: TensorLSTM(FEATURES[config.features], config.hidden_dim))
UPDATE_NETWORKS.register("nfn", lambda config, spec: UniversalNFN(FEATURES[config.features], spec, config.hidden_dim))
UPDATE_NETWORKS.register(
    "ng_gnn",
    lambda config, spec: NeuralGraphGNN(FEATURES[config.features], spec, config.hidden_dim, config.num_layers),
)
UPDATE_NETWORKS.register(
    "ng_t",
    lambda config, spec: NeuralGraphTransformer(FEATURES[config.features], spec, config.hidden_dim, config.num_layers),
)
UPDATE_NETWORKS.register("scalegmn_forward", lambda config, spec: _streams(config, spec, bidirectional=False))
UPDATE_NETWORKS.register("scalegmn", lambda config, spec: _streams(config, spec, bidirectional=True))
