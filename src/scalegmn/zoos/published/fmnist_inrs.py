"""The published INRs of Fashion-MNIST."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalegmn.zoos.convert import Listing, NothingThereError, checksum
from scalegmn.zoos.published.inrs import InrFile, inr_listing, read_splits
from scalegmn.zoos.registry import ConvertedDataset, register_dataset

if TYPE_CHECKING:
    from scalegmn.zoos.loader import DataConfig


class FashionMnistInrs(ConvertedDataset):
    """`{train,val,test}/model_<n>.pth`, each with its own `label`; splits in `splits.json`."""

    def choice(self, config: DataConfig) -> dict[str, Any]:
        """The splits."""
        return {"splits": checksum(config.file(config.split_path, "splits.json"))}

    def listing(self, config: DataConfig) -> Listing:
        """The networks that the splits name."""
        return fmnist_listing(config.root, config.file(config.split_path, "splits.json"))


register_dataset(FashionMnistInrs("labeled_fashion_mnist_inr", "a SIREN per Fashion-MNIST image"))


def fmnist_listing(root: Path, splits: Path) -> Listing:
    """The Fashion-MNIST INRs: `{train,val,test}/model_<n>.pth`, each with its own `label`.

    Args:
        root: the dataset's folder.
        splits: JSON, split -> paths, or split -> {"path": paths}; the last two parts of a path count.
    """
    files: list[InrFile] = []
    if not any((root / part).is_dir() for part in ("train", "val", "test")):
        raise NothingThereError(f"{root}: no folders train, val, test; set --data.dataset_path")
    for split, entries in read_splits(splits).items():
        for path in entries["path"]:
            files.append(InrFile(root.joinpath(*re.split(r"[\\/]", path)[-2:]), split, None, None))
    return inr_listing(files, [], splits, {"images": "fashion_mnist", "image_shape": [28, 28, 1]})
