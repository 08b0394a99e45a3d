"""A trained model applied to networks in files: classes, predicted test accuracies, or edited networks.

Networks of one architecture form a batch. A network that cannot be read does not stop the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from scalegmn.experiments.trained import TrainedModel
from scalegmn.interop.onnx import from_onnx
from scalegmn.interop.state_dicts import from_state_dict, read_layers, state_dict_of, write_state_dict
from scalegmn.interop.torch_modules import FACTORY, from_factory
from scalegmn.networks import HETERO, NetParams, NetSpec
from scalegmn.zoos.zoo_format import first_not_finite

STATE_DICTS = (".pth", ".pt", ".safetensors")
"""Endings of files that hold state dicts."""


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        name: a file, or `package.module:factory`.
        target: the file of the edited network, in the folder of all.
    """

    name: str
    target: Path


@dataclass(frozen=True)
class InputOptions:
    """What files of networks do not tell.

    Attributes:
        activation: of state dicts; None: it is not known.
        w0: of their sines.
        input_shape: of a module's example input; None: it is not known.
    """

    activation: str | None
    w0: float
    input_shape: tuple[int, ...] | None


def find_sources(names: Sequence[str]) -> list[Source]:
    """The networks that a command names; a folder stands for all files of networks below it."""
    sources = []
    for path in map(Path, names):
        files = sorted(file for file in path.rglob("*") if file.suffix in (*STATE_DICTS, ".onnx"))
        for file in files or [path]:
            target = file.relative_to(path) if files else Path(file.name)
            if file.suffix not in STATE_DICTS:
                target = target.with_name(f"{target.name.replace(':', '.')}.safetensors")
            sources.append(Source(str(file), target))
    return sources


def read_net(name: str, options: InputOptions) -> NetParams:
    """One network in single precision, as a batch of size 1; raises ValueError with its name."""
    path = Path(name)
    if path.suffix in STATE_DICTS:
        state, _ = read_layers(path)
        if options.activation is None:
            reason = "a state dict does not tell its activation, and the training networks may have several"
            raise ValueError(f"{name}: {reason}; set --activation")
        try:
            params = from_state_dict(state, options.activation, options.w0)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    elif path.suffix == ".onnx":
        params = from_onnx(path)
    elif re.fullmatch(FACTORY, name):
        params = from_factory(name, options.input_shape)
    else:
        expected = f"a {', '.join(STATE_DICTS)} or .onnx file, a folder of them, or package.module:factory"
        raise ValueError(f"{name}: expected {expected}")
    params = params.map(Tensor.float)
    statistics = [tensor for tensor in params.statistics or () if tensor is not None]
    if first_not_finite((*params.weights, *params.biases, *statistics)) is not None:
        raise ValueError(f"{name}: a weight or bias is too large for single precision")
    return params


def predict(
    model: TrainedModel, sources: Sequence[Source], options: InputOptions, out: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """A model's answers about networks.

    Args:
        model: the model.
        sources: the networks.
        options: what the files do not tell.
        out: folder of the edited networks.

    Returns:
        A row per network that could be read, in order: its name, the answer, how it is unlike the training networks;
        and what was wrong with the others, a line each.
    """
    nets: dict[int, NetParams] = {}
    rows: dict[int, dict[str, Any]] = {}
    problems = []
    for index, source in enumerate(sources):
        try:
            nets[index] = read_net(source.name, options)
        except ValueError as error:
            problems.append(str(error))
    for part in tqdm(_parts(nets, model.config.batch_size), unit=" batches", disable=None):
        params = NetParams.cat([nets[index] for index in part])
        try:
            answers, warnings = model(params), differences(model, params)
        except ValueError as error:
            problems += [f"{sources[index].name}: {error}" for index in part]
            continue
        for row, index in enumerate(part):
            try:
                answer = _answer(model, answers, row, sources[index], out)
                rows[index] = {"network": sources[index].name, **answer, "warnings": warnings[row]}
            except (ValueError, OSError) as error:
                problems.append(str(error))
    return [rows[index] for index in sorted(rows)], problems


def _parts(nets: dict[int, NetParams], batch_size: int) -> list[list[int]]:
    """Networks of equal architecture, in batches."""
    groups: dict[NetSpec, list[int]] = {}
    for index, params in nets.items():
        groups.setdefault(params.spec, []).append(index)
    return [same[i : i + batch_size] for same in groups.values() for i in range(0, len(same), batch_size)]


def _answer(
    model: TrainedModel, answers: Tensor | NetParams, row: int, source: Source, out: Path | None
) -> dict[str, Any]:
    """The answer about one network of a batch; an edited network is written."""
    if isinstance(answers, NetParams):
        assert out is not None
        return {"edited": str(write_edited(answers, row, source, out / source.target))}
    return model.task_class.answer_of(answers, row, model.summary["data"])


def write_edited(edited: NetParams, row: int, source: Source, target: Path) -> Path:
    """Writes one of B edited networks: a state dict with the keys and types of its source; of other sources, with
    `seq.<l>.weight` and `seq.<l>.bias`.

    Raises:
        ValueError: the file exists.
    """
    if target.exists():
        raise ValueError(f"{source.name}: --out: {target} exists already")
    state = state_dict_of(edited.to("cpu"), row)
    if Path(source.name).suffix in STATE_DICTS:
        stored, names = read_layers(Path(source.name))
        state = stored | {name: new.to(stored[name].dtype) for name, new in zip(names, state.values(), strict=True)}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_state_dict(target, state)
    return target


def differences(model: TrainedModel, params: NetParams) -> list[list[str]]:
    """The differences of each of B networks of one architecture from the training networks, in words.

    Raises:
        ValueError: they have other inputs or outputs.
    """
    spec, trained = params.spec, model.spec
    if model.num_architectures == 1:
        layers = []
        for old, new in zip(trained.layers, spec.layers, strict=True):
            source = new if old.activation == HETERO else old  # a missing bias is a bias of zeros
            layers.append(replace(old, activation=source.activation, w0=source.w0, bias=new.bias))
        same, known = NetSpec(tuple(layers)) == spec, _described(trained)
    else:
        same = spec.is_chain and NetSpec.envelope([trained, spec]) == trained
        known = f"of {model.num_architectures:,} architectures within {_described(trained)}"
    unlike = [] if same else [f"is a {_described(spec)}, the training networks are {known}"]
    return [[*unlike, *warnings] for warnings in model.task_class.warnings(params, model.summary["data"])]


def _described(spec: NetSpec) -> str:
    """A spec with the frequencies of its sines."""
    frequencies = sorted({layer.w0 for layer in spec.layers if layer.activation == "sine"})
    return str(spec) + (f" of w0 {', '.join(f'{w0:g}' for w0 in frequencies)}" if frequencies else "")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, a line each; fractions in percent."""
    if not rows:
        return ""
    names = [name for name in rows[0] if name not in ("warnings", "probabilities")]
    cells = [[name.replace("_", " ") for name in names]]
    cells += [[f"{v:.1%}" if isinstance(v, float) else str(v) for v in map(row.get, names)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]) + "\n"
        for first, *rest in cells
    )


def input_options(
    model: TrainedModel, activation: str | None = None, input_shape: tuple[int, ...] | None = None
) -> InputOptions:
    """What to assume of networks that do not tell: the training networks' activation, if they have one, and frequency.

    Args:
        model: the trained model.
        activation: of state dicts, in place of the training networks'.
        input_shape: of a module's example input.
    """
    trained = {layer.activation for layer in model.spec.layers[:-1]} or {"identity"}
    known = len(trained) == 1 and trained != {HETERO} and model.num_architectures == 1
    return InputOptions(activation or (trained.pop() if known else None), model.spec.layers[0].w0, input_shape)
