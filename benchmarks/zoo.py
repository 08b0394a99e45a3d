"""Fitting many SIRENs at once: our loop beside a naive batched one, in one run.

python benchmarks/zoo.py [--out FILE.jsonl]

The naive version is autograd over `torch.baddbmm` on all networks at once, with torch's Adam. Prints, for
the networks of the digits and the MNIST recipe, network-steps per second (one forward, backward and Adam step of one
network; medians of rounds in turns), their ratio, and what share of this machine's own rate for large matrix products
our products alone amount to; the rest is mostly sines and cosines. Appends a line per case to FILE.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from scalegmn.nets.siren import init_siren, pixel_grid
from scalegmn.spec import NetParams, NetSpec
from scalegmn.zoos.fit import Descent, fit_sirens

STEPS, ROUNDS = 20, 5
CASES = {"digits": ([2, 12, 12, 1], 8, 6.0, 2048), "mnist": ([2, 32, 32, 1], 28, 30.0, 256)}
"""Layout, side of the images, w0, networks."""


def ours(params: NetParams, points: Tensor, targets: Tensor) -> None:
    """STEPS steps of every network."""
    fit_sirens(params, points, targets, Descent(STEPS, 1e-3))


def naive(params: NetParams, points: Tensor, targets: Tensor) -> None:
    """The same with autograd on all networks at once."""
    params = params.map(lambda tensor: tensor.clone().requires_grad_())
    optimizer = torch.optim.Adam([*params.weights, *params.biases], lr=1e-3)
    for _ in range(STEPS):
        x = points.expand(len(params), -1, -1)
        for index, layer in enumerate(params.spec.layers):
            x = torch.baddbmm(params.biases[index][:, None], x, params.weights[index].mT)
            x = torch.sin(layer.w0 * x) if index < params.spec.num_layers - 1 else x
        optimizer.zero_grad()
        (x - targets).square().mean((1, 2)).sum().backward()
        optimizer.step()


def matrix_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """What the machine is best at."""
    torch.mm(left, right, out=out)


def seconds(run: Callable[..., None], *arguments: object) -> float:
    """Of one call."""
    started = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started


def measure(layout: list[int], side: int, w0: float, networks: int) -> dict[str, float]:
    """Network-steps per second of both versions, and flop/s of our products and of large ones."""
    spec = NetSpec.mlp(layout, "sine", w0)
    generator = torch.Generator().manual_seed(0)
    problem = (
        init_siren(spec, networks, generator),
        pixel_grid(side, side),
        torch.rand(networks, side * side, layout[-1]),
    )
    square = [torch.rand(1024, 1024) for _ in range(3)]
    runs = {"ours": (ours, *problem), "naive": (naive, *problem), "matrix": (matrix_product, *square)}
    found = {name: [] for name in runs}
    for round_number in range(ROUNDS + 1):  # the first is a warm-up
        for name, run in runs.items():
            took = seconds(*run)
            if round_number:
                found[name].append(took)
    median = {name: sorted(took)[ROUNDS // 2] for name, took in found.items()}
    first, *rest = (layer.in_dim * layer.out_dim for layer in spec.layers)
    flop = 2 * side**2 * (2 * first + 3 * sum(rest))  # forward, weights' gradient, and inputs' but the points'
    rates = {name: networks * STEPS / median[name] for name in ("ours", "naive")}
    matrix_rate = 2 * 1024**3 / median["matrix"]
    return rates | {"ratio": rates["ours"] / rates["naive"], "share": rates["ours"] * flop / matrix_rate}


def main() -> None:
    """Measures all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="append the figures to this JSONL file")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'network-steps per second':<44}{'ours':>10}{'naive':>10}{'ratio':>8}{'of matrix rate':>16}")
    for name, (layout, side, w0, networks) in CASES.items():
        figures = measure(layout, side, w0, networks)
        case = f"{name}: {layout}, {side**2} points, {networks} networks"
        ours_rate, naive_rate, ratio, share = figures.values()
        print(f"{case:<44}{ours_rate:>10,.0f}{naive_rate:>10,.0f}{ratio:>8.1f}{share:>15.0%}")
        if arguments.out:
            line = {"case": name, "threads": torch.get_num_threads(), "torch": torch.__version__, **figures}
            with open(arguments.out, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
