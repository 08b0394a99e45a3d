"""Learning to optimise: meta-training of a learned optimiser."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalegmn.networks import NetSpec
from scalegmn.optimizers.coordinates import Coordinates
from scalegmn.optimizers.evaluation import learned_curves
from scalegmn.optimizers.features import OptimizerState
from scalegmn.optimizers.learned import LearnedOptimizer
from scalegmn.optimizers.meta_gradients import MAX_LOSS, Population, first_order, persistent_evolution
from scalegmn.optimizers.problems import ImageData, InnerProblem, ProblemConfig, architectures


@dataclass(frozen=True)
class MetaConfig:
    """How an optimiser is trained."""

    method: Literal["first_order", "evolution"] = "first_order"
    """first_order: through the loss right after each step, as in Neural Graphs; evolution: persistent evolution
    strategies, through whole trainings, as in UNF."""

    networks: int = 16
    """Inner networks per outer step."""

    horizon: int = 100
    """Steps that an inner network is trained."""

    outer_steps: int = 50
    """Outer steps per epoch, after which the optimiser is validated."""

    next_batch: bool = False
    """first_order: the loss after a step is that on the batch of the next step, which favours steps that generalise;
    false: as published, on the batch that the step has seen."""

    window: int = 50
    """evolution: inner steps per outer step."""

    sigma: float = 0.01
    """evolution: standard deviation of the perturbations of the optimiser's parameters."""

    objective: Literal["mean", "final"] = "final"
    """evolution: the mean loss of an inner network's training, or its last one."""

    eval_networks: int = 8
    """Inner networks per architecture that validate, and that test, the optimiser."""

    eval_steps: int | None = None
    """Steps that these are trained; null: horizon."""

    def __post_init__(self) -> None:
        counts = ("networks", "horizon", "outer_steps", "window", "eval_networks")
        problems = [
            f"{name}: found {getattr(self, name)}, expected at least 1" for name in counts if getattr(self, name) < 1
        ]
        if self.eval_steps is not None and self.eval_steps < 1:
            problems.append(f"eval_steps: found {self.eval_steps}, expected at least 1, or null")
        if not self.sigma > 0:
            problems.append(f"sigma: found {self.sigma}, expected above 0")
        if self.method == "evolution" and self.horizon % max(1, self.window):
            problems.append(f"horizon: found {self.horizon}, expected a multiple of window, {self.window}")
        if problems:
            raise ValueError("; ".join(f"meta.{problem}" for problem in problems))


class LearnedOptimization:
    """Meta-training as a task of the training loop: a batch is one outer step, its networks are the inner ones.

    The loss of an outer step is a scalar whose gradient is the meta-gradient (`MetaGradient.surrogate`). The population
    of persistent evolution is carried from step to step and is part of a run's state. Several processes share the inner
    networks of each step.

    Args:
        problem: the inner problems.
        meta: how the optimiser is trained.

    Raises:
        ValueError: the images cannot be read, or evolution is asked for with several architectures.
    """

    monitor = "loss"
    maximize = False

    def __init__(self, problem: ProblemConfig, meta: MetaConfig) -> None:
        self.problem, self.meta = problem, meta
        self.data = ImageData(problem)
        self.specs = architectures(problem, self.data)
        if meta.method == "evolution" and len(self.specs) > 1:
            found = f"found {len(self.specs)} architectures, but evolution goes on with the same inner networks"
            raise ValueError(f"problem.hidden_dims, problem.activations: {found}; use one, or method: first_order")
        self.steps_per_epoch = meta.outer_steps
        self.population: Population | None = None
        self.num_diverged = 0

    @property
    def spec(self) -> NetSpec:
        """The first architecture."""
        return self.specs[0]

    @property
    def data_id(self) -> str:
        """A checksum of the images and of what is drawn with them."""
        return hashlib.sha256(repr((self.data.source, asdict(self.problem))).encode()).hexdigest()

    def prepare(self, model: nn.Module) -> None:
        """Nothing of an optimiser depends on data."""

    def shuffle(self, generator: torch.Generator) -> Sequence[Tensor]:
        """The inner networks of each outer step of an epoch."""
        return [torch.arange(self.meta.networks)] * self.meta.outer_steps

    def train_batches(
        self, batches: Sequence[Tensor], generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[InnerProblem, Tensor]]:
        """A new problem for each outer step."""
        for rows in batches:
            yield InnerProblem.draw(self.problem, self.data, len(rows), generator), rows

    def loss(self, model: nn.Module, inputs: InnerProblem, target: Tensor) -> Tensor:
        """A scalar with the value and gradient of an outer step, the mean over its inner networks."""
        optimizer = _optimizer(model)
        if self.meta.method == "first_order":
            gradient = first_order(optimizer, inputs, self.meta.horizon, self.meta.next_batch)
        else:
            meta, generator = self.meta, torch.Generator().manual_seed(inputs.seed)
            size = sum(parameter.numel() for parameter in optimizer.parameters())
            noise = torch.randn(inputs.total, size, generator=generator)[inputs.rows]
            windows = meta.horizon // meta.window
            offset = inputs.rows * windows // inputs.total * meta.window
            gradient, self.population = persistent_evolution(
                optimizer,
                inputs,
                self.population,
                noise,
                meta.window,
                meta.horizon,
                meta.sigma,
                meta.objective,
                offset,
            )
        self.num_diverged += gradient.num_diverged
        return gradient.surrogate(list(optimizer.parameters()))

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """`loss` and `accuracy` on the images of a split after inner trainings of new networks; `train_loss`, the mean
        of their last losses on batches; `diverged`, how many inner networks have in meta-training so far."""
        optimizer, meta = _optimizer(model), self.meta
        generator = torch.Generator().manual_seed({"train": 1, "val": 2, "test": 3}[split])
        losses, accuracies, last = [], [], []
        for spec in self.specs:
            problem = InnerProblem.draw(self.problem, self.data, meta.eval_networks, generator, spec)
            curves = learned_curves(optimizer, problem, meta.eval_steps or meta.horizon)
            loss, accuracy = problem.measure(curves.parameters, split)
            losses.append(loss.nan_to_num(MAX_LOSS).clamp_max(MAX_LOSS))
            accuracies.append(accuracy)
            last.append(curves.losses[:, -10:].nan_to_num(MAX_LOSS).clamp_max(MAX_LOSS).mean(1))
        means = (torch.cat(parts).mean().item() for parts in (losses, accuracies, last))
        return dict(zip(("loss", "accuracy", "train_loss"), means, strict=True)) | {
            "diverged": float(self.num_diverged)
        }

    def state(self) -> dict[str, Tensor]:
        """The population of persistent evolution, and the number of inner networks that diverged."""
        state = {"num_diverged": torch.tensor(self.num_diverged)}
        if self.population is not None:
            population = self.population._asdict()
            inner: OptimizerState = population.pop("state")
            state |= population
            state |= inner._asdict()
        return state

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from `state`."""
        self.num_diverged = int(state["num_diverged"])
        if "xi" in state:
            inner = OptimizerState(*(state[name] for name in OptimizerState._fields))
            self.population = Population(state["parameters"], inner, state["xi"], state["before"])

    def identity(self) -> dict[str, Any]:
        """The task, the images, and the first architecture, for a run's summary."""
        return {
            "task": "learned_optimization",
            "images": self.data.source,
            "sha256": self.data_id,
            "spec": self.spec.to_dict(),
            "parameters_per_network": [Coordinates(spec).num_parameters for spec in self.specs],
        }


def _optimizer(model: nn.Module) -> LearnedOptimizer:
    """The optimiser itself, also inside of what the loop calls it by."""
    inner = getattr(model, "model", model)
    assert isinstance(inner, LearnedOptimizer)
    return inner
