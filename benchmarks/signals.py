"""Where a model loses what tells its input networks apart, before training.

python benchmarks/signals.py [--conf FILE] [--networks 256] [--data.dataset_path ZOO] [--ng_gnn_args.init published ...]

For what each part of the model returns, and for what the readout reads: the root mean square (RMS) of the features x,
and the share of their mean square that differs between networks,

    share = mean of Var_b(x_b) / mean of x_b^2,

over the networks b at every place. At 0 the features are the same for all networks, whatever these are. An RMS that
grows or vanishes from layer to layer means that gradients do, too. Neurons of a hidden layer are in no special order:
there the share is what differs between them. Parts run in their plain form, one after the other.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.experiments.config import Config, read_config
from scalegmn.models.base import Metanetwork
from scalegmn.networks import NetParams
from scalegmn.zoos.loader import load_splits

CONF = Path(__file__).parents[1] / "configs" / "digits_cls" / "scalegmn.yml"


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model in the order of their names: its children, and those of its lists of modules."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{place}", part) for place, part in child.named_children())
        else:
            yield name, child


def tensors(features: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a part returns."""
    if isinstance(features, Tensor):
        yield from [features] if features.is_floating_point() and features.ndim > 1 else []
    elif isinstance(features, (tuple, list)):
        for part in features:
            yield from tensors(part)


def measure(x: Tensor, num_networks: int) -> tuple[float, float]:
    """RMS and share of features of all networks, [num_networks * n, ...], network by network."""
    rows = x.double().reshape(num_networks, -1)
    square = rows.square().mean()
    return square.sqrt().item(), (rows.var(0, correction=0).mean() / square).item()


@torch.no_grad()
def signals(model: Metanetwork, params: NetParams) -> list[tuple[str, list[tuple[float, float]]]]:
    """Part -> RMS and share of each tensor that it returns, in the order in which the parts run."""
    rows: list[tuple[str, list[tuple[float, float]]]] = []

    def record(name: str, features: Any) -> None:
        whole = [x for x in tensors(features) if len(x) % len(params) == 0]
        if whole:
            rows.append((name, [measure(x, len(params)) for x in whole]))

    hooks = []
    for name, part in parts(model):
        if name == "readout":
            hooks.append(part.register_forward_pre_hook(lambda _, inputs: record("readout reads", inputs)))
        hooks.append(part.register_forward_hook(lambda _, __, output, name=name: record(name, output)))
    model.engine = "plain"
    model.eval()(params)
    for hook in hooks:
        hook.remove()
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", type=Path, default=CONF)
    parser.add_argument("--networks", type=int, default=256)
    arguments, words = parser.parse_known_args()
    config: Config = read_config(["--conf", str(arguments.conf), *words])
    zoo, splits = load_splits(config.data)
    torch.manual_seed(config.train_args.seed)
    model = config.model_config.build_for(zoo.architectures)
    model.fit_normalization(part for batch, _ in splits["train"].batches() for part in batch.parts)
    nets = splits["val"].read(torch.arange(min(arguments.networks, len(splits["val"]))))
    assert isinstance(nets, NetParams), "networks of several architectures have no places in common"
    for name, features in signals(model, nets):
        print(f"{name:<24}" + "   ".join(f"rms {rms:9.2e} share {share:6.4f}" for rms, share in features))


if __name__ == "__main__":
    main()
