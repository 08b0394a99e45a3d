"""Recipes: from images to a zoo of INRs, one small SIREN per image and view."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.siren import OUTPUT_OFFSET, init_siren, pixel_grid, render
from scalegmn.reporting.figures import reconstructions
from scalegmn.reporting.files import versions
from scalegmn.reporting.words import counted
from scalegmn.zoos.fit.common import OnDone, Recipe, choose_device, choose_images, fit_shards, seeded
from scalegmn.zoos.fit.sirens import Descent, fit_sirens
from scalegmn.zoos.images import Images
from scalegmn.zoos.shards import Shards
from scalegmn.zoos.zoo_format import Networks, open_zoo, split_by_group
from scalegmn.zoos.zoo_tensors import params_from_tensors

BLOCK = 512
"""Networks per shard. A shard depends on the recipe and its number alone, not on who fits it or what came before."""

SHOWN = 12
"""Networks in the figure."""


@dataclass(frozen=True)
class InrRecipe(Recipe):
    """Fit SIRENs to images, and store them as a zoo."""

    out: str = "data/digits_inr"
    """Folder of the zoo."""

    views: int = 8
    """Fits per image, each from its own initial weights."""

    hidden: tuple[int, ...] = (12, 12)
    """Neurons of each hidden layer."""

    w0: float = 6.0
    """Frequency of the sines, sin(w0 (W x + b))."""

    steps: int = 200
    """Steps per network, at most."""

    lr: float = 1e-2
    """Learning rate at the start; falls to zero as a cosine over `steps`."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw: Adam, with decoupled weight decay; sgd: without momentum."""

    weight_decay: float = 0.0
    """Decoupled weight decay."""

    target_psnr: float | None = None
    """In dB; a network stops at the first step at which its fit reaches it. null: all steps."""

    init: Literal["independent", "shared"] = "independent"
    """independent: every network has its own initial weights; shared: all images of one view start from the same. Both
    are drawn as the SIREN paper does, and as those of the published zoos were."""

    base_width: int | None = None
    """Start and learn as networks of this hidden width do (muP), whatever `hidden` is: wider networks then store images
    in functions of the same kind. For adamw; null: as the SIREN paper, with one learning rate."""

    dtype: Literal["float32", "float16"] = "float32"
    """How weights are stored; float16 halves the zoo. The PSNR is that of the stored weights."""

    val_fraction: float = 0.1
    """Share of the images (outside the source's own test set) whose networks are for validation."""

    test_fraction: float | None = 0.2
    """Share of the images whose networks are for testing; null: those of the source's own test set."""

    def __post_init__(self) -> None:
        problems = self.common_problems(("views", "steps"), ("weight_decay",))
        problems += [
            f"{name}: found {getattr(self, name)}, expected above 0"
            for name in ("w0", "lr", "target_psnr")
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        if not self.hidden or min(self.hidden) < 1:
            problems.append(f"hidden: found {list(self.hidden)}, expected one number per layer, each at least 1")
        fractions = [fraction for fraction in (self.val_fraction, self.test_fraction) if fraction is not None]
        if not min(fractions) > 0 or not sum(fractions) < 1:
            problems.append(f"val_fraction, test_fraction: found {fractions}, expected positive with a sum below 1")
        if self.base_width is not None and (self.base_width < 1 or self.optimizer != "adamw"):
            found = f"found {self.base_width} with {self.optimizer}"
            problems.append(f"base_width: {found}, expected at least 1, with optimizer adamw")
        if problems:
            raise ValueError("; ".join(problems))

    def plan(self) -> dict[str, Any]:
        """As in `Recipe`; without base_width where there is none, as in zoos made before it."""
        return {key: value for key, value in super().plan().items() if key != "base_width" or value is not None}

    @property
    def descent(self) -> Descent:
        """How each network is fitted."""
        return Descent(self.steps, self.lr, self.optimizer, self.weight_decay, self.target_psnr, self.base_width)


def make_zoo(recipe: InrRecipe) -> Path:
    """Fits this process's part of a recipe's zoo, and merges all parts if they are there.

    Finished shards of an interrupted run are kept; an existing zoo of the same recipe is left as it is.

    Returns:
        The zoo's folder.

    Raises:
        ValueError: the folder holds something else, the images cannot be read, or the recipe does not work.
        OSError: the disk is full, or similar.
    """
    device = choose_device(recipe.device)
    images = recipe.load_images()
    image = choose_images(images, recipe.num_images).repeat_interleave(recipe.views)
    splits = _splits(recipe, images, image)
    blocks = image.split(BLOCK)
    shards = Shards(Path(recipe.out), recipe.plan() | {"image_source": images.source, "block": BLOCK}, len(blocks))
    if shards.finished:
        print(f"{shards.out}: this zoo is there already")
        return shards.out

    def fit(number: int, on_done: OnDone) -> Networks:
        return _fit(recipe, images, blocks[number], number, device, on_done)

    if not fit_shards(recipe, shards, list(map(len, blocks)), fit, "fitting"):
        return shards.out
    provenance = {
        **recipe.image_provenance(images),
        **({} if images.classes is None else {"classes": list(images.classes)}),
        "device": device.partition(":")[0],
        "versions": versions(),
    }
    shards.merge(splits, provenance, lambda folder: _draw(folder, _spec(recipe, images), images))
    zoo = open_zoo(shards.out)
    low, median = np.percentile(zoo.columns["psnr"].numpy(), [5, 50])
    quality = f"PSNR median {median:.1f} dB, 5th percentile {low:.1f} dB"
    print(f"{zoo.path}: {counted(len(zoo), 'network')} {zoo.spec}, {quality}")
    return zoo.path


def _splits(recipe: InrRecipe, images: Images, image: Tensor) -> dict[str, Tensor]:
    """Numbers of the networks of each split; all networks of one image are in one."""
    fractions = {"val": recipe.val_fraction, "test": recipe.test_fraction}
    keeps_test = images.keeps_split or recipe.test_fraction is None
    sets = {"val": images.validation, "test": images.held_out if keeps_test else None}
    kept = {name: chosen[image] for name, chosen in sets.items() if chosen is not None}
    to_draw = {name: fraction for name, fraction in fractions.items() if name not in kept and fraction is not None}
    if {*kept, *to_draw} != {"val", "test"}:
        raise ValueError(f"test_fraction: found null, but images: {recipe.images} has no test set of its own; use 0.2")
    others = (
        torch.stack([torch.zeros_like(image, dtype=torch.bool), *kept.values()]).any(0).logical_not().nonzero()[:, 0]
    )
    drawn = {name: others[rows] for name, rows in split_by_group(image[others], to_draw, recipe.seed).items()}
    splits = {name: kept[name].nonzero()[:, 0] if name in kept else drawn[name] for name in ("train", "val", "test")}
    empty = [name for name, rows in splits.items() if not len(rows)]
    if empty:
        found = counted(len(image.unique()), "image")
        raise ValueError(f"num_images: {found} leave none for {', '.join(empty)}; use more")
    return splits


def _fit(recipe: InrRecipe, images: Images, image: Tensor, number: int, device: str, on_done: OnDone) -> Networks:
    """Shard `number`: a network for each of the images `image`, [B]."""
    height, width, _ = images.shape
    pixels = images.take(image)
    start = _initial(recipe, _spec(recipe, images), number, len(image))
    targets = pixels.flatten(1, 2) - OUTPUT_OFFSET
    fitted = fit_sirens(start, pixel_grid(height, width), targets, recipe.descent, device, on_done)
    params, mse = fitted.params, fitted.mse
    if recipe.dtype == "float16":
        params = params.map(Tensor.half)
        mse = (render(params.map(Tensor.float), height, width) - pixels).square().flatten(1).mean(1)
    psnr = -10 * mse.clamp_min(1e-12).log10()
    diverged = int((~psnr.isfinite()).sum())
    if diverged:
        found = f"{diverged} of {len(psnr)} networks diverged"
        raise ValueError(f"lr: found {recipe.lr}, with which {found}; lower it")
    return Networks((params,), {"label": images.labels[image], "image": image, "psnr": psnr, "steps": fitted.steps})


def _spec(recipe: InrRecipe, images: Images) -> NetSpec:
    """The networks' architecture."""
    return NetSpec.mlp([2, *recipe.hidden, images.shape[-1]], "sine", recipe.w0)


def _initial(recipe: InrRecipe, spec: NetSpec, number: int, num_networks: int) -> NetParams:
    """The initial networks of shard `number`."""
    if recipe.init == "independent":
        return init_siren(spec, num_networks, seeded(recipe.seed, number), recipe.base_width)
    views = init_siren(spec, recipe.views, seeded(recipe.seed, 0), recipe.base_width)
    return views[(number * BLOCK + torch.arange(num_networks)) % recipe.views]


def _draw(folder: Path, spec: NetSpec, images: Images) -> None:
    """`fits.png`: originals above their fits for networks evenly spaced in the zoo, and the PSNR of all."""
    tensors = load_file(folder / "zoo.safetensors")  # memory-mapped
    psnr = tensors["column.psnr"]
    shown = torch.linspace(0, len(psnr) - 1, min(SHOWN, len(psnr))).long()
    originals = images.take(tensors["column.image"][shown])
    fits = render(params_from_tensors(spec, tensors)[shown].map(Tensor.float), *images.shape[:2])
    reconstructions(folder / "fits.png", originals.numpy(), fits.numpy(), psnr.numpy())
