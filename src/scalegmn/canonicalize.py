"""`python -m scalegmn.canonicalize --conf ...`: write a canonical copy of a zoo.

The copy is a zoo like any other, read with `--data.dataset_path`; its provenance names the zoo that it was made from
and the symmetries that were removed. Reading it gives the same numbers as removing them on the fly from the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalegmn.cli import parse
from scalegmn.config import Config
from scalegmn.data.zoo_format import Zoo, open_zoo, write_zoo
from scalegmn.log import user_errors, versions
from scalegmn.official import translate_file
from scalegmn.spec import NetParams
from scalegmn.symmetry.canonicalize import canonicalize

BLOCK = 4096
"""Networks at once: intermediate results don't grow with the zoo."""


@dataclass(frozen=True)
class CanonicalizeConfig(Config):
    """Write a canonical copy of a configuration's zoo, without the symmetries in data.canonicalize."""

    out: str | None = None
    """Folder of the copy; null: that of the zoo, with `_canon` appended."""


def canonical_copy(params: NetParams, names: tuple[str, ...]) -> tuple[NetParams, int]:
    """All networks without the named symmetries, and how many of them changed."""
    copy, num_changed = params.map(torch.empty_like), 0
    for start in range(0, len(params), BLOCK):
        rows = slice(start, start + BLOCK)
        stored = params[rows]
        canonical = canonicalize(stored, names)
        num_changed += int((canonical.flatten() != stored.flatten()).any(1).sum())
        for target, found in zip((*copy.weights, *copy.biases), (*canonical.weights, *canonical.biases), strict=True):
            target[rows] = found
    return copy, num_changed


def provenance_of_copy(zoo: Zoo, names: tuple[str, ...]) -> dict[str, Any]:
    """What the zoo says of itself and where the copy comes from; the recipe, which makes other weights, in `source`."""
    rest = {key: value for key, value in zoo.provenance.items() if key != "recipe"}
    return rest | {
        "canonical": [*zoo.canonical, *names],
        "source": {"path": str(zoo.path), "sha256": zoo.sha256, "provenance": zoo.provenance},
        "versions": versions(),
    }


def is_copy(path: Path, provenance: dict[str, Any]) -> bool:
    """Whether the folder holds a zoo of the same source and without the same symmetries."""
    try:
        found = open_zoo(path).provenance
        same_source = found["source"]["sha256"] == provenance["source"]["sha256"]
        return same_source and found["canonical"] == provenance["canonical"]
    except (ValueError, KeyError):
        return False


def main() -> None:
    """Reads a configuration, writes the canonical copy of its zoo."""
    with user_errors():
        config = parse(CanonicalizeConfig, prog="python -m scalegmn.canonicalize", translate=translate_file)
        zoo = open_zoo(Path(config.data.dataset_path))
        out = zoo.path.with_name(zoo.path.name + "_canon") if config.out is None else Path(config.out)
        names = tuple(name for name in config.data.canonicalize if name not in zoo.canonical)
        if not names:
            already = f", which has removed {', '.join(zoo.canonical)} already" if zoo.canonical else ""
            raise ValueError(f"data.canonicalize: nothing to remove from {zoo.path}{already}")
        provenance = provenance_of_copy(zoo, names)
        what = f"canonical ({', '.join(provenance['canonical'])}) copy of {zoo.path}"
        if out.exists():
            if not is_copy(out, provenance):
                raise ValueError(f"{out}: exists and is not the {what}; choose another --out or delete it")
            print(f"{out}: the {what} is there already")
            return
        params, num_changed = canonical_copy(zoo.params, names)
        write_zoo(out, params, zoo.columns, zoo.splits, provenance)
    print(f"{out}: {what}, {num_changed:,} of {len(params):,} networks changed")


if __name__ == "__main__":
    main()
