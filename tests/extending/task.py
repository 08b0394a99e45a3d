"""A task of one's own: regression of a column of the zoo, such as how well an INR fits its image.

scalegmn train column_regression --import tests/extending/task.py --column_regression_args.column psnr \
    --scalegmn_args.out_dim 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.tasks import ZooTask, register_task


@dataclass(frozen=True)
class Options:
    """Options of the task."""

    column: str = "psnr"
    """The column of the zoo to predict."""


@register_task
class ColumnRegression(ZooTask):
    """Mean squared error of one output and a column."""

    name = "column_regression"
    description = "a column of the zoo"
    answers = "A column of the zoo that the model was trained on."
    options = Options
    out_dim = 1
    monitor = "mae"
    maximize = False

    @classmethod
    def from_settings(cls, settings: Any) -> "ColumnRegression":
        cls.check_model(settings.model_config)
        return cls(settings.data, cls.options_of(settings).column, settings.batch_size, settings.debug)

    def loss(self, model: nn.Module, inputs: Any, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(inputs)[:, 0], target.float())

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        errors = self.per_network(model, split, device, lambda params, target: model(params)[:, 0] - target)
        return {"loss": errors.square().mean().item(), "mae": errors.abs().mean().item()}

    @classmethod
    @torch.no_grad()
    def answer(cls, model: nn.Module, params: NetParams, removed: Sequence[str]) -> Tensor:
        return model(canonicalize(params, removed))[:, 0]
