"""`scalegmn zoo cnn --conf zoos/digits_cnn.yml`: train a zoo of small CNNs that classify images.

Each network has its own hyper-parameters, drawn from the ranges of Unterthiner et al. (2020, arXiv 2002.11448), and, if
`mixed`, its own architecture, drawn from those of the CNN Wild Park (Kofinas et al., ICLR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scalegmn.networks import ACTIVATIONS, HETERO, LayerSpec, NetParams, NetSpec
from scalegmn.reporting.figures import accuracies
from scalegmn.reporting.files import versions
from scalegmn.reporting.words import counted
from scalegmn.zoos.fit.cnn_descent import OPTIMIZERS, Choices, LabelledImages, Optimizer
from scalegmn.zoos.fit.cnns import train_cnns
from scalegmn.zoos.fit.common import OnDone, Recipe, choose_device, choose_images, fit_shards, seeded
from scalegmn.zoos.images import Images
from scalegmn.zoos.shards import Shards, lock
from scalegmn.zoos.zoo_format import Networks, Zoo, joined, open_zoo, split_by_group

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
    """Channels of each 3x3 convolution with stride 2; then follow the mean over positions and a linear layer. mixed:
    every convolution draws one of these."""

    mixed: bool = False
    """Each network has its own architecture: a depth, and per convolution, of stride 1, channels, a kernel, an
    activation and maybe a residual connection from a layer before the previous one. false: all have `channels`."""

    depths: tuple[int, ...] = (2, 3, 4, 5)
    """mixed: each network draws how many convolutions it has."""

    kernels: tuple[int, ...] = (3, 5, 7)
    """mixed: each convolution draws its height and width, odd."""

    padding: Literal["same", "valid"] = "valid"
    """Zeros around the input of a convolution: `valid` none, as published; `same` so that small images suffice, and for
    mixed, where residual connections need it."""

    grey: bool = True
    """Average the channels of colour images, as published."""

    batch_size: int = 512
    """Images per step; all of a network's where it has fewer."""

    activations: tuple[str, ...] = ("relu", "tanh")
    """Each network draws one; mixed: each convolution draws one. Any activation, also one of your own (`--import`); not
    mixed, relu and tanh are the fastest, as their gradients are written out."""

    optimizers: tuple[Optimizer, ...] = OPTIMIZERS
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
        for name in ("channels", "depths", "kernels"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                problems.append(f"{name}: found {list(getattr(self, name))}, expected numbers, each at least 1")
        if not all(kernel % 2 for kernel in self.kernels):
            problems.append(f"kernels: found {list(self.kernels)}, expected odd numbers")
        if self.mixed and self.padding != "same":
            problems.append(f"padding: found {self.padding}, expected same for mixed")
        unknown = [name for name in self.activations if name not in ACTIVATIONS]
        if unknown:
            problems.append(f"activations: found {unknown[0]}, expected one of {', '.join(ACTIVATIONS)}")
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
    images = recipe.load_images()
    labelled = _labelled(recipe, images)
    _check_size(recipe, labelled)
    sizes = [len(part) for part in torch.arange(recipe.networks).split(BLOCK)]
    shards = Shards(Path(recipe.out), recipe.plan() | {"image_source": images.source, "block": BLOCK}, len(sizes))
    if shards.finished:
        print(f"{shards.out}: this zoo is there already")
        return shards.out

    def train(number: int, on_done: OnDone) -> Networks:
        return _train(recipe, labelled, number, sizes[number], device, on_done)

    if not fit_shards(recipe, shards, sizes, train, "training"):
        return shards.out
    with lock(shards.out):
        if not shards.finished:  # by somebody else, meanwhile
            _merge(recipe, shards, images, device)
    zoo = open_zoo(shards.out)
    final = zoo.columns["test_accuracy"][zoo.columns["epoch"] == recipe.checkpoints[-1]]
    counts = ", ".join(f"{int(count):,}" for count in final.histc(10, 0, 1))
    diverged = zoo.provenance["diverged"]
    kind = zoo.spec if len(zoo.nets) == 1 else f"of {len(zoo.nets):,} architectures"
    size = f"{counted(len(zoo), 'checkpoint')} of {counted(len(final), 'network')}"
    print(f"{zoo.path}: {size} {kind}; {diverged:,} diverged, left out")
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
        found = f"{counted(recipe.networks, 'network')}, of which {diverged} diverged"
        raise ValueError(f"networks: {found}, leave none for {', '.join(empty)}; use more networks")
    provenance = {
        **recipe.image_provenance(images),
        "diverged": diverged,
        "optimizers": list(OPTIMIZERS),
        "device": device,
        "versions": versions(),
    }
    by_epoch = {f"epoch {number}": accuracy[epoch == number].numpy() for number in recipe.checkpoints}
    shards.merge(splits, provenance, lambda folder: accuracies(folder / "accuracies.png", by_epoch))


def as_read(pixels: Tensor, grey: bool) -> Tensor:
    """Images as the networks read them, [n, channels, height, width] in [-1, 1].

    Args:
        pixels: [n, height, width, channels] in [0, 1].
        grey: average the channels.
    """
    inputs = pixels.permute(0, 3, 1, 2)
    return (2 * (inputs.mean(1, keepdim=True) if grey else inputs) - 1).contiguous()


def _labelled(recipe: CnnRecipe, images: Images) -> LabelledImages:
    """The chosen images with values in [-1, 1], and which of them train and test the networks.

    The test images are the source's test set; without one, its validation set; without either, a fifth of the images.
    Where the source has both sets, the validation set is left out.
    """
    rows = choose_images(images, recipe.num_images)
    inputs = as_read(images.take(rows), recipe.grey)
    test_set = images.validation if images.held_out is None else images.held_out
    if test_set is None:
        order = torch.randperm(len(rows), generator=seeded(recipe.seed))
        test, train = order.split([round(TEST_IMAGES * len(rows)), len(rows) - round(TEST_IMAGES * len(rows))])
    else:
        others = ~test_set if images.validation is None else ~(test_set | images.validation)
        test, train = (part[rows].nonzero()[:, 0] for part in (test_set, others))
    if not len(test) or round(min(recipe.train_fractions) * len(train)) < 1:
        raise ValueError(f"num_images: {counted(len(rows), 'image')} are too few to train and to test on; use more")
    return LabelledImages(inputs, images.labels[rows], train, test)


def zoo_images(zoo: Zoo, path: str | None) -> tuple[LabelledImages, tuple[int, Literal["same", "valid"]]]:
    """The images that a zoo's networks were trained and tested on, and the stride and padding with which they read
    them.

    Args:
        zoo: of `scalegmn zoo cnn`.
        path: where the images' files are; `digits` needs none.

    Raises:
        ValueError: the zoo has another origin, or other images are there.
    """
    plan, names = zoo.provenance.get("recipe", {}), {field.name for field in fields(CnnRecipe)}
    if not {"padding", "grey", "mixed"} <= set(plan):
        raise ValueError(f"{zoo.path}: its provenance names no recipe of CNNs; use a zoo of `scalegmn zoo cnn`")
    given = {"images_path": path, "background": zoo.provenance.get("background", "white")}
    recipe = CnnRecipe(**{key: value for key, value in plan.items() if key in names}, **given)
    images = recipe.load_images()
    if images.source != plan["image_source"]:
        found = f"found {images.source}, but {zoo.path} was made from {plan['image_source']}"
        raise ValueError(f"data.images_path: {found}; set it to these")
    return _labelled(recipe, images), (1 if recipe.mixed else 2, recipe.padding)


def _check_size(recipe: CnnRecipe, images: LabelledImages) -> None:
    """Raises ValueError when the images are too small for the convolutions."""
    side = min(images.pixels.shape[2:])
    for _ in recipe.channels if recipe.padding == "valid" else ():
        if side < 3:
            size = "x".join(map(str, images.pixels.shape[2:]))
            raise ValueError(
                f"padding: valid, but images of {size} are too small for {len(recipe.channels)} convolutions; use same"
            )
        side = (side - 3) // 2 + 1


def draw(
    recipe: CnnRecipe, number: int, size: int, num_channels: int, num_classes: int
) -> tuple[list[NetSpec], Choices]:
    """Architectures and choices of the networks of a shard.

    Args:
        recipe: says what they are drawn from.
        number: of the shard, which with the recipe's seed decides what is drawn.
        size: networks.
        num_channels, num_classes: of the images.
    """
    generator = seeded(recipe.seed, number)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    def log_uniform(low: float, high: float) -> Tensor:
        return uniform(math.log(low), math.log(high)).exp()

    def one_of(values: list[float]) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (size,), generator=generator)]

    def some(values: Sequence[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    def of_one_architecture() -> list[NetSpec]:
        widths = pairwise((num_channels, *recipe.channels))
        layers = [LayerSpec(a, b, (3, 3), "relu") for a, b in widths]
        spec = NetSpec((*layers, LayerSpec(recipe.channels[-1], num_classes)))
        indices = one_of(list(range(len(recipe.activations))))
        return [spec.with_activation(recipe.activations[index]) for index in indices.tolist()]

    def of_any() -> NetSpec:
        widths = [num_channels, *(some(recipe.channels) for _ in range(some(recipe.depths)))]
        layers = []
        for index, (a, b) in enumerate(pairwise(widths)):
            kernel, activation = some(recipe.kernels), some(recipe.activations)
            layers.append(LayerSpec(a, b, (kernel, kernel), activation, residual=some([None, *range(index - 1)])))
        return NetSpec((*layers, LayerSpec(widths[-1], num_classes)))

    specs = [of_any() for _ in range(size)] if recipe.mixed else of_one_architecture()
    return specs, Choices(
        lr=log_uniform(*recipe.lr),
        l2=log_uniform(*recipe.l2),
        dropout=uniform(*recipe.dropout),
        optimizer=one_of([OPTIMIZERS.index(name) for name in recipe.optimizers]),
        init_std=log_uniform(*recipe.init_std),
        train_fraction=one_of(list(recipe.train_fractions)),
    )


def _train(recipe: CnnRecipe, images: LabelledImages, number: int, size: int, device: str, on_done: OnDone) -> Networks:
    """Shard `number`: all checkpoints of its networks but those that diverged."""
    specs, choices = draw(recipe, number, size, images.pixels.shape[1], int(images.labels.max()) + 1)
    trained = train_cnns(
        specs,
        choices,
        images,
        recipe.checkpoints,
        recipe.batch_size,
        None if recipe.mixed else recipe.padding,
        (recipe.seed, number),
        device,
        on_done,
    )
    several = not recipe.mixed and len(recipe.activations) > 1
    good, repeats = trained.finite.all(1), len(recipe.checkpoints)
    nets = (params for params, fine in zip(trained.nets, good, strict=True) if fine)
    columns = {name: value.repeat_interleave(repeats) for name, value in vars(choices).items()} | {
        "test_accuracy": trained.test_accuracy.flatten(),
        "train_accuracy": trained.train_accuracy.flatten(),
        "network": (number * BLOCK + torch.arange(size)).repeat_interleave(repeats),
        "epoch": torch.tensor(recipe.checkpoints).repeat(size),
    }
    kept = good.repeat_interleave(repeats)
    return Networks(
        joined((_with_activations(params, recipe.activations) for params in nets) if several else nets),
        {name: column[kept] for name, column in columns.items()},
    )


def _with_activations(params: NetParams, names: Sequence[str]) -> NetParams:
    """The same networks with a spec that those of all these activations have."""
    spec = params.spec.with_activation(HETERO, names)
    index = spec.activations.index(params.spec.layers[0].activation)
    return params.replace(spec=spec, activation=torch.full((len(params),), index))
