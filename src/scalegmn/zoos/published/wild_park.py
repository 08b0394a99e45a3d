"""The CNN Wild Park (Kofinas et al., ICLR 2024; doi 10.5281/zenodo.12797219): CNNs of mixed architecture.

Its layout is taken from the scripts that write and read it (github.com/mkofinas/neural-graphs, directory
experiments/cnn_generalization/dataset); the download itself has not been at hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from scalegmn.configuration.text import read_text
from scalegmn.interop.state_dicts import stored_network
from scalegmn.interop.tensor_files import check_size, refusal
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.zoos.convert import Listing, NothingThereError, checksum
from scalegmn.zoos.registry import ConvertedDataset, register_dataset
from scalegmn.zoos.zoo_format import Networks, first_not_finite, joined

if TYPE_CHECKING:
    from scalegmn.zoos.loader import DataConfig


class _Checkpoint(NamedTuple):
    """A network on disk. The folder around its folder is its run; all checkpoints of a run have one architecture."""

    path: Path
    score: float
    step: int
    split: str


class _StandIn:
    """Stands in for every class and function that a pickle names: takes any arguments and does nothing."""

    def __new__(cls, *args: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass


class WildPark(ConvertedDataset):
    """`<run>/<checkpoint>/checkpoint.pt` with `model` and `config`; splits in `cnn_park_splits.json`."""

    settings = ("split_path",)

    def choice(self, config: DataConfig) -> dict[str, Any]:
        """The splits."""
        return {"splits": checksum(config.file(config.split_path, "cnn_park_splits.json"))}

    def listing(self, config: DataConfig) -> Listing:
        """The checkpoints that the splits name."""
        return wild_park_listing(config.root, config.file(config.split_path, "cnn_park_splits.json"))


register_dataset(WildPark("cnn_wild_park", "CNNs of mixed architecture that classify CIFAR-10 images"))


def wild_park_listing(root: Path, splits: Path) -> Listing:
    """The checkpoints of all runs, run by run, with their test accuracy.

    Args:
        root: where the paths of `splits` are found, or their ends, such as `<run>/<checkpoint>/checkpoint.pt`.
        splits: JSON, split -> {"path", "score": test accuracies, "step": epochs}, lists with an entry per checkpoint.

    Raises:
        ValueError: a file is missing or not what it should be, or a run is in two splits; names it.
    """
    checkpoints = _read_splits(root, splits)
    runs: dict[Path, str] = {}
    for checkpoint in checkpoints:
        run, split = checkpoint.path.parents[1], checkpoint.split
        if runs.setdefault(run, split) != split:
            raise ValueError(f"{splits}: {run} is in split {runs[run]} and in {split}, expected runs in one")
    numbers = {run: number for number, run in enumerate(runs)}
    names = [checkpoint.split for checkpoint in checkpoints]
    rows = {
        name: torch.tensor([row for row, split in enumerate(names) if split == name]).long()
        for name in ("train", "val", "test")
    }
    read = partial(_read, checkpoints, numbers)
    provenance = {"images": "cifar10", "image_shape": [32, 32, 3]}
    return Listing([checkpoint.path for checkpoint in checkpoints], len(checkpoints), read, rows, provenance)


def _read_splits(root: Path, path: Path) -> list[_Checkpoint]:
    """The checkpoints that the JSON names, in the order of their paths."""
    expected = 'JSON with "train", "val" and "test", each with lists "path", "score" (0 to 1) and "step"'
    try:
        content = json.loads(read_text(path))
        entries = sorted(
            (re.split(r"[\\/]", name), float(score), int(step), split)
            for split in ("train", "val", "test")
            for name, score, step in zip(*(content[split][key] for key in ("path", "score", "step")), strict=True)
        )
        good = bool(entries) and all(len(parts) > 2 and 0 <= score <= 1 for parts, score, _, _ in entries)
    except OSError:
        raise ValueError(f"data.split_path: {path}: no such file") from None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{path}: expected {expected}")
    first = entries[0][0]
    ends = [depth for depth in range(len(first), 2, -1) if root.joinpath(*first[-depth:]).is_file()]
    if not ends:
        raise NothingThereError(f"{root}: no {'/'.join(first)}, as in {path}; set --data.dataset_path")
    return [_Checkpoint(root.joinpath(*parts[-ends[0] :]), score, step, split) for parts, score, step, split in entries]


def _read(checkpoints: Sequence[_Checkpoint], numbers: Mapping[Path, int], part: slice) -> Networks:
    """Some of the checkpoints."""
    chosen = checkpoints[part]
    columns: dict[str, Tensor] = {
        "test_accuracy": torch.tensor([checkpoint.score for checkpoint in chosen]),
        "epoch": torch.tensor([checkpoint.step for checkpoint in chosen]),
        "network": torch.tensor([numbers[checkpoint.path.parents[1]] for checkpoint in chosen]),
    }
    return Networks(joined([_read_network(checkpoint.path) for checkpoint in chosen]), columns)


def _read_network(path: Path) -> NetParams:
    """The network of a checkpoint, [1], without executing anything.

    Raises:
        ValueError: the file is missing, damaged or of another kind, or its weights are not finite; names it.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([_stand_in(name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile or broken file leads to
        raise refusal(path, error) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path}: expected a checkpoint with model, a state dict, and config")
    state = content["model"]
    spec = _spec(path, _plain(content.get("config")))
    check_size(path, state)
    try:
        tensors = [tensor[None].float() for tensor in stored_network(state).tensors()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
    expected = [shape for layer in spec.layers for shape in (layer.weight_shape, (layer.out_dim,))]
    if shapes != expected:
        raise ValueError(f"{path}: model: found shapes {shapes}, expected {expected} by its config")
    if first_not_finite([tensor.flatten(1) for tensor in tensors]) is not None:
        raise ValueError(f"{path}: a weight or bias is NaN or infinite; leave it out of the splits")
    return NetParams(spec, tuple(tensors[::2]), tuple(tensors[1::2]))


@cache
def _stand_in(name: str) -> type:
    """The stand-in of what pickles call `name`."""
    module, _, class_name = name.rpartition(".")
    return type(class_name, (_StandIn,), {"__module__": module, "__qualname__": class_name})


def _plain(value: Any) -> Any:
    """The dictionaries, lists and values that an OmegaConf container holds; others as they are."""
    if isinstance(value, _StandIn):
        attributes = vars(value)
        return _plain(attributes.get("_content", attributes.get("_val")))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _spec(path: Path, config: Any) -> NetSpec:
    """The architecture that a checkpoint describes: `channels` (with those of the image), and per convolution
    `kernel_size`, `stride`, `padding`, `activation` (or `none`) and `residual`, its source or -1."""
    try:
        channels = config["channels"]
        keys = ("kernel_size", "stride", "padding", "activation", "residual")
        layers = []
        rows = zip(channels[:-1], channels[1:], *(config[key] for key in keys), strict=True)
        for in_dim, out_dim, kernel, stride, padding, activation, residual in rows:
            if (stride, padding) != (1, kernel // 2) or kernel % 2 == 0:
                raise ValueError(f"found stride {stride} and padding {padding}, expected 1 and {kernel // 2}")
            name = {"none": "identity"}.get(activation, activation)
            source = None if residual < 0 else residual
            layers.append(LayerSpec(in_dim, out_dim, (kernel, kernel), name, residual=source))
        return NetSpec((*layers, LayerSpec(channels[-1], config["n_classes"])))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: config: not the description of a CNN ({type(error).__name__}: {error})") from None
