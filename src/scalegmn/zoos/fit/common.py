"""What all recipes have in common: where images come from, and which process makes which part of the zoo."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scalegmn.zoos.images import Images, load_images
from scalegmn.zoos.pictures import is_colour
from scalegmn.zoos.shards import Shards
from scalegmn.zoos.zoo_format import Networks

OnDone = Callable[[int], object]
"""Called with the number of networks that have become ready."""


@dataclass(frozen=True)
class Recipe:
    """From images to a zoo of networks."""

    out: str = "data/zoo"
    """Folder of the zoo."""

    images: Literal["digits", "mnist", "fashion_mnist", "cifar10", "folder"] = "digits"
    """Image source. digits: scikit-learn's 1,797 grey images of 8x8 pixels; mnist, fashion_mnist: the four IDX files;
    cifar10: the published batches, or pictures; folder: pictures of one size, <class>/<picture>. See data/README.md."""

    images_path: str | None = None
    """Where the images' files are: a folder, for cifar10 and folder also a tar archive; digits needs none."""

    background: str = "white"
    """The colour behind transparent pixels of pictures, such as black or #ff8000; grey pictures get its brightness."""

    num_images: int | None = None
    """Use only so many images, evenly spaced in their order; null: all."""

    seed: int = 0
    """Seed of everything random: initial weights, split, ..."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks are fitted; auto: on a GPU when there is one."""

    shard: str | None = None
    """i/n: fit only the i-th of n parts, i from 0; the last to finish merges them. null: all, or this process's part
    under torchrun and srun. The zoo is the same whatever n is."""

    def common_problems(self, at_least_1: Collection[str] = (), not_negative: Collection[str] = ()) -> list[str]:
        """One sentence per field that is out of range: fields of every recipe, and the named ones."""
        problems = []
        for least, names in ((1, ("num_images", *at_least_1)), (0, ("seed", *not_negative))):
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= least:
                    problems.append(f"{name}: found {value}, expected {'at least 1' if least else '0 or more'}")
        if not is_colour(self.background):
            problems.append(f"background: found {self.background}, expected a colour such as white, black or #ff8000")
        if self.shard is not None and not _is_part(self.shard):
            problems.append(f"shard: found {self.shard}, expected i/n with i from 0 to n - 1, such as 0/4")
        return problems

    @property
    def part(self) -> tuple[int, int]:
        """Which part of how many this process fits."""
        if self.shard is not None:
            part, num_parts = self.shard.split("/")
        elif "RANK" in os.environ:
            part, num_parts = os.environ["RANK"], os.environ["WORLD_SIZE"]
        else:
            part, num_parts = os.environ.get("SLURM_PROCID", "0"), os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        return int(part), int(num_parts)

    def plan(self) -> dict[str, Any]:
        """The settings that determine the zoo, in plain types: all but where it is made and those that determine the
        images, whose checksum counts."""
        elsewhere = ("out", "images_path", "background", "device", "shard")
        return {key: value for key, value in asdict(self).items() if key not in elsewhere}

    def load_images(self) -> Images:
        """The images; says on stderr what was recognised and what was passed over."""
        images = load_images(self.images, Path(self.images_path) if self.images_path else None, self.background)
        for note in images.notes:
            print(f"note: {note}", file=sys.stderr)
        return images

    def image_provenance(self, images: Images) -> dict[str, Any]:
        """What a zoo remembers of its images."""
        background = {} if self.background == "white" else {"background": self.background}
        source = {"images": self.images, "image_source": images.source, "image_shape": list(images.shape)}
        return {**source, **background}


def _is_part(text: str) -> bool:
    """Whether text is i/n with i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    return match is not None and int(match[1]) < int(match[2])


def fit_shards(
    recipe: Recipe, shards: Shards, sizes: Sequence[int], fit: Callable[[int, OnDone], Networks], word: str
) -> bool:
    """Fits the missing shards of this process's part, one by one.

    Args:
        recipe: which part this is.
        shards: where they are kept.
        sizes: the number of networks in each shard.
        fit: a shard's number -> its networks; when it raises ValueError, all shards are discarded.
        word: the label of the progress bar.

    Returns:
        Whether all shards are there; if not, prints which parts have to make the others.
    """
    part, num_parts = recipe.part
    numbers = [number for number in shards.missing() if number % num_parts == part]
    with tqdm(total=sum(sizes[number] for number in numbers), unit=" networks", desc=word, disable=None) as bar:
        for number in numbers:
            if number not in shards.missing():  # another process has fitted it meanwhile
                continue
            try:
                networks = fit(number, bar.update)
            except ValueError:
                shards.discard()
                raise
            if not shards.finished:  # by another process, meanwhile
                shards.write(number, *networks.nets, **networks.columns)
    missing = shards.missing()
    if missing:
        parts = sorted({number % num_parts for number in missing})
        words = f"{len(missing)} of {len(sizes)} shards are still to come, from part {', '.join(map(str, parts))}"
        print(f"{shards.out}: part {part}/{num_parts} is done; {words}")
    return not missing


def choose_device(name: str) -> str:
    """`cpu`, or a GPU; under torchrun and srun, each process has its own."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found cuda, but torch sees no GPU; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return "cpu"
    place = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID", "0")
    return f"cuda:{int(place) % torch.cuda.device_count()}"


def choose_images(images: Images, num_images: int | None) -> Tensor:
    """The identities of `num_images` images, evenly spaced, so that classes and test set have their shares."""
    if num_images is None:
        return torch.arange(len(images))
    if num_images > len(images):
        raise ValueError(f"num_images: found {num_images}, expected at most {len(images)}")
    return torch.arange(num_images) * len(images) // num_images


def seeded(*words: int) -> torch.Generator:
    """A generator whose stream differs for every tuple of numbers, such as a seed and a shard."""
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))
