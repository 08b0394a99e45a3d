"""Classify the content of networks, such as the image that an INR stores."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from scalegmn.models.base import ModelConfig
from scalegmn.networks import MultiArchBatch, NetParams
from scalegmn.reporting.figures import confusion_matrix
from scalegmn.tasks.zoo_task import ZooTask
from scalegmn.zoos.loader import DataConfig


class Classification(ZooTask):
    """Cross-entropy on the `label` column of a zoo; selected by validation accuracy.

    Args:
        data: which zoo, canonical or not.
        batch_size: networks per batch.
        model: labels are 0 to model.out_dim - 1.
        debug: use only a few networks per split.

    Raises:
        ValueError: the zoo cannot be read, or has other labels, or the model gives no vectors.
    """

    name = "classification"
    monitor = "accuracy"
    maximize = True

    def __init__(self, data: DataConfig, batch_size: int, model: ModelConfig, debug: bool = False) -> None:
        model.check_output("vector", "classification")
        super().__init__(data, "label", batch_size, debug)
        labels, self.num_classes = self.zoo.columns["label"], model.out_dim
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"{model.section}.out_dim: {self.num_classes} classes, but the labels of {self.zoo.path} reach from "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        self.announce()

    def target(self, labels: Tensor) -> Tensor:
        """The labels [B], or under mixup their probabilities [B, classes]."""
        return nn.functional.one_hot(labels, self.num_classes).float() if self.data.augment.mixup else labels

    def loss(self, model: nn.Module, inputs: NetParams | MultiArchBatch, target: Tensor) -> Tensor:
        """Cross-entropy of logits [B, classes] and labels, [B] or probabilities [B, classes]."""
        return nn.functional.cross_entropy(model(inputs), target)

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Mean cross-entropy and accuracy over a split; its confusion matrix into the folder `figures`."""
        logits = self.per_network(model, split, device, lambda params, _: model(params).float())
        labels = self.splits[split].labels
        if figures is not None:
            num_classes = logits.shape[1]
            counts = (labels * num_classes + logits.argmax(1)).bincount(minlength=num_classes**2)
            confusion_matrix(figures / "confusion_matrix.png", counts.reshape(num_classes, -1).numpy())
        return {
            "loss": nn.functional.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }
