"""What it costs to read networks of several architectures at once.

python benchmarks/mixed.py [--cases mnist_bidir ...] [--batch_size 64] [--rounds 5] [--out FILE.jsonl]

A step is forward, backward and AdamW, under a published configuration of ScaleGMN. By turns, equal networks pass in
blocks per layer and as a sparse graph, and networks that have widths of their own each pass as one graph and one after
the other. Reported: networks per second of each, medians over the rounds; how many times as long the graph takes as the
blocks, and one by one as the graph, medians over the rounds, each of which holds all four.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from step_time import CASES, CONFIGS, mean_square, random_networks, timed

from scalegmn.config import build_model
from scalegmn.models.scalegmn import ScaleGMN
from scalegmn.spec import NetParams, NetSpec
from scalegmn.train.trainer import keep_freed_memory

Read = Callable[[list[NetParams]], torch.Tensor | tuple]


def other_widths(spec: NetSpec, number: int) -> NetSpec:
    """A network of nearly as many parameters: each hidden layer wider or narrower."""
    layout = list(spec.layout)
    for place in range(1, len(layout) - 1):
        layout[place] += (number * (2 * place + 1)) % 13 - 6
    layers = zip(spec.layers, layout[:-1], layout[1:], strict=True)
    return NetSpec(tuple(replace(layer, in_dim=n, out_dim=m) for layer, n, m in layers))


def step_of(model: ScaleGMN, read: Read, parts: list[list[NetParams]]) -> Callable[[], None]:
    """A training step that reads a batch in parts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        for nets in parts:
            mean_square(read(nets)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(case: str, batch_size: int, rounds: int, device: torch.device) -> dict[str, object]:
    """The figures of one case."""
    conf, spec = CASES[case]
    torch.manual_seed(0)
    keep_freed_memory()
    model = build_model(CONFIGS / conf, spec=spec).to(device)
    at_once = model.networks_at_once(device)
    params = random_networks(spec, batch_size, device)
    equal = [[params[start : start + at_once]] for start in range(0, batch_size, at_once)]
    others = [random_networks(other_widths(spec, number), 1, device) for number in range(batch_size)]
    unequal = [others[start : start + at_once] for start in range(0, batch_size, at_once)]
    steps = {
        "blocks": step_of(model, lambda nets: model.in_blocks(nets[0]), equal),
        "graph": step_of(model, model.as_graph, equal),
        "unequal_graph": step_of(model, model, unequal),
        "unequal_one_by_one": step_of(model, model, [[params] for params in others]),
    }
    seconds = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            found = timed(step, device)
            if number:  # the first is a warm-up
                seconds[name].append(found)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    return {
        "case": case,
        "batch_size": batch_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        **{name: batch_size / statistics.median(found) for name, found in seconds.items()},
        "graph_over_blocks": ratio("graph", "blocks"),
        "one_by_one_over_graph": ratio("unequal_one_by_one", "unequal_graph"),
        "torch": torch.__version__,
    }


def main() -> None:
    """Measures the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ["mnist_forward", "mnist_bidir", "cifar_bidir", "relu_cnn_forward", "relu_cnn_bidir", "hetero_bidir"]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind that are timed")
    parser.add_argument("--out", type=Path, help="append the figures to this JSONL file")
    arguments = parser.parse_args()
    for case in arguments.cases:
        found = measure(case, arguments.batch_size, arguments.rounds, torch.device(arguments.device))
        print(
            "{case:<17} networks/s: equal in blocks {blocks:7.1f}, as a graph {graph:7.1f} "
            "({graph_over_blocks:.2f} x as long); unequal as a graph {unequal_graph:7.1f}, one by one "
            "{unequal_one_by_one:7.1f} ({one_by_one_over_graph:.1f} x as long)".format(**found),
            flush=True,
        )
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
