"""The datasets by name: what `data.dataset_path` may hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from scalegmn.registry import Registry
from scalegmn.zoos.convert import Listing, converted
from scalegmn.zoos.zoo_format import Zoo, is_zoo, open_zoo

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from scalegmn.zoos.loader import DataConfig


FILE_SETTINGS = ("data_path", "metrics_path", "layout_path", "idcs_file")
"""The settings of `data` that name a file of one layout; a zoo in place of this layout holds all of it."""

LAYOUT_SETTINGS = ("split_path", "split_points", "extra_aug", *FILE_SETTINGS)
"""The settings of `data` that only some layouts have a use for."""


class Dataset(ABC):
    """What a folder may hold.

    Args:
        name: what configurations call it (`data.dataset`).
        description: what it is, in one line, for `--help`.
    """

    options: ClassVar[type[DataclassInstance] | None] = None
    """A dataclass of the dataset's own options, all with defaults: the mapping `data.dataset_args`."""

    settings: ClassVar[Collection[str]] = LAYOUT_SETTINGS
    """Those of `LAYOUT_SETTINGS` that may be set; the others are refused."""

    def __init__(self, name: str, description: str) -> None:
        self.name, self.description = name, description

    @abstractmethod
    def open(self, config: DataConfig) -> Zoo:
        """The dataset as a zoo.

        Raises:
            ValueError: a file is missing, refused or damaged.
        """

    def problems(self, config: DataConfig) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        known = [] if self.options is None else [item.name for item in fields(self.options)]
        expected = f"expected some of {', '.join(known)}" if known else f"but {self.name} has no options"
        problems = [f"data.dataset_args: found {key}, {expected}" for key in config.dataset_args if key not in known]
        return problems + unread_settings(config, self.settings, f"data.dataset {self.name}")

    def options_of(self, config: DataConfig) -> Any:
        """The dataset's own options, an instance of `options`; None if it has none."""
        return None if self.options is None else self.options(**config.dataset_args)


def unread_settings(config: DataConfig, allowed: Collection[str], what: str) -> list[str]:
    """A sentence for each of `LAYOUT_SETTINGS` that is set and may not be.

    Args:
        config: the settings.
        allowed: those that may be set.
        what: what does not read the others.
    """
    problems = []
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name in LAYOUT_SETTINGS and item.name not in allowed and value != item.default:
            default = "null" if item.default is None else item.default
            key = f"data.{item.name}"
            problems.append(f"{key}: found {value}, but {what} does not read it; leave it out (--{key} {default})")
    return problems


class ConvertedDataset(Dataset):
    """Networks in another layout, which become a zoo when they are first read.

    A dataset of one's own derives from this class and defines `listing`; `register_dataset` makes an instance usable by
    its name.
    """

    @property
    def zoo_name(self) -> str:
        """The name in the folder of the converted zoo; datasets with one name share converted zoos."""
        return self.name

    @abstractmethod
    def listing(self, config: DataConfig) -> Listing:
        """The networks of the dataset, and their splits. It reads names only; `Listing.read` reads networks.

        Raises:
            NothingThereError: there is no network at all.
            ValueError: a file is missing or not what it should be.
        """

    def choice(self, config: DataConfig) -> Mapping[str, Any]:
        """All settings that decide which networks the zoo holds and in which splits, in plain JSON types. There is a
        converted zoo for each choice."""
        options = self.options_of(config)
        return {} if options is None else asdict(options)

    def open(self, config: DataConfig) -> Zoo:
        """The dataset as a zoo; converts it unless that has been done."""
        cache_dir = None if config.cache_dir is None else Path(config.cache_dir).expanduser()
        listing = partial(self.listing, config)
        return converted(self.zoo_name, config.root, self.choice(config), listing, cache_dir, config.convert)


class ZooFolder(Dataset):
    """A zoo in the format of this package, which has its own splits."""

    settings = FILE_SETTINGS

    def open(self, config: DataConfig) -> Zoo:
        """The zoo.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = config.root
        if not is_zoo(path):
            raise ValueError(
                f"{path}: no zoo there (zoo.json missing); set --data.dataset_path to one, or make one: "
                f"of INRs with `scalegmn zoo inr --conf zoos/digits_inr.yml --out {path}`, of CNNs with `scalegmn zoo "
                f"cnn --conf zoos/digits_cnn.yml --out {path}`, of your own networks with `scalegmn zoo import`"
            )
        return open_zoo(path)


DATASETS: Registry[Dataset] = Registry("data.dataset")
"""Name -> dataset."""


def register_dataset(dataset: Dataset) -> Dataset:
    """Makes a dataset usable by its name, and returns it; raises ValueError when another dataset has this name."""
    return DATASETS.register(dataset.name, dataset)


register_dataset(ZooFolder("zoo", "a zoo in the format of this package"))
