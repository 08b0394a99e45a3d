"""The one on-disk zoo: a folder with `zoo.safetensors` and `zoo.json`.

`zoo.safetensors` holds, first axis = network: `spec0.weight.<l>`, `spec0.bias.<l>`, `column.<name>` (label, image,
psnr, ...), and `split.<name>` (indices). `zoo.json` holds the format version, the `NetSpec`, counts, a checksum of the
tensors and the provenance: recipe, image source, versions. The folder appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalegmn.spec import NetParams, NetSpec

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Zoo:
    """A zoo that has been opened and verified; tensors are memory-mapped.

    Attributes:
        path: its folder.
        params: all networks.
        columns: per name, a tensor [networks, ...]: `label` (class), `image` (identity of the image), `psnr` (dB).
        splits: `train`, `val`, `test` -> indices of networks.
        sha256: checksum of tensors and description, the zoo's identity.
        provenance: how it was made.
    """

    path: Path
    params: NetParams
    columns: dict[str, Tensor]
    splits: dict[str, Tensor]
    sha256: str
    provenance: dict[str, Any]

    @property
    def spec(self) -> NetSpec:
        """The architecture."""
        return self.params.spec

    @property
    def canonical(self) -> tuple[str, ...]:
        """The symmetries that the stored networks have removed."""
        return tuple(self.provenance.get("canonical", ()))


def write_zoo(
    path: Path,
    params: NetParams,
    columns: Mapping[str, Tensor],
    splits: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    draw: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a zoo folder atomically; `draw` adds figures to it.

    Raises:
        ValueError: `path` exists.
    """
    if path.exists():
        raise ValueError(f"{path} exists already")
    staging = path.with_name(path.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = {f"column.{name}": tensor for name, tensor in columns.items()}
    tensors |= {f"split.{name}": tensor for name, tensor in splits.items()}
    tensors |= params_to_tensors(params)
    file = staging / "zoo.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    content = {
        "format": "scalegmn zoo",
        "version": FORMAT_VERSION,
        "networks": len(params),
        "specs": [params.spec.to_dict()],
        "columns": list(columns),
        "splits": {name: len(indices) for name, indices in splits.items()},
        "bytes": file.stat().st_size,
        "tensors_sha256": _file_sha256(file),
        "provenance": dict(provenance),
    }
    content["sha256"] = _description_sha256(content)
    draw(staging)
    (staging / "zoo.json").write_text(json.dumps(content, indent=2) + "\n")
    for written in staging.iterdir():
        with open(written, "rb") as handle:
            os.fsync(handle.fileno())
    os.replace(staging, path)


def open_zoo(path: Path) -> Zoo:
    """Opens a zoo folder and verifies it.

    Raises:
        ValueError: there is none, it is truncated, edited or of another version; says which and what to do.
    """
    file, description = path / "zoo.safetensors", path / "zoo.json"
    missing = [part.name for part in (description, file) if not part.exists()]
    if missing:
        raise ValueError(
            f"{path}: no zoo there ({' and '.join(missing)} missing); set --data.dataset_path, or make a zoo of INRs "
            f"with `python -m scalegmn.zoos --conf configs/zoos/digits_inr.yml --out {path}`"
        )
    remedy = f"delete {path} and make it again"
    try:
        content = json.loads(description.read_text())
        version = content["version"]
        if version == FORMAT_VERSION and content["sha256"] != _description_sha256(content):
            raise ValueError("its checksum differs: edited or damaged")
        spec = NetSpec.from_dict(content["specs"][0])
        size, checksum = content["bytes"], content["tensors_sha256"]
        columns, splits, provenance = content["columns"], content["splits"], content["provenance"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{description}: not a zoo description ({type(error).__name__}: {error}); {remedy}") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{description}: format version {version}, expected {FORMAT_VERSION}; {remedy}")
    if file.stat().st_size != size:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, expected {size}: truncated or replaced; {remedy}")
    if _file_sha256(file) != checksum:
        raise ValueError(f"{file}: checksum differs from zoo.json's: edited or damaged; {remedy}")
    try:
        tensors = load_file(file)
        params = params_from_tensors(spec, tensors)
        columns = {name: tensors[f"column.{name}"] for name in columns}
        splits = {name: tensors[f"split.{name}"] for name in splits}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: not the tensors that zoo.json describes ({error}); {remedy}") from None
    return Zoo(path, params, columns, splits, content["sha256"], provenance)


def params_to_tensors(params: NetParams) -> dict[str, Tensor]:
    """Named tensors of networks of one spec."""
    tensors = {f"spec0.weight.{index}": tensor for index, tensor in enumerate(params.weights)}
    tensors |= {f"spec0.bias.{index}": tensor for index, tensor in enumerate(params.biases)}
    if params.activation is not None:
        tensors["spec0.activation"] = params.activation
    return tensors


def params_from_tensors(spec: NetSpec, tensors: Mapping[str, Tensor]) -> NetParams:
    """The inverse of `params_to_tensors`.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a shape is not the spec's.
    """
    weights = tuple(tensors[f"spec0.weight.{index}"] for index in range(spec.num_layers))
    biases = tuple(tensors[f"spec0.bias.{index}"] for index in range(spec.num_layers))
    for index, (layer, weight, bias) in enumerate(zip(spec.layers, weights, biases, strict=True)):
        expected = (len(biases[0]), *layer.weight_shape)
        if weight.shape != expected or bias.shape != expected[:2]:
            raise ValueError(
                f"layer {index}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, "
                f"expected {expected} and {expected[:2]}"
            )
    return NetParams(spec, weights, biases, tensors.get("spec0.activation"))


def split_by_group(groups: Tensor, fractions: Mapping[str, float], seed: int) -> dict[str, Tensor]:
    """Splits networks so that all networks of one group (image) are in one split.

    Args:
        groups: [networks] identity of each network's image.
        fractions: split -> share of the groups; `train` takes what they leave.
        seed: of the shuffle.

    Returns:
        Split -> ascending indices of networks.
    """
    identities = groups.unique()
    shuffled = identities[torch.randperm(len(identities), generator=torch.Generator().manual_seed(seed))]
    sizes = [round(fraction * len(identities)) for fraction in fractions.values()]
    parts = shuffled.split([len(identities) - sum(sizes), *sizes])
    names = ("train", *fractions)
    return {name: torch.isin(groups, part).nonzero()[:, 0] for name, part in zip(names, parts, strict=True)}


def _file_sha256(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _description_sha256(content: Mapping[str, Any]) -> str:
    """The checksum of all else in a description, the tensors' checksum included: the zoo's identity."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
