"""`python -m scalegmn.zoos.cnns --conf configs/zoos/digits_cnn.yml`: train a zoo of small CNNs that classify images.

Each network has its own hyper-parameters, drawn from the ranges of Unterthiner et al. (2020, arXiv 2002.11448).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scalegmn.cli import parse
from scalegmn.data.images import Images, load_images
from scalegmn.data.shards import Shards, lock
from scalegmn.data.zoo_format import Networks, open_zoo, split_by_group
from scalegmn.log import user_errors, versions
from scalegmn.plot import accuracies
from scalegmn.spec import ACTIVATIONS, MIXED, LayerSpec, NetSpec
from scalegmn.zoos.fit_cnns import OPTIMIZERS, Choices, LabelledImages, train_cnns
from scalegmn.zoos.making import OnDone, Recipe, choose_device, choose_images, fit_shards, seeded

BLOCK = 256
"""Networks per shard. A shard depends on the recipe and its number alone, not on who trains it or what came before."""

TEST_IMAGES = 0.2
"""Share of the images that test the networks, where the source has no test set of its own."""


@dataclass(frozen=True)
class CnnRecipe(Recipe):
    """Train small CNNs to classify images, and store them as a zoo."""

    out: str = "data/digits_cnn"
    """Folder of the zoo."""

    networks: int = 2000
    """How many networks are trained."""

    checkpoints: tuple[int, ...] = (0, 1, 2, 3, 20, 40, 60, 80, 86)
    """Epochs after which every network is stored; training ends with the last."""

    channels: tuple[int, ...] = (16, 16, 16)
    """Channels of each 3x3 convolution with stride 2; then follow the mean over positions and a linear layer."""

    padding: Literal["same", "valid"] = "valid"
    """Zeros around the input of a convolution: `valid` none, as published; `same` so that small images suffice."""

    grey: bool = True
    """Average the channels of colour images, as published."""

    batch_size: int = 512
    """Images per step; all of a network's where it has fewer."""

    activations: tuple[Literal["relu", "tanh"], ...] = ("relu", "tanh")
    """Each network draws one."""

    optimizers: tuple[Literal["sgd", "adam", "rmsprop"], ...] = OPTIMIZERS
    """Each network draws one."""

    train_fractions: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """Each network draws the share of the training images that it sees, the same ones in every epoch."""

    lr: tuple[float, float] = (5e-4, 5e-2)
    """Range of the learning rate, drawn log-uniformly."""

    l2: tuple[float, float] = (1e-8, 1e-2)
    """Range of the coefficient of the sum of squared weights, drawn log-uniformly."""

    dropout: tuple[float, float] = (0.0, 0.7)
    """Range of the dropout probability after each convolution, drawn uniformly."""

    init_std: tuple[float, float] = (1e-3, 0.5)
    """Range of the standard deviation of the initial weights, which are normal, drawn log-uniformly; biases are 0."""

    val_fraction: float = 0.1
    """Share of the networks, with all their checkpoints, that a metanetwork is validated on."""

    test_fraction: float = 0.2
    """Share of the networks, with all their checkpoints, that a metanetwork is tested on."""

    def __post_init__(self) -> None:
        problems = self.common_problems(("networks", "batch_size"))
        if not self.channels or min(self.channels) < 1:
            problems.append(f"channels: found {list(self.channels)}, expected one number per layer, each at least 1")
        given = list(self.checkpoints)
        if not given or given != sorted(set(given)) or given[0] < 0:
            problems.append(f"checkpoints: found {given}, expected ascending numbers of epochs from 0")
        for name in ("activations", "optimizers", "train_fractions"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                problems.append(f"{name}: found {list(values)}, expected one or more, all different")
        if not all(0 < fraction <= 1 for fraction in self.train_fractions):
            problems.append(f"train_fractions: found {list(self.train_fractions)}, expected shares above 0, at most 1")
        for name in ("lr", "l2", "init_std"):
            if not 0 < getattr(self, name)[0] <= getattr(self, name)[1]:
                problems.append(f"{name}: found {list(getattr(self, name))}, expected two ascending numbers above 0")
        if not 0 <= self.dropout[0] <= self.dropout[1] < 1:
            problems.append(f"dropout: found {list(self.dropout)}, expected two ascending probabilities below 1")
        fractions = [self.val_fraction, self.test_fraction]
        if not min(fractions) > 0 or not sum(fractions) < 1:
            problems.append(f"val_fraction, test_fraction: found {fractions}, expected positive with a sum below 1")
        if problems:
            raise ValueError("; ".join(problems))


def make_cnn_zoo(recipe: CnnRecipe) -> Path:
    """Trains this process's part of a recipe's zoo, and merges all parts if they are there.

    Finished shards of an interrupted run are kept; an existing zoo of the same recipe is left as it is. Networks that
    diverged, with NaN or infinite parameters or outputs at a checkpoint, are left out and counted.

    Returns:
        The zoo's folder.

    Raises:
        ValueError: the folder holds something else, the images cannot be read, or the recipe does not work.
        OSError: the disk is full, or similar.
    """
    device = choose_device(recipe.device)
    images = load_images(recipe.images, recipe.images_path and Path(recipe.images_path))
    labelled = _labelled(recipe, images)
    spec = _spec(recipe, labelled)
    sizes = [len(part) for part in torch.arange(recipe.networks).split(BLOCK)]
    shards = Shards(Path(recipe.out), recipe.plan() | {"image_source": images.source, "block": BLOCK}, len(sizes))
    if shards.finished:
        print(f"{shards.out}: this zoo is there already")
        return shards.out

    def train(number: int, on_done: OnDone) -> Networks:
        return _train(recipe, spec, labelled, number, sizes[number], device, on_done)

    if not fit_shards(recipe, shards, sizes, train, "training"):
        return shards.out
    with lock(shards.out):
        if not shards.finished:  # by somebody else, meanwhile
            _merge(recipe, shards, images, device)
    zoo = open_zoo(shards.out)
    final = zoo.columns["test_accuracy"][zoo.columns["epoch"] == recipe.checkpoints[-1]]
    counts = ", ".join(f"{int(count):,}" for count in final.histc(10, 0, 1))
    diverged = zoo.provenance["diverged"]
    print(
        f"{zoo.path}: {len(zoo):,} checkpoints of {len(final):,} networks {zoo.spec}; {diverged:,} diverged, left out"
    )
    print(f"test accuracy: median {final.median():.1%}; networks from 0 to 100 % in steps of 10: {counts}")
    return zoo.path


def _merge(recipe: CnnRecipe, shards: Shards, images: Images, device: str) -> None:
    """The zoo from all shards.

    Raises:
        ValueError: too many networks diverged.
    """
    parts = [part.columns for part in shards]
    network, epoch, accuracy = (
        torch.cat([columns[name] for columns in parts]) for name in ("network", "epoch", "test_accuracy")
    )
    diverged = recipe.networks - len(network.unique())
    splits = split_by_group(network, {"val": recipe.val_fraction, "test": recipe.test_fraction}, recipe.seed)
    empty = [name for name, rows in splits.items() if not len(rows)]
    if empty:
        shards.discard()
        found = f"{recipe.networks} networks, of which {diverged} diverged"
        raise ValueError(f"networks: {found}, leave none for {', '.join(empty)}; use more")
    provenance = {
        "images": recipe.images,
        "image_source": images.source,
        "image_shape": list(images.shape),
        "diverged": diverged,
        "optimizers": list(OPTIMIZERS),
        "device": device,
        "versions": versions(),
    }
    by_epoch = {f"epoch {number}": accuracy[epoch == number].numpy() for number in recipe.checkpoints}
    shards.merge(splits, provenance, lambda folder: accuracies(folder / "accuracies.png", by_epoch))


def _labelled(recipe: CnnRecipe, images: Images) -> LabelledImages:
    """The chosen images as the networks see them, in [-1, 1]; those that test are the source's own, or a fifth."""
    rows = choose_images(images, recipe.num_images)
    pixels = images.take(rows).permute(0, 3, 1, 2)
    if recipe.grey:
        pixels = pixels.mean(1, keepdim=True)
    if images.held_out is None:
        order = torch.randperm(len(rows), generator=seeded(recipe.seed))
        test, train = order.split([round(TEST_IMAGES * len(rows)), len(rows) - round(TEST_IMAGES * len(rows))])
    else:
        test, train = (part.nonzero()[:, 0] for part in (images.held_out[rows], ~images.held_out[rows]))
    if not len(test) or round(min(recipe.train_fractions) * len(train)) < 1:
        raise ValueError(f"num_images: {len(rows)} images are too few to train and to test on; use more")
    return LabelledImages((2 * pixels - 1).contiguous(), images.labels[rows], train, test)


def _spec(recipe: CnnRecipe, images: LabelledImages) -> NetSpec:
    """The networks' architecture.

    Raises:
        ValueError: the images are too small for it.
    """
    channels, side = (images.pixels.shape[1], *recipe.channels), min(images.pixels.shape[2:])
    for _ in recipe.channels if recipe.padding == "valid" else ():
        if side < 3:
            size = "x".join(map(str, images.pixels.shape[2:]))
            raise ValueError(
                f"padding: valid, but images of {size} are too small for {len(recipe.channels)} convolutions; use same"
            )
        side = (side - 3) // 2 + 1
    activation = recipe.activations[0] if len(recipe.activations) == 1 else MIXED
    hidden = (LayerSpec(a, b, (3, 3), activation) for a, b in pairwise(channels))
    return NetSpec((*hidden, LayerSpec(channels[-1], int(images.labels.max()) + 1)))


def _draw(recipe: CnnRecipe, number: int, size: int) -> tuple[Tensor, Choices]:
    """Activations, as indices into `ACTIVATIONS`, and choices of the networks of shard `number`."""
    generator = seeded(recipe.seed, number)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    def log_uniform(low: float, high: float) -> Tensor:
        return uniform(math.log(low), math.log(high)).exp()

    def one_of(values: list[float]) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (size,), generator=generator)]

    activation = one_of([ACTIVATIONS.index(name) for name in recipe.activations])
    return activation, Choices(
        lr=log_uniform(*recipe.lr),
        l2=log_uniform(*recipe.l2),
        dropout=uniform(*recipe.dropout),
        optimizer=one_of([OPTIMIZERS.index(name) for name in recipe.optimizers]),
        init_std=log_uniform(*recipe.init_std),
        train_fraction=one_of(list(recipe.train_fractions)),
    )


def _train(
    recipe: CnnRecipe, spec: NetSpec, images: LabelledImages, number: int, size: int, device: str, on_done: OnDone
) -> Networks:
    """Shard `number`: all checkpoints of its networks but those that diverged."""
    activation, choices = _draw(recipe, number, size)
    trained = train_cnns(
        spec,
        activation,
        choices,
        images,
        recipe.checkpoints,
        recipe.batch_size,
        recipe.padding,
        (recipe.seed, number),
        device,
        on_done,
    )
    good, repeats = trained.finite.all(1), len(recipe.checkpoints)
    columns = {name: value.repeat_interleave(repeats) for name, value in vars(choices).items()} | {
        "test_accuracy": trained.test_accuracy.flatten(),
        "train_accuracy": trained.train_accuracy.flatten(),
        "network": (number * BLOCK + torch.arange(size)).repeat_interleave(repeats),
        "epoch": torch.tensor(recipe.checkpoints).repeat(size),
    }
    kept = good.repeat_interleave(repeats)
    return Networks((trained.params[kept],), {name: column[kept] for name, column in columns.items()})


def main() -> None:
    """Reads a recipe and makes its zoo."""
    with user_errors():
        make_cnn_zoo(parse(CnnRecipe, prog="python -m scalegmn.zoos.cnns"))


if __name__ == "__main__":
    main()
