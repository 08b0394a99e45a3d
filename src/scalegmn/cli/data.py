"""`python -m scalegmn.data`: look at zoos, check them, take networks out of them, draw splits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from scalegmn.interop.state_dicts import state_dict_of, write_state_dict
from scalegmn.reporting.errors import user_errors
from scalegmn.reporting.files import write_atomic
from scalegmn.zoos.published.cnns import write_published
from scalegmn.zoos.published.mnist_inrs import mnist_splits
from scalegmn.zoos.zoo_format import Zoo, open_zoo, verify_zoo

SHOWN = 10
"""Architectures that `info` names."""


def info(zoo: Zoo) -> str:
    """What a zoo holds, in lines."""
    size = (zoo.path / "zoo.safetensors").stat().st_size
    lines = [f"{zoo.path}: {len(zoo):,} networks, {size / 1e6:,.1f} MB, sha256 {zoo.sha256}"]
    for params in zoo.nets[:SHOWN]:
        dtype = str(params.biases[0].dtype).removeprefix("torch.")
        lines.append(f"  {len(params):,} x {params.spec}, {params.spec.num_parameters:,} parameters, {dtype}")
    rest = zoo.nets[SHOWN:]
    if rest:
        lines.append(f"  {sum(map(len, rest)):,} networks of {len(rest):,} more architectures")
    for name, column in sorted(zoo.columns.items()):
        low, high = (f"{value:.4g}" for value in (column.min().item(), column.max().item()))
        lines.append(f"  column {name}: {low} to {high}")
    for name, rows in zoo.splits.items():
        lines.append(f"  split {name}: {len(rows):,} networks")
    lines.append(f"  provenance: {json.dumps(zoo.provenance)}")
    return "\n".join(lines)


def export_network(zoo: Zoo, number: int, out: Path) -> None:
    """Writes one network as a state dict, `seq.<l>.weight` and `seq.<l>.bias`, a `.pth` or `.safetensors` file.

    Raises:
        ValueError: there is no such network, the file exists, or its name says neither format.
    """
    if not 0 <= number < len(zoo):
        raise ValueError(f"--network: found {number}, expected 0 to {len(zoo) - 1} for {zoo.path}")
    if out.exists():
        raise ValueError(f"--out: {out} exists already")
    for params in zoo.nets:
        if number < len(params):
            break
        number -= len(params)
    if out.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"--out: found {out}, expected a name that ends in .pth or .safetensors")
    write_state_dict(out, state_dict_of(params, number))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m scalegmn.data", description=__doc__.split(": ", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("info", "what a zoo holds"),
        ("verify", "every checksum and weight of a zoo"),
        ("export", "one network of a zoo as a state dict"),
        ("published", "a zoo of CNNs in the published layout: npy and csv files"),
    ):
        commands.add_parser(name, help=text).add_argument("zoo", type=Path, help="its folder")
    export = commands.choices["export"]
    export.add_argument("--network", type=int, required=True, help="its number in the zoo")
    export.add_argument("--out", type=Path, required=True, help="file, .pth or .safetensors")
    commands.choices["published"].add_argument("--out", type=Path, required=True, help="folder of the files")
    splits = commands.add_parser("splits", help="splits JSON of the published MNIST INRs")
    splits.add_argument("dataset_path", type=Path, help="folder of the INRs")
    splits.add_argument("--out", type=Path, help="JSON file; default mnist_splits.json in dataset_path")
    splits.add_argument("--val_size", type=int, default=5000, help="training networks to validate with (5000)")
    splits.add_argument("--seed", type=int, default=0, help="of their choice (0)")
    arguments = parser.parse_args()
    with user_errors():
        if arguments.command == "info":
            print(info(open_zoo(arguments.zoo)))
        elif arguments.command == "verify":
            print(f"{verify_zoo(arguments.zoo).path}: every checksum is right, every weight finite")
        elif arguments.command == "export":
            export_network(open_zoo(arguments.zoo), arguments.network, arguments.out)
            print(arguments.out)
        elif arguments.command == "published":
            write_published(open_zoo(arguments.zoo), arguments.out)
            print(f"{arguments.out}: read it with --data.dataset cifar10 --data.dataset_path {arguments.out}")
        else:
            out = arguments.out or arguments.dataset_path / "mnist_splits.json"
            if out.exists():
                raise ValueError(f"--out: {out} exists already")
            content = mnist_splits(arguments.dataset_path, arguments.val_size, arguments.seed)
            write_atomic(out, json.dumps(content))
            print(f"{out}: " + ", ".join(f"{len(found['path']):,} {name}" for name, found in content.items()))


if __name__ == "__main__":
    main()
