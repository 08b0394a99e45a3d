"""Predict the test accuracy of networks from their weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from scalegmn.networks import ACTIVATIONS, MultiArchBatch, NetParams, NetSpec
from scalegmn.reporting.figures import predictions
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.tasks.zoo_task import ZooTask
from scalegmn.zoos.loader import DataConfig, LabelledNets, hidden_activation

LOSSES = {
    "MSE": lambda logits, target: nn.functional.mse_loss(logits.sigmoid(), target),
    "BCE": nn.functional.binary_cross_entropy_with_logits,
}
"""Of what a model says before the sigmoid, and the true accuracy."""


def metrics(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """How well accuracies are predicted.

    Args:
        true, predicted: [n], in [0, 1].

    Returns:
        `tau`: Kendall's tau-b, the agreement of the order; `r2`: 1 - sum (y - f)^2 / sum (y - mean y)^2; `mae`: mean
        |y - f|. tau and r2 are 0 where they are not defined: all true values are the same, or, for tau, all predicted.
    """
    tau, spread = kendalltau(true, predicted).statistic, np.square(true - true.mean()).sum()
    return {
        "tau": 0.0 if math.isnan(tau) else float(tau),
        "r2": float(1 - np.square(true - predicted).sum() / spread) if spread > 0 else 0.0,
        "mae": float(np.abs(true - predicted).mean()),
    }


def weight_sizes(params: NetParams) -> Tensor:
    """log10 of the root mean square of each layer's weights, [B, L], without the scale symmetry of relu layers: two
    networks of the same function have the same."""
    weights = canonicalize(params, ("scale",)).weights
    return torch.stack([w.flatten(1).square().mean(1).sqrt() for w in weights], 1).clamp_min(1e-30).log10()


class Generalization(ZooTask):
    """The sigmoid of a model's one output against a zoo's column `test_accuracy` (Unterthiner et al., 2020); selected
    by Kendall's tau on the validation split.

    Args:
        data: which zoo; `activation_function` chooses among its networks.
        batch_size: networks per batch.
        loss: `MSE` of the sigmoid, or `BCE`.
        debug: use only a few networks per split.

    Raises:
        ValueError: the zoo cannot be read, or its accuracies are not from 0 to 1.
    """

    name = "generalization"
    monitor = "tau"
    maximize = True

    def __init__(
        self, data: DataConfig, batch_size: int, loss: Literal["MSE", "BCE"] = "MSE", debug: bool = False
    ) -> None:
        super().__init__(data, "test_accuracy", batch_size, debug)
        low, high = (value.item() for value in self.zoo.columns["test_accuracy"].aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{self.zoo.path}: test_accuracy: found {low:g} to {high:g}, expected 0 to 1")
        self.criterion = LOSSES[loss]
        self.announce()

    def loss(self, model: nn.Module, inputs: NetParams | MultiArchBatch, target: Tensor) -> Tensor:
        """The mean loss of the networks' accuracies, [B]."""
        return self.criterion(model(inputs)[:, 0], target)

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Loss, tau, R^2 and mean absolute error over a whole split.

        With a folder `figures`: predicted against true accuracies and their calibration go there, and the metrics of
        each activation of a mixed zoo are given too, as `tau_relu`, ...
        """
        nets = self.splits[split]
        logits = self.per_network(model, split, device, lambda params, _: model(params)[:, 0].float())
        true, predicted = nets.labels.double().numpy(), logits.double().sigmoid().numpy()
        found = {"loss": self.criterion(logits, nets.labels).item(), **metrics(true, predicted)}
        if figures is not None:
            kinds = _by_activation(nets)
            for name, own in kinds.items() if len(kinds) > 1 else ():
                found |= {f"{key}_{name}": value for key, value in metrics(true[own], predicted[own]).items()}
            title = f"{split}: tau {found['tau']:.3f}, R^2 {found['r2']:.3f}"
            predictions(figures / "predictions.png", true, predicted, kinds, title)
        return found

    def identity(self) -> dict[str, Any]:
        """Which zoo was read, and how; and what its training networks are like, which tells others from them.

        `test_accuracy`: percentiles 0 to 100. `log10_weights`: per layer of the spec that covers all, the least and the
        largest `weight_sizes`; None for hidden layers that no training network has.
        """
        nets = self.splits["train"]
        parts = [weight_sizes(part) for params, _ in nets.batches() for part in params.parts]
        depth = NetSpec.envelope(self.architectures).num_layers
        sizes = torch.cat([_at_depth(part, depth) for part in parts]).double().numpy()
        ranges = zip(np.fmin.reduce(sizes).tolist(), np.fmax.reduce(sizes).tolist(), strict=True)
        percentiles = np.percentile(nets.labels.double().numpy(), range(101))
        return {
            **super().identity(),
            "test_accuracy": percentiles.tolist(),
            "log10_weights": [None if math.isnan(low) else [low, high] for low, high in ranges],
        }


def _at_depth(sizes: Tensor, num_layers: int) -> Tensor:
    """What each layer has, [B, L] -> [B, num_layers], the last layer last; NaN for hidden layers that are missing."""
    missing = sizes.new_full((len(sizes), num_layers - sizes.shape[1]), math.nan)
    return torch.cat([sizes[:, :-1], missing, sizes[:, -1:]], dim=1)


def _by_activation(nets: LabelledNets) -> dict[str, np.ndarray]:
    """Activation -> [M] bool, which networks have it in all hidden layers; `several`, those that have others too."""
    own = torch.cat([hidden_activation(params) for params in nets.zoo.nets])[nets.rows]
    return {(*ACTIVATIONS, "several")[index]: (own == index).numpy() for index in own.unique().tolist()}
