"""How well metanetworks learn to compute what their input networks compute.

python benchmarks/expressivity.py [--models scalegmn ...] [--targets activations gradients] [--steps 1000]
    [--out FILE.jsonl] [--figure FILE.png]

Input networks are random tanh networks [4, 8, 8, 3], new ones in every step. Models change parameters (`output:
parameters`), and learn one of two targets of the shape of parameters:

    activations   x_1, x_2, x_3 of the network at one fixed input u, in the places of biases
    gradients     of <v, f(u)>, v fixed, by all weights and biases

by the mean square error over the tensors of the target, each divided by its root mean square. Prints R^2 = 1 - error on
1,000 other networks: 0 is as good as answering zero. All models have width 32, six layers (as many as messages need to
go from inputs to outputs and back), the same steps, batches and learning rate (AdamW 0.003, warm-up and cosine), and no
setting is tuned. With `--figure` the curves of all runs in FILE.jsonl are drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from scalegmn.models.base import ModelConfig
from scalegmn.models.dwsnet import DWSNetConfig
from scalegmn.models.nfn import NFNConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.gradients import gradient_factors

SPEC = NetSpec.mlp([4, 8, 8, 3], "tanh")
GRAPH = {"output": "parameters", "out_scale": 1.0, "hidden_dim": 32, "num_layers": 6}
MODELS: dict[str, ModelConfig] = {
    "scalegmn": ScaleGMNConfig(**GRAPH, symmetry="sign", direction="bidirectional", init="balanced"),
    "gmn": ScaleGMNConfig(**GRAPH, symmetry="permutation", direction="bidirectional", init="balanced"),
    "ng_gnn": NGGNNConfig(**GRAPH, init="balanced"),
    "nfn": NFNConfig(output="parameters", out_scale=1.0, layer="NP", hidden_dims=(32,) * 6, num_frequencies=16),
    "dwsnet": DWSNetConfig(output="parameters", out_scale=1.0, hidden_dim=32, num_hidden=6, set_layer="deep_set"),
}
BATCH, WARMUP, RATE, NUM_TEST = 64, 50, 3e-3, 1000


def random_networks(num: int, generator: torch.Generator) -> NetParams:
    """Networks with normal weights of variance 1 / fan-in, and biases of standard deviation 0.5."""
    weights = [torch.randn(num, *layer.weight_shape, generator=generator) / layer.in_dim**0.5 for layer in SPEC.layers]
    biases = [torch.randn(num, layer.out_dim, generator=generator) / 2 for layer in SPEC.layers]
    return NetParams(SPEC, tuple(weights), tuple(biases))


def targets(params: NetParams, name: str) -> list[Tensor]:
    """The tensors of a target: activations in the places of biases, or gradients by weights, then by biases."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(1, size, generator=generator) for size in (SPEC.layout[0], SPEC.layout[-1]))
    xs, gs = gradient_factors(params, u, v)
    if name == "activations":
        return [x[:, 0] for x in xs[1:]]
    by_weights = [torch.einsum("bpi,bpj->bij", g, x) for g, x in zip(gs[1:], xs[:-1], strict=True)]
    return [*by_weights, *(g[:, 0] for g in gs[1:])]


def error_of(name: str) -> Callable[[NetParams, NetParams], Tensor]:
    """(changes, networks) -> the mean over tensors of the error relative to the mean square of a tensor."""
    sizes = [x.square().mean() for x in targets(random_networks(10_000, torch.Generator().manual_seed(2)), name)]

    def error(changes: NetParams, params: NetParams) -> Tensor:
        predicted = changes.biases if name == "activations" else (*changes.weights, *changes.biases)
        triples = zip(predicted, targets(params, name), sizes, strict=True)
        return torch.stack([(y - target).square().mean() / size for y, target, size in triples]).mean()

    return error


def learn(model_name: str, target: str, steps: int, seed: int) -> list[dict[str, float]]:
    """Trains a model; R^2 on other networks after every tenth of the steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, error = MODELS[model_name].build(SPEC), error_of(target)
    model.fit_normalization([random_networks(NUM_TEST, generator)])
    test = random_networks(NUM_TEST, torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    curve: list[dict[str, float]] = []
    start = time.process_time()
    for number in range(1, steps + 1):
        share = min(number / WARMUP, 0.5 * (1 + math.cos(math.pi * number / steps)))
        optimizer.param_groups[0]["lr"] = RATE * share
        optimizer.zero_grad()
        params = random_networks(BATCH, generator)
        changes = model(params)
        assert isinstance(changes, NetParams)
        error(changes, params).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if number % max(1, steps // 10) == 0:
            with torch.no_grad():
                changes = model(test)
                assert isinstance(changes, NetParams)
                curve.append({"step": number, "r2": 1 - error(changes, test).item()})
    seconds = time.process_time() - start
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return [{**row, "parameters": num_parameters, "seconds": seconds} for row in curve]


def main() -> None:
    """Trains all, prints a table, and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--targets", nargs="+", default=["activations", "gradients"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the curves to this JSONL file")
    parser.add_argument("--figure", type=Path, help="a PNG of all curves, or of those in --out")
    values = parser.parse_args()
    runs = []
    for name in values.models:
        for target in values.targets:
            curve = learn(name, target, values.steps, values.seed)
            runs.append({"model": name, "target": target, "seed": values.seed, "curve": curve})
            last = curve[-1]
            size = f"{last['parameters']:,} parameters, {last['seconds']:.0f} s of processor time"
            print(f"{name:<10} {target:<12} R^2 {last['r2']:.4f}  ({size})", flush=True)
            if values.out is not None:
                with values.out.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    if values.figure is not None:
        if values.out is not None:
            runs = [json.loads(line) for line in values.out.read_text().splitlines()]
        draw(runs, values.figure)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """R^2 over steps, a panel per target."""
    targets = list(dict.fromkeys(run["target"] for run in runs))
    figure = Figure(figsize=(4.4 * len(targets), 3.5), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True):
        for run in (run for run in runs if run["target"] == target):
            axes.plot(*zip(*((row["step"], row["r2"]) for row in run["curve"]), strict=True), ".-", label=run["model"])
        axes.set(title=target, xlabel="step", ylabel="$R^2$ on other networks")
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
