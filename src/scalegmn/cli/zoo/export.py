"""`scalegmn zoo export ZOO --network 3 --out net.pth`: one network of a zoo as a state dict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalegmn.cli.arguments import Arguments
from scalegmn.interop.state_dicts import state_dict_of
from scalegmn.interop.tensor_files import write_tensors
from scalegmn.zoos.zoo_format import Zoo, is_zoo, open_zoo


def run(words: Sequence[str]) -> None:
    """Writes one network."""
    parser = Arguments("scalegmn zoo export", "Write one network of a zoo as a state dict.")
    parser.add_argument("zoo", type=Path, help="its folder")
    parser.add_argument("--network", type=int, required=True, help="its number in the zoo, from 0")
    parser.add_argument("--out", type=Path, required=True, help="the file, .pth or .safetensors")
    values = parser.read(words)
    export_network(open_zoo(values.zoo), values.network, values.out)
    print(values.out)


def refuse_zoos(names: Sequence[str]) -> None:
    """Raises ValueError if one of the files and folders with networks is a zoo, or holds one."""
    paths = [path.parent if path.name == "zoo.safetensors" else path for path in map(Path, names)]
    for zoo in (folder for path in paths for folder in (path, *path.glob("*")) if is_zoo(folder)):
        remedy = f"write one of its networks as a file with `scalegmn zoo export {zoo} --network 0 --out net.pth`"
        raise ValueError(f"{zoo}: found a zoo, expected files of networks; {remedy}")


def export_network(zoo: Zoo, number: int, out: Path) -> None:
    """Writes one network as a state dict, `seq.<l>.weight` and `seq.<l>.bias`, to a `.pth` or `.safetensors` file.

    Raises:
        ValueError: the zoo has no such network, the file exists, or its name ends otherwise.
    """
    if not 0 <= number < len(zoo):
        raise ValueError(f"--network: found {number}, expected 0 to {len(zoo) - 1} for {zoo.path}")
    if out.exists():
        raise ValueError(f"--out: {out} exists already; choose another")
    if out.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"--out: found {out}, expected a name that ends in .pth or .safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    for params in zoo.nets:
        if number < len(params):
            break
        number -= len(params)
    write_tensors(out, state_dict_of(params, number))
