"""Datasets in layouts that others have published, one file per layout; each registers itself."""

from scalegmn.zoos.published import cifar_inrs, cnns, fmnist_inrs, mnist_inrs, wild_park
from scalegmn.zoos.registry import DATASETS

__all__ = ["DATASETS", "cifar_inrs", "cnns", "fmnist_inrs", "mnist_inrs", "wild_park"]
