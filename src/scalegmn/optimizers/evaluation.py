"""Training curves of inner networks under any optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from time import process_time

import torch
from torch import Tensor

from scalegmn.optimizers.coordinates import all_finite
from scalegmn.optimizers.hand_designed import HandDesigned
from scalegmn.optimizers.learned import LearnedOptimizer
from scalegmn.optimizers.problems import InnerProblem, Problem


@dataclass(frozen=True)
class Curves:
    """How B networks trained.

    Attributes:
        losses: [B, T], on the batch of each step, before the step; infinite from where a network diverged.
        parameters: [B, P], after the last step.
        seconds: processor time.
    """

    losses: Tensor
    parameters: Tensor
    seconds: float

    @property
    def num_diverged(self) -> int:
        """Networks whose loss was not finite."""
        return int((~self.losses.isfinite()).any(1).sum())

    def smoothed(self, width: int) -> Tensor:
        """[B, T]: the mean of the last `width` losses at each step."""
        sums = torch.nn.functional.pad(self.losses.double().cumsum(1), (1, 0))
        ends = torch.arange(1, self.losses.shape[1] + 1)
        starts = (ends - width).clamp_min(0)
        return ((sums[:, ends] - sums[:, starts]) / (ends - starts)).to(self.losses)


@torch.no_grad()
def learned_curves(optimizer: LearnedOptimizer, problem: Problem, num_steps: int) -> Curves:
    """The curves of a learned optimiser."""
    began, flat = process_time(), problem.params.flatten()
    trained = optimizer.train_networks(problem, flat, optimizer.features.start(flat), num_steps)
    return Curves(trained.losses, trained.parameters, process_time() - began)


@torch.no_grad()
def hand_designed_curves(optimizer: HandDesigned, problem: Problem, num_steps: int, rates: Tensor) -> Curves:
    """The curves of a hand-designed optimiser with learning rates [B]."""
    began, flat = process_time(), problem.params.flatten()
    state, losses = optimizer.start(flat), []
    alive = torch.ones(len(flat), dtype=torch.bool)
    for step in range(num_steps):
        loss, gradients = problem.losses_and_gradients(flat, problem.batch(step))
        alive &= loss.isfinite() & all_finite(gradients)
        losses.append(torch.where(alive, loss, torch.inf))
        new, state = optimizer.step(flat, torch.where(alive[:, None], gradients, 0), state, rates, num_steps)
        alive &= all_finite(new)
        flat = torch.where(alive[:, None], new, flat)
    return Curves(torch.stack(losses, dim=1), flat, process_time() - began)


RATES = {
    "adam": [0.0005 * 10 ** (3 * j / 19) for j in range(20)],
    "sgd": [0.001 * 10 ** (3 * j / 19) for j in range(20)],
}
"""The 20 learning rates that are tried, in equal ratios: from .0005 to .5 of Adam, and from .001 to 1 of SGD."""


@dataclass(frozen=True)
class Tuned:
    """A hand-designed optimiser with the learning rate that is best at the end.

    Attributes:
        rate: the learning rate.
        curves: of the networks, with it.
    """

    rate: float
    curves: Curves


def tuned(optimizer: HandDesigned, problem: InnerProblem, num_steps: int, width: int) -> Tuned:
    """The best learning rate of `RATES` on a problem, by the mean over networks of the last `width` losses. All rates
    train the same networks on the same images, side by side; the time is shared out equally."""
    rates, size = RATES[optimizer.kind], len(problem)
    copies = problem[torch.arange(size).repeat(len(rates))]
    curves = hand_designed_curves(optimizer, copies, num_steps, torch.tensor(rates).repeat_interleave(size))
    losses, parameters = (part.unflatten(0, (len(rates), size)) for part in (curves.losses, curves.parameters))
    best = int(losses[:, :, -width:].mean((1, 2)).argmin())
    return Tuned(rates[best], Curves(losses[best], parameters[best], curves.seconds / len(rates)))


def steps_to(curves: Curves, loss: float, width: int) -> int | None:
    """The first step after which the mean over networks of the last `width` losses is at most `loss`; None: there is
    none."""
    means = curves.smoothed(width).mean(0)
    reached = (means[width - 1 :] <= loss).nonzero()
    return None if not len(reached) else int(reached[0]) + width
