import pytest
import torch

from scalegmn.train.optim import OptimizationConfig, OptimizerConfig, ScheduleConfig, build_optimizer


def rates(warmup, decay, steps, total):
    config = OptimizationConfig(optimizer_args=OptimizerConfig(lr=2.0), scheduler_args=ScheduleConfig(warmup, decay))
    optimizer, schedule = build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))], total)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_by_hand():
    assert rates(4, "constant", 6, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert rates(0, "constant", 2, 2) == [2.0, 2.0]
    assert rates(2, "cosine", 7, 6) == pytest.approx([1.0, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0])


def test_amsgrad_remembers_the_largest_gradient():
    """After a large gradient, a small one moves a parameter by less than without it."""

    def last_step(amsgrad):
        config = OptimizationConfig(optimizer_args=OptimizerConfig(weight_decay=0, amsgrad=amsgrad))
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer, _ = build_optimizer(config, [parameter], 301)
        for gradient in [100.0] + 300 * [1e-3]:
            before = parameter.item()
            parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
        return before - parameter.item()

    assert last_step(True) == pytest.approx(0.999**150 * last_step(False), rel=1e-3)
