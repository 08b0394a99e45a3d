"""`zoo.safetensors`: how the networks of a zoo lie in a file, and how they are written, a part in memory at a time.

Its tensors are `spec<g>.weight.<l>`, `spec<g>.bias.<l>` of architecture g, `column.<name>` of all networks, and
`split.<name>` (numbers of networks). The first axis is that of networks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from scalegmn.networks import NetParams, NetSpec

if TYPE_CHECKING:
    from scalegmn.zoos.zoo_format import Networks

DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
"""What a zoo's tensors may be, and their names in safetensors; larger ones come first in the file, for alignment."""


class Layout:
    """Where the tensors of a zoo lie in its file.

    Args:
        parts: the networks, iterated over once.
        splits: name -> numbers of networks, counted through the parts.

    Raises:
        ValueError: parts have columns of different types or lengths, a type is not one of `DTYPES`, or the splits are
            not disjoint sets of the networks.

    Attributes:
        counts: how many networks of each architecture there are, in the order of the file.
        first: the number of each architecture's first network.
        splits: name -> numbers of networks, counted in the order of the file.
        header: tensor -> its description, as safetensors stores it; the largest numbers come first, for alignment.
        size: bytes of all tensors.
    """

    def __init__(self, parts: Iterable[Networks], splits: Mapping[str, Tensor]) -> None:
        self.counts: dict[NetSpec, int] = {}
        self._numbers: dict[NetSpec, int] = {}
        self._rows: dict[str, int] = {}
        self._kinds: dict[str, tuple[torch.dtype, torch.Size]] = {}  # and the shape of a row
        sequence: list[tuple[NetSpec, int]] = []  # networks of one architecture in a row
        for part in parts:
            for params in part.nets:
                sequence.append((params.spec, len(params)))
                self.counts[params.spec] = self.counts.get(params.spec, 0) + len(params)
                number = self._numbers.setdefault(params.spec, len(self._numbers))
                for name, tensor in params_to_tensors(params, number).items():
                    self._add(name, tensor)
            for name, column in part.columns.items():
                self._add(f"column.{name}", column)
        num_networks = sum(self.counts.values())
        for name in self._rows:
            if name.startswith("column.") and self._rows[name] != num_networks:
                raise ValueError(f"{name}: {self._rows[name]} rows for {num_networks} networks")
        check_splits(splits, num_networks)
        self.first = dict(zip(self.counts, accumulate(self.counts.values(), initial=0), strict=False))
        places = _places(self.first, sequence)
        self.splits = {name: places[rows] for name, rows in splits.items()}
        for name, rows in self.splits.items():
            self._add(f"split.{name}", rows)
        self.header: dict[str, dict[str, Any]] = {}
        self.size = 0
        for name in sorted(self._rows, key=lambda name: (list(DTYPES).index(self._kinds[name][0]), name)):
            (dtype, shape), begin = self._kinds[name], self.size
            self.size += self._rows[name] * shape.numel() * dtype.itemsize
            shapes = [self._rows[name], *shape]
            self.header[name] = {"dtype": DTYPES[dtype], "shape": shapes, "data_offsets": [begin, self.size]}

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return [name.removeprefix("column.") for name in self._rows if name.startswith("column.")]

    def _add(self, name: str, tensor: Tensor) -> None:
        """Counts the rows of a tensor."""
        kind = (tensor.dtype, tensor.shape[1:])
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: found {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        first = self._kinds.setdefault(name, kind)
        if first != kind:
            raise ValueError(f"{name}: found {kind[0]} {tuple(kind[1])}, in an earlier part {first}")
        self._rows[name] = self._rows.get(name, 0) + len(tensor)

    def write(self, file: Path, parts: Iterable[Networks]) -> None:
        """Writes the file.

        Args:
            file: where.
            parts: the same networks again.
        """
        text = json.dumps(self.header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            data = out.tell()
            out.truncate(data + self.size)
            written = dict.fromkeys(self.counts, 0)
            for part in parts:
                begin = 0
                for params in part.nets:
                    spec, rows = params.spec, slice(begin, begin + len(params))
                    for name, tensor in params_to_tensors(params, self._numbers[spec]).items():
                        self._put(out, data, name, written[spec], tensor)
                    for name, column in part.columns.items():
                        self._put(out, data, f"column.{name}", self.first[spec] + written[spec], column[rows])
                    written[spec] += len(params)
                    begin = rows.stop
            for name, tensor in self.splits.items():
                self._put(out, data, f"split.{name}", 0, tensor)

    def _put(self, out: BinaryIO, data: int, name: str, row: int, tensor: Tensor) -> None:
        """Writes some rows of a tensor, from `row` on; `data` is where tensors begin."""
        row_bytes = tensor.shape[1:].numel() * tensor.element_size()
        out.seek(data + self.header[name]["data_offsets"][0] + row * row_bytes)
        out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _places(first: Mapping[NetSpec, int], sequence: Sequence[tuple[NetSpec, int]]) -> Tensor:
    """The numbers in the zoo of the networks counted through its parts.

    Args:
        first: the number of each architecture's first network.
        sequence: how many networks of which architecture follow each other.
    """
    ends, places = dict(first), [torch.zeros(0, dtype=torch.long)]
    for spec, count in sequence:
        places.append(torch.arange(ends[spec], ends[spec] + count))
        ends[spec] += count
    return torch.cat(places)


def check_splits(splits: Mapping[str, Tensor], num_networks: int) -> None:
    """Raises ValueError unless the splits are disjoint sets of the zoo's networks."""
    rows = torch.cat([torch.zeros(0, dtype=torch.long), *splits.values()])
    if len(rows) and (rows.min() < 0 or rows.max() >= num_networks):
        raise ValueError(f"splits: found network {int(rows.max())}, expected 0 to {num_networks - 1}")
    counts = rows.bincount()
    if (counts > 1).any():
        raise ValueError(f"splits: network {int(counts.argmax())} is named {int(counts.max())} times, expected once")


def params_to_tensors(params: NetParams, group: int = 0) -> dict[str, Tensor]:
    """Named tensors of networks of one spec, the zoo's architecture number `group`; batch norms are refused."""
    if params.statistics is not None:
        raise ValueError(
            f"zoos hold no statistics of batch norms, found {params.spec}; store params.with_batch_norm_folded()"
        )
    tensors = {f"spec{group}.weight.{index}": tensor for index, tensor in enumerate(params.weights)}
    tensors |= {f"spec{group}.bias.{index}": tensor for index, tensor in enumerate(params.biases)}
    if params.activation is not None:
        tensors[f"spec{group}.activation"] = params.activation
    return tensors


def params_from_tensors(spec: NetSpec, tensors: Mapping[str, Tensor], group: int = 0) -> NetParams:
    """The inverse of `params_to_tensors`.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a shape is not the spec's.
    """
    weights = tuple(tensors[f"spec{group}.weight.{index}"] for index in range(spec.num_layers))
    biases = tuple(tensors[f"spec{group}.bias.{index}"] for index in range(spec.num_layers))
    for index, (layer, weight, bias) in enumerate(zip(spec.layers, weights, biases, strict=True)):
        expected = (len(biases[0]), *layer.weight_shape)
        if weight.shape != expected or bias.shape != expected[:2]:
            raise ValueError(
                f"layer {index}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, "
                f"expected {expected} and {expected[:2]}"
            )
    return NetParams(spec, weights, biases, tensors.get(f"spec{group}.activation"))
