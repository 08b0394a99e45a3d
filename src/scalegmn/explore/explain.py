"""`scalegmn explain --checkpoint RUN NET`: what a trained model's answer about a network rests on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalegmn.experiments.trained import TrainedModel
from scalegmn.explore.attribution import (
    Attribution,
    deletion_curves,
    gradient_times_weight,
    integrated_gradients,
    ranked_neurons,
    reference_network,
    removable_neurons,
    score_of,
    symmetries_to_remove,
)
from scalegmn.networks import NetParams
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.zoos.zoo_format import Zoo, class_names, in_single, open_zoo

REFERENCES = 512
"""Training networks whose mean is the reference network."""

REMOVED, DRAWS, FEWEST_DRAWS = 12, 20, 4
"""Neurons that deletion curves remove; random orders beside them, and the fewest that large networks have."""

EVALUATED = 5 * 10**7
"""Parameters of all networks together that random orders leave, where they are more than the fewest."""


@dataclass(frozen=True)
class Explanation:
    """What one answer rests on.

    Attributes:
        output: the output that is explained, counted from 0.
        meaning: what the score is, in words.
        method: one of `attribution.METHODS`.
        attribution: of one network, as it is stored: neurons keep their numbers.
        ranked: hidden neurons (layer, neuron), from the one that raises the score most.
        curve: the score without the first 0, 1, ... of them, [n + 1].
        random: the same for random orders, [draws, n + 1].
    """

    output: int
    meaning: str
    method: str
    attribution: Attribution
    ranked: list[tuple[int, int]]
    curve: Tensor
    random: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """A row per hidden neuron, in the order of `ranked`; layers and neurons are counted from 0."""
        neurons, values = self.attribution.neurons(), self.attribution.values
        return [
            {
                "layer": layer,
                "neuron": neuron,
                "contribution": neurons[layer][0, neuron].item(),
                "bias": values.biases[layer][0, neuron].item(),
                "incoming": values.weights[layer][0, neuron].sum().item(),
            }
            for layer, neuron in self.ranked
        ]

    def content(self) -> dict[str, Any]:
        """All of it in plain types."""
        values, reference = self.attribution.values, self.attribution.reference
        return {
            "output": self.output,
            "meaning": self.meaning,
            "method": self.method,
            "score": self.attribution.score.item(),
            "reference_score": None if reference is None else reference.item(),
            "neurons": self.rows(),
            "weights": [weight[0].tolist() for weight in values.weights],
            "biases": [bias[0].tolist() for bias in values.biases],
            "deletion": {"ranked": self.curve.tolist(), "random": self.random.tolist()},
        }

    def table(self) -> str:
        """The neurons as text, and what the numbers are."""
        lines = [f"{self.meaning}: {self.attribution.score.item():.3f}"]
        if self.attribution.reference is not None:
            lines[0] += f", of the mean canonical network {self.attribution.reference.item():.3f}"
        lines.append(f"{'layer':>5} {'neuron':>6} {'contribution':>12} {'bias':>9} {'incoming':>9}")
        for row in self.rows():
            numbers = f"{row['contribution']:>12.3f} {row['bias']:>9.3f} {row['incoming']:>9.3f}"
            lines.append(f"{row['layer']:>5} {row['neuron']:>6} {numbers}")
        count = len(self.curve) // 2
        without, by_chance = self.curve[count].item(), self.random[:, count].mean().item()
        lines.append(f"without the first {count}: {without:.3f}; without {count} at random: {by_chance:.3f} (mean)")
        return "\n".join(lines)


def reference_of(model: TrainedModel, params: NetParams, zoo: Zoo) -> NetParams:
    """The mean canonical network of training networks with the architecture of `params`, see
    `attribution.reference_network`.

    Raises:
        ValueError: the zoo has no such training networks.
    """
    removed, rows = symmetries_to_remove(model.config.model_config, model.canonical), zoo.splits["train"]
    places = [number for number, nets in enumerate(zoo.nets) if nets.spec == params.spec]
    rows = rows[torch.isin(zoo.architecture(rows), torch.tensor(places, dtype=torch.long))]
    if not len(rows):
        raise ValueError(
            f"{zoo.path}: no training network is a {params.spec}, so that there is no reference; set --method gradient"
        )
    rows = rows[torch.linspace(0, len(rows) - 1, min(REFERENCES, len(rows))).long()]
    nets = zoo.take(rows.sort().values)
    assert isinstance(nets, NetParams)
    return reference_network(canonicalize(in_single(nets), removed))


def require_answers(model: TrainedModel) -> None:
    """Refuses models whose answer is no class or number.

    Raises:
        ValueError: the model edits networks.
    """
    if model.task_class.output != "vector":
        raise ValueError(f"{model.run}: edits networks; explain a model that gives a class or a number")


def default_method(model: TrainedModel) -> str:
    """`integrated` for classes, `gradient` for accuracies: a predictor of accuracies reads every network near the
    reference as untrained, so that most of the path to it says little about the network itself."""
    return "gradient" if model.task == "generalization" else "integrated"


def open_reference(model: TrainedModel, path: Path | None) -> Zoo:
    """The zoo that the reference network is the mean of: that of the run, unless another is named.

    Raises:
        ValueError: it is not there.
    """
    folder = path or Path(model.summary["data"]["zoo"])
    try:
        return open_zoo(folder)
    except ValueError as error:
        raise ValueError(f"{error}; name the zoo with --reference, or set --method gradient") from None


def explain(
    model: TrainedModel, params: NetParams, zoo: Zoo | None, output: int | None = None, seed: int = 0
) -> Explanation:
    """What a trained model's answer about one network rests on.

    Args:
        model: the model; its task has an answer per network.
        params: one network, as it is stored.
        zoo: whose mean canonical network integrated gradients start from; None: gradient x weight.
        output: which output, counted from 0; None: the largest.
        seed: of the random orders of neurons.

    Raises:
        ValueError: the model edits networks, cannot read this one, or has no such output.
    """
    require_answers(model)
    metanetwork = model.metanetwork(params.spec)
    params = params.to(next(metanetwork.parameters()))
    removed = symmetries_to_remove(model.config.model_config, model.canonical)
    x = canonicalize(params, removed)
    with torch.no_grad():
        z = metanetwork(x)
    assert isinstance(z, Tensor)
    output = int(z[0].argmax()) if output is None else output
    score = score_of(metanetwork, output)
    if zoo is None:
        attribution = gradient_times_weight(score, x)
    else:
        attribution = integrated_gradients(score, x, reference_of(model, params, zoo).to(params.biases[0]))
    ranked, generator = ranked_neurons(attribution), torch.Generator().manual_seed(seed)
    places = removable_neurons(x.spec)
    count = min(REMOVED, len(places))
    draws = min(DRAWS, max(FEWEST_DRAWS, EVALUATED // (x.spec.num_parameters * (count + 1))))
    orders = [torch.randperm(len(places), generator=generator)[:count].tolist() for _ in range(draws)]
    curves = deletion_curves(score, x, [ranked[:count], *([places[place] for place in order] for order in orders)])
    return Explanation(
        output,
        _meaning(model, output, z.shape[1]),
        "gradient" if zoo is None else "integrated",
        attribution,
        ranked,
        curves[0],
        curves[1:],
    )


def _meaning(model: TrainedModel, output: int, out_dim: int) -> str:
    """What is explained, in words."""
    if out_dim == 1:
        return "logit of the predicted accuracy" if model.task == "generalization" else "output"
    names = class_names(model.summary["data"].get("classes"), out_dim)
    return f"log-odds of class {output if names is None else names[output]}"
