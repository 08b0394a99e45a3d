"""Recipes: from images to a zoo of INRs, one small SIREN per image and view."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from scalegmn.data.zoo_format import Networks, params_from_tensors, params_to_tensors, split_by_group, write_zoo
from scalegmn.log import versions, write_atomic, write_json
from scalegmn.nets.siren import OUTPUT_OFFSET, init_siren, pixel_grid, render
from scalegmn.plot import reconstructions
from scalegmn.spec import NetParams, NetSpec
from scalegmn.zoos.fit import SirenFit

BLOCK = 512
"""Networks fitted at once. A block's result depends on the recipe and the block's number alone."""


@dataclass(frozen=True)
class InrRecipe:
    """Fit SIRENs to images, and store them as a zoo."""

    out: str = "data/digits_inr"
    """Folder of the zoo."""

    images: Literal["digits"] = "digits"
    """Image source. digits: scikit-learn's 1,797 grey images of 8x8 pixels, 10 classes."""

    num_images: int | None = None
    """Fit only the first so many images; null: all."""

    views: int = 8
    """Fits per image, each from its own initial weights."""

    width: int = 12
    """Neurons per hidden layer."""

    depth: int = 2
    """Hidden layers."""

    w0: float = 6.0
    """Frequency of the sines, sin(w0 (W x + b))."""

    steps: int = 200
    """Steps of AdamW per network."""

    lr: float = 1e-2
    """Learning rate at the start; falls to zero as a cosine."""

    weight_decay: float = 0.0
    """Decoupled weight decay."""

    init: Literal["independent", "shared"] = "independent"
    """independent: every network has its own initial weights; shared: all images of one view start from the same."""

    val_fraction: float = 0.1
    """Share of the images whose networks are for validation."""

    test_fraction: float = 0.2
    """Share of the images whose networks are for testing."""

    seed: int = 0
    """Seed of initial weights and split."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: found {getattr(self, name)}, expected at least 1"
            for name in ("views", "width", "depth", "steps", "num_images")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        problems += [
            f"{name}: found {getattr(self, name)}, expected above 0"
            for name in ("w0", "lr")
            if not getattr(self, name) > 0
        ]
        problems += [
            f"{name}: found {getattr(self, name)}, expected 0 or more"
            for name in ("weight_decay", "seed")
            if not getattr(self, name) >= 0
        ]
        fractions = (self.val_fraction, self.test_fraction)
        if min(fractions) <= 0 or sum(fractions) >= 1:
            problems.append(f"val_fraction, test_fraction: found {fractions}, expected positive with a sum below 1")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Images:
    """Images to fit.

    Attributes:
        pixels: [n, height, width, channels] in [0, 1].
        labels: [n] classes.
        source: what they are, for the zoo's provenance.
    """

    pixels: Tensor
    labels: Tensor
    source: str

    def first(self, num_images: int | None) -> Images:
        """The first so many images; None: all."""
        return Images(self.pixels[:num_images], self.labels[:num_images], self.source)


def load_digits_images() -> Images:
    """scikit-learn's handwritten digits: 1,797 x 8 x 8, grey."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images / 16).float()[..., None]
    return Images(pixels, torch.from_numpy(digits.target).long(), "scikit-learn digits")


IMAGE_SOURCES: dict[str, Callable[[], Images]] = {"digits": load_digits_images}


def make_zoo(recipe: InrRecipe) -> Path:
    """Fits the zoo of a recipe and writes it; finished blocks of an interrupted run are kept.

    Returns:
        The zoo's folder; an existing zoo of the same recipe is left as it is.

    Raises:
        ValueError: the folder holds something else.
    """
    out = Path(recipe.out)
    unfinished = out.with_name(out.name + ".partial")
    plan = {key: value for key, value in asdict(recipe).items() if key != "out"} | {"block": BLOCK}
    if out.exists():
        _expect_recipe(out / "zoo.json", plan, lambda content: content["provenance"]["recipe"])
        shutil.rmtree(unfinished, ignore_errors=True)  # left over when the last moment was interrupted
        print(f"{out}: this zoo is there already")
        return out
    images = IMAGE_SOURCES[recipe.images]()
    if recipe.num_images is not None and recipe.num_images > len(images.pixels):
        raise ValueError(f"num_images: found {recipe.num_images}, expected at most {len(images.pixels)}")
    images = images.first(recipe.num_images)
    image = torch.arange(len(images.pixels)).repeat_interleave(recipe.views)
    splits = split_by_group(image, {"val": recipe.val_fraction, "test": recipe.test_fraction}, recipe.seed)
    empty = [name for name, rows in splits.items() if not len(rows)]
    if empty:
        raise ValueError(f"num_images: {len(images.pixels)} images leave none for {', '.join(empty)}; use more")
    if unfinished.exists():
        _expect_recipe(unfinished / "recipe.json", plan, lambda content: content)
    unfinished.mkdir(parents=True, exist_ok=True)
    write_json(unfinished / "recipe.json", plan)

    params, mse = _fit(recipe, images, image, unfinished)
    failed = int((~params.flatten().isfinite().all(1)).sum())
    if failed:
        shutil.rmtree(unfinished)
        raise ValueError(f"lr: found {recipe.lr}, with which {failed} of {len(params)} networks diverged; lower it")
    psnr = -10 * mse.log10()
    columns = {"label": images.labels[image], "image": image, "psnr": psnr}
    provenance = {
        "recipe": plan,
        "images": images.source,
        "image_shape": list(images.pixels.shape[1:]),
        "versions": versions(),
    }
    shown = torch.linspace(0, len(params) - 1, min(12, len(params))).long()
    originals = images.pixels[image[shown]]
    fits = render(params[shown], *originals.shape[1:3])

    def draw(folder: Path) -> None:
        reconstructions(folder / "fits.png", originals.numpy(), fits.numpy(), psnr.numpy())

    write_zoo(out, [Networks((params,), columns)], splits, provenance, draw)
    shutil.rmtree(unfinished)
    low, median = np.percentile(psnr.numpy(), [5, 50])
    print(f"{out}: {len(params):,} networks {params.spec}, PSNR median {median:.1f} dB, 5th percentile {low:.1f} dB")
    return out


def _fit(recipe: InrRecipe, images: Images, image: Tensor, folder: Path) -> tuple[NetParams, Tensor]:
    """Fits network k to image `image[k]`, block by block; each block is kept in `folder` as it finishes.

    Returns:
        The networks, and the mean squared error of each.
    """
    height, width, channels = images.pixels.shape[1:]
    spec = NetSpec.mlp([2, *[recipe.width] * recipe.depth, channels], "sine", recipe.w0)
    points = pixel_grid(height, width)
    blocks = []
    bar = tqdm(total=len(image) * recipe.steps, unit=" net-steps", unit_scale=True, desc="fitting", disable=None)
    with bar:
        for number, rows in enumerate(image.split(BLOCK)):
            file = folder / f"block-{number:05d}.safetensors"
            if file.exists():
                bar.update(len(rows) * recipe.steps)
            else:
                targets = images.pixels[rows].flatten(1, 2) - OUTPUT_OFFSET
                fit = SirenFit(_initial(recipe, spec, number, len(rows)), points, targets)
                params, mse = fit.run(recipe.steps, recipe.lr, recipe.weight_decay, partial(bar.update, len(rows)))
                write_atomic(file, save({**params_to_tensors(params), "mse": mse}))
            blocks.append(load_file(file))
    joined = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    return params_from_tensors(spec, joined), joined["mse"]


def _initial(recipe: InrRecipe, spec: NetSpec, block: int, num_networks: int) -> NetParams:
    """The initial networks of a block."""
    if recipe.init == "independent":
        return init_siren(spec, num_networks, _generator(recipe.seed, block))
    views = init_siren(spec, recipe.views, _generator(recipe.seed, 0))
    return views[(block * BLOCK + torch.arange(num_networks)) % recipe.views]


def _generator(seed: int, block: int) -> torch.Generator:
    """A generator whose stream differs for every pair of seed and block."""
    words = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


def _expect_recipe(path: Path, plan: dict[str, Any], read: Callable[[Any], Any]) -> None:
    """Raises ValueError unless the JSON file at `path` records this recipe."""
    try:
        found = read(json.loads(path.read_text()))
        different = [key for key in plan if found.get(key) != plan[key]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path.parent}: exists and is not a zoo of this recipe; choose another --out") from None
    if different:
        raise ValueError(
            f"{path.parent}: made by another recipe ({', '.join(f'{key} {found.get(key)}' for key in different)}); "
            "choose another --out or delete it"
        )
