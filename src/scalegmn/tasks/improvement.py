"""Improve trained image classifiers in one pass, through their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.models.base import ModelConfig
from scalegmn.networks import MultiArchBatch, NetParams
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.reporting.figures import accuracies
from scalegmn.tasks.editing import edit_stored, edited
from scalegmn.tasks.registry import RunSettings, register_task
from scalegmn.tasks.zoo_task import ZooTask
from scalegmn.zoos.fit.cnn_zoo import zoo_images
from scalegmn.zoos.loader import DataConfig, augmented


@dataclass(frozen=True)
class ImprovementConfig:
    """Options of improvement."""

    l1: float = 0.0
    """lambda: the loss has lambda times the mean absolute value of all parameters of the improved network."""

    images: int = 64
    """Training images per network and step."""

    def __post_init__(self) -> None:
        if not self.l1 >= 0:
            raise ValueError(f"improvement_args.l1: found {self.l1}, expected 0 or more")
        if self.images < 1:
            raise ValueError(f"improvement_args.images: found {self.images}, expected at least 1")


@register_task
class Improvement(ZooTask):
    """CE(theta + Delta(theta)) + lambda mean |theta + Delta(theta)|: a metanetwork reads a trained classifier theta
    once and returns its improvement Delta.

    The cross-entropy CE is that of the improved network itself on training images, which are drawn anew for each
    network and step. Networks of the splits `val` and `test` are judged on images that no network was trained on: `val`
    on every second one of the zoo's test images, `test` on the others.

    Amortised fine-tuning (sparsifying, for lambda > 0); see Zhou et al., 2023, https://arxiv.org/abs/2302.14040, for
    changes of weights, and `benchmarks/improvement.py` for gradient descent and magnitude pruning of the same networks.

    Args:
        data: a zoo of `scalegmn zoo cnn`, of one architecture.
        batch_size: networks per batch.
        debug: use only a few networks per split.
        options: of the task.

    Raises:
        ValueError: the zoo or its images cannot be read, or its networks have several architectures.
    """

    name = "improvement"
    description = "changes of the weights of an image classifier that make it better, or sparse"
    answers = "Changes of a network's parameters, so that it classifies its images better."
    limits = ("Improved networks are for the images that the training networks classify.",)
    options = ImprovementConfig
    output = "parameters"
    monitor = "loss"
    maximize = False

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        debug: bool = False,
        options: ImprovementConfig = ImprovementConfig(),
    ) -> None:
        moving = [name for name in ("translate", "rotate", "relabel", "mixup") if getattr(data.augment, name)]
        if moving:
            raise ValueError(f"data.augment.{moving[0]}: it changes what networks classify; leave it out here")
        super().__init__(data, "test_accuracy", batch_size, debug)
        if len(self.zoo.nets) > 1:
            found = f"found {len(self.zoo.nets):,} architectures, expected one"
            raise ValueError(f"{self.zoo.path}: {found}; choose another zoo")
        self.num_images, self.l1 = options.images, options.l1
        self.images, self.reading = zoo_images(self.zoo, data.images_path)
        self.held_out = {"train": self.images.test[::2], "val": self.images.test[::2], "test": self.images.test[1::2]}
        self.announce()

    @classmethod
    def from_settings(cls, settings: RunSettings) -> Improvement:
        """The task, for models whose output is one change of all parameters."""
        cls.check_model(settings.model_config)
        return cls(settings.data, settings.batch_size, settings.debug, cls.options_of(settings))

    @classmethod
    def check_model(cls, model: ModelConfig) -> None:
        """Raises ValueError unless the model changes parameters, once."""
        super().check_model(model)
        if model.heads > 1:
            model.refuse([f"heads: found {model.heads}, but {cls.name} returns one network; use 1"])

    def train_batches(
        self, batches: Sequence[Tensor], generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[NetParams | MultiArchBatch, Tensor]]:
        """Training batches (networks, numbers of their images [B, P]) of these rows on a device, augmented."""
        train = self.images.train
        for params, labels in self.splits["train"].batches(batches, device):
            drawn = torch.randint(len(train), (len(labels), self.num_images), generator=generator)
            yield augmented(self.data, params, train[drawn].to(device), generator)

    def loss(self, model: nn.Module, inputs: NetParams, target: Tensor) -> Tensor:
        """The mean loss of B improved networks on the images of these numbers, [B, P]."""
        return self.measure(edited(model, inputs), target)[0].mean()

    def measure(self, params: NetParams, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each of B networks, [B], on images of these numbers, [P], or [B, P]."""
        pixels, labels = (values.to(rows.device)[rows] for values in (self.images.pixels, self.images.labels))
        logits = evaluate_cnn(params, pixels, *self.reading)
        labels = labels.expand(logits.shape[:2])
        entropy = nn.functional.cross_entropy(logits.mT, labels, reduction="none").mean(1)
        return entropy + self.l1 * params.flatten().abs().mean(1), (logits.argmax(2) == labels).float().mean(1)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Mean loss and accuracy of the improved networks of a split on held-out images; into the folder `figures`: the
        accuracies before and after, and improvements.csv with those of each network."""
        loss, after = self._measured(model, split, device)
        if figures is not None:
            before = self._measured(None, split, device)[1]
            self.write_predictions(figures / "improvements.csv", split, before=before, after=after)
            accuracies(figures / "accuracies.png", {"before": before.numpy(), "after one pass": after.numpy()})
        return {"loss": loss.mean().item(), "accuracy": after.mean().item()}

    def _measured(self, model: nn.Module | None, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each network of a split, [M], as it is (None) or improved by a model."""

        def measure(params: NetParams | MultiArchBatch, _: Tensor) -> Tensor:
            assert isinstance(params, NetParams)
            improved = params if model is None else edited(model, params)
            return torch.stack(self.measure(improved, self.held_out[split].to(device)), dim=1)

        loss, accuracy = self.per_network(model or nn.Identity(), split, device, measure).unbind(1)
        return loss, accuracy

    def identity(self) -> dict[str, Any]:
        """The data of a run, and the mean loss and accuracy of its networks as they are."""
        before = {}
        for split in ("val", "test"):
            loss, accuracy = self._measured(None, split, torch.device("cpu"))
            before[split] = {"loss": loss.mean().item(), "accuracy": accuracy.mean().item()}
        return {**super().identity(), "before": before}

    @classmethod
    def answer(cls, model: nn.Module, params: NetParams, removed: Sequence[str]) -> NetParams:
        """The improved networks; see `edit_stored`."""
        return edit_stored(model, params, removed)

    @classmethod
    def result_text(cls, summary: Mapping[str, Any]) -> str:
        """Mean accuracies on held-out images, before and after one pass."""
        val, test = (summary["data"]["before"][split]["accuracy"] for split in ("val", "test"))
        lines = [f"{'accuracy on held-out images':<28}{'val':>8}{'test':>8}"]
        lines.append(f"{'before':<28}{val:>8.3f}{test:>8.3f}")
        lines.append(f"{'after one pass':<28}{summary['val_accuracy']:>8.3f}{summary['test_accuracy']:>8.3f}")
        return "\n".join(lines)
