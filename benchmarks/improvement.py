"""One pass of a trained metanetwork beside gradient descent and magnitude pruning of the same networks.

scalegmn train improvement --conf digits_improvement/scalegmn.yml --run_dir RUN
python benchmarks/improvement.py RUN

Mean accuracies of the zoo's test networks on the same held-out images: as they are; after one pass of the run's model;
after one pass over the same networks moved by random permutations and scalars, which compute the same; after epochs of
SGD from where they are, on all training images, without momentum, dropout or weight decay, in batches of 32, at the
learning rate that is best for the validation networks. Last, with the smallest share of the weights set to zero, over
all layers of a network. Prints a table, then everything as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from scalegmn.experiments.config import read_config_file
from scalegmn.experiments.trained import load_model, read_summary
from scalegmn.networks import NetParams
from scalegmn.symmetry.groups import GroupElement
from scalegmn.tasks.editing import edit_stored
from scalegmn.tasks.improvement import Improvement
from scalegmn.zoos.fit.cnn_descent import OPTIMIZERS, Choices
from scalegmn.zoos.fit.equal_cnns import EqualFit

SHARES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Shares of the weights that are set to zero."""

BATCH_SIZE = 32
"""Images per step of SGD."""


def networks(task: Improvement, split: str) -> NetParams:
    """All networks of a split, as they are stored."""
    nets = replace(task.splits[split], removed=())
    return cast("NetParams", nets.read(torch.arange(len(nets))))


def accuracy(task: Improvement, params: NetParams, split: str) -> float:
    """The mean accuracy of networks on the held-out images of a split."""
    return task.measure(params, task.held_out[split])[1].mean().item()


def descent(task: Improvement, params: NetParams, split: str, rate: float, epochs: list[int]) -> list[float]:
    """Mean accuracies after these numbers of epochs of SGD."""
    size = len(params)
    constants = {"lr": rate, "l2": 0.0, "dropout": 0.0, "init_std": 0.0, "train_fraction": 1.0}
    choices = {name: torch.full((size,), value) for name, value in constants.items()}
    images, padding = task.images, task.reading[1]
    fit = EqualFit(
        [params],
        Choices(**choices, optimizer=torch.full((size,), OPTIMIZERS.index("sgd"))),
        images.pixels,
        images.labels,
        BATCH_SIZE,
        torch.Generator().manual_seed(0),
        padding=padding,
    )
    rows = images.train.expand(size, -1)
    return fit.run(rows, task.held_out[split], epochs).test_accuracy.mean(0).tolist()


def pruned(params: NetParams, share: float) -> NetParams:
    """Networks without the smallest weights: this share of all weights of each; biases stay."""
    flat = torch.cat([weight.flatten(1) for weight in params.weights], dim=1).abs()
    count = round(share * flat.shape[1])
    bound = flat.sort(1).values[:, count - 1] if count else flat.new_full((len(flat),), -1.0)

    def kept(weight: Tensor) -> Tensor:
        return torch.where(weight.abs() > bound.view(-1, *[1] * (weight.ndim - 1)), weight, 0)

    return params.replace(weights=tuple(map(kept, params.weights)))


@torch.no_grad()
def main() -> None:
    """Prints all figures of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--epochs", default="0,1,5,25,50,100,150", help="numbers of epochs of SGD")
    parser.add_argument("--rates", default="0.01,0.03,0.1,0.3", help="learning rates of SGD to choose from")
    parser.add_argument("--networks", type=int, help="SGD of the first so many networks of each split; default: of all")
    values = parser.parse_args()
    summary, config = read_summary(values.run), read_config_file(values.run / "config.yml")
    with redirect_stdout(StringIO()):
        task = Improvement.from_settings(config)
    if task.zoo.sha256 != summary["data"]["sha256"]:
        raise SystemExit(f"error: {task.zoo.path} is not the zoo that {values.run} was trained on; make it again")
    model = load_model(config.model_config, values.run, task.spec).eval()
    params = networks(task, "test")
    start = time.perf_counter()
    removed = task.splits["test"].removed
    improved = edit_stored(model, params, removed)
    seconds = (time.perf_counter() - start) / len(params)
    element = GroupElement.sample(params, torch.Generator().manual_seed(0))
    figures = {
        "networks": len(params),
        "before": accuracy(task, params, "test"),
        "one pass": accuracy(task, improved, "test"),
        "one pass, moved": accuracy(task, edit_stored(model, element.act(params), removed), "test"),
        "seconds per network": seconds,
    }
    epochs, rates = [int(word) for word in values.epochs.split(",")], [float(word) for word in values.rates.split(",")]
    chosen = slice(values.networks)
    rate = rates[0]
    if len(rates) > 1:
        of_rates = [max(descent(task, networks(task, "val")[chosen], "val", rate, epochs)) for rate in rates]
        rate = rates[max(range(len(rates)), key=of_rates.__getitem__)]
    start = time.perf_counter()
    after = descent(task, params[chosen], "test", rate, epochs)
    figures |= {
        "learning rate": rate,
        "descent": dict(zip(map(str, epochs), after, strict=True)),
        "descent, networks": len(params[chosen]),
        "descent, seconds per network": (time.perf_counter() - start) / len(params[chosen]),
        "pruned": {
            name: {f"{share:g}": accuracy(task, pruned(nets, share), "test") for share in SHARES}
            for name, nets in (("before", params), ("one pass", improved))
        },
    }
    for name in ("before", "one pass", "one pass, moved"):
        print(f"{name:<28}{figures[name]:>8.3f}")
    for number, value in zip(epochs, after, strict=True):
        print(f"{f'SGD, {number} epochs':<28}{value:>8.3f}")
    for name, row in figures["pruned"].items():
        print(f"pruned, {name:<20}" + "".join(f"{share}: {value:.3f}  " for share, value in row.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
