"""Whether layers as they were read compute what the module computes, and whether the module keeps their symmetries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.torch_modules.execution import LARGE
from scalegmn.interop.torch_modules.layers import ReadLayer
from scalegmn.interop.torch_modules.parameters import read_parameters, written_tensors
from scalegmn.interop.torch_modules.trace import Trace
from scalegmn.networks import NetSpec
from scalegmn.symmetry.groups import GroupElement


def check_values(trace: Trace, actual: Tensor, claimed: Tensor) -> None:
    """Refuses a layer that, as it was read, gives other values than the module."""
    size = float(actual.abs().max()) if actual.numel() else 0.0
    difference = float((actual - claimed).abs().max()) if actual.numel() else 0.0
    tolerance = 1e-6 if actual.dtype == torch.float64 else 1e-3
    if not difference <= tolerance * size and bool(actual.isfinite().all()):
        share = f"{difference / size:.1g}" if size else "all"
        trace.refuse(f"the layer that was read gives other values than the module, by {share} of them")


def keeps_symmetry(
    layers: Sequence[ReadLayer],
    spec: NetSpec,
    routers: set[int],
    tensors: Mapping[str, Any],
    outputs: Tensor,
    run: Callable[[dict[str, Any]], Tensor],
) -> bool:
    """Whether random group elements leave what the module computes, but not the parts of all of them that move the
    gates of experts alone, or the experts alone. Arguments as of `broken_symmetry`."""
    drawn, change, tolerance = _moves(layers, spec, tensors, outputs, run)
    elements = list(drawn)
    gates = set().union(*(item.layers for item in spec.permutation_classes if routers & {*item.layers}))
    orders = {spec.block_order.get(index, -1) for index in routers}
    experts = {index for index, order in spec.block_order.items() if order in orders} - gates
    return (
        orders.isdisjoint({-1})
        and all(change(element) <= tolerance for element in elements)
        and all(
            any(change(_restricted(element, part)) > tolerance for element in elements) for part in (gates, experts)
        )
    )


def is_symmetric(
    layers: Sequence[ReadLayer],
    spec: NetSpec,
    tensors: Mapping[str, Any],
    run: Callable[[Mapping[str, Any]], Tensor],
    seed: int,
) -> bool:
    """Whether random group elements, drawn with a seed, leave what the module computes. Other arguments as of
    `broken_symmetry`."""
    elements, change, tolerance = _moves(layers, spec, tensors, run(tensors), run, seed)
    return all(change(element) <= tolerance for element in elements)


def broken_symmetry(
    layers: Sequence[ReadLayer],
    spec: NetSpec,
    tensors: Mapping[str, Any],
    outputs: Tensor,
    run: Callable[[dict[str, Any]], Tensor],
) -> tuple[set[int], str]:
    """Hidden layers that move together and change what the module computes, and what is wrong; empty if random group
    elements leave it.

    Two elements are tried in float64; for more than `LARGE` parameters one, in float32.

    Args:
        layers: the traced layers, in the order of the spec.
        spec: the architecture.
        tensors: parameters, buffers and constants by name.
        outputs: of the module with these.
        run: the module's operations, with other tensors.
    """
    elements, change, tolerance = _moves(layers, spec, tensors, outputs, run)
    for element in elements:
        if not change(element) <= tolerance:
            for part in _parts(spec):
                moved = _restricted(element, part)
                if not (size := change(moved)) <= tolerance:
                    break
            else:
                part, size = set(range(spec.num_layers - 1)), change(element)
            return part, (
                f"{layers[min(part)].place}: neurons of this layer do not have the symmetries of a layer of its kind: "
                f"moving them changes the output by {size:.1g} of its spread, because the module uses them in a way "
                "that is not known; please report it"
            )
    return set(), ""


def _moves(
    layers: Sequence[ReadLayer],
    spec: NetSpec,
    tensors: Mapping[str, Any],
    outputs: Tensor,
    run: Callable[[dict[str, Any]], Tensor],
    seed: int = 0,
) -> tuple[Iterator[GroupElement], Callable[[GroupElement], float], float]:
    """Random group elements, by how much one changes the outputs, and what change is none."""
    params = read_parameters(tensors, layers, spec, is_copied=False)
    generator = torch.Generator().manual_seed(seed)
    elements = (
        GroupElement.sample(params, generator, decades=0.3) for _ in range(1 if spec.num_parameters > LARGE else 2)
    )

    def change(element: GroupElement) -> float:
        return _change(run(written_tensors(element.act(params), tensors, layers, spec)), outputs)

    return elements, change, 1e-6 if outputs.dtype == torch.float64 else 1e-2


def _change(moved: Tensor, outputs: Tensor) -> float:
    """The largest change relative to the spread of the outputs; the same NaN or infinity on both sides is no change."""
    same = (moved == outputs) | (moved.isnan() & outputs.isnan())
    finite = outputs[outputs.isfinite()]
    spread = float(finite.std(correction=0)) if finite.numel() > 1 else 0.0
    spread = max(spread, 1e-6 * float(finite.abs().max()) if finite.numel() else 0.0, 1e-30)
    return float(torch.where(same, 0, (moved - outputs).abs()).max()) / spread


def _parts(spec: NetSpec) -> list[set[int]]:
    """Sets of hidden layers that move together."""
    links = [set(item.layers) for item in (*spec.permutation_classes, *spec.scaling_classes)]
    links += [{layer, first} for layer, first in spec.block_order.items() if first >= 0]
    links += [set(pair) for pair in (*spec.reciprocal_layers.items(), *spec.transposed_pairs)]
    parts: list[set[int]] = [{layer} for layer in range(spec.num_layers - 1)]
    for link in links:
        touched = [part for part in parts if part & link]
        parts = [part for part in parts if not part & link] + ([set().union(*touched)] if touched else [])
    return sorted(parts, key=min)


def _restricted(element: GroupElement, layers: set[int]) -> GroupElement:
    """The element that moves these layers alone."""
    order = [torch.arange(p.shape[1], device=p.device).expand_as(p) for p in element.permutations]
    chosen = [index in layers for index in range(len(order))]
    return replace(
        element,
        permutations=tuple(p if c else q for p, q, c in zip(element.permutations, order, chosen, strict=True)),
        scales=tuple(s if c else torch.ones_like(s) for s, c in zip(element.scales, chosen, strict=True)),
    )
