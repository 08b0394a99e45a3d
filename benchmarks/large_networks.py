"""Time per parameter and peak memory of a training step on one input network, small to large.

python benchmarks/large_networks.py [--hidden_dim 64] [--layouts 2,96,96,3 2,2048,4096,3 ...] [--out FILE.jsonl]

ScaleGMN (sign, forward, four layers) on one SIREN of each layout; a step is forward, backward and AdamW.
"""

import argparse
import resource
from pathlib import Path

import torch
from step_time import mean_square, random_networks, report, timed

from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import NetSpec
from scalegmn.training.gradients import backward_in_micro_batches
from scalegmn.training.memory import keep_freed_memory

LAYOUTS = ["2,96,96,3", "2,300,300,3", "2,600,600,3", "2,1000,1000,3", "2,2048,4096,3"]


def measure(layout: str, hidden_dim: int, rounds: int) -> dict[str, object]:
    """The figures of one layout."""
    keep_freed_memory()
    torch.manual_seed(0)
    spec, device = NetSpec.mlp([int(size) for size in layout.split(",")], "sine"), torch.device("cpu")
    model = ScaleGMNConfig(hidden_dim=hidden_dim).build(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    params, target = random_networks(spec, 1, device), torch.zeros(1)

    def step() -> None:
        optimizer.zero_grad()
        backward_in_micro_batches(lambda part, _: mean_square(model(part)), params, target, 1)
        optimizer.step()

    seconds = min(timed(step, device) for _ in range(rounds))
    return {
        "layout": layout,
        "hidden_dim": hidden_dim,
        "parameters": spec.num_parameters,
        "seconds": seconds,
        "microseconds_per_parameter": 1e6 * seconds / spec.num_parameters,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def main() -> None:
    """Measures each layout in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--hidden_dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="steps; the fastest counts")
    parser.add_argument("--out", type=Path, help="append the figures to this JSONL file")
    arguments = parser.parse_args()
    for layout in arguments.layouts:
        report(
            (measure, layout, arguments.hidden_dim, arguments.rounds),
            "[{layout}] d {hidden_dim}: {parameters:,} parameters, {seconds:.2f} s, "
            "{microseconds_per_parameter:.1f} us/parameter, peak {peak_gb:.2f} GB",
            arguments.out,
        )


if __name__ == "__main__":
    main()
