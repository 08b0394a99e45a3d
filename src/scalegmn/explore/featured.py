"""Networks of a run that the page shows in depth: answers for moved networks, explanations, edits.

All numbers are evaluations made when the page is written: the trained model, which keeps its symmetries, and beside it
an MLP that reads all weights in a row and keeps none.
"""

from __future__ import annotations

import warnings
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalegmn.experiments.trained import TrainedModel
from scalegmn.explore.architectures import described
from scalegmn.explore.explain import default_method, explain
from scalegmn.networks import NetParams
from scalegmn.symmetry.groups import GroupElement, PhaseShift
from scalegmn.tasks.editing import original_images
from scalegmn.tasks.image_edits import IMAGE_EDITS
from scalegmn.zoos.zoo_format import Networks, Zoo, in_single

FEATURED = 6
"""Networks shown in depth, at most."""

FEATURED_PARAMETERS = 12_000
"""Parameters of all of them together: of large networks there are fewer, at least one."""

WALK = 24
"""Moves of the walk, one after the other."""

LARGEST_TURN = 3
"""Half-turns of the phase slider, in each direction."""

SCALES = (0.1, 0.5, 2.0, 10.0)
"""Factors of the scale slider."""

LARGEST = 20_000
"""Parameters of a network for which moves and explanations are computed."""

MOST_MOVES = 300
"""Moves evaluated for each network; swaps of distant neurons are left out first."""

BASELINE_NETWORKS = 2000
"""Training networks of the MLP."""


@dataclass(frozen=True)
class Move:
    """A move of one or two neurons, as the page names it: `swap:<layer>:<i>:<j>`, `flip:<layer>:<i>`,
    `scale:<layer>:<i>:<q>`, `phase:<layer>:<i>:<half-turns>`; layers and neurons are counted from 0."""

    kind: str
    layer: int
    neuron: int
    value: float = 0.0

    @property
    def key(self) -> str:
        """Its name."""
        value = "" if self.kind == "flip" else f":{self.value:g}"
        return f"{self.kind}:{self.layer}:{self.neuron}{value}"

    def act(self, params: NetParams) -> NetParams:
        """The moved networks; they compute the same functions."""
        hidden = params.biases[:-1]
        if self.kind == "phase":
            turns = [torch.zeros_like(bias) for bias in hidden]
            turns[self.layer][:, self.neuron] = self.value
            return PhaseShift(tuple(turns)).act(params)
        permutations = [torch.arange(bias.shape[1]).repeat(len(params), 1) for bias in hidden]
        scales = [torch.ones_like(bias) for bias in hidden]
        if self.kind == "swap":
            other = int(self.value)
            permutations[self.layer][:, self.neuron], permutations[self.layer][:, other] = other, self.neuron
        else:
            scales[self.layer][:, self.neuron] = -1 if self.kind == "flip" else self.value
        return GroupElement(tuple(permutations), tuple(scales)).act(params)


def single_moves(params: NetParams) -> list[Move]:
    """All moves of single neurons that keep the function of one network, and swaps of pairs, nearest first, up to
    `MOST_MOVES`."""
    moves, swaps = [], []
    own = () if params.activation is None else (params.spec.activations[int(params.activation[0])],)
    for index, layer in enumerate(described(params.spec, *own)["layers"]):
        if not layer["movable"]:
            continue
        for neuron in range(layer["outputs"]):
            if layer["signs"]:
                moves.append(Move("flip", index, neuron))
            if layer["scales"]:
                moves += [Move("scale", index, neuron, q) for q in SCALES]
            if layer["phases"]:
                turns = [k for k in range(-LARGEST_TURN, LARGEST_TURN + 1) if k]
                moves += [Move("phase", index, neuron, k) for k in turns]
            swaps += [Move("swap", index, neuron, other) for other in range(neuron + 1, layer["outputs"])]
    swaps.sort(key=lambda move: move.value - move.neuron)
    return (moves + swaps)[:MOST_MOVES]


def random_walk(params: NetParams, generator: torch.Generator) -> list[Move]:
    """`WALK` moves drawn one after the other; none if the network has none."""
    moves = single_moves(params)
    return [moves[int(torch.randint(len(moves), (), generator=generator))] for _ in range(WALK)] if moves else []


Answer = Callable[[NetParams], Tensor]
"""B networks as they are stored -> answers [B, classes], or [B, 1]."""


def featured_networks(
    model: TrainedModel, zoo: Zoo, nets: Networks, rows: Tensor, image_shape: tuple[int, ...] | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Some of a run's networks in depth, and lines about what was computed.

    Args:
        model: the run's.
        zoo: its zoo.
        nets: the networks that the page shows.
        rows: their numbers in the zoo.
        image_shape: of the images that they draw, if they do.
    """
    places = _places(zoo, nets, rows)
    if model.task_class.output == "parameters":
        return [_edited(model, zoo, nets, rows, place) for place in places] if image_shape else [], []
    baseline, note = flat_baseline(model, zoo)
    generator, result = torch.Generator().manual_seed(0), []
    for place in places:
        params = nets.take(torch.tensor([place]))
        assert isinstance(params, NetParams)
        if params.spec.num_parameters > LARGEST:
            continue
        of_model = _answers_of(model)
        entry = {"row": place, **moved_answers(params, of_model, baseline, generator)}
        with_reference = default_method(model) == "integrated" and zoo.architectures.get(params.spec, 0) > 0
        explanation = explain(model, params, zoo if with_reference else None)
        entry["explanation"] = {
            "meaning": explanation.meaning,
            "method": explanation.method,
            "values": encoded(explanation.attribution.values.flatten()),
            "neurons": [rounded_list(values[0]) for values in explanation.attribution.neurons()],
            "curve": rounded_list(explanation.curve),
            "random": rounded_list(explanation.random.mean(0)),
            "score": round(explanation.attribution.score.item(), 4),
        }
        result.append(entry)
    return result, [note] if note else []


def moved_answers(
    params: NetParams, of_model: Answer, baseline: Answer | None, generator: torch.Generator
) -> dict[str, Any]:
    """Answers about one network, moved by each single move and along a walk.

    Returns:
        `moves`: key -> [model's class or -1, its probability or value, the same of the MLP]; key `` is the network as
        it is. `walk`: the keys of its moves; `walk_answers`: after 0, 1, ... of them.
    """
    moves, walk = single_moves(params), random_walk(params, generator)
    states = [params, *(move.act(params) for move in moves)]
    walked = [params]
    for move in walk:
        walked.append(move.act(walked[-1]))
    answers = _summaries(NetParams.cat(states + walked), of_model, baseline)
    keys = ["", *(move.key for move in moves)]
    return {
        "moves": dict(zip(keys, answers, strict=False)),
        "walk": [move.key for move in walk],
        "walk_answers": answers[len(states) :],
    }


def _summaries(params: NetParams, of_model: Answer, baseline: Answer | None) -> list[list[float]]:
    """Class and probability, or -1 and the value, of the model and of the MLP."""
    columns: list[list[float]] = []
    for answer in (of_model, baseline):
        if answer is None:
            continue
        values = answer(params)
        if values.shape[1] == 1:
            columns += [[-1] * len(values), rounded_list(values[:, 0])]
        else:
            probability, number = values.max(1)
            columns += [number.tolist(), rounded_list(probability)]
    return [list(row) for row in zip(*columns, strict=True)]


def flat_baseline(model: TrainedModel, zoo: Zoo) -> tuple[Answer | None, str]:
    """An MLP of all weights and biases as they are stored, fitted to training networks, and what it reaches; None where
    networks have several architectures or no labels."""
    column = {"classification": "label", "generalization": "test_accuracy"}.get(model.task)
    if column not in zoo.columns or len(zoo.nets) != 1 or zoo.spec.num_parameters > LARGEST:
        return None, ""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train = _some(zoo.splits["train"])
    test = _some(zoo.splits["test"])
    kind = MLPClassifier if model.task == "classification" else MLPRegressor
    mlp = make_pipeline(StandardScaler(), kind(hidden_layer_sizes=(64,), max_iter=30, random_state=0))
    inputs = {name: _flat(zoo, rows) for name, rows in (("train", train), ("test", test))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mlp.fit(inputs["train"], zoo.columns[column][train].numpy())
    score = mlp.score(inputs["test"], zoo.columns[column][test].numpy())
    measure = "accuracy" if model.task == "classification" else "R2"

    def answer(params: NetParams) -> Tensor:
        flat = params.flatten().numpy()
        if model.task == "generalization":
            return torch.from_numpy(mlp.predict(flat)).float()[:, None]
        shares = mlp.predict_proba(flat)
        full = np.zeros((len(flat), int(max(mlp.classes_)) + 1))
        full[:, mlp.classes_] = shares
        return torch.from_numpy(full).float()

    return answer, f"MLP of all weights: 64 hidden neurons, {len(train):,} networks, test {measure} {score:.3f}"


def _flat(zoo: Zoo, rows: Tensor) -> np.ndarray:
    params = zoo.take(rows)
    assert isinstance(params, NetParams)
    return in_single(params).flatten().numpy()


def _some(rows: Tensor) -> Tensor:
    chosen = rows[torch.linspace(0, len(rows) - 1, min(BASELINE_NETWORKS, len(rows))).long()]
    return chosen.sort().values


def _answers_of(model: TrainedModel, batch: int = 128) -> Answer:
    """The model's answers about networks as they are stored, [B, classes] or [B, 1]."""

    def answer(params: NetParams) -> Tensor:
        parts = [model(params[start : start + batch]) for start in range(0, len(params), batch)]
        values = torch.cat([part for part in parts if isinstance(part, Tensor)])
        return values if values.ndim == 2 else values[:, None]

    return answer


def _places(zoo: Zoo, nets: Networks, rows: Tensor) -> list[int]:
    """The networks in depth: of different labels, as far as there are several."""
    largest = max(params.spec.num_parameters for params in nets.nets)
    count = max(1, min(FEATURED, len(nets), FEATURED_PARAMETERS // largest))
    if "label" not in zoo.columns:
        return torch.linspace(0, len(nets) - 1, count).long().tolist()
    labels = zoo.columns["label"][rows].tolist()
    first: dict[int, int] = {}
    for place, label in enumerate(labels):
        first.setdefault(label, place)
    return sorted(first.values())[:count]


def _edited(model: TrainedModel, zoo: Zoo, nets: Networks, rows: Tensor, place: int) -> dict[str, Any]:
    """A network with the changes that a model makes of it, and the image that they are to draw."""
    params = nets.take(torch.tensor([place]))
    assert isinstance(params, NetParams)
    changed = model(params)
    assert isinstance(changed, NetParams)
    edit = IMAGE_EDITS.require(model.config.data.style_function, "data.style_function")
    entry: dict[str, Any] = {"row": place, "edit": {"changes": encoded(changed.flatten() - params.flatten())}}
    entry["edit"]["name"] = edit.name
    try:
        images = original_images(zoo, model.config.data)
    except (ValueError, OSError):
        return entry  # the originals are not there
    original = images.take(zoo.columns["image"][rows[place]][None])
    target = torch.from_numpy(edit(original.numpy())).float()
    entry["edit"]["target"] = {"shape": list(target.shape[1:]), "values": encoded(target.flatten(1))}
    return entry


def encoded(values: Tensor) -> str:
    """float32 in base64."""
    return b64encode(values.float().numpy().tobytes()).decode()


def rounded_list(values: Tensor) -> list[float]:
    """Five digits."""
    return [float(f"{value:.5g}") for value in values.tolist()]
