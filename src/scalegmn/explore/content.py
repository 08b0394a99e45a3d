"""What the page shows, as plain data: collections of networks with columns, a map, pictures and parameters."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.experiments.trained import TrainedModel, load
from scalegmn.explore.answers import answers_of, inputs_of_zoo
from scalegmn.explore.architectures import described, is_drawable, sizes_of
from scalegmn.explore.featured import featured_networks
from scalegmn.explore.maps import places, require_map
from scalegmn.interop.network_files import InputOptions, find_sources, read_source
from scalegmn.models.base import Metanetwork
from scalegmn.networks import HETERO, NetParams
from scalegmn.networks.siren import OUTPUT_OFFSET, render
from scalegmn.reporting.files import natural_order
from scalegmn.reporting.words import said_once
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.symmetry.statistics import invariant_statistics
from scalegmn.zoos.zoo_format import Networks, Zoo, in_single, is_zoo, joined, open_zoo

NETWORKS = 2000
"""Networks of a zoo on a page."""

PARAMETER_BYTES = 7 * 2**20
"""Parameters on a page, before base64 makes them a third longer; collections share them equally, and networks beyond
them are shown without."""

BATCH = 256
"""Networks that a model answers at once."""

LARGEST_IMAGE = 32
"""Pixels of the longer side of thumbnails."""


@dataclass
class Collection:
    """Networks that the page shows together.

    Attributes:
        name: what the user named.
        kind: `zoo`, `run` or `networks`.
        note: where they come from, in a sentence.
        names: of each network.
        nets: the networks, numbered through.
        columns: name -> a value per network: numbers, or names of classes.
        image_shape: (height, width, channels) of the images that they draw; None: they are no INRs of images.
        output_offset: what is added to their outputs to have pixels.
        features: [networks, features], what the map shows.
        map_of: what these are, in words.
        answers: of classifiers, see `answers.answers_of`.
        map_kind: how they become places, one of `maps.MAPS`.
        featured: networks with moves, explanations or edits, see `featured.featured_networks`.
        facts: further lines for people.
    """

    name: str
    kind: str
    note: str
    names: list[str]
    nets: Networks
    columns: dict[str, list[float | str | None]]
    image_shape: tuple[int, int, int] | None
    output_offset: float
    features: Tensor
    map_of: str
    map_kind: str = "pca"
    answers: dict[str, Any] | None = None
    featured: list[dict[str, Any]] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def content(self, parameter_bytes: int = PARAMETER_BYTES) -> dict[str, Any]:
        """All of it in plain JSON types, with so many bytes of parameters at most."""
        x, y, map_kind = places(self.features, self.map_kind)
        architectures, architecture = _architectures(self.nets)
        count = self._num_with_parameters(parameter_bytes)
        return {
            "name": self.name,
            "kind": self.kind,
            "note": self.note,
            "facts": self.facts,
            "names": self.names,
            "columns": [_column(name, values) for name, values in self.columns.items()],
            "map": {"x": rounded(x), "y": rounded(y), "kind": map_kind, "of": self.map_of},
            "images": self._images(),
            "output_offset": self.output_offset,
            "architectures": architectures,
            "architecture": architecture,
            "group": self.nets.architecture(torch.arange(len(self.nets))).tolist(),  # of equal layers
            "parameters": {"count": count, "values": self._parameters(count)},
            "answers": self.answers,
            "featured": self.featured,
        }

    def _num_with_parameters(self, parameter_bytes: int) -> int:
        """How many networks, from the first, have their parameters on the page."""
        total = 0
        sizes = [params.spec.num_parameters for params in self.nets.nets for _ in range(len(params))]
        for count, size in enumerate(sizes):
            total += 4 * size
            if total > parameter_bytes:
                return count
        return len(sizes)

    def _parameters(self, count: int) -> str:
        """The first networks' parameters, float32 in base64, in the order of `NetParams.flatten`."""
        content, left = b"", count
        for params in self.nets.nets:
            content += params[: max(left, 0)].flatten().float().numpy().tobytes()
            left -= len(params)
        return b64encode(content).decode()

    def _images(self) -> dict[str, Any] | None:
        """Thumbnails of what INRs draw, a byte per pixel and channel."""
        if self.image_shape is None:
            return None
        height, width, channels = self.image_shape
        shrink = max(1, math.ceil(max(height, width) / LARGEST_IMAGE))
        height, width = max(2, height // shrink), max(2, width // shrink)
        pixels = [
            render(in_single(part), height, width, self.output_offset).clamp(0, 1).mul(255).round().byte()
            for params in self.nets.nets
            for part in _batches(params)
        ]
        values = b64encode(torch.cat(pixels).numpy().tobytes()).decode()
        return {"height": height, "width": width, "channels": channels, "pixels": values}


def collections_of(
    names: Sequence[str], options: InputOptions, limit: int = NETWORKS, map_kind: str = "pca"
) -> list[Collection]:
    """The collections that a user names: zoos, runs or bundles, and networks in files, which are one collection.

    Args:
        names: paths, or `package.module:factory`.
        options: what networks in files do not tell.
        limit: networks of each zoo.
        map_kind: one of `maps.MAPS`.

    Raises:
        ValueError: something cannot be read; says which.
    """
    require_map(map_kind)
    found, files = [], []
    for name in names:
        path = Path(name)
        if is_zoo(path):
            found.append(of_zoo(path, limit))
        elif any((path / file).is_file() for file in ("summary.json", "config.yml", "config.json")):
            found.append(of_run(path, limit))
        elif not path.exists() and ":" not in name:
            raise ValueError(f"{name}: no such file or folder, expected a zoo, a run, a bundle or a network")
        else:
            files.append(name)
    found += [of_files(files, options)] if files else []
    return [replace(collection, map_kind=map_kind) for collection in found]


def of_zoo(path: Path, limit: int = NETWORKS) -> Collection:
    """Networks of a zoo, evenly spread, on a map of their invariant statistics."""
    zoo = open_zoo(path)
    rows = _spread(torch.arange(len(zoo)), limit)
    return _of_rows(zoo, rows, str(path), "zoo", None)


def of_run(path: Path, limit: int = NETWORKS) -> Collection:
    """Test networks of a run or bundle with the model's answers, on a map of its last features.

    Raises:
        ValueError: the run is not finished, or its zoo is not there.
    """
    model = load(path)
    folder = Path(model.summary["data"]["zoo"])
    try:
        zoo = open_zoo(folder)
    except ValueError as error:
        raise ValueError(
            f"{path}: its zoo cannot be shown: {error}; start in the folder where the run began, or put {folder} here"
        ) from None
    rows = _spread(zoo.splits["test"], limit).sort().values
    result = _of_rows(zoo, rows, str(path), "run", model)
    result.featured, facts = featured_networks(model, zoo, result.nets, rows, result.image_shape)
    result.facts += facts
    return result


def of_files(names: Sequence[str], options: InputOptions) -> Collection:
    """Networks in files, modules that code makes among them.

    Raises:
        ValueError: one cannot be read.
    """
    sources, passed_over = find_sources(names)
    found = [read_source(source.name, options) for source in sources]
    read = [params for params, _ in found]
    assumed: dict[str, list[str]] = {}
    for source, (_, notes) in zip(sources, found, strict=True):
        for note in notes:
            assumed.setdefault(note, []).append(source.name)
    order = sorted(range(len(read)), key=lambda index: str(read[index].spec))
    nets = Networks(joined([read[index] for index in order]), {})
    return Collection(
        name="networks",
        kind="networks",
        note=f"{len(read)} in files",
        names=[sources[index].name for index in order],
        nets=nets,
        columns={"parameters": [float(read[index].spec.num_parameters) for index in order]},
        image_shape=_image_shape(nets, None),
        output_offset=OUTPUT_OFFSET,
        features=statistics_of(nets),
        map_of="invariant statistics of the weights",
        answers=answers_of(nets, None),
        facts=[*passed_over, *said_once(assumed)],
    )


def _of_rows(zoo: Zoo, rows: Tensor, name: str, kind: str, model: TrainedModel | None) -> Collection:
    """These networks of a zoo, with the answers of a model if there is one."""
    taken = zoo.take(rows)
    nets = Networks(tuple(in_single(part) for part in taken.parts), {})
    columns: dict[str, list[float | str | None]] = {}
    split = {int(row): name for name, members in zoo.splits.items() for row in members.tolist()}
    columns["split"] = [split.get(row) for row in rows.tolist()]
    for column, values in zoo.columns.items():
        if values.ndim == 1:
            columns[column] = _values(values[rows])
    if "optimizer" in columns and "optimizers" in zoo.provenance:
        optimizers = zoo.provenance["optimizers"]
        columns["optimizer"] = [optimizers[int(number)] for number in zoo.columns["optimizer"][rows]]
    if "label" in columns:
        classes = zoo.classes or tuple(str(n) for n in range(int(zoo.columns["label"].max()) + 1))
        columns["label"] = [classes[int(label)] for label in zoo.columns["label"][rows]]
    if len(nets.nets) > 1 or nets.nets[0].activation is not None:
        columns |= _architecture_columns(nets)
    total = f"{len(rows):,} of {len(zoo):,} networks"
    note, features, map_of = f"{total} of the zoo {zoo.path}", None, "invariant statistics of the weights"
    facts = []
    if model is not None:
        note = f"{total}, of the test split; model: {model.config.model}, {model.summary['parameters']:,} parameters"
        answers, features = answers_and_features(model, nets)
        if answers is not None:
            columns |= _answer_columns(model, answers, columns)
            map_of = "the model's last features"
        facts = [f"{key.replace('_', ' ')}: {model.summary[key]:.4f}" for key in model.summary if _is_metric(key)]
    images_path = zoo.path if model is None else model.config.data.images_path or zoo.path
    return Collection(
        name=name,
        kind=kind,
        note=note,
        names=[str(row) for row in rows.tolist()],
        nets=nets,
        columns=columns,
        image_shape=_image_shape(nets, zoo.provenance.get("image_shape")),
        output_offset=float(zoo.provenance.get("output_offset", OUTPUT_OFFSET)),
        features=statistics_of(nets) if features is None else features,
        map_of=map_of,
        answers=answers_of(nets, inputs_of_zoo(zoo, Path(images_path))),
        facts=facts,
    )


def _is_metric(key: str) -> bool:
    return key.startswith("test_")


@torch.no_grad()
def answers_and_features(model: TrainedModel, nets: Networks) -> tuple[Tensor | None, Tensor | None]:
    """A model's outputs [networks, out_dim] and the features that its last layer reads [networks, D]; None for models
    that edit.

    Where the outputs are sums of what several `nn.Linear` compute, the features are those that all of them read; where
    they are not what such layers compute, the outputs are the features.
    """
    if model.task_class.output != "vector":
        return None, None
    outputs, features = [], []
    for params in nets.nets:
        metanetwork = model.metanetwork(params.spec)
        for part in _batches(params):
            x = canonicalize(part.to(next(metanetwork.parameters())), model.canonical)
            output, feature = _with_last_features(metanetwork, model.config.model_config.out_dim, x)
            outputs.append(output)
            features.append(feature)
    known = [feature for feature in features if feature is not None]
    return torch.cat(outputs).cpu(), torch.cat(known if len(known) == len(outputs) else outputs).cpu()


def _with_last_features(model: Metanetwork, out_dim: int, x: NetParams) -> tuple[Tensor, Tensor | None]:
    """The output [B, out_dim], and what the last layers read [B, D], in the order of the networks; None if there are no
    such layers.

    Models compute networks of one activation together, in an order of their own; so each activation is one batch here.
    """
    if x.activation is not None and len(x.activation.unique()) > 1:
        rows = [torch.eq(x.activation, index).nonzero()[:, 0] for index in x.activation.unique()]
        parts = [_with_last_features(model, out_dim, x[some]) for some in rows]
        back = torch.cat(rows).argsort()
        features = [feature for _, feature in parts if feature is not None]
        together = torch.cat(features)[back] if len(features) == len(parts) else None
        return torch.cat([output for output, _ in parts])[back], together
    calls: list[tuple[Tensor, Tensor]] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == out_dim]
    handles = [
        layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output))) for layer in layers
    ]
    output = model(x)
    for handle in handles:
        handle.remove()
    assert isinstance(output, Tensor)
    calls = [(read, z) for read, z in calls if read.ndim == 2 and z.shape == output.shape]
    for last in (calls[-1:], calls):
        if last and torch.allclose(torch.stack([z for _, z in last]).sum(0), output, rtol=1e-4, atol=1e-4):
            return output, torch.cat([read for read, _ in last], 1)
    return output, None


def _answer_columns(
    model: TrainedModel, outputs: Tensor, columns: Mapping[str, Sequence[Any]]
) -> dict[str, list[float | str | None]]:
    """Prediction and error of each network."""
    if model.task == "generalization":
        predicted = outputs[:, 0].sigmoid().tolist()
        answer: dict[str, list[float | str | None]] = {"prediction": _values(outputs[:, 0].sigmoid())}
        if "test_accuracy" in columns:
            pairs = zip(predicted, columns["test_accuracy"], strict=True)
            answer["error"] = [round(p - float(true), 5) for p, true in pairs]
        return answer
    if outputs.shape[1] == 1:
        return {"prediction": _values(outputs[:, 0])}
    names = model.summary["data"].get("classes") or [str(number) for number in range(outputs.shape[1])]
    probability, number = outputs.softmax(1).max(1)
    answer = {"prediction": [names[index] for index in number.tolist()], "probability": _values(probability)}
    if "label" in columns:
        pairs = zip(answer["prediction"], columns["label"], strict=True)
        answer["correct"] = ["yes" if p == label else "no" for p, label in pairs]
    return answer


def _architectures(nets: Networks) -> tuple[list[dict[str, Any]], list[int]]:
    """Descriptions of architectures, those of networks that differ in their activation one for each, and which each
    network has."""
    descriptions: list[dict[str, Any]] = []
    index: list[int] = []
    for params in nets.nets:
        numbers = [-1] * len(params) if params.activation is None else params.activation.tolist()
        present = sorted({*numbers})
        index += [len(descriptions) + present.index(number) for number in numbers]
        descriptions += [described(params.spec, *([] if n < 0 else [params.spec.activations[n]])) for n in present]
    return descriptions, index


def _architecture_columns(nets: Networks) -> dict[str, list[float | str | None]]:
    """Depth, width, parameters and activation, where networks differ."""
    result: dict[str, list[float | str | None]] = {"layers": [], "parameters": [], "activation": []}
    for params in nets.nets:
        result["layers"] += [float(params.spec.num_layers)] * len(params)
        result["parameters"] += [float(params.spec.num_parameters)] * len(params)
        names = {layer.activation for layer in params.spec.layers[:-1]} or {"identity"}
        shared = ", ".join(sorted(names))
        if params.activation is not None:
            result["activation"] += [params.spec.activations[index] for index in params.activation.tolist()]
        else:
            result["activation"] += [shared.replace(HETERO, "several")] * len(params)
    return {name: values for name, values in result.items() if len(set(values)) > 1}


@torch.no_grad()
def statistics_of(nets: Networks) -> Tensor:
    """Statistics that no symmetry changes, of the first and the last layer and of the network, [networks, D]."""
    rows = []
    for params in nets.nets:
        for part in _batches(in_single(params)):
            layers, network = invariant_statistics(part)
            rows.append(torch.cat([layers[:, 0], layers.mean(1), layers[:, -1], network], 1))
    return torch.cat(rows)


def _image_shape(nets: Networks, stated: Any) -> tuple[int, int, int] | None:
    """Of the images that networks draw: networks of positions (x, y) with one or three outputs, and linear layers."""
    if not all(is_drawable(params.spec) and sizes_of(params.spec)[0] == 2 for params in nets.nets):
        return None
    channels = {sizes_of(params.spec)[1] for params in nets.nets}
    if len(channels) != 1 or not channels <= {1, 3}:
        return None
    height, width = stated[:2] if stated else (LARGEST_IMAGE, LARGEST_IMAGE)
    return int(height), int(width), channels.pop()


def _batches(params: NetParams) -> list[NetParams]:
    return [params[start : start + BATCH] for start in range(0, len(params), BATCH)]


def _spread(rows: Tensor, limit: int) -> Tensor:
    """At most so many of the rows, evenly."""
    return rows[torch.linspace(0, len(rows) - 1, min(limit, len(rows))).round().long()]


def rounded(values: Tensor) -> list[float]:
    """Five digits, which no picture needs more of."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def _values(values: Tensor) -> list[float | str | None]:
    """Numbers of a column; None where there is none."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.double().tolist()]


def _column(name: str, values: Sequence[float | str | None]) -> dict[str, Any]:
    """A column with its kind; of names, numbers of a list of names in their natural order."""
    if not any(isinstance(value, str) for value in values):
        return {"name": name, "kind": "number", "values": list(values)}
    names = sorted({str(value) for value in values if value is not None}, key=natural_order)
    place = {text: number for number, text in enumerate(names)}
    coded = [None if value is None else place[str(value)] for value in values]
    return {"name": name, "kind": "category", "names": names, "values": coded}
