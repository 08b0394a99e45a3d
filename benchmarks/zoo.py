"""Fitting many networks at once: our loops beside plain ones, in one run.

python benchmarks/zoo.py [--out FILE.jsonl]

SIRENs: the naive version is autograd over `torch.baddbmm` on all networks at once, with torch's Adam. Prints, for
the networks of the digits and the MNIST recipe, network-steps per second (one forward, backward and Adam step of one
network; medians of rounds in turns), their ratio, and what share of this machine's own rate for large matrix products
our products alone amount to; the rest is mostly sines and cosines. Small CNNs, with dropout and Adam: beside the same
networks as torch modules, trained one after the other, in images per second of one core; for networks of one
architecture, and for those of the digits' Wild Park. Appends a line per case to FILE.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.evaluate import activate
from scalegmn.networks.siren import init_siren, pixel_grid
from scalegmn.zoos.fit.cnn_descent import OPTIMIZERS, Choices, LabelledImages
from scalegmn.zoos.fit.cnn_zoo import CnnRecipe, draw
from scalegmn.zoos.fit.cnns import train_cnns
from scalegmn.zoos.fit.sirens import Descent, fit_sirens

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
"""CNNs that are trained, and how many of one architecture one by one."""


def cnn_images() -> LabelledImages:
    """As many images as there are digits."""
    pixels, labels = torch.rand(1797, 1, 8, 8), torch.randint(10, (1797,))
    return LabelledImages(pixels, labels, torch.arange(1437), torch.arange(32))


def cnn_specs() -> list[NetSpec]:
    """The architecture of the digits recipe."""
    hidden = (LayerSpec(a, b, (3, 3), "relu") for a, b in pairwise((1, 16, 16, 16)))
    return [NetSpec((*hidden, LayerSpec(16, 10)))] * CNNS


def mixed_specs() -> list[NetSpec]:
    """Architectures of the digits' Wild Park."""
    activations = ("relu", "gelu", "tanh", "sigmoid", "leaky_relu")
    recipe = CnnRecipe(mixed=True, channels=(4, 8, 16, 32), activations=activations, padding="same")
    return draw(recipe, 0, CNNS, 1, 10)[0]


class OneCnn(nn.Module):
    """A network as torch modules."""

    def __init__(self, spec: NetSpec, stride: int) -> None:
        super().__init__()
        self.spec = spec
        self.convolutions = nn.ModuleList(
            nn.Conv2d(layer.in_dim, layer.out_dim, layer.kernel, stride, layer.kernel[0] // 2)
            for layer in spec.layers[:-1]
        )
        self.dropout, self.last = nn.Dropout(0.3), nn.Linear(spec.layers[-1].in_dim, spec.layers[-1].out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[P, channels, height, width] -> [P, classes]."""
        found = []
        for layer, convolution in zip(self.spec.layers, self.convolutions, strict=False):
            x = convolution(x)
            if layer.residual is not None:
                source = found[layer.residual]
                both = min(x.shape[1], source.shape[1])
                x = torch.cat([x[:, :both] + source[:, :both], x[:, both:]], 1)
            x = self.dropout(activate(x, layer.activation))
            found.append(x)
        return self.last(x.mean((2, 3)))


def batched_cnns(specs: list[NetSpec], images: LabelledImages, batch_size: int, padding: str | None) -> None:
    """One epoch of all networks, and their accuracy on all images."""
    value = torch.full((len(specs),), 1e-3)
    adam = torch.full((len(specs),), OPTIMIZERS.index("adam"))
    choices = Choices(value, value, 300 * value, adam, 100 * value, torch.ones(len(specs)))
    train_cnns(specs, choices, images, (1,), batch_size, padding, (0, 0))


def cnns_one_by_one(specs: list[NetSpec], images: LabelledImages, batch_size: int, stride: int) -> None:
    """One epoch of each network as torch modules."""
    for spec in specs:
        model = OneCnn(spec, stride)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=2e-3)
        for rows in images.train[torch.randperm(len(images.train))].split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.pixels[rows]), images.labels[rows]).backward()
            optimizer.step()


def measure_cnns(batch_size: int, mixed: bool) -> dict[str, float]:
    """Images per second of one core, both ways; small layers one by one gain from no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    specs, images = mixed_specs() if mixed else cnn_specs(), cnn_images()
    alone = specs if mixed else specs[:ALONE]  # their costs differ
    padding, stride = (None, 1) if mixed else ("same", 2)
    found = {"ours": [], "one_by_one": []}
    for round_number in range(1 if mixed else ROUNDS + 1):  # the first is a warm-up, and lasts minutes if mixed
        took = {
            "ours": seconds(batched_cnns, specs, images, batch_size, padding) / len(specs),
            "one_by_one": seconds(cnns_one_by_one, alone, images, batch_size, stride) / len(alone),
        }
        for name, time_of_one in took.items() if round_number or mixed else ():
            found[name].append(time_of_one)
    torch.set_num_threads(threads)
    rates = {name: len(images.train) / sorted(took)[len(took) // 2] for name, took in found.items()}
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
    for name, batch_size, mixed in (
        ("[1, 16, 16, 16, 10]", 32, False),
        ("[1, 16, 16, 16, 10]", 512, False),
        ("mixed", 32, True),
    ):
        figures = measure_cnns(batch_size, mixed)
        append(arguments.out, f"cnn {name}, batches of {batch_size}", figures)
        ours_rate, alone_rate, ratio = figures.values()
        case = f"CNN {name}, 8x8, batches of {batch_size}"
        print(f"{case:<44}{ours_rate:>10,.0f}{alone_rate:>10,.0f}{ratio:>8.1f}")


def append(path: str | None, case: str, figures: dict[str, float]) -> None:
    """A line of JSON to the file, if there is one."""
    if path:
        with open(path, "a") as file:
            line = {"case": case, "threads": torch.get_num_threads(), "torch": torch.__version__, **figures}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
