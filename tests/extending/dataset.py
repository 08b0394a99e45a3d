"""A dataset of one's own: MLPs in an .npz file, one array per layer and kind.

scalegmn train classification --import tests/extending/dataset.py --data.dataset npz_mlps --data.dataset_path FOLDER \
    --data.dataset_args '{"file": "mlps.npz"}'
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalegmn.networks import NetParams
from scalegmn.zoos.convert import Listing, NothingThereError
from scalegmn.zoos.registry import ConvertedDataset, register_dataset
from scalegmn.zoos.zoo_format import Networks


@dataclass(frozen=True)
class Options:
    """Options of the dataset."""

    file: str = "networks.npz"
    """The file in `data.dataset_path`."""


class NpzMlps(ConvertedDataset):
    """`weight<l>` [n, out, in] and `bias<l>` [n, out] of each layer, `label` [n], and `train`, `val`, `test`: rows."""

    options = Options

    def listing(self, config: Any) -> Listing:
        path = config.root / self.options_of(config).file
        if not path.is_file():
            raise NothingThereError(f"{path}: no such file; set --data.dataset_path")
        arrays = np.load(path, allow_pickle=False)
        splits = {name: torch.from_numpy(arrays[name]) for name in ("train", "val", "test")}
        return Listing([path], len(arrays["label"]), partial(read, path, arrays), splits, {})


def read(path: Path, arrays: Mapping[str, np.ndarray], rows: slice) -> Networks:
    """Some of the networks."""
    num_layers = sum(name.startswith("weight") for name in arrays)
    layers = [[torch.from_numpy(arrays[f"{kind}{layer}"][rows]) for layer in range(num_layers)] for kind in KINDS]
    return Networks((NetParams.from_tensors(*layers, "tanh"),), {"label": torch.from_numpy(arrays["label"][rows])})


KINDS = ("weight", "bias")
register_dataset(NpzMlps("npz_mlps", "MLPs in an .npz file"))
