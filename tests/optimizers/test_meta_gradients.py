"""First-order gradients are those of autograd; persistent evolution strategies find the analytic ones on quadratics."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.optimizers.coordinates import Coordinates
from scalegmn.optimizers.learned import LearnedOptimizer, LearnedOptimizerConfig
from scalegmn.optimizers.meta_gradients import MAX_LOSS, first_order, persistent_evolution
from scalegmn.optimizers.networks import UpdateNetwork
from scalegmn.optimizers.problems import ImageData, InnerProblem, ProblemConfig

SPEC = NetSpec((LayerSpec(1, 1, None, "tanh"), LayerSpec(1, 1)))
WINDOW, NUM_WINDOWS = 5, 4


class Quadratic:
    """sum of c_i p_i^2 / 2 of the four parameters of each network; batches are not read."""

    def __init__(self, num_networks, largest=1.0):
        generator = torch.Generator().manual_seed(0)
        flat = torch.randn(num_networks, 4, generator=generator, dtype=torch.float64)
        empty = NetParams(SPEC, (flat[:, :1, None],) * 2, (flat[:, :1],) * 2)
        self.params = empty.unflatten(flat)
        self.curvature = largest * torch.linspace(0.2, 1, 4, dtype=torch.float64)

    def batch(self, step):
        nothing = torch.zeros(len(self.params), 1)
        return nothing, nothing

    def losses(self, flat, batch):
        return (self.curvature * flat.square()).sum(1) / 2

    def losses_and_gradients(self, flat, batch):
        return self.losses(flat, batch), self.curvature * flat


class Rate(LearnedOptimizer):
    """p <- p - exp(s) g, with one learned number s."""

    def __init__(self, log_rate=-1.0):
        super().__init__(LearnedOptimizerConfig(network="ff"), SPEC)
        self.network, self.rule = UpdateNetwork(self.features), nn.Identity()
        self.log_rate = nn.Parameter(torch.tensor(log_rate, dtype=torch.float64))

    def forward(self, inputs, coordinates):
        return -self.log_rate.exp() * inputs.gradients


def window_losses(problem, log_rates, objective):
    """The losses [windows, N] of an unroll whose windows have their own s, [windows]."""
    flat, losses, ends = problem.params.flatten(), [], []
    for log_rate in log_rates:
        own = []
        for _ in range(WINDOW):
            loss, gradient = problem.losses_and_gradients(flat, None)
            own.append(loss)
            flat = flat - log_rate.exp() * gradient
        losses.append(torch.stack(own).mean(0) / NUM_WINDOWS)
        ends.append((own[0], own[-1]))
    if objective == "mean":
        return torch.stack(losses)
    before = [ends[0][0], *(last for _, last in ends[:-1])]
    return torch.stack([last - first for first, (_, last) in zip(before, ends, strict=True)])


def noise(problem, generator):
    return torch.randn(len(problem.params), 1, generator=generator, dtype=torch.float64)


def estimates(problem, optimizer, sigma, objective, seed=0):
    """The gradient of every window, and the perturbations [windows, N]."""
    generator, population, found = torch.Generator().manual_seed(seed), None, []
    for _ in range(NUM_WINDOWS):
        estimate, population = persistent_evolution(
            optimizer, problem, population, noise(problem, generator), WINDOW, WINDOW * NUM_WINDOWS, sigma, objective
        )
        found.append(estimate.gradients[0])
    again = torch.Generator().manual_seed(seed)
    epsilon = [sigma * noise(problem, again)[:, 0] for _ in range(NUM_WINDOWS)]
    return torch.stack(found), torch.stack(epsilon)


@pytest.mark.parametrize("objective", ["mean", "final"])
def test_persistent_evolution_is_the_analytic_gradient_along_its_perturbations(objective):
    """(L_+ - L_-) xi / (2 sigma^2) with L_+ - L_- = 2 sum_v dL_w/ds_v epsilon_v up to sigma^2."""
    problem, optimizer, sigma = Quadratic(16), Rate(), 1e-4
    found, epsilon = estimates(problem, optimizer, sigma, objective)
    log_rates = optimizer.log_rate.detach().repeat(NUM_WINDOWS).requires_grad_()
    losses = window_losses(problem, log_rates, objective)
    xi = epsilon.cumsum(0)
    for window in range(NUM_WINDOWS):
        jacobian = torch.stack([torch.autograd.grad(x, log_rates, retain_graph=True)[0] for x in losses[window]])
        expected = ((jacobian.T * epsilon).sum(0) * xi[window]).mean() / sigma**2
        torch.testing.assert_close(found[window], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("objective", ["mean", "final"])
def test_windows_add_up_to_the_analytic_gradient(objective):
    """Within four standard errors; without what xi keeps of earlier windows, the estimate is another."""
    problem, optimizer = Quadratic(1), Rate()
    problem.params = problem.params[torch.zeros(40_000, dtype=torch.long)]
    log_rate = optimizer.log_rate.detach().requires_grad_()
    losses = window_losses(problem, [log_rate] * NUM_WINDOWS, objective)
    (expected,) = torch.autograd.grad(losses.mean(1).sum(), log_rate)
    found, _ = estimates(problem, optimizer, 0.01, objective)
    assert abs(found.sum() - expected) < 0.05 * abs(expected)
    truncated = [rate.detach().requires_grad_() for rate in [log_rate] * NUM_WINDOWS]
    parts = window_losses(problem, truncated, objective).mean(1)
    without = sum(
        torch.autograd.grad(part, rate, retain_graph=True)[0] for part, rate in zip(parts, truncated, strict=True)
    )
    assert abs(without - expected) > 0.3 * abs(expected)


def test_networks_start_again_at_the_horizon():
    problem, optimizer, generator = Quadratic(3), Rate(), torch.Generator().manual_seed(0)
    offset = torch.tensor([0, 5, 10])
    population, ages = None, []
    for _ in range(5):
        _, population = persistent_evolution(
            optimizer, problem, population, noise(problem, generator), WINDOW, 15, 0.01, offset=offset
        )
        ages.append(population.age.tolist())
    assert ages == [[5, 10, 15], [10, 15, 5], [15, 5, 10], [5, 10, 15], [10, 15, 5]]


@pytest.mark.parametrize("next_batch", [False, True])
@pytest.mark.parametrize("network", ["ff", "scalegmn", "nfn"])
def test_first_order_gradients_are_those_of_autograd(network, next_batch):
    data = ImageData(ProblemConfig(image_size=3))
    data.pixels = {split: pixels.double() for split, pixels in data.pixels.items()}
    config = ProblemConfig(image_size=3, hidden_dims=((4,),), batch_size=6)
    problem = InnerProblem.draw(config, data, 3, torch.Generator().manual_seed(0))
    problem = replace(problem, params=problem.params.to(torch.float64))
    torch.manual_seed(0)
    optimizer = LearnedOptimizerConfig(network=network, hidden_dim=4).build(problem.params.spec).double()
    with torch.no_grad():
        for parameter in optimizer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found = first_order(optimizer, problem, 3, next_batch)
    flat, total = problem.params.flatten(), 0
    state = optimizer.features.start(flat)
    for step in range(3):
        batch = problem.batch(step)
        _, gradients = problem.losses_and_gradients(flat, batch)
        inputs, state = optimizer.inputs(problem.params, flat, gradients, state)
        new = flat + optimizer(inputs, Coordinates(problem.params.spec))
        total = total + problem.losses(new, problem.batch(step + 1) if next_batch else batch).mean() / 3
        flat = new.detach()
    torch.testing.assert_close(found.loss, total.detach(), rtol=1e-12, atol=0)
    expected = torch.autograd.grad(total, list(optimizer.parameters()), materialize_grads=True)
    for one, other in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    loss = found.surrogate(list(optimizer.parameters()))
    loss.backward()
    assert loss.item() == found.loss.item()
    for parameter, gradient in zip(optimizer.parameters(), found.gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


class OneDiverges(Quadratic):
    """The losses of the first network, in the first step only, are not finite."""

    def losses_and_gradients(self, flat, batch):
        losses, gradients = super().losses_and_gradients(flat, batch)
        bad = torch.zeros(len(self.params), dtype=torch.bool)
        bad[0] = True
        bad = bad.repeat(len(flat) // len(bad))
        return torch.where(bad, torch.nan, losses), torch.where(bad[:, None], torch.inf, gradients)


def test_a_diverging_network_is_counted_and_poisons_nothing():
    optimizer, generator = Rate(), torch.Generator().manual_seed(0)
    whole, broken = Quadratic(4), OneDiverges(4)
    clean = first_order(optimizer, whole, 3)
    found = first_order(optimizer, broken, 3)
    assert (clean.num_diverged, found.num_diverged) == (0, 3)
    alone = Quadratic(4)
    alone.params = alone.params[1:]
    expected = first_order(optimizer, alone, 3)
    torch.testing.assert_close(found.gradients[0], expected.gradients[0] * 3 / 4)
    torch.testing.assert_close(found.loss, expected.loss * 3 / 4 + MAX_LOSS / 4)
    estimate, population = persistent_evolution(optimizer, broken, None, noise(whole, generator), WINDOW, 20, 0.01)
    assert estimate.num_diverged == 1
    assert estimate.gradients[0].isfinite()
    assert population.age.isnan().tolist() == [True, False, False, False]
    _, population = persistent_evolution(optimizer, whole, population, noise(whole, generator), WINDOW, 20, 0.01)
    assert population.age.tolist() == [5, 10, 10, 10]
