"""Low-rank adapters (LoRA, Hu et al., 2022, https://arxiv.org/abs/2106.09685) in state dicts, as peft writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.reporting.files import natural_order

_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
"""Names of factors: `q_proj.lora_A.weight` in files, `q_proj.lora_A.default.weight` in state dicts of modules."""


def adapter_factors(state: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, tuple[str, str]]:
    """Changed layer -> the entries of A and B; empty if the state dict is none of an adapter alone.

    Args:
        state: entry -> value.
        names: the changed layers that are read, in this order; None: all, in their natural order.

    Raises:
        ValueError: a factor is missing or no matrix, or a name is unknown.
    """
    if any(re.search(r"(^|\.)base_layer\.", str(key)) for key in state):
        return {}
    factors: dict[str, dict[str, str]] = {}
    for key, value in state.items():
        match = _FACTOR.fullmatch(str(key))
        if match is None or not isinstance(value, Tensor):
            continue
        entries = factors.setdefault(match[1], {})
        if match[2] in entries:
            raise ValueError(f"{key}: a second adapter of {match[1]} beside {entries[match[2]]}; save one alone")
        entries[match[2]] = str(key)
    for name, entries in factors.items():
        shapes = {part: list(state[key].shape) for part, key in entries.items()}
        if {*entries} != {"A", "B"} or any(len(shape) != 2 for shape in shapes.values()):
            raise ValueError(f"{name}: found low-rank factors {shapes}, expected matrices A [r, in] and B [out, r]")
        if shapes["A"][0] != shapes["B"][1]:
            raise ValueError(f"{name}: A has rank {shapes['A'][0]}, but B has {shapes['B'][1]}")
    unknown = [name for name in names or () if name not in factors]
    if factors and unknown:
        raise ValueError(f"layers: found {', '.join(unknown)}, expected some of {', '.join(factors)}")
    ordered = sorted(factors, key=natural_order) if names is None else names
    return {name: (factors[name]["A"], factors[name]["B"]) for name in ordered if factors}


def adapter_spec(shapes: Iterable[tuple[int, int, int]]) -> NetSpec:
    """The network of an adapter of several layers: for each, a product W = B A without biases.

    What A reads is computed by the network that is adapted (`LayerSpec.opaque`), and B's neurons are this network's
    (`LayerSpec.pinned`), so that the neurons between the two are the only ones that are free.

    Args:
        shapes: in, r and out of each changed layer.
    """
    layers: list[LayerSpec] = []
    for in_dim, rank, out_dim in shapes:
        inside = bool(layers)
        layers += [
            LayerSpec(in_dim, rank, bias=False, constant=inside, opaque=inside),
            LayerSpec(rank, out_dim, bias=False, pinned=True),
        ]
    last = layers.pop()
    return NetSpec((*layers, LayerSpec(last.in_dim, last.out_dim, bias=False)))
