"""Optimiser and learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn


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
    """Steps over which the learning rate rises linearly."""

    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant (as published), or a half cosine that ends at zero with the last epoch."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            found = self.warmup_steps
            raise ValueError(f"optimization.scheduler_args.warmup_steps: found {found}, expected 0 or more")


@dataclass(frozen=True)
class OptimizationConfig:
    """How the model is fitted."""

    clip_grad_max_norm: float | None = 10.0
    """Gradients are scaled down to this norm; null: never."""

    optimizer_args: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""

    scheduler_args: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate schedule."""

    def __post_init__(self) -> None:
        norm = self.clip_grad_max_norm
        if norm is not None and not norm > 0:
            raise ValueError(f"optimization.clip_grad_max_norm: found {norm}, expected above 0, or null")


def build_optimizer(
    config: OptimizationConfig, parameters: Iterable[nn.Parameter], num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and its schedule for a run of `num_steps` steps."""
    options = config.optimizer_args
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, weight_decay=options.weight_decay, amsgrad=options.amsgrad, fused=True
    )
    warmup, decay = config.scheduler_args.warmup_steps, config.scheduler_args.decay

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if decay == "constant" or step < warmup:
            return rise
        return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup)))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
