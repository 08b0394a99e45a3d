"""A trained model applied to networks in files: classes, predicted test accuracies, or edited networks.

Networks of one architecture form a batch. A network that cannot be read does not stop the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from scalegmn.experiments.trained import TrainedModel
from scalegmn.interop.network_files import InputOptions, Source, head_files, read_source
from scalegmn.interop.state_dicts import read_network, state_dict_of
from scalegmn.interop.tensor_files import write_tensors
from scalegmn.interop.torch_modules import ExampleInput
from scalegmn.networks import HETERO, NetParams, NetSpec
from scalegmn.reporting.words import said_once


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
    notes: dict[int, tuple[str, ...]] = {}
    rows: dict[int, dict[str, Any]] = {}
    problems = []
    for index, source in enumerate(sources):
        try:
            nets[index], notes[index] = read_source(source.name, options)
            if source.is_state_dict:
                nets[index] = with_frequencies(nets[index], model)
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
                answer = _answer(model, answers, row, sources[index], out, options)
                notes_and_warnings = {"notes": list(notes[index]), "warnings": warnings[row]}
                rows[index] = {"network": sources[index].name, **answer, **notes_and_warnings}
            except (ValueError, OSError) as error:
                problems.append(str(error))
    return [rows[index] for index in sorted(rows)], problems


def with_frequencies(params: NetParams, model: TrainedModel) -> NetParams:
    """The network of a state dict with the frequencies of the training networks' sines, layer by layer; as it is where
    these have another depth or several architectures."""
    layers, trained = params.spec.layers, model.spec.layers
    if model.num_architectures > 1 or len(layers) != len(trained):
        return params
    layers = tuple(
        replace(layer, w0=of_trained.w0) if layer.activation == of_trained.activation == "sine" else layer
        for layer, of_trained in zip(layers, trained, strict=True)
    )
    return params.replace(spec=replace(params.spec, layers=layers))


def _parts(nets: dict[int, NetParams], batch_size: int) -> list[list[int]]:
    """Networks of equal architecture, in batches."""
    groups: dict[NetSpec, list[int]] = {}
    for index, params in nets.items():
        groups.setdefault(params.spec, []).append(index)
    return [same[i : i + batch_size] for same in groups.values() for i in range(0, len(same), batch_size)]


def _answer(
    model: TrainedModel,
    answers: Tensor | NetParams,
    row: int,
    source: Source,
    out: Path | None,
    options: InputOptions,
) -> dict[str, Any]:
    """The answer about one network of a batch; an edited network is written, or those of all heads."""
    if isinstance(answers, NetParams):
        assert out is not None
        heads = model.config.model_config.heads
        of_heads = answers[row * heads : (row + 1) * heads]
        paths = [str(path) for path in write_edited(of_heads, source, out / source.target, options)]
        return {"edited": paths[0] if heads == 1 else paths}
    return model.task_class.answer_of(answers, row, model.summary["data"])


def write_edited(edited: NetParams, source: Source, target: Path, options: InputOptions) -> list[Path]:
    """Writes the edited networks of one network, one per head of the model (`head_files`): a state dict with the keys,
    shapes and types of its source. With `seq.<l>.weight` and `seq.<l>.bias` if the source is none, or its weights are
    computed from several entries.

    Raises:
        ValueError: a file exists.
    """
    paths, params = head_files(target, len(edited)), edited.to("cpu")
    for path in paths:
        if path.exists():
            raise ValueError(f"{source.name}: --out: {path} exists already; choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    for head, path in enumerate(paths):
        state = None
        if source.is_state_dict:
            network = read_network(Path(source.name), options.layers)
            state = network.with_parameters(params[head : head + 1])
        write_tensors(path, state_dict_of(params, head) if state is None else state)
    return paths


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
        same, known = replace(spec, layers=tuple(layers)) == spec, _described(trained)
    else:
        same = spec.is_chain and NetSpec.envelope([trained, spec]) == trained
        known = f"of {model.num_architectures:,} architectures within {_described(trained)}"
    unlike = [] if same else [f"is a {_described(spec)}, the training networks are {known}"]
    return [[*unlike, *warnings] for warnings in model.task_class.warnings(params, model.summary["data"])]


def _described(spec: NetSpec) -> str:
    """A spec with the frequencies of its sines."""
    frequencies = sorted({layer.w0 for layer in spec.layers if layer.activation == "sine"})
    return str(spec) + (f" of w0 {', '.join(f'{w0:g}' for w0 in frequencies)}" if frequencies else "")


def notes_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was assumed of networks, each sentence once: with the first network, and the number of others."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in row["notes"]:
            by_note.setdefault(note, []).append(row["network"])
    return said_once(by_note)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, a line each; fractions in percent."""
    if not rows:
        return ""
    names = [name for name in rows[0] if name not in ("notes", "warnings", "probabilities")]
    cells = [[name.replace("_", " ") for name in names]]
    cells += [list(map(_cell, map(row.get, names))) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]) + "\n"
        for first, *rest in cells
    )


def _cell(value: Any) -> str:
    """A value of a row; of several files those of the first and the last."""
    if isinstance(value, list):
        return f"{value[0]} ... {value[-1]}"
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def input_options(
    model: TrainedModel,
    activation: str | None = None,
    example: ExampleInput | None = None,
    layers: tuple[str, ...] | None = None,
) -> InputOptions:
    """What to assume of networks that do not tell: the training networks' activation, if they have one, and frequency.

    Args:
        model: the trained model.
        activation: of state dicts, in place of the training networks'.
        example: an input of modules; None: it is not known.
        layers: the layers of state dicts in their order.
    """
    trained = {layer.activation for layer in model.spec.layers[:-1]} or {"identity"}
    known = len(trained) == 1 and trained != {HETERO} and model.num_architectures == 1
    activation = activation or (trained.pop() if known else None)
    return InputOptions(activation, model.spec.layers[0].w0, example or ExampleInput(), layers)
