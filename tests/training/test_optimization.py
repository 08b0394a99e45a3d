import math

import pytest
import torch

from scalegmn.training.optimization import (
    PLATEAU_FACTOR,
    OptimizationConfig,
    OptimizerConfig,
    Schedule,
    ScheduleConfig,
    build_optimizer,
)


def build(decay, total, warmup=0, patience=10):
    schedule = ScheduleConfig(warmup, decay, patience)
    config = OptimizationConfig(optimizer_args=OptimizerConfig(lr=2.0), scheduler_args=schedule)
    return build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))], total)


def rates(warmup, decay, steps, total):
    optimizer, schedule = build(decay, total, warmup)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_by_hand():
    assert rates(4, "constant", 6, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert rates(0, "constant", 2, 2) == [2.0, 2.0]
    assert rates(4, "none", 2, 2) == [2.0, 2.0]
    assert rates(4, "plateau", 5, 5) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates(2, "cosine", 7, 6) == pytest.approx([1.0, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0])


def test_one_cycle_by_hand():
    """20 steps: the peak is at step 0.3 * 20 - 1 = 5, the end at step 19."""
    found = rates(1000, "one_cycle", 20, 20)
    assert (found[0], found[5], found[19]) == pytest.approx((2 / 25, 2.0, 2 / 25e4))
    assert found[2] == pytest.approx(2 - (2 - 2 / 25) * (1 + math.cos(math.pi * 2 / 5)) / 2)
    assert found[12] == pytest.approx((2 + 2 / 25e4) / 2)


def test_one_cycle_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0, total_steps=50, cycle_momentum=False)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 50:
            reference.step()
    assert rates(0, "one_cycle", 50, 50) == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_one_cycle_of_few_steps(total):
    assert all(0 < rate <= 2 for rate in rates(0, "one_cycle", total + 1, total))


def test_plateau_by_hand():
    """A tenth after two epochs that are not better, and again after two more; better ones start the count anew."""
    _, schedule = build("plateau", 100, patience=2)
    found = []
    for value in (1, 2, 2, 3, 3, 1, 0, 0, 4):
        schedule.end_epoch(value)
        found.append(schedule.lr)
    assert found == pytest.approx([2, 2, 2, 2, 2, 0.2, 0.2, 0.02, 0.02])


def test_plateau_after_a_result_that_is_not_a_number():
    """It counts as not better, and is not remembered as the best."""
    _, schedule = build("plateau", 100, patience=2)
    found = []
    for value in (math.nan, 1, 2, math.nan, 3, 4):
        schedule.end_epoch(value)
        found.append(schedule.lr)
    assert found == [2.0] * 6


@pytest.mark.parametrize("decay", ["constant", "cosine", "one_cycle", "plateau", "none"])
def test_schedule_goes_on(decay):
    _, whole = build(decay, 12, 3, 2)
    expected, state = [], None
    for step in range(12):
        if step == 7:
            state = whole.state_dict()
        whole.step()
        if step % 2:
            whole.end_epoch(-step)
        expected.append(whole.lr)
    _, resumed = build(decay, 12, 3, 2)
    resumed.load_state_dict(state)
    for step in range(7, 12):
        resumed.step()
        if step % 2:
            resumed.end_epoch(-step)
        assert resumed.lr == expected[step]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleConfig(plateau_patience=0), "scheduler_args.plateau_patience: found 0, expected 1 or more"),
        (lambda: OptimizationConfig(ema_decay=1.0), "optimization.ema_decay: found 1.0"),
    ],
)
def test_ranges(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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


def test_schedule_of_an_earlier_version():
    """Its counters lead to the learning rates that the run had."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    config = ScheduleConfig(decay="plateau", warmup_steps=4, plateau_patience=2)
    schedule = Schedule(torch.optim.SGD([parameter], lr=1.0), config, 100)
    schedule.load_state_dict({"step": 2, "reduction": 1.0, "best": 0.5, "since_best": 0})
    assert schedule.lr == pytest.approx(0.75)
    schedule = Schedule(torch.optim.SGD([parameter], lr=1.0), config, 100)
    schedule.load_state_dict({"step": 50, "reduction": PLATEAU_FACTOR, "best": 0.5, "since_best": 1})
    assert schedule.lr == pytest.approx(PLATEAU_FACTOR)
    schedule.end_epoch(0.4)
    assert schedule.lr == pytest.approx(PLATEAU_FACTOR**2)
