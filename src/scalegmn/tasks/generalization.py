"""Predict the test accuracy of networks from their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scalegmn.networks import BUILT_IN, MultiArchBatch, NetParams, NetSpec, not_built_in
from scalegmn.reporting.figures import predictions
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.symmetry.statistics import at_depth
from scalegmn.tasks.registry import RunSettings, register_task
from scalegmn.tasks.zoo_task import ZooTask
from scalegmn.zoos.loader import SEVERAL, DataConfig, LabelledNets, hidden_activation

LOSSES = {
    "MSE": lambda logits, target: nn.functional.mse_loss(logits.sigmoid(), target),
    "BCE": nn.functional.binary_cross_entropy_with_logits,
}
"""Loss by name: of logits, whose sigmoid is the predicted accuracy, and true accuracies."""


def metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """How close predicted accuracies are to true ones.

    Args:
        true: [n], in [0, 1].
        predicted: [n], in [0, 1].

    Returns:
        `tau`: Kendall's tau-b, the agreement of the order; `r2`: 1 - sum (y - f)^2 / sum (y - mean y)^2; `mae`: mean
        |y - f|. tau and r2 are 0 where they are not defined: all true values are the same, or, for tau, all predicted.
    """
    from scipy.stats import kendalltau  # takes a second to import, which reading a configuration need not wait for

    tau, spread = kendalltau(true, predicted).statistic, np.square(true - true.mean()).sum()
    return {
        "tau": 0.0 if math.isnan(tau) else float(tau),
        "r2": float(1 - np.square(true - predicted).sum() / spread) if spread > 0 else 0.0,
        "mae": float(np.abs(true - predicted).mean()),
    }


def weight_sizes(params: NetParams) -> Tensor:
    """log10 of the root mean square of each layer's weights, [B, L], after relu layers are made canonical: networks
    that differ only by positive scalars of relu neurons have the same sizes."""
    weights = canonicalize(params, ("scale",)).weights
    return torch.stack([w.flatten(1).square().mean(1).sqrt() for w in weights], 1).clamp_min(1e-30).log10()


@register_task
class Generalization(ZooTask):
    """The sigmoid of a model's single output predicts a zoo's column `test_accuracy` (Unterthiner et al., 2020,
    https://arxiv.org/abs/2002.11448); selected by Kendall's tau on the validation split.

    Args:
        data: the zoo; `activation_function` chooses among its networks.
        batch_size: networks per batch.
        loss: `MSE` of the sigmoid, or `BCE`.
        debug: use only a few networks per split.

    Raises:
        ValueError: the zoo cannot be read, or its accuracies are not from 0 to 1.
    """

    name = "generalization"
    description = "the test accuracy of a network, from its weights alone"
    answers = "The test accuracy of a network, from 0 to 1, from its weights alone."
    limits = ("Accuracies are those on the task that the training networks were trained for.",)
    out_dim = 1
    monitor = "tau"
    maximize = True

    def __init__(self, data: DataConfig, batch_size: int, loss: str = "MSE", debug: bool = False) -> None:
        super().__init__(data, "test_accuracy", batch_size, debug)
        low, high = (value.item() for value in self.zoo.columns["test_accuracy"].aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{self.zoo.path}: test_accuracy: found {low:g} to {high:g}, expected 0 to 1")
        self.criterion = LOSSES[loss]
        self.announce()

    @classmethod
    def from_settings(cls, settings: RunSettings) -> Generalization:
        """The task, for models with one output."""
        cls.check_model(settings.model_config)
        return cls(settings.data, settings.batch_size, settings.train_args.loss, settings.debug)

    def loss(self, model: nn.Module, inputs: NetParams | MultiArchBatch, target: Tensor) -> Tensor:
        """The mean loss of the networks' accuracies, [B]."""
        return self.criterion(model(inputs)[:, 0], target)

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Loss, tau, R^2 and mean absolute error over a whole split.

        With a folder `figures`: predicted against true accuracies and their calibration go there, as figure and as
        predictions.csv, and the metrics of
        each activation of a mixed zoo are given too, as `tau_relu`, ...
        """
        nets = self.splits[split]
        logits = self.per_network(model, split, device, lambda params, _: model(params)[:, 0].float())
        true, predicted = nets.labels.double().numpy(), logits.double().sigmoid().numpy()
        results = {"loss": self.criterion(logits, nets.labels).item(), **metrics(true, predicted)}
        if figures is not None:
            self.write_predictions(figures / "predictions.csv", split, predicted=logits.sigmoid())
            members = _by_activation(nets)
            for name, rows in members.items() if len(members) > 1 else ():
                results |= {f"{key}_{name}": value for key, value in metrics(true[rows], predicted[rows]).items()}
            title = f"{split}: tau {results['tau']:.3f}, R^2 {results['r2']:.3f}"
            predictions(figures / "predictions.png", true, predicted, members, title)
        return results

    @classmethod
    @torch.no_grad()
    def answer(cls, model: nn.Module, params: NetParams, removed: Sequence[str]) -> Tensor:
        """The predicted test accuracies, [B]."""
        return model(canonicalize(params, removed))[:, 0].sigmoid()

    @classmethod
    def answer_of(cls, answers: Tensor, row: int, data: Mapping[str, Any]) -> dict[str, Any]:
        """The predicted accuracy, and the percentile of the training networks' accuracies that it is at."""
        accuracy = answers[row].item()
        percentile = np.searchsorted(data["test_accuracy"], accuracy).clip(0, 100)
        return {"test_accuracy": accuracy, "percentile": int(percentile)}

    @classmethod
    def warnings(cls, params: NetParams, data: Mapping[str, Any]) -> list[list[str]]:
        """Layers that the training networks lack, or whose weights are smaller or larger than all of theirs."""
        warnings: list[list[str]] = [[] for _ in range(len(params))]
        *hidden, last = data["log10_weights"]
        hidden = [*hidden, *[None] * params.spec.num_layers][: params.spec.num_layers - 1]
        for layer, (bounds, sizes) in enumerate(zip([*hidden, last], weight_sizes(params).mT.tolist(), strict=True)):
            for of_network, size in zip(warnings, sizes, strict=True):
                if bounds is None:
                    of_network.append(f"layer {layer} is there, the training networks have no such layer")
                elif not bounds[0] - 0.01 <= size <= bounds[1] + 0.01:  # canonical relu layers all have size 1, rounded
                    between = f"{10 ** bounds[0]:.2g} to {10 ** bounds[1]:.2g}"
                    of_network.append(
                        f"layer {layer} has weights of size {10**size:.2g}, the training networks {between}"
                    )
        return warnings

    def identity(self) -> dict[str, Any]:
        """The data of a run, and statistics of its training networks, which `answer_of` and `warnings` compare with.

        `test_accuracy`: percentiles 0 to 100. `log10_weights`: the smallest and the largest `weight_sizes` of each
        layer of `NetSpec.envelope`; None for hidden layers that no training network has.
        """
        nets = self.splits["train"]
        parts = [weight_sizes(part) for params, _ in nets.batches() for part in params.parts]
        depth = NetSpec.envelope(self.architectures).num_layers
        sizes = torch.cat([at_depth(part, depth) for part in parts]).double().numpy()
        ranges = zip(np.fmin.reduce(sizes).tolist(), np.fmax.reduce(sizes).tolist(), strict=True)
        percentiles = np.percentile(nets.labels.double().numpy(), range(101))
        return {
            **super().identity(),
            "test_accuracy": percentiles.tolist(),
            "log10_weights": [None if math.isnan(low) else [low, high] for low, high in ranges],
        }


def _by_activation(nets: LabelledNets) -> dict[str, np.ndarray]:
    """Activation -> [M] bool, the networks that have it in all hidden layers; `several`: those with different ones."""
    activation = np.concatenate([hidden_activation(params) for params in nets.zoo.nets])[nets.rows.numpy()]
    present = {*activation.tolist()}
    names = (*BUILT_IN, *not_built_in(present - {SEVERAL}), SEVERAL)
    return {name or "several": activation == name for name in names if name in present}
