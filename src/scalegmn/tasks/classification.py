"""Classify the content of networks, such as the image that an INR stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.models.base import ModelConfig
from scalegmn.networks import MultiArchBatch, NetParams
from scalegmn.reporting.figures import confusion_matrix
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.tasks.registry import RunSettings, register_task
from scalegmn.tasks.zoo_task import ZooTask
from scalegmn.zoos.loader import DataConfig
from scalegmn.zoos.zoo_format import class_names


@dataclass(frozen=True)
class ClassificationConfig:
    """Options of classification."""

    label_smoothing: float = 0.0
    """In training, this share of a label's probability is spread evenly over all classes (Szegedy et al., 2016)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            found = self.label_smoothing
            raise ValueError(f"classification_args.label_smoothing: found {found}, expected a share in [0, 1)")


@register_task
class Classification(ZooTask):
    """Cross-entropy on the `label` column of a zoo; selected by validation accuracy.

    Args:
        data: the zoo, and how its networks are read.
        batch_size: networks per batch.
        model: its out_dim is the number of classes; labels are 0 to out_dim - 1.
        debug: use only a few networks per split.
        options: of the task.

    Raises:
        ValueError: the zoo cannot be read or has other labels, or the model's output is no vector.
    """

    name = "classification"
    description = "the class of a network, such as of the image that an INR stores"
    answers = "The class of a network, such as what the image shows that an INR stores: probabilities."
    limits = ("Probabilities are not calibrated, and there is no answer for what is none of the classes.",)
    options = ClassificationConfig
    monitor = "accuracy"
    maximize = True

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        model: ModelConfig,
        debug: bool = False,
        options: ClassificationConfig = ClassificationConfig(),
    ) -> None:
        self.check_model(model)
        self.label_smoothing = options.label_smoothing
        super().__init__(data, "label", batch_size, debug)
        labels, self.num_classes = self.zoo.columns["label"], model.out_dim
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"{model.section}.out_dim: {self.num_classes} classes, but the labels of {self.zoo.path} reach from "
                f"{int(labels.min())} to {int(labels.max())}; set {model.section}.out_dim to the number of classes"
            )
        classes = self.zoo.classes
        if classes is not None and len(classes) != self.num_classes:
            found = f"{self.zoo.path} names {len(classes)} classes, the model has {self.num_classes} outputs"
            print(f"note: {found}, so that names are left out; set {model.section}.out_dim {len(classes)}")
        self.announce()

    @classmethod
    def from_settings(cls, settings: RunSettings) -> Classification:
        """The task, for models with one output per class."""
        options = cls.options_of(settings)
        return cls(settings.data, settings.batch_size, settings.model_config, settings.debug, options)

    def target(self, labels: Tensor) -> Tensor:
        """The labels [B], or under mixup their probabilities [B, classes]."""
        return nn.functional.one_hot(labels, self.num_classes).float() if self.data.augment.mixup else labels

    def loss(self, model: nn.Module, inputs: NetParams | MultiArchBatch, target: Tensor) -> Tensor:
        """Cross-entropy of logits [B, classes] and labels, [B] or probabilities [B, classes], smoothed."""
        return nn.functional.cross_entropy(model(inputs), target, label_smoothing=self.label_smoothing)

    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Mean cross-entropy and accuracy over a split; into the folder `figures`: its confusion matrix, and
        predictions.csv with the predicted class of each network."""
        logits = self.per_network(model, split, device, lambda params, _: model(params).float())
        labels = self.splits[split].labels
        if figures is not None:
            num_classes = logits.shape[1]
            counts = (labels * num_classes + logits.argmax(1)).bincount(minlength=num_classes**2)
            probability, predicted = logits.softmax(1).max(1)
            self.write_predictions(figures / "predictions.csv", split, predicted=predicted, probability=probability)
            names = class_names(self.zoo.classes, num_classes)
            confusion_matrix(figures / "confusion_matrix.png", counts.reshape(num_classes, -1).numpy(), names)
        return {
            "loss": nn.functional.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }

    @classmethod
    @torch.no_grad()
    def answer(cls, model: nn.Module, params: NetParams, removed: Sequence[str]) -> Tensor:
        """The probabilities of the classes, [B, classes]."""
        return model(canonicalize(params, removed)).softmax(1)

    @classmethod
    def answer_of(cls, answers: Tensor, row: int, data: Mapping[str, Any]) -> dict[str, Any]:
        """The most probable class, its name if there are names, its probability, and the probabilities of all
        classes."""
        number, names = int(answers[row].argmax()), class_names(data.get("classes"), answers.shape[1])
        named = {} if names is None else {"class_name": names[number]}
        probability = answers[row, number].item()
        return {"class": number, **named, "probability": probability, "probabilities": answers[row].tolist()}

    def identity(self) -> dict[str, Any]:
        """The data of a run, with the names of the classes if there are any."""
        classes = {} if self.zoo.classes is None else {"classes": list(self.zoo.classes)}
        return {**super().identity(), **classes}
