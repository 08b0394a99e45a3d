"""Fitting many networks at once: our loops beside plain ones, in one run.

python benchmarks/zoo.py [--out FILE.jsonl]

SIRENs: the naive version is autograd over `torch.baddbmm` on all networks at once, with torch's Adam. Prints, for
the networks of the digits and the MNIST recipe, network-steps per second (one forward, backward and Adam step of one
network; medians of rounds in turns), their ratio, and what share of this machine's own rate for large matrix products
our products alone amount to; the rest is mostly sines and cosines. Small CNNs, with dropout and Adam: beside the same
networks as torch modules, trained one after the other, in images per second of one core. Appends a line per case to
FILE.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from scalegmn.nets.siren import init_siren, pixel_grid
from scalegmn.spec import ACTIVATIONS, LayerSpec, NetParams, NetSpec
from scalegmn.zoos.fit import Descent, fit_sirens
from scalegmn.zoos.fit_cnns import OPTIMIZERS, Choices, LabelledImages, train_cnns

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


CNNS, ALONE = 64, 2
"""CNNs that ours trains at once, and that are trained one by one."""


def cnn_problem() -> tuple[NetSpec, LabelledImages]:
    """CNNs of the digits recipe, and as many images as there are digits."""
    sizes = (1, 16, 16, 16)
    hidden = (LayerSpec(a, b, (3, 3), "relu") for a, b in pairwise(sizes))
    pixels, labels = torch.rand(1797, 1, 8, 8), torch.randint(10, (1797,))
    return NetSpec((*hidden, LayerSpec(16, 10))), LabelledImages(pixels, labels, torch.arange(1437), torch.arange(32))


def batched_cnns(spec: NetSpec, images: LabelledImages, networks: int, batch_size: int) -> None:
    """One epoch of all networks, and their accuracy on all images."""
    value = torch.full((networks,), 1e-3)
    adam = torch.full((networks,), OPTIMIZERS.index("adam"))
    choices = Choices(value, value, 300 * value, adam, 100 * value, torch.ones(networks))
    activation = torch.full((networks,), ACTIVATIONS.index("relu"))
    train_cnns(spec, activation, choices, images, (1,), batch_size, "same", (0, 0))


def cnns_one_by_one(images: LabelledImages, networks: int, batch_size: int) -> None:
    """One epoch of each network as torch modules."""
    for _ in range(networks):
        hidden = [nn.Sequential(nn.Conv2d(i, 16, 3, 2, 1), nn.ReLU(), nn.Dropout(0.3)) for i in (1, 16, 16)]
        model = nn.Sequential(*hidden, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=2e-3)
        for rows in images.train[torch.randperm(len(images.train))].split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.pixels[rows]), images.labels[rows]).backward()
            optimizer.step()


def measure_cnns(batch_size: int) -> dict[str, float]:
    """Images per second of one core, both ways; small layers one by one gain from no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec, images = cnn_problem()
    found = {"ours": [], "one_by_one": []}
    for round_number in range(ROUNDS + 1):  # the first is a warm-up
        took = {
            "ours": seconds(batched_cnns, spec, images, CNNS, batch_size) / CNNS,
            "one_by_one": seconds(cnns_one_by_one, images, ALONE, batch_size) / ALONE,
        }
        for name, time_of_one in took.items() if round_number else ():
            found[name].append(time_of_one)
    torch.set_num_threads(threads)
    rates = {name: len(images.train) / sorted(took)[ROUNDS // 2] for name, took in found.items()}
    return rates | {"ratio": rates["ours"] / rates["one_by_one"]}


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
        append(arguments.out, name, figures)
    print(f"{'images per second and core':<44}{'ours':>10}{'1 by 1':>10}{'ratio':>8}")
    for batch_size in (32, 512):
        figures = measure_cnns(batch_size)
        append(arguments.out, f"cnn, batches of {batch_size}", figures)
        ours_rate, alone_rate, ratio = figures.values()
        case = f"CNN [1, 16, 16, 16, 10], 8x8, batches of {batch_size}"
        print(f"{case:<44}{ours_rate:>10,.0f}{alone_rate:>10,.0f}{ratio:>8.1f}")


def append(path: str | None, case: str, figures: dict[str, float]) -> None:
    """A line of JSON to the file, if there is one."""
    if path:
        with open(path, "a") as file:
            line = {"case": case, "threads": torch.get_num_threads(), "torch": torch.__version__, **figures}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
