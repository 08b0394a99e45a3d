"""Edit the images that INRs store, through their weights."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams
from scalegmn.networks.siren import render
from scalegmn.reporting.figures import edits
from scalegmn.symmetry.canonicalize import TO_CANONICAL
from scalegmn.tasks.image_edits import STYLES
from scalegmn.tasks.zoo_task import ZooTask
from scalegmn.zoos.images import SOURCES, Images, load_images
from scalegmn.zoos.loader import DataConfig
from scalegmn.zoos.zoo_format import Zoo

SHOWN = 6
"""Networks in each figure."""

RIDGE = 1e-3
"""Of the linear map from weights to images, relative to the weights' mean square."""


def edited(model: nn.Module, params: NetParams) -> NetParams:
    """The networks that a model makes of others: theta + delta(theta)."""
    changes: NetParams = model(params)
    return replace(
        params,
        weights=tuple(map(torch.add, params.weights, changes.weights)),
        biases=tuple(map(torch.add, params.biases, changes.biases)),
    )


@torch.no_grad()
def edit_stored(model: nn.Module, params: NetParams, removed: Sequence[str]) -> NetParams:
    """Edits networks as they are stored: c^-1 (c theta + delta(c theta)), c what leads to canonical networks.

    Args:
        model: delta.
        params: theta, B networks.
        removed: the symmetries that canonical networks have removed.
    """
    passed = []
    for name in removed:
        passed.append(TO_CANONICAL[name](params))
        params = passed[-1].act(params)
    params = edited(model, params)
    for element in reversed(passed):
        params = element.inverse().act(params)
    return params


class Editing(ZooTask):
    """Mean squared error between the image that an edited INR draws and the edited original (Zhou et al., 2023).

    The model reads an INR's weights alone and returns changes of them. Each INR's original is found by its identity,
    the zoo's column `image`, among the images that the zoo was made from.

    Args:
        data: which zoo, which style, where the originals are.
        batch_size: networks per batch.
        debug: use only a few networks per split.

    Raises:
        ValueError: the zoo or its images cannot be read, the style is not for such images, or the INRs draw others.
    """

    name = "editing"
    monitor = "loss"
    maximize = False

    def __init__(self, data: DataConfig, batch_size: int, debug: bool = False) -> None:
        moving = [name for name in ("translate", "rotate", "relabel", "mixup") if getattr(data.augment, name)]
        if moving:
            raise ValueError(f"data.augment.{moving[0]}: edited originals do not follow it; leave it out for editing")
        super().__init__(data, "image", batch_size, debug)
        if len(self.zoo.nets) > 1:
            raise ValueError(f"{self.zoo.path}: found {len(self.zoo.nets):,} architectures, but editing needs one")
        style = STYLES[data.style_function]
        if self.spec.layout[-1] != style.channels:
            raise ValueError(
                f"data.style_function: {data.style_function} is for images of {style.channels} channels, but "
                f"{self.zoo.path} has INRs of {self.spec.layout[-1]}"
            )
        images = original_images(self.zoo, data)
        used = torch.cat([nets.labels for nets in self.splits.values()]).unique()
        self.originals = images.take(used)  # [n, height, width, channels]
        self.targets = torch.from_numpy(style.edit(self.originals.numpy())).float()
        self.place = torch.zeros(int(used.max()) + 1, dtype=torch.long)  # image -> its row in these two
        self.place[used] = torch.arange(len(used))
        self._check_images()
        self.announce()

    def target(self, labels: Tensor) -> Tensor:
        """The edited originals [B, height, width, channels] of images [B]."""
        return self.targets[self.place[labels.cpu()]].to(labels.device)

    def loss(self, model: nn.Module, inputs: NetParams, target: Tensor) -> Tensor:
        """Mean squared error over networks, pixels and channels."""
        return self.errors(edited(model, inputs), target).mean()

    def errors(self, params: NetParams, target: Tensor) -> Tensor:
        """The mean squared error of each network's image, [B]."""
        return (render(params, *target.shape[1:3]) - target).square().flatten(1).mean(1)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Mean squared error over a split; into the folder `figures`: the worst and the median edits, and edits.csv
        with the error of each image."""
        nets = self.splits[split]
        errors = self.per_network(
            model, split, device, lambda params, images: self.errors(edited(model, params), self.target(images))
        )
        if figures is not None:
            self._write_table(figures / "edits.csv", split, errors)
            order = errors.argsort(descending=True)
            middle = len(order) // 2
            for name, rows in {"worst": order[:SHOWN], "median": order[middle : middle + SHOWN]}.items():
                params, target = nets.read(rows, device), self.target(nets.labels[rows])
                size = target.shape[1:3]
                drawn = render(params, *size).cpu(), target, render(edited(model, params), *size).cpu()
                edits(figures / f"{name}_edits.png", *(images.numpy() for images in drawn), errors[rows].numpy())
        return {"loss": errors.mean().item()}

    @torch.no_grad()
    def trivial_answers(self) -> dict[str, dict[str, float]]:
        """Mean squared errors of two answers that know nothing of symmetry, on the same networks.

        `no_edit`: the INR as it is. `linear_map`: the image that least squares predict from all weights and biases
        (with a small ridge), fitted on the training split.

        Returns:
            Split -> answer -> error.
        """
        moments = products = 0
        for params, images in self.splits["train"].batches():
            x, y = _with_ones(params), self.target(images).flatten(1).double()
            moments, products = moments + x.mT @ x, products + x.mT @ y
        ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
        linear = torch.linalg.solve(moments + ridge, products)
        answers = {}
        for split in ("val", "test"):
            errors = {"no_edit": [], "linear_map": []}
            for params, images in self.splits[split].batches():
                target = self.target(images)
                errors["no_edit"].append(self.errors(params, target))
                errors["linear_map"].append((_with_ones(params) @ linear - target.flatten(1)).square().mean(1))
            answers[split] = {name: torch.cat(found).mean().item() for name, found in errors.items()}
        return answers

    def identity(self) -> dict[str, Any]:
        """Which zoo was read, and how, and what trivial answers reach on it."""
        return {**super().identity(), "trivial_answers": self.trivial_answers()}

    def _check_images(self) -> None:
        """Raises ValueError unless the INRs draw their originals better than other originals."""
        rows = torch.arange(min(64, len(self.splits["val"])))
        drawn = self.splits["val"].read(rows)
        originals = self.originals[self.place[self.splits["val"].labels[rows]]]
        others = self.originals[torch.arange(len(rows)) * len(self.originals) // len(rows)]
        own, other = (self.errors(drawn, images).mean().item() for images in (originals, others))
        if not own < other / 2:
            raise ValueError(
                f"{self.zoo.path}: its INRs do not draw these images (mean squared error {own:.3f}, with other images "
                f"{other:.3f}); set --data.images_path to those that they were fitted to"
            )

    def _write_table(self, path: Path, split: str, errors: Tensor) -> None:
        """A line per network: its number in the zoo, its image, its error."""
        nets = self.splits[split]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["network", "image", "mse"])
            writer.writerows(zip(nets.rows.tolist(), nets.labels.tolist(), errors.tolist(), strict=True))


def table(summary: Mapping[str, Any]) -> str:
    """Mean squared errors x 1e-2, as papers give them, of the trivial answers and of a finished run's model."""
    answers = summary["data"]["trivial_answers"]
    rows = {name: [answers[split][name] for split in ("val", "test")] for name in ("no_edit", "linear_map")}
    rows["metanetwork"] = [summary["val_loss"], summary["test_loss"]]
    lines = [f"{'mean squared error x 1e-2':<28}{'val':>8}{'test':>8}"]
    lines += [f"{name:<28}" + "".join(f"{100 * error:>8.3f}" for error in errors) for name, errors in rows.items()]
    return "\n".join(lines)


def original_images(zoo: Zoo, data: DataConfig) -> Images:
    """The images that a zoo's INRs were fitted to, from `data.images_path` (null: `data.dataset_path`).

    Raises:
        ValueError: the zoo says not which, or others are there.
    """
    name, source = zoo.provenance.get("images"), zoo.provenance.get("image_source")
    if name not in SOURCES:
        raise ValueError(f"{zoo.path}: its provenance names no images, found {name!r}, expected {', '.join(SOURCES)}")
    images = load_images(name, Path(data.images_path or data.dataset_path).expanduser())
    if source is not None and images.source != source:
        raise ValueError(f"data.images_path: found {images.source}, but {zoo.path} was made from {source}")
    if list(images.shape) != zoo.provenance["image_shape"]:
        shape = tuple(zoo.provenance["image_shape"])
        raise ValueError(f"data.images_path: found images of shape {images.shape}, but {zoo.path} has those of {shape}")
    if int(zoo.columns["image"].max()) >= len(images):
        raise ValueError(
            f"data.images_path: found {len(images)} images, but {zoo.path} has INRs of up to number "
            f"{int(zoo.columns['image'].max())}"
        )
    return images


def _with_ones(params: NetParams) -> Tensor:
    """[B, parameters + 1], a one at the end, in double precision."""
    flat = params.flatten().double()
    return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
