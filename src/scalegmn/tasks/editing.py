"""Edit the images that INRs store, through their weights."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.networks import MultiArchBatch, NetParams
from scalegmn.networks.siren import OUTPUT_OFFSET, render
from scalegmn.reporting.figures import edits
from scalegmn.symmetry.canonicalize import TO_CANONICAL
from scalegmn.tasks.image_edits import IMAGE_EDITS
from scalegmn.tasks.registry import RunSettings, register_task
from scalegmn.tasks.zoo_task import ZooTask
from scalegmn.zoos.images import SOURCES, Images, load_images
from scalegmn.zoos.loader import DataConfig
from scalegmn.zoos.zoo_format import Zoo

NUM_SHOWN = 6
"""Networks in each figure."""

RIDGE = 1e-3
"""The ridge of the linear map from weights to images, relative to the mean square of the weights."""


def edited(model: nn.Module, params: NetParams) -> NetParams:
    """The edited networks theta + delta_i(theta) of each of a model's k heads: B k networks, `[i::k]` those of head i.

    The edited image is the mean of the images that the k networks of one theta draw (output capacity expansion).
    """
    changes: NetParams = model(params)
    heads = len(changes) // max(len(params), 1)
    thetas = params if heads == 1 else NetParams.interleave([params] * heads)
    return thetas.replace(
        weights=tuple(map(torch.add, thetas.weights, changes.weights)),
        biases=tuple(map(torch.add, thetas.biases, changes.biases)),
    )


@torch.no_grad()
def edit_stored(model: nn.Module, params: NetParams, removed: Sequence[str]) -> NetParams:
    """Edits networks as they are stored: c^-1 (c theta + delta_i(c theta)), where c theta is canonical; see `edited`.

    Args:
        model: delta.
        params: theta, B networks.
        removed: the symmetries that canonical networks have removed.
    """
    to_canonical = []
    for name in removed:
        to_canonical.append(TO_CANONICAL[name](params))
        params = to_canonical[-1].act(params)
    num_networks, params = len(params), edited(model, params)
    of_heads = params.of_heads(num_networks)
    for element in reversed(to_canonical):
        of_heads = list(map(element.inverse().act, of_heads))
    return NetParams.interleave(of_heads)


@register_task
class Editing(ZooTask):
    """Mean squared error between the image that an edited INR draws and the edited original (Zhou et al., 2023,
    https://arxiv.org/abs/2302.14040).

    The model reads only the weights of an INR and returns changes of them. Each INR's original is the image whose index
    is in the zoo's column `image`, among the images that the zoo was made from.

    Args:
        data: the zoo, the edit (`style_function`), and where the originals are.
        batch_size: networks per batch.
        debug: use only a few networks per split.

    Raises:
        ValueError: the zoo or its images cannot be read, the edit is not for such images, or the INRs draw others.
    """

    name = "editing"
    description = "changes of the weights of an INR that edit the image which it stores"
    answers = (
        "Changes of a network's parameters, so that the image which an INR stores is edited (`{data.style_function}`)."
    )
    limits = (
        "Edited networks keep their architecture and the names in their files, not their training loss.",
        "A model with k `heads` writes k networks for each; the edited image is the mean of the images that they draw.",
    )
    output = "parameters"
    monitor = "loss"
    maximize = False

    def __init__(self, data: DataConfig, batch_size: int, debug: bool = False) -> None:
        moving = [name for name in ("translate", "rotate", "relabel", "mixup") if getattr(data.augment, name)]
        if moving:
            raise ValueError(f"data.augment.{moving[0]}: edited originals do not follow it; leave it out for editing")
        image_edit = IMAGE_EDITS.require(data.style_function, "data.style_function")
        super().__init__(data, "image", batch_size, debug)
        if len(self.zoo.nets) > 1:
            raise ValueError(
                f"{self.zoo.path}: found {len(self.zoo.nets):,} architectures, expected one; edit another zoo"
            )
        if self.spec.layout[-1] != image_edit.num_channels:
            raise ValueError(
                f"data.style_function: {image_edit.name} is for images of {image_edit.num_channels} channels, but "
                f"{self.zoo.path} has INRs of {self.spec.layout[-1]}; choose another of {', '.join(IMAGE_EDITS)}"
            )
        images, self.output_offset = original_images(self.zoo, data), output_offset(self.zoo)
        used = torch.cat([nets.labels for nets in self.splits.values()]).unique()
        self.originals = images.take(used)  # [n, height, width, channels]
        self.targets = torch.from_numpy(image_edit(self.originals.numpy())).float()
        self.place = torch.zeros(int(used.max()) + 1, dtype=torch.long)  # image -> its row in originals and targets
        self.place[used] = torch.arange(len(used))
        self._check_images()
        self.announce()

    @classmethod
    def from_settings(cls, settings: RunSettings) -> Editing:
        """The task, for models whose output is changes of parameters."""
        cls.check_model(settings.model_config)
        return cls(settings.data, settings.batch_size, settings.debug)

    def target(self, labels: Tensor) -> Tensor:
        """The edited originals [B, height, width, channels] of images [B]."""
        return self.targets[self.place[labels.cpu()]].to(labels.device)

    def loss(self, model: nn.Module, inputs: NetParams, target: Tensor) -> Tensor:
        """Mean squared error over networks, pixels and channels."""
        return self.errors(edited(model, inputs), target).mean()

    def errors(self, params: NetParams, target: Tensor) -> Tensor:
        """The mean squared error of each image, [B], that B k networks draw together."""
        return (self.images_of(params, target) - target).square().flatten(1).mean(1)

    def images_of(self, params: NetParams, target: Tensor) -> Tensor:
        """The images that B k networks draw, each the mean of k; as large as targets [B, height, width, channels]."""
        height, width = target.shape[1:3]
        drawn = render(params, height, width, self.output_offset)
        return drawn if len(params) == len(target) else drawn.unflatten(0, (len(target), -1)).mean(1)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Mean squared error over a split; into the folder `figures`: the worst and the median edits, and edits.csv
        with the error of each image."""
        nets = self.splits[split]
        errors = self.per_network(
            model, split, device, lambda nets, images: self.errors(edited(model, _single(nets)), self.target(images))
        )
        if figures is not None:
            self._write_table(figures / "edits.csv", split, errors)
            order = errors.argsort(descending=True)
            middle = len(order) // 2
            for name, rows in {"worst": order[:NUM_SHOWN], "median": order[middle : middle + NUM_SHOWN]}.items():
                params, target = _single(nets.read(rows, device)), self.target(nets.labels[rows])
                before, after = (self.images_of(nets, target).cpu() for nets in (params, edited(model, params)))
                images = before.numpy(), target.numpy(), after.numpy()
                edits(figures / f"{name}_edits.png", *images, errors[rows].numpy())
        return {"loss": errors.mean().item()}

    @torch.no_grad()
    def trivial_answers(self) -> dict[str, dict[str, float]]:
        """Mean squared errors of two baselines on the same networks.

        `no_edit`: the INR as it is. `linear_map`: the image that ridge regression predicts from all weights and biases,
        fitted to the training split.

        Returns:
            Split -> answer -> error.
        """
        size = self.spec.num_parameters + 1
        moments = torch.zeros(size, size, dtype=torch.float64)
        products = torch.zeros(size, self.targets[0].numel(), dtype=torch.float64)
        for nets, images in self.splits["train"].batches():
            x, y = _with_ones(_single(nets)), self.target(images).flatten(1).double()
            moments += x.mT @ x
            products += x.mT @ y
        ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
        linear = torch.linalg.solve(moments + ridge, products)
        answers = {}
        for split in ("val", "test"):
            errors: dict[str, list[Tensor]] = {"no_edit": [], "linear_map": []}
            for nets, images in self.splits[split].batches():
                params, target = _single(nets), self.target(images)
                errors["no_edit"].append(self.errors(params, target))
                errors["linear_map"].append((_with_ones(params) @ linear - target.flatten(1)).square().mean(1))
            answers[split] = {name: torch.cat(of_batches).mean().item() for name, of_batches in errors.items()}
        return answers

    def identity(self) -> dict[str, Any]:
        """The data of a run, and the errors of two baselines on them."""
        return {**super().identity(), "trivial_answers": self.trivial_answers()}

    @classmethod
    def answer(cls, model: nn.Module, params: NetParams, removed: Sequence[str]) -> NetParams:
        """The edited networks; see `edit_stored`."""
        return edit_stored(model, params, removed)

    @classmethod
    def result_text(cls, summary: Mapping[str, Any]) -> str:
        """Mean squared errors x 1e-2, as papers give them, of the baselines and of the model."""
        answers = summary["data"]["trivial_answers"]
        rows = {name: [answers[split][name] for split in ("val", "test")] for name in ("no_edit", "linear_map")}
        rows["metanetwork"] = [summary["val_loss"], summary["test_loss"]]
        lines = [f"{'mean squared error x 1e-2':<28}{'val':>8}{'test':>8}"]
        lines += [f"{name:<28}" + "".join(f"{100 * error:>8.3f}" for error in errors) for name, errors in rows.items()]
        return "\n".join(lines)

    def _check_images(self) -> None:
        """Raises ValueError unless the INRs draw their originals better than others, and with the right offset."""
        rows = torch.arange(min(64, len(self.splits["val"])))
        drawn = _single(self.splits["val"].read(rows))
        originals = self.originals[self.place[self.splits["val"].labels[rows]]]
        others = self.originals[torch.arange(len(rows)) * len(self.originals) // len(rows)]
        error, error_of_others = (self.errors(drawn, images).mean().item() for images in (originals, others))
        shift = (originals - self.images_of(drawn, originals)).mean().item()
        shifted, shifted_of_others = (self.errors(drawn, images - shift).mean() for images in (originals, others))
        is_shifted = abs(shift) > 0.1 and shifted < min(error, shifted_of_others) / 2
        if error < error_of_others / 2 and not is_shifted:
            return
        remedy = "set --data.images_path to those that they were fitted to"
        if is_shifted:
            fits = round(self.output_offset + shift, 1) + 0.0  # no -0
            found = f"output_offset: found {self.output_offset:g}, but {fits:g} fits"
            remedy = f"{found}; set --data.dataset_args '{{output_offset: {fits:g}}}'"
        raise ValueError(
            f"{self.zoo.path}: its INRs do not draw these images (mean squared error {error:.3f}, with other images "
            f"{error_of_others:.3f}); {remedy}"
        )

    def _write_table(self, path: Path, split: str, errors: Tensor) -> None:
        """A line per network: its number in the zoo, its image, its error."""
        nets = self.splits[split]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["network", "image", "mse"])
            writer.writerows(zip(nets.rows.tolist(), nets.labels.tolist(), errors.tolist(), strict=True))


def output_offset(zoo: Zoo) -> float:
    """What is added to the outputs of a zoo's INRs to have pixels."""
    return float(zoo.provenance.get("output_offset", OUTPUT_OFFSET))


def original_images(zoo: Zoo, data: DataConfig) -> Images:
    """The images that a zoo's INRs were fitted to, from `data.images_path` (null: `data.dataset_path`).

    Raises:
        ValueError: the zoo's provenance names no images, or other images are there.
    """
    name, source = zoo.provenance.get("images"), zoo.provenance.get("image_source")
    if name not in SOURCES:
        found = f"found {name!r}, expected one of {', '.join(SOURCES)}"
        raise ValueError(f"{zoo.path}: its provenance names no images ({found}); use a zoo of `scalegmn zoo inr`")
    background = zoo.provenance.get("background", "white")
    images = load_images(name, Path(data.images_path or data.dataset_path).expanduser(), background)
    if source is not None and images.source != source:
        raise ValueError(
            f"data.images_path: found {images.source}, but {zoo.path} was made from {source}; set it to these"
        )
    if list(images.shape) != zoo.provenance["image_shape"]:
        shape = tuple(zoo.provenance["image_shape"])
        raise ValueError(f"data.images_path: found images of shape {images.shape}, but {zoo.path} has those of {shape}")
    if int(zoo.columns["image"].max()) >= len(images):
        raise ValueError(
            f"data.images_path: found {len(images)} images, but {zoo.path} has INRs of up to number "
            f"{int(zoo.columns['image'].max())}"
        )
    return images


def _single(nets: NetParams | MultiArchBatch) -> NetParams:
    """A batch of a zoo of one architecture."""
    assert isinstance(nets, NetParams)
    return nets


def _with_ones(params: NetParams) -> Tensor:
    """Parameters in double precision with a one at the end, [B, parameters + 1]."""
    flat = params.flatten().double()
    return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
