"""Steps of inner networks under a learned optimiser: many networks at once against one after the other.

python benchmarks/inner_steps.py --networks 256 --steps 20

Networks of [64, 32, 10] on digits, 32 images per step, under an untrained FF optimiser: 14 channels, two hidden layers.
Prints steps per second of wall time, and per second of processor time: of many together, of one after the other, and of
one after the other with PyTorch's operations alone, the loop that a user would write. With SCALEGMN_NATIVE=0 no way
has compiled code.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

from scalegmn.engine import native
from scalegmn.optimizers.evaluation import learned_curves
from scalegmn.optimizers.learned import LearnedOptimizer, LearnedOptimizerConfig
from scalegmn.optimizers.problems import ImageData, InnerProblem, ProblemConfig


def rates(optimizer: LearnedOptimizer, problems: list[InnerProblem], num_steps: int) -> tuple[float, float]:
    """Steps of one network per second of wall time, and per second of processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    for problem in problems:
        learned_curves(optimizer, problem, num_steps)
    count = num_steps * sum(map(len, problems))
    return count / (time.perf_counter() - wall), count / (time.process_time() - processor)


def main() -> None:
    """Prints the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden_dim", type=int, default=8, help="half the width of FF's hidden layers")
    parser.add_argument("--images", type=int, default=32, help="per step and network")
    values = parser.parse_args()
    config = ProblemConfig(batch_size=values.images)
    problem = InnerProblem.draw(config, ImageData(config), values.networks, torch.Generator().manual_seed(0))
    options = LearnedOptimizerConfig(network="ff", features="ng", rule="ng", hidden_dim=values.hidden_dim)
    optimizer = options.build(problem.params.spec)
    alone = [problem[index : index + 1] for index in range(min(4, values.networks))]
    learned_curves(optimizer, alone[0], 2)  # what is done once
    found = {
        "together": rates(optimizer, [problem], values.steps),
        "one by one": rates(optimizer, alone, values.steps),
    }
    os.environ["SCALEGMN_NATIVE"] = "0"
    native.library.cache_clear()
    found["one by one, PyTorch"] = rates(optimizer, alone, values.steps)
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, (wall, processor) in found.items():
        ratio = found["together"][1] / processor
        print(f"{name:<20} {wall:8,.0f} steps/s {processor:8,.0f} steps per processor second, together {ratio:.1f} x")


if __name__ == "__main__":
    main()
