"""The published small CNNs (Unterthiner et al., 2020, https://arxiv.org/abs/2002.11448), as Zhou et al. (NeurIPS 2023)
use them."""

from __future__ import annotations

import ast
import csv
import gzip
import os
import random
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scalegmn.configuration.text import read_text
from scalegmn.networks import ACTIVATIONS, HETERO, NetParams
from scalegmn.reporting.files import removed_on_failure
from scalegmn.zoos.convert import Listing, NothingThereError
from scalegmn.zoos.registry import ConvertedDataset, register_dataset
from scalegmn.zoos.zoo_format import Networks, Zoo, first_not_finite

if TYPE_CHECKING:
    from scalegmn.zoos.loader import DataConfig

FINAL_STEP = 86
"""The step whose checkpoint counts."""


class SmallCnns(ConvertedDataset):
    """`weights.npy`, `metrics.csv.gz`, `layout.csv` and `<name>_split.csv`; options `data.data_path`,
    `data.metrics_path`, `data.layout_path`, `data.idcs_file` and `data.activation_function`."""

    zoo_name = "small_cnns"
    settings = ("data_path", "metrics_path", "layout_path", "idcs_file")

    def choice(self, config: DataConfig) -> dict[str, Any]:
        """The files, and the activation that networks are chosen by."""
        files = [os.path.relpath(path, config.root) for path in self._files(config)]
        return {"files": files, "activation_function": config.activation_function}

    def listing(self, config: DataConfig) -> Listing:
        """The final networks."""
        return cnn_listing(*self._files(config), config.activation_function)

    def _files(self, config: DataConfig) -> tuple[Path, Path, Path, Path]:
        """Weights, metrics, layout, order."""
        return (
            config.file(config.data_path, "weights.npy"),
            config.file(config.metrics_path, "metrics.csv.gz"),
            config.file(config.layout_path, "layout.csv"),
            config.file(config.idcs_file, f"{self.name}_split.csv"),
        )


register_dataset(SmallCnns("cifar10", "small CNNs that classify grey CIFAR-10 images, with their test accuracies"))
register_dataset(SmallCnns("svhn", "small CNNs that classify grey SVHN images, with their test accuracies"))


def cnn_listing(weights: Path, metrics: Path, layout: Path, order: Path, activation: str | None) -> Listing:
    """The final networks of the zoo, with their test accuracy, in the published splits.

    Rows in the shuffled order whose `step` is 86; the second half tests; of the first half, its positions shuffled by
    `random.Random(0)`, 80 % train and 20 % validate; then those with the chosen activation.

    Args:
        weights: npy, [rows, parameters].
        metrics: csv.gz, a line per row, with `step`, `test_accuracy` and `config.activation`.
        layout: csv, a line per tensor: `varname`, `start_idx`, `end_idx`, `shape`.
        order: csv, row numbers.
        activation: `relu`, `tanh`, ...; None: all.

    Raises:
        ValueError: a file is missing or not what it should be; names it and the line.
    """
    if not (weights.exists() or metrics.exists()):
        raise NothingThereError(f"data.data_path: {weights}: no such file; set --data.dataset_path")
    rows, steps, accuracies, activations = _read_metrics(metrics)
    values = _open_weights(weights, rows)
    tensors = _read_layout(layout, values.shape[1])
    shuffled = _read_order(order, rows)
    final = [row for row in shuffled if steps[row] == FINAL_STEP]
    if not final:
        raise ValueError(f"{metrics}: no row with step {FINAL_STEP}")
    half = len(final) // 2
    positions = list(range(half))
    random.Random(0).shuffle(positions)
    num_train = int(0.8 * half)
    parts = {"train": positions[:num_train], "val": positions[num_train:], "test": range(half, len(final))}
    chosen: list[int] = []
    splits: dict[str, Tensor] = {}
    for name, part in parts.items():
        wanted = [final[k] for k in part if activation in (None, activations[final[k]])]
        splits[name] = torch.arange(len(chosen), len(chosen) + len(wanted))
        chosen += wanted
    if not chosen:
        raise ValueError(
            f"data.activation_function: found {activation}, expected one of {', '.join(sorted(set(activations)))}"
        )
    names = [activations[row] for row in chosen]
    unknown = sorted(set(names) - set(ACTIVATIONS))
    if unknown:
        raise ValueError(
            f"{metrics}: config.activation: found {unknown[0]!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    scores = torch.tensor([accuracies[row] for row in chosen])
    if not ((scores >= 0) & (scores <= 1)).all():
        low, high = scores.aminmax()
        raise ValueError(f"{metrics}: test_accuracy: found {low:g} to {high:g}, expected 0 to 1")
    read = partial(_read, weights, values, tensors, chosen, names, scores)
    return Listing([weights, metrics, layout, order], len(chosen), read, splits, {})


def write_published(zoo: Zoo, folder: Path) -> None:
    """Writes a zoo of CNNs in the published layout, which `cnn_listing` reads back.

    The files: `weights.npy`, `metrics.csv.gz` (`step` is the epoch), `layout.csv` and `cifar10_split.csv`, a random
    order of the rows. The last epoch is written as step 86, by which readers choose; they also split anew.

    Args:
        zoo: convolutions, then one linear layer, with columns `test_accuracy` and `epoch`.
        folder: where they go; made.

    Raises:
        ValueError: the folder exists, or the zoo is another one.
    """
    spec, missing = zoo.spec, {"test_accuracy", "epoch"} - set(zoo.columns)
    kinds = [layer.kernel is not None for layer in spec.layers]
    if missing or kinds != [True] * (spec.num_layers - 1) + [False]:
        raise ValueError(
            f"{zoo.path}: found {spec} with columns {', '.join(zoo.columns)}, expected convolutions and one linear "
            "layer, with test_accuracy and epoch"
        )
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another")
    layout, parts, start = [], [], 0
    for index, (weight, bias) in enumerate(zip(zoo.params.weights, zoo.params.biases, strict=True)):
        layer = f"sequential/{f'conv2d_{index}'.removesuffix('_0') if kinds[index] else 'dense'}"
        weight = weight.permute(0, 3, 4, 2, 1) if kinds[index] else weight.mT
        for kind, tensor in (("bias:0", bias), ("kernel:0", weight)):
            size = tensor[0].numel()
            layout.append([f"{layer}/{kind}", start, start + size, str(tuple(tensor.shape[1:]))])
            parts.append(tensor.flatten(1).float())
            start += size
    last, columns = zoo.columns["epoch"].max(), {key: column.tolist() for key, column in zoo.columns.items()}
    columns["step"] = torch.where(zoo.columns["epoch"] == last, FINAL_STEP, zoo.columns["epoch"]).tolist()
    columns["config.activation"] = [spec.layers[0].activation] * len(zoo)
    if zoo.params.activation is not None:
        columns["config.activation"] = [spec.activations[index] for index in zoo.params.activation.tolist()]
    with removed_on_failure(folder):
        folder.mkdir(parents=True)
        np.save(folder / "weights.npy", torch.cat(parts, 1).numpy())
        with open(folder / "layout.csv", "w", newline="") as file:
            csv.writer(file).writerows([["varname", "start_idx", "end_idx", "shape"], *layout])
        with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
        np.savetxt(folder / "cifar10_split.csv", np.random.default_rng(0).permutation(len(zoo)), fmt="%d")


def _read(
    file: Path,
    values: np.ndarray,
    tensors: Sequence[tuple[bool, slice, tuple[int, ...]]],
    rows: Sequence[int],
    activations: Sequence[str],
    scores: Tensor,
    part: slice,
) -> Networks:
    """Some of the chosen rows as networks."""
    flat = torch.from_numpy(np.asarray(values[rows[part]], dtype=np.float32))
    bad = first_not_finite([flat])
    if bad is not None:
        raise ValueError(f"{file}: row {rows[part][bad]} has NaN or infinite weights")
    weights, biases = [], []
    for is_kernel, where, shape in tensors:
        tensor = flat[:, where].reshape(-1, *shape)
        if not is_kernel:
            biases.append(tensor)
        elif len(shape) == 4:  # [h, w, in, out]
            weights.append(tensor.permute(0, 4, 3, 1, 2))
        else:  # [in, out]
            weights.append(tensor.permute(0, 2, 1))
    params = NetParams.from_tensors(weights, biases, activations[0])
    if len(set(activations)) > 1:
        spec = params.spec.with_activation(HETERO, activations)
        indices = torch.tensor([spec.activations.index(name) for name in activations[part]])
        params = params.replace(spec=spec, activation=indices)
    columns = {"test_accuracy": scores[part], "row": torch.tensor(rows[part])}
    return Networks((params,), columns)


def _open_weights(path: Path, num_rows: int) -> np.ndarray:
    """The weights, memory-mapped."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"data.data_path: {path}: no such file") from None
    except Exception as error:  # whatever a hostile or broken file leads to
        raise ValueError(f"{path}: refused, not a plain npy array ({error})") from None
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f" or len(values) != num_rows:
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "several arrays"
        raise ValueError(f"{path}: found {found}, expected floats [{num_rows}, parameters]")
    return values


def _read_metrics(path: Path) -> tuple[int, list[int], list[float], list[str]]:
    """Number of rows; step, test accuracy and activation of each."""
    steps, accuracies, activations = [], [], []
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
            for line, row in enumerate(csv.DictReader(file), start=2):
                try:
                    steps.append(int(float(row["step"])))
                    accuracies.append(float(row["test_accuracy"]))
                    activations.append(row["config.activation"])
                except KeyError as error:
                    raise ValueError(
                        f"{path}: no column {error}, expected step, test_accuracy and config.activation"
                    ) from None
                except (TypeError, ValueError, OverflowError):
                    found = f"{row['step']!r}, {row['test_accuracy']!r}"
                    raise ValueError(
                        f"{path}: line {line}: step, test_accuracy: found {found}, expected numbers"
                    ) from None
    except FileNotFoundError:
        raise ValueError(f"data.metrics_path: {path}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ValueError(f"{path}: not a gzip file of comma-separated values ({error})") from None
    return len(steps), steps, accuracies, activations


def _read_layout(path: Path, num_parameters: int) -> list[tuple[bool, slice, tuple[int, ...]]]:
    """Whether it is a kernel, its columns, its shape, of each tensor in the order of the file."""
    tensors = []
    try:
        rows = list(csv.DictReader(read_text(path).splitlines()))
    except OSError:
        raise ValueError(f"data.layout_path: {path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not comma-separated values ({error})") from None
    for line, row in enumerate(rows, start=2):
        try:
            kind = row["varname"].rpartition("/")[2]
            where = slice(int(row["start_idx"]), int(row["end_idx"]))
            shape = ast.literal_eval(row["shape"])
            size = int(np.prod(shape))
            good = isinstance(shape, tuple) and all(type(n) is int and n > 0 for n in shape)
        except (KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError, AttributeError):
            good = False
        if not good or kind not in ("kernel:0", "bias:0") or len(shape) not in ((2, 4) if "k" in kind else (1,)):
            raise ValueError(
                f"{path}: line {line}: expected varname ending in kernel:0 or bias:0, start_idx, end_idx and a shape "
                f"like (3, 3, 1, 16), found {dict(row)}"
            )
        if not 0 <= where.start < where.stop <= num_parameters or where.stop - where.start != size:
            raise ValueError(f"{path}: line {line}: columns {where.start} to {where.stop} do not hold shape {shape}")
        tensors.append((kind == "kernel:0", where, shape))
    ends = [0, *sorted(where.stop for _, where, _ in tensors)]
    if sorted(where.start for _, where, _ in tensors) != ends[:-1] or ends[-1] != num_parameters:
        raise ValueError(f"{path}: its tensors do not cover columns 0 to {num_parameters} once each")
    return tensors


def _read_order(path: Path, num_rows: int) -> list[int]:
    """The shuffled row numbers."""
    try:
        rows = [int(float(word)) for word in read_text(path).replace(",", "\n").split()]
    except OSError:
        raise ValueError(f"data.idcs_file: {path}: no such file") from None
    except (ValueError, OverflowError):
        raise ValueError(f"{path}: expected row numbers, one per line") from None
    if len(set(rows)) != len(rows) or not rows or min(rows) < 0 or max(rows) >= num_rows:
        raise ValueError(f"{path}: expected different row numbers from 0 to {num_rows - 1}")
    return rows
