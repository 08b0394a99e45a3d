"""Gradients for the parameters of a learned optimiser: first-order, and by persistent evolution strategies.

Shape letters: B inner networks, P parameters of each, D parameters of the optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalegmn.optimizers.coordinates import Coordinates, all_finite
from scalegmn.optimizers.features import OptimizerState
from scalegmn.optimizers.learned import LearnedOptimizer
from scalegmn.optimizers.problems import Problem

MAX_LOSS = 20.0
"""An inner network with a larger loss, or one that is not finite, has diverged: it counts with this loss, and starts
again."""


class MetaGradient(NamedTuple):
    """The gradient of an outer step."""

    loss: Tensor
    """What is minimised, a scalar."""

    gradients: list[Tensor]
    """Of the optimiser's parameters, in their order."""

    num_diverged: int
    """Inner networks that diverged."""

    def surrogate(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """A scalar with the value `loss` and these gradients, for a training loop that calls `backward`."""
        product = sum((p * g).sum() for p, g in zip(parameters, self.gradients, strict=True))
        assert isinstance(product, Tensor)
        return self.loss.detach() + product - product.detach()


def first_order(optimizer: LearnedOptimizer, problem: Problem, horizon: int, next_batch: bool = False) -> MetaGradient:
    """The mean over steps of the gradient of the loss after a step (Kofinas et al., 2024): the parameters and the
    optimiser's memory before the step are constants.

    Args:
        optimizer: the optimiser.
        problem: B networks.
        horizon: steps.
        next_batch: the loss is that on the batch of the next step, whose gradient this step reads anyway; else, as
            published, on the batch that the step itself has seen.
    """
    params, parameters = problem.params, list(optimizer.parameters())
    start = params.flatten()
    coordinates, flat, state = Coordinates(params.spec), start, optimizer.features.start(start)
    total, num_diverged = start.new_zeros(()), 0
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    batch = problem.batch(0)
    _, inner = problem.losses_and_gradients(flat, batch)
    for step in range(horizon):
        diverged = ~all_finite(inner)
        inputs, state = optimizer.inputs(params, flat, torch.where(diverged[:, None], 0, inner), state)
        with torch.enable_grad():
            changes = optimizer(inputs, coordinates)
        new, following = flat + changes.detach(), problem.batch(step + 1)
        losses, outer = problem.losses_and_gradients(new, following if next_batch else batch)
        diverged |= ~(losses < MAX_LOSS) | ~all_finite(outer) | ~all_finite(new)
        weighted = torch.where(diverged[:, None], 0, outer) / (len(flat) * horizon)
        own = torch.autograd.grad(changes, parameters, weighted, allow_unused=True)
        for gradient, part in zip(gradients, own, strict=True):
            if part is not None:
                gradient += part
        total = total + torch.where(diverged, MAX_LOSS, losses).mean() / horizon
        num_diverged += int(diverged.sum())
        flat, state, batch = torch.where(diverged[:, None], start, new), state.reset(diverged), following
        inner = outer
        if not next_batch or bool(diverged.any()):
            _, inner = problem.losses_and_gradients(flat, batch)
    return MetaGradient(total, gradients, num_diverged)


class Population(NamedTuple):
    """N inner networks, each trained twice side by side by optimisers that differ, between two outer steps."""

    parameters: Tensor
    """[2 N, P]: with +epsilon, then with -epsilon."""

    state: OptimizerState
    """Of 2 N networks."""

    xi: Tensor
    """[N, D], the sum of a network's perturbations since it started."""

    before: Tensor
    """[2 N], the loss at the end of the last window."""

    @property
    def age(self) -> Tensor:
        """[N], steps since each started."""
        return self.state.steps[: len(self.xi)]

    @classmethod
    def at_start(cls, start: Tensor, state: OptimizerState, dim: int, offset: Tensor | None) -> Population:
        """N networks before their first window.

        Args:
            start: [N, P], their parameters.
            state: of 2 N networks that start.
            dim: D.
            offset: [N], the ages that they have; None: 0.
        """
        if offset is not None:
            state = state._replace(steps=offset.to(start).repeat(2))
        before = start.new_full((2 * len(start),), torch.nan)
        return cls(start.repeat(2, 1), state, start.new_zeros(len(start), dim), before)

    def with_restarts(self, start: Tensor, horizon: int) -> Population:
        """Networks that have taken `horizon` steps, or have diverged, start again, with xi = 0.

        Args:
            start: [N, P], their parameters at the start.
            horizon: steps that each network is trained.
        """
        ended = (self.age >= horizon) | self.age.isnan()
        both = ended.repeat(2)
        state = self.state.reset(both)
        return Population(
            torch.where(both[:, None], start.repeat(2, 1), self.parameters),
            state._replace(steps=torch.where(both, 0, state.steps)),
            torch.where(ended[:, None], 0, self.xi),
            torch.where(both, torch.nan, self.before),
        )


def persistent_evolution(
    optimizer: LearnedOptimizer,
    problem: Problem,
    population: Population | None,
    noise: Tensor,
    window: int,
    horizon: int,
    sigma: float,
    objective: str = "mean",
    offset: Tensor | None = None,
) -> tuple[MetaGradient, Population]:
    """An estimate of the gradient by persistent evolution strategies (Vicol et al., 2021,
    https://arxiv.org/abs/2112.13835): mean of (L_+ - L_-) xi / (2 sigma^2), where L are the losses of a window of steps
    with parameters + and - epsilon, and xi is the sum of the epsilon of all windows since the inner network started.
    Networks that have taken `horizon` steps, or have diverged, start again, with xi = 0, before the window.

    Over the windows from start to horizon, the estimates add up to one of the gradient of the objective.

    Args:
        optimizer: the optimiser.
        problem: N networks as they start.
        population: after the window before; None: at the start.
        noise: [N, D], standard normal: epsilon / sigma.
        window: steps.
        horizon: steps that each network is trained; a multiple of `window`.
        sigma: standard deviation of epsilon.
        objective: `mean`: the mean loss over all steps; `final`: the last loss, as the sum of its changes over windows.
        offset: [N], the age that networks have at the start of the run, so that they do not all end together.
    """
    num_networks, start = len(problem.params), problem.params.flatten()
    parameters = dict(optimizer.named_parameters())
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    if population is None:
        population = Population.at_start(start, optimizer.features.start(start.repeat(2, 1)), len(vector), offset)
    flat, state, xi, before = population.with_restarts(start, horizon)
    epsilon = sigma * noise
    xi = xi + epsilon
    perturbed = torch.cat([vector + epsilon, vector - epsilon])
    shapes = [parameter.shape for parameter in parameters.values()]
    sizes = [shape.numel() for shape in shapes]
    rows = [part.reshape(-1, *shape) for part, shape in zip(perturbed.split(sizes, dim=1), shapes, strict=True)]
    own = dict(zip(parameters, rows, strict=True))
    trained = optimizer.train_networks(problem, flat, state, window, own, MAX_LOSS)
    losses, diverged = trained.losses.clamp(max=MAX_LOSS), trained.diverged
    total, last = losses.mean(1), losses[:, -1]
    before = torch.where(before.isnan(), losses[:, 0], before)
    loss = total if objective == "mean" else last - before
    share = window / horizon if objective == "mean" else 1.0
    difference = share * (loss[:num_networks] - loss[num_networks:])
    gradient = (difference[:, None] * xi).mean(0) / (2 * sigma**2)
    parts = gradient.split(sizes)
    either = diverged[:num_networks] | diverged[num_networks:]
    steps = torch.where(either.repeat(2), torch.nan, trained.state.steps)  # to start again
    return (
        MetaGradient(
            last.mean() if objective == "final" else total.mean(),
            [part.view(shape) for part, shape in zip(parts, shapes, strict=True)],
            int(either.sum()),
        ),
        Population(trained.parameters, trained.state._replace(steps=steps), xi, last),
    )
