"""Fitting many SIRENs at once: our loop beside a naive batched one, in one run.

python benchmarks/zoo.py [--out FILE.jsonl]

The naive version is the same mathematics as autograd over `torch.baddbmm` on all networks, with torch's Adam. Both fit
the digits recipe's networks. Prints network-steps per second (one forward, backward and Adam step of one network) and
their ratio, and appends a line to FILE.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from scalegmn.nets.siren import init_siren, pixel_grid
from scalegmn.spec import NetSpec
from scalegmn.zoos.fit import SirenFit
from scalegmn.zoos.recipes import BLOCK, load_digits_images

NETWORKS, STEPS, ROUNDS = 1797, 20, 3


def ours(spec: NetSpec, points: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """One call: STEPS steps of every network, block by block."""
    params = init_siren(spec, NETWORKS, torch.Generator().manual_seed(0))
    fits = [SirenFit(params[k : k + BLOCK], points, targets[k : k + BLOCK]) for k in range(0, NETWORKS, BLOCK)]
    return lambda: [fit.run(STEPS, 1e-2, 0.0) for fit in fits] and None


def naive(spec: NetSpec, points: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """The same with autograd on all networks at once."""
    params = init_siren(spec, NETWORKS, torch.Generator().manual_seed(0)).map(lambda tensor: tensor.requires_grad_())
    optimizer = torch.optim.Adam([*params.weights, *params.biases], lr=1e-2)

    def run() -> None:
        for _ in range(STEPS):
            x = points.expand(NETWORKS, -1, -1)
            for index, layer in enumerate(spec.layers):
                x = torch.baddbmm(params.biases[index][:, None], x, params.weights[index].mT)
                x = torch.sin(layer.w0 * x) if index < spec.num_layers - 1 else x
            optimizer.zero_grad()
            (x - targets).square().mean((1, 2)).sum().backward()
            optimizer.step()

    return run


def main() -> None:
    """Measures both in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="append the figures to this JSONL file")
    arguments = parser.parse_args()
    spec = NetSpec.mlp([2, 12, 12, 1], "sine", 6.0)
    targets = load_digits_images().pixels[:NETWORKS].flatten(1, 2) - 0.5
    versions = {"ours": ours, "naive": naive}
    runs = {name: build(spec, pixel_grid(8, 8), targets) for name, build in versions.items()}
    rates = {name: [] for name in runs}
    for round_number in range(ROUNDS + 1):  # the first is a warm-up
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if round_number:
                rates[name].append(NETWORKS * STEPS / (time.perf_counter() - started))
    figures = {name: sorted(found)[ROUNDS // 2] for name, found in rates.items()}
    print(f"{spec}, {NETWORKS} networks, 64 points, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, rate in figures.items():
        print(f"{name:<6}{rate:>12,.0f} network-steps/s")
    print(f"ratio {figures['ours'] / figures['naive']:>12.1f}")
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.write(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, **figures}) + "\n")


if __name__ == "__main__":
    main()
