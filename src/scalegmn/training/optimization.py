"""Optimiser and learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

PLATEAU_FACTOR = 0.1
"""What a plateau multiplies the learning rate by."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-3
    """Learning rate after the warm-up."""

    weight_decay: float = 1e-2
    """Decoupled weight decay."""

    amsgrad: bool = False
    """Step sizes that never grow again (Reddi et al., 2018), as Neural Graphs and DWSNet were trained."""

    def __post_init__(self) -> None:
        problems = [] if self.lr > 0 else [f"lr: found {self.lr}, expected above 0"]
        if not self.weight_decay >= 0:
            problems.append(f"weight_decay: found {self.weight_decay}, expected 0 or more")
        if problems:
            raise ValueError("; ".join(f"optimization.optimizer_args.{problem}" for problem in problems))


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps of a run."""

    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly; none and one_cycle have no such warm-up."""

    decay: Literal["constant", "cosine", "one_cycle", "plateau", "none"] = "constant"
    """After the warm-up: constant (as published); cosine: half a cosine that ends at zero with the last epoch; plateau:
    a tenth whenever validation has not improved for plateau_patience epochs. one_cycle (Smith and Topin, 2019): up from
    1/25 over the first 30 % of the steps, then down to nearly zero; none: the same from the first step on."""

    plateau_patience: int = 10
    """For plateau: epochs without a better validation result before the learning rate falls."""

    def __post_init__(self) -> None:
        problems = [
            f"optimization.scheduler_args.{name}: found {getattr(self, name)}, expected {least} or more"
            for name, least in (("warmup_steps", 0), ("plateau_patience", 1))
            if getattr(self, name) < least
        ]
        if problems:
            raise ValueError("; ".join(problems))

    def factor(self, step: int, num_steps: int) -> float:
        """What the learning rate is multiplied by at a step, from 0, of a run of `num_steps`."""
        if self.decay == "none":
            return 1.0
        if self.decay == "one_cycle":
            peak = max(1.0, 0.3 * num_steps - 1)
            if step <= peak:
                return _cosine(1 / 25, 1.0, step / peak)
            return _cosine(1.0, 1 / 25e4, min(1.0, (step - peak) / max(1.0, num_steps - 1 - peak)))
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay != "cosine":
            return 1.0
        return _cosine(1.0, 0.0, min(1.0, (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)))


def _cosine(start: float, end: float, share: float) -> float:
    """From start to end by half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class OptimizationConfig:
    """How the model is fitted."""

    clip_grad_max_norm: float | None = 10.0
    """Gradients are scaled down to this norm; null: never."""

    ema_decay: float | None = None
    """Validate, test and keep an exponential moving average of the parameters: after every step, average = ema_decay
    average + (1 - ema_decay) parameters; null: the parameters themselves."""

    optimizer_args: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""

    scheduler_args: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate schedule."""

    def __post_init__(self) -> None:
        norm, decay = self.clip_grad_max_norm, self.ema_decay
        problems = []
        if norm is not None and not norm > 0:
            problems.append(f"clip_grad_max_norm: found {norm}, expected above 0, or null")
        if decay is not None and not 0 <= decay < 1:
            problems.append(f"ema_decay: found {decay}, expected 0 or more and less than 1, or null")
        if problems:
            raise ValueError("; ".join(f"optimization.{problem}" for problem in problems))


class Schedule:
    """Sets the optimiser's learning rate: lr factor(step), times what plateaus have left of it.

    Args:
        optimizer: whose learning rate.
        config: which schedule.
        lr: the learning rate that it multiplies.
        num_steps: of the whole run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, lr: float, num_steps: int) -> None:
        self._optimizer, self._config, self._lr, self._num_steps = optimizer, config, lr, num_steps
        self.load_state_dict({"step": 0, "reduction": 1.0, "best": -math.inf, "since_best": 0})

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._optimizer.param_groups[0]["lr"]

    def step(self) -> None:
        """After every step of the optimiser."""
        self._state["step"] += 1
        self._set()

    def end_epoch(self, value: float) -> None:
        """After every epoch, with a validation result of which larger is better."""
        state = self._state
        state["since_best"] = 0 if value > state["best"] else state["since_best"] + 1
        state["best"] = max(state["best"], value)  # this way round a NaN is never the best
        if self._config.decay == "plateau" and state["since_best"] >= self._config.plateau_patience:
            state["reduction"] *= PLATEAU_FACTOR
            state["since_best"] = 0
        self._set()

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, in plain types."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`."""
        self._state = dict(state)
        self._set()

    def _set(self) -> None:
        factor = self._config.factor(self._state["step"], self._num_steps) * self._state["reduction"]
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * factor


def build_optimizer(
    config: OptimizationConfig, parameters: Iterable[nn.Parameter], num_steps: int, fused: bool = True
) -> tuple[torch.optim.Optimizer, Schedule]:
    """AdamW and its schedule for a run of `num_steps` steps.

    Args:
        config: their settings.
        parameters: what is fitted.
        num_steps: of the whole run.
        fused: one kernel for all parameters; it cannot undo the scaling of a fp16 loss before gradients are clipped.
    """
    options = config.optimizer_args
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, weight_decay=options.weight_decay, amsgrad=options.amsgrad, fused=fused
    )
    return optimizer, Schedule(optimizer, config.scheduler_args, options.lr, num_steps)
