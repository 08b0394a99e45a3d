"""Optimiser and learning rate schedule: settings, and how they are built."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

PLATEAU_FACTOR = 0.1
"""Factor of the learning rate at a plateau."""


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
    """The learning rate of an optimiser: torch's schedulers, one stepped after every step, one after every epoch.

    Args:
        optimizer: its current learning rate is the one that the schedule scales.
        config: which schedule.
        num_steps: of the whole run; the learning rate stays as it is afterwards.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, num_steps: int) -> None:
        self._optimizer, self._num_steps = optimizer, num_steps
        self._per_step = _step_scheduler(optimizer, config, num_steps)
        self._per_epoch: ReduceLROnPlateau | None = None
        if config.decay == "plateau":
            # torch reduces after more than `patience` epochs without improvement
            patience = config.plateau_patience - 1
            self._per_epoch = ReduceLROnPlateau(optimizer, "max", PLATEAU_FACTOR, patience, 0.0, "abs", eps=0.0)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Called after every step of the optimiser."""
        if self._per_step.last_epoch < self._num_steps:
            self._per_step.step()

    def end_epoch(self, value: float) -> None:
        """Called after every epoch, with a validation result of which larger is better."""
        if self._per_epoch is not None:
            self._per_epoch.step(value)

    def state_dict(self) -> dict[str, Any]:
        """Position of the schedule, in plain types."""
        per_epoch = None if self._per_epoch is None else self._per_epoch.state_dict()
        return {"lr": self.lr, "per_step": self._per_step.state_dict(), "per_epoch": per_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`, or from the state of an earlier version: `step`, `reduction` (the product of
        all plateaus' factors), `best`, `since_best` (epochs without improvement).

        Raises:
            KeyError: the state has neither form.
        """
        if "since_best" in state:
            self._load_counters(state)
            return
        lr, per_step, per_epoch = (state[name] for name in ("lr", "per_step", "per_epoch"))
        self._per_step.load_state_dict(per_step)
        if self._per_epoch is not None:
            self._per_epoch.load_state_dict(per_epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def _load_counters(self, state: dict[str, Any]) -> None:
        """Takes the steps of an earlier version's state again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects a step of the optimizer before each
            for _ in range(state["step"]):
                self.step()
        if self._per_epoch is not None:
            self._per_epoch.best, self._per_epoch.num_bad_epochs = state["best"], state["since_best"]
            for group in self._optimizer.param_groups:
                group["lr"] *= state["reduction"]


def _step_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, num_steps: int) -> LRScheduler:
    """The scheduler that changes the learning rate from step to step."""
    if config.decay == "none":
        return ConstantLR(optimizer, factor=1.0)
    if config.decay == "one_cycle":
        return OneCycleLR(
            optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=num_steps, cycle_momentum=False
        )
    warmup_steps = config.warmup_steps
    schedulers: list[LRScheduler] = []
    if warmup_steps:  # lr / warmup_steps, 2 lr / warmup_steps, ..., lr
        schedulers.append(LinearLR(optimizer, 1 / warmup_steps, total_iters=max(1, warmup_steps - 1)))
    if config.decay == "cosine":
        schedulers.append(CosineAnnealingLR(optimizer, T_max=max(1, num_steps - warmup_steps)))
    if len(schedulers) == 2:
        return SequentialLR(optimizer, schedulers, milestones=[warmup_steps])
    return schedulers[0] if schedulers else ConstantLR(optimizer, factor=1.0)


def build_optimizer(
    config: OptimizationConfig, parameters: Iterable[nn.Parameter], num_steps: int, fused: bool = True
) -> tuple[torch.optim.Optimizer, Schedule]:
    """AdamW and its learning rate schedule, for a run of `num_steps` steps.

    Args:
        config: their settings.
        parameters: what is optimised.
        num_steps: of the whole run.
        fused: one kernel for all parameters; such a kernel cannot undo the scaling of an fp16 loss before gradients
            are clipped.
    """
    options = config.optimizer_args
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, weight_decay=options.weight_decay, amsgrad=options.amsgrad, fused=fused
    )
    return optimizer, Schedule(optimizer, config.scheduler_args, num_steps)
