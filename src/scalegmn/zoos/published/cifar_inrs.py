"""The published INRs of CIFAR-10 (Zhou et al., NeurIPS 2023, https://arxiv.org/abs/2302.14040)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalegmn.zoos.convert import Listing, NothingThereError
from scalegmn.zoos.images import CLASSES
from scalegmn.zoos.published.inrs import InrDataset, InrFile, SirenOptions, inr_listing
from scalegmn.zoos.registry import register_dataset

if TYPE_CHECKING:
    from scalegmn.zoos.loader import DataConfig

_FOLDER = re.compile(r"randinit_smaller(?:_aug(\d+))?_(.+)s")


class CifarInrs(InrDataset):
    """`randinit_smaller_<label>s/net<image>.pth`, split by the numbers of images; options `data.split_points` and
    `data.extra_aug`."""

    settings = ("split_points", "extra_aug")

    def problems(self, config: DataConfig) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        problems = super().problems(config)
        if config.extra_aug < 0:
            problems.append(f"data.extra_aug: found {config.extra_aug}, expected 0 or more")
        if not 0 < config.split_points[0] < config.split_points[1]:
            problems.append(f"data.split_points: found {config.split_points}, expected two ascending numbers above 0")
        return problems

    def choice(self, config: DataConfig) -> dict[str, Any]:
        """The splits, how many more fits of each training image, and how networks are evaluated."""
        return {"split_points": list(config.split_points), "extra_aug": config.extra_aug, **super().choice(config)}

    def listing(self, config: DataConfig) -> Listing:
        """The networks in the folders of classes."""
        return cifar_listing(config.root, config.split_points, config.extra_aug, self.options_of(config))


register_dataset(CifarInrs("cifar_inr", "a SIREN, or several, per CIFAR-10 image"))


def cifar_listing(root: Path, split_points: Sequence[int], extra_aug: int, options: SirenOptions) -> Listing:
    """The networks in `randinit_smaller_<label>s/net<image>.pth`.

    Args:
        root: the dataset's folder.
        split_points: images below the first train, those below the second validate, the others test.
        extra_aug: use so many more fits of each training image, `randinit_smaller_aug<k>_<label>s`, k < extra_aug.
        options: how networks are evaluated.
    """
    if not root.is_dir():
        raise NothingThereError(f"{root}: no such folder; set --data.dataset_path")
    files, augmentations = [], set()
    for folder in sorted(root.iterdir()):
        match = _FOLDER.fullmatch(folder.name)
        if not match or (match[1] and int(match[1]) >= extra_aug):
            continue
        augmentations |= {int(match[1])} if match[1] else set()
        for entry in os.scandir(folder):
            number = re.fullmatch(r"net(\d+)\.pth", entry.name)
            if not number:
                continue
            image = int(number[1])
            split = "train" if image < split_points[0] else "val" if image < split_points[1] else "test"
            if not match[1] or split == "train":
                files.append(InrFile(folder / entry.name, split, match[2], image))
    missing = sorted(set(range(extra_aug)) - augmentations)
    if files and missing:
        raise ValueError(
            f"data.extra_aug: found {extra_aug}, but {root} has no randinit_smaller_aug{missing[0]}_<label>s; "
            f"download them or use --data.extra_aug {missing[0]}"
        )
    files.sort(key=lambda file: (file.image or 0, file.path.as_posix()))
    provenance = {"images": "cifar10", "image_shape": [32, 32, 3], "classes": list(CLASSES["cifar10"])}
    return inr_listing(files, [], root, provenance, options)
