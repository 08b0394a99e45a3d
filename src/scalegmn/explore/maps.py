"""Places of networks on a map, from their features."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

MAPS = ("pca", "umap")
"""Principal components; UMAP (McInnes et al., 2018, https://arxiv.org/abs/1802.03426), an extra."""

FARTHEST = 3.0
"""Deviations from the mean, beyond which the map does not tell networks apart."""

NEIGHBOURS = 15
"""Of each network in UMAP; so many networks have their principal components instead."""


def require_map(kind: str) -> None:
    """Raises ValueError if a map is unknown, or needs a package that is not there."""
    if kind not in MAPS:
        raise ValueError(f"--map: found {kind}, expected one of {', '.join(MAPS)}")
    if kind == "umap" and find_spec("umap") is None:
        raise ValueError("--map umap: umap-learn is not installed; `pip install 'scalegmn[explore]'`, or --map pca")


def places(features: Tensor, kind: str = "pca") -> tuple[Tensor, Tensor, str]:
    """x and y of networks with these features [networks, D], [networks] each, and what they are, in words.

    Args:
        features: of each network.
        kind: one of `MAPS`.

    Raises:
        ValueError: see `require_map`.
    """
    require_map(kind)
    if kind == "umap" and len(features) > NEIGHBOURS:
        return *umap(features), "UMAP"
    return *principal_components(features), "principal components"


def standardised(features: Tensor) -> Tensor:
    """Features [networks, D] with mean 0 and deviation 1, and none beyond `FARTHEST`; those that are the same for all
    networks are left out."""
    x = features.double().nan_to_num(0, 0, 0)
    x = x - x.mean(0)
    spread = x.square().mean(0).sqrt()
    x = (x[:, spread > 1e-9] / spread[spread > 1e-9]).clamp(-FARTHEST, FARTHEST)
    return x - x.mean(0)


def principal_components(features: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of standardised features [networks, D], [networks] each, with the signs that
    make the largest loading positive."""
    x = standardised(features)
    components = torch.zeros(2, len(features), dtype=torch.float64)
    if x.numel():
        _, vectors = torch.linalg.eigh(x.mT @ x)
        for number in range(min(2, x.shape[1])):
            loading = vectors[:, -1 - number]
            sign = loading[loading.abs().argmax()].sign()
            components[number] = x @ loading * sign
    return components[0], components[1]


def umap(features: Tensor) -> tuple[Tensor, Tensor]:
    """UMAP of standardised features [networks, D], the same on every call; more networks than `NEIGHBOURS`."""
    import warnings

    from umap import UMAP

    x = standardised(features)
    if not x.shape[1]:
        return torch.zeros(len(x)), torch.zeros(len(x))
    reducer = UMAP(n_neighbors=NEIGHBOURS, random_state=0, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about points that fall together
        x, y = torch.from_numpy(reducer.fit_transform(x.numpy())).double().nan_to_num(0).mT
    return x, y
