"""The published INRs of Fashion-MNIST."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalegmn.zoos.convert import Listing, NothingThereError, checksum
from scalegmn.zoos.images import CLASSES
from scalegmn.zoos.published.inrs import InrDataset, InrFile, SirenOptions, inr_listing, read_splits
from scalegmn.zoos.registry import register_dataset

if TYPE_CHECKING:
    from scalegmn.zoos.loader import DataConfig


class FashionMnistInrs(InrDataset):
    """`{train,val,test}/model_<n>.pth`, each with its own `label`; splits in `splits.json`."""

    settings = ("split_path",)

    def choice(self, config: DataConfig) -> dict[str, Any]:
        """The splits, and how networks are evaluated."""
        return {"splits": checksum(config.file(config.split_path, "splits.json")), **super().choice(config)}

    def listing(self, config: DataConfig) -> Listing:
        """The networks that the splits name."""
        return fmnist_listing(config.root, config.file(config.split_path, "splits.json"), self.options_of(config))


register_dataset(FashionMnistInrs("labeled_fashion_mnist_inr", "a SIREN per Fashion-MNIST image"))


def fmnist_listing(root: Path, splits: Path, options: SirenOptions) -> Listing:
    """The Fashion-MNIST INRs: `{train,val,test}/model_<n>.pth`, each with its own `label`.

    Args:
        root: the dataset's folder.
        splits: JSON, split -> paths, or split -> {"path": paths}; the last two parts of a path count.
        options: how networks are evaluated.
    """
    files: list[InrFile] = []
    if not any((root / part).is_dir() for part in ("train", "val", "test")):
        raise NothingThereError(f"{root}: no folders train, val, test; set --data.dataset_path")
    for split, entries in read_splits(splits).items():
        for path in entries["path"]:
            files.append(InrFile(root.joinpath(*re.split(r"[\\/]", path)[-2:]), split, None, None))
    provenance = {"images": "fashion_mnist", "image_shape": [28, 28, 1], "classes": list(CLASSES["fashion_mnist"])}
    return inr_listing(files, [], splits, provenance, options)
