"""Single networks from state dicts: which entries are layers, and in which order they stand."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.adapters import adapter_factors, adapter_spec
from scalegmn.interop.tensor_files import SAVED_BY_TORCH, check_size, ending, entries_of_network, read_tensors
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.reporting.files import natural_order

MODULE_READS = "scalegmn.from_module(module, example_input), or package.module:factory, reads such networks"
"""What to do with networks that a state dict does not determine."""

_MOST_STEPS = 10_000
"""Of the search for orders of layers that fit."""

_SHOWN = 8
"""Entries in a sentence, of many."""


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer or a convolution of a state dict.

    Attributes:
        name: what its entries have in common (`layers.0`).
        weight: [out, in, ...] as it is stored, or as it follows from the entries of a parametrisation.
        bias: [out]; None: there is none.
        entries: the names of weight and bias; None of a weight that several entries make up, and of a missing bias.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    entries: tuple[str | None, str | None]

    @property
    def in_dim(self) -> int:
        """Neurons or channels that it reads; of a linear layer after a convolution, all their positions."""
        return self.weight.shape[1]

    @property
    def out_dim(self) -> int:
        """Neurons or channels that it has."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class StoredNetwork:
    """A network as a state dict holds it.

    Attributes:
        content: all that the file holds.
        state: the state dict in it.
        layers: a chain.
        notes: what was assumed, a sentence each.
    """

    content: dict[str, Any]
    state: dict[str, Any]
    layers: tuple[StoredLayer, ...]
    notes: tuple[str, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Weight and bias (zeros where there is none) of each layer in turn, in one type, single precision at least.

        Weights are [out, in] of linear layers, [out, in, kh, kw] of convolutions, those along one axis with kh = 1, and
        of linear layers that read all positions of a convolution's channels.
        """
        stored = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias) if tensor is not None]
        dtype = torch.float32
        for tensor in stored:
            dtype = torch.promote_types(dtype, tensor.dtype)
        tensors: list[Tensor] = []
        channels: int | None = None  # of the convolution before
        for layer in self.layers:
            weight, shape = layer.weight.to(dtype), tuple(layer.weight.shape)
            if weight.ndim == 3:
                weight = weight[:, :, None]
            elif weight.ndim == 2 and channels is not None and layer.in_dim != channels:
                weight = weight.reshape(shape[0], channels, *_positions(layer.in_dim // channels))
            channels = layer.out_dim if weight.ndim == 4 and layer.weight.ndim > 2 else None
            bias = weight.new_zeros(shape[0]) if layer.bias is None else layer.bias.to(dtype)
            tensors += [weight, bias]
        return tensors

    def params(self, activation: str, w0: float = 30.0) -> NetParams:
        """The network as a batch of one.

        Args:
            activation: of all hidden layers.
            w0: the frequency of sine layers, sin(w0 (W x + b)).

        Raises:
            ValueError: the activation is unknown, or a value is not finite.
        """
        tensors = [tensor[None] for tensor in self.tensors()]
        params = NetParams.from_tensors(tensors[::2], tensors[1::2], activation, w0)
        layers = (
            LayerSpec(**{**vars(layer), "bias": stored.bias is not None})
            for layer, stored in zip(params.spec.layers, self.layers, strict=True)
        )
        return params.replace(spec=NetSpec(tuple(layers)))

    def with_parameters(self, params: NetParams) -> dict[str, Any] | None:
        """The state dict with the parameters of another network [1] of these layers, in its own types and shapes; None
        if some weight is made up of several entries."""
        state = dict(self.state)
        for layer, weight, bias in zip(self.layers, params.weights, params.biases, strict=True):
            weight_entry, bias_entry = layer.entries
            if weight_entry is None:
                return None
            state[weight_entry] = weight[0].reshape(layer.weight.shape).to(layer.weight.dtype)
            if layer.bias is not None:
                assert bias_entry is not None
                state[bias_entry] = bias[0].to(layer.bias.dtype)
        return state


class StoredAdapter(StoredNetwork):
    """A low-rank adapter: `layers` are the factors A and B of each layer that it changes, and no chain."""

    def params(self, activation: str = "identity", w0: float = 1.0) -> NetParams:
        """The adapter as a batch of one network of products B A, whose activation is the identity."""
        tensors = [tensor[None] for tensor in self.tensors()]
        pairs = zip(self.layers[::2], self.layers[1::2], strict=True)
        spec = adapter_spec((a.in_dim, a.out_dim, b.out_dim) for a, b in pairs)
        bad = [layer.name for layer in self.layers if not layer.weight.isfinite().all()]
        if bad:
            raise ValueError(f"{bad[0]} has NaN or infinity")
        return NetParams(spec, tuple(tensors[::2]), tuple(tensors[1::2]))


def from_state_dict(
    tensors: Mapping[str, Any], activation: str, w0: float = 30.0, layers: Sequence[str] | None = None
) -> NetParams:
    """A chain of linear layers and convolutions from its state dict, whatever its entries are called.

    Low-rank adapters as peft writes them (`q_proj.lora_A.weight`) are read as products B A (`adapter_spec`), whatever
    `activation` is; `layers` names those of the adapted network that are read.

    A first convolution whose kernels have one channel is taken as one of grey images; `from_module` reads depthwise
    ones, which have the same shapes.

    Args:
        tensors: name -> tensor, or a checkpoint with such a state dict in an entry (`state_dict`, `model`, ...).
        activation: of all hidden layers.
        w0: the frequency of sine layers, sin(w0 (W x + b)).
        layers: the names of the layers in their order; None: as they stand in the state dict or, if that is no chain,
            in the only order that is one.

    Returns:
        A batch of one network.

    Raises:
        ValueError: the layers are no chain, or one of several, or a value is not finite; or there are other things than
            linear layers and convolutions, such as norms, whose places a state dict does not tell.
    """
    return stored_network(dict(tensors), layers).params(activation, w0)


def read_network(path: Path, layers: Sequence[str] | None = None) -> StoredNetwork:
    """The network of a file; its entries have an order only if torch.save wrote it.

    Raises:
        ValueError: as `read_tensors` and `stored_network`, or the tensors claim more numbers than the file holds; names
            the file.
    """
    content = read_tensors(path)
    try:
        network = stored_network(content, layers, in_order=ending(path) in SAVED_BY_TORCH)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_size(path, network.state)
    return network


def stored_network(
    content: dict[str, Any], layers: Sequence[str] | None = None, in_order: bool = True
) -> StoredNetwork:
    """The network in a state dict or in a checkpoint that has one.

    Args:
        content: entry -> value.
        layers: the names of the layers in their order; None: what follows from the order of entries, and from shapes.
        in_order: whether the order of entries may be that of the layers.

    Raises:
        ValueError: as `from_state_dict`.
    """
    state, place, beside = entries_of_network(content)
    notes = [] if place is None else [f"the network is the entry {place!r}"]
    if beside:
        notes.append(f"not read: the entries {', '.join(beside)}, which hold matrices too")
    factors = adapter_factors(state, layers)
    if factors:
        return _adapter(content, state, factors, notes)
    entries, passed_over = _layers(state)
    if layers is None:
        chain = _ordered(entries, in_order, notes)
    else:
        chain = _chosen(entries, layers)
        passed_over += [layer.name for layer in entries if layer.name not in layers]
    if passed_over:
        notes.append(f"not read: {_some(passed_over)}")
    for index, (before, after) in enumerate(pairwise(chain), 1):
        if not _fits(before, after):
            order = ", ".join(layer.name for layer in chain)
            raise ValueError(
                f"layer {index}: {after.name} reads {after.in_dim} neurons, but {before.name} has {before.out_dim}; "
                f"the layers are {order}, and no order of them is a chain; {MODULE_READS}"
            )
        if before.weight.ndim > 2 and after.weight.ndim == 2 and after.in_dim != before.out_dim:
            places = after.in_dim // before.out_dim
            shape = "x".join(map(str, _positions(places)))
            notes.append(f"{after.name} reads {before.out_dim} channels at {places} positions each, taken as {shape}")
    return StoredNetwork(content, state, tuple(chain), (*notes, *_assumptions(chain)))


def _adapter(
    content: dict[str, Any], state: dict[str, Any], factors: Mapping[str, tuple[str, str]], notes: Sequence[str]
) -> StoredAdapter:
    """The low-rank adapter with these entries, A and B for each changed layer."""
    entries = [entry for pair in factors.values() for entry in pair]
    stored = tuple(_layer(entry.removesuffix(".weight"), {"weight": entry}, state) for entry in entries)
    others = [str(key) for key, value in state.items() if isinstance(value, Tensor) and key not in entries]
    read = f"a low-rank adapter, read as W = B A of {_some(factors)}; lora_alpha / r, which multiplies W, is left out"
    return StoredAdapter(content, state, stored, (*notes, read, *([f"not read: {_some(others)}"] if others else [])))


def _assumptions(chain: Sequence[StoredLayer]) -> list[str]:
    """What layers were taken for where others have the same shapes, a sentence each."""
    notes = []
    modules = Counter(layer.name.rpartition(".")[0] for layer in chain)
    several = [name for name, number in modules.items() if number > 1]
    if len(several) > 1:
        notes.append(f"the layers of {_some(several)} are taken as one network, each after the other")
    square = [layer.name for layer in chain if layer.weight.ndim > 2 and layer.in_dim == layer.out_dim > 1]
    if square:
        notes.append(f"{', '.join(square)}: taken as a convolution; a transposed one has the same shapes")
    first = chain[0]
    if first.weight.ndim == 3:
        notes.append(f"{first.name}: taken as a convolution along one axis; a bilinear layer has the same shapes")
    return notes


def state_dict_of(params: NetParams, row: int) -> dict[str, Tensor]:
    """Network `row` of B as a state dict: `seq.<l>.weight` [out, in, ...] and `seq.<l>.bias` [out]."""
    state: dict[str, Tensor] = {}
    for layer, (weight, bias) in enumerate(zip(params.weights, params.biases, strict=True)):
        state |= {f"seq.{layer}.weight": weight[row].clone(), f"seq.{layer}.bias": bias[row].clone()}
    return state


# Which entries are layers


def _layers(state: Mapping[str, Any]) -> tuple[list[StoredLayer], list[str]]:
    """The layers in the order of their entries, and the names of tensors that belong to none.

    A layer is a weight and a bias whose names differ in this word alone (`fc.weight`, `fc.bias`), or a weight. Where
    names do not match so, or no name has these words and tensors with one axis are the biases, the first weight and the
    first bias are a layer, and so on.
    """
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        found = f"the entries {_some(map(str, state))}" if state else "nothing"
        raise ValueError(
            f"no tensors: found {found}, expected a state dict; write torch.save(module.state_dict(), FILE)"
        )
    parts = {key: part for key in tensors if (part := _part(key)) is not None}
    numbers = [key for key, value in tensors.items() if value.ndim == 0 and key not in parts]
    factors = [key for key in numbers if tensors[key].is_floating_point()]  # others count steps
    tensors = {key: value for key, value in tensors.items() if key not in numbers}
    if not parts:
        parts = {key: ("", "bias" if value.ndim == 1 else "weight") for key, value in tensors.items()}
    by_layer: dict[str, dict[str, str]] = {}
    for key, (stem, role) in parts.items():
        by_layer.setdefault(stem, {})[role] = key
    weights, biases = ([key for key, (_, part) in parts.items() if part == name] for name in ("weight", "bias"))
    unpaired = [key for key in biases if not any(part.startswith("weight") for part in by_layer[parts[key][0]])]
    if unpaired or "" in by_layer:
        if not weights or len(weights) != len(biases):
            raise ValueError(
                f"{len(weights)} weights and {len(biases)} biases, expected one of each per layer: found "
                f"{_shown(tensors)}; {MODULE_READS}"
            )
        by_layer = {w: {"weight": w, "bias": b} for w, b in zip(weights, biases, strict=True)}
    if not by_layer:
        raise ValueError(f"0 weights and 0 biases, expected one of each per layer: found {_shown(tensors)}")
    norms = {stem for stem, own in by_layer.items() if "weight" in own and tensors[own["weight"]].ndim < 2}
    of_losses = {stem for stem in norms if stem.startswith(("criterion", "loss"))}
    statistics = {key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] == "running_mean"}
    norms = (norms - of_losses) | statistics
    if norms:
        names = _some(sorted(norms, key=natural_order))
        raise ValueError(f"{names}: a norm or a PReLU, and a state dict does not tell where it stands; {MODULE_READS}")
    layers = [_layer(stem, own, tensors) for stem, own in by_layer.items() if stem not in of_losses]
    read = {key for stem, own in by_layer.items() if stem not in of_losses for key in own.values()}
    return layers, [key for key in tensors if key not in read] + factors


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    first, others = [*names][:_SHOWN], [*names][_SHOWN:]
    return ", ".join(first) + (f" and {len(others):,} more" if others else "")


def _shown(tensors: Mapping[str, Tensor]) -> str:
    """The first tensors with their shapes."""
    first = [f"{key} {list(tensor.shape)}" for key, tensor in list(tensors.items())[:3]]
    return ", ".join(first) + (f" and {len(tensors) - 3:,} more" if len(tensors) > 3 else "")


_NO_CHAIN = {
    r"(weight|bias)_[ih]h(_l\d|$)": "a recurrent layer",
    r"in_proj_(weight|bias)$|(^|\.)[qkv]_proj_weight$|(^|\.)bias_[kv]$": "attention",
    r"(^|\.)(to_)?(q|k|v|query|key|value)(_proj)?\.weight$": "attention",
    r"(^|[._])(shortcut|downsample|skip|residual)([._]\w+)*\.weight$": "a layer beside others",
    r"(^|\.)lora_[AB]\.": "a layer beside others",
}
"""Names of entries -> what has them, for parameters that have the shapes of layers and are none."""


def _part(key: str) -> tuple[str, str] | None:
    """The layer that an entry belongs to, and what it is of it: `weight`, `bias`, or what a parametrisation stores;
    None if its name has neither word."""
    parametrised = re.fullmatch(r"(.*?)\.?parametrizations\.(weight|bias)\.(.+)", key)
    if parametrised is not None:
        return parametrised[1], f"{parametrised[2]}.{parametrised[3]}"
    for pattern, kind in _NO_CHAIN.items():
        if re.search(pattern, key):
            raise ValueError(f"{key}: {kind}, which is no layer of a chain; {MODULE_READS}")
    by_hook = re.fullmatch(r"(.*?)\.?((?:weight|bias)_(?:g|v|u|orig|mask))", key)
    if by_hook is not None:
        return by_hook[1], by_hook[2]
    word = next((word for word in ("weight", "bias") if word in key), None)
    return None if word is None else (key.replace(word, "", 1).strip("._") or "layer", word)


def _layer(name: str, entries: Mapping[str, str], tensors: Mapping[str, Tensor]) -> StoredLayer:
    """The layer that these entries (`weight`, `bias`, ... -> name) make up."""
    for key in entries.values():
        tensor = tensors[key]
        plain = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"
        if not plain or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{key} is not a dense tensor of floating point numbers, of two bytes or more each")
    values = {part: tensors[key] for part, key in entries.items()}
    weight, bias = (_effective(name, word, values) for word in ("weight", "bias"))
    assert weight is not None
    if weight.ndim > 4:
        raise ValueError(f"{name}: a convolution over volumes, expected linear layers and convolutions over images")
    if bias is not None and bias.shape != weight.shape[:1]:
        transposed = weight.ndim > 2 and bias.shape == weight.shape[1:2]
        kind = f"a transposed convolution, which a state dict does not determine; {MODULE_READS}"
        expected = kind if transposed else f"found a bias of shape {tuple(bias.shape)}, expected ({len(weight)},)"
        raise ValueError(f"{name}: {expected}")
    return StoredLayer(name, weight, bias, (entries.get("weight"), entries.get("bias")))


def _weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """A magnitude g for each direction v."""
    axes = [axis for axis in range(v.ndim) if g.ndim == 0 or g.shape[axis] == 1]
    return g * v / torch.linalg.vector_norm(v, dim=axes, keepdim=True)


def _spectral_norm(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """A weight divided by its largest singular value, whose singular vectors are u and v."""
    return weight / (u @ weight.flatten(1) @ v)


_PARAMETRISATIONS: dict[tuple[str, ...], Callable[..., Tensor]] = {
    ("",): lambda tensor: tensor,
    ("g", "v"): _weight_norm,
    ("original0", "original1"): _weight_norm,
    ("orig", "mask"): torch.mul,
    ("orig", "u", "v"): _spectral_norm,
    ("original", "0._u", "0._v"): _spectral_norm,
}
"""What follows `weight` or `bias` in the names of entries -> the tensor that they make up."""


def _effective(name: str, word: str, values: Mapping[str, Tensor]) -> Tensor | None:
    """The weight or bias that the entries of a layer make up; None of a missing bias."""
    own = {part.removeprefix(word).lstrip("._"): value for part, value in values.items() if part.startswith(word)}
    for parts, function in _PARAMETRISATIONS.items():
        if {*own} == {*parts}:
            return function(*(own[part] for part in parts))
    if word == "bias" and not own:
        return None
    found = ", ".join(part for part in values if part.startswith(word)) or "nothing"
    raise ValueError(f"{name}: the {word} is made up of {found} in an unknown way; {MODULE_READS}")


# In which order they stand


def _chosen(layers: Sequence[StoredLayer], names: Sequence[str]) -> list[StoredLayer]:
    """The layers of these names, in this order."""
    by_name = {layer.name: layer for layer in layers}
    unknown = [name for name in names if name not in by_name]
    if unknown or len({*names}) < len(names) or not names:
        raise ValueError(f"layers: found {', '.join(names)}, expected different ones of {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _ordered(layers: Sequence[StoredLayer], in_order: bool, notes: list[str]) -> list[StoredLayer]:
    """The layers as they stand if they have an order and are a chain so, and it is noted if other orders fit too; else
    in the only order that is a chain and keeps numbered ones ascending, which is noted."""
    known = sorted(layers, key=lambda layer: natural_order(layer.name))
    chains, is_all = _chains(known)
    if in_order and _is_chain(layers):
        names = [layer.name for layer in layers]
        if any([layer.name for layer in chain] != names for chain in chains):
            notes.append(f"the layers are taken as they stand, {_some(names)}; --layers names them in another order")
        return list(layers)
    if not is_all and len(chains) < 2:
        raise ValueError(f"{len(layers)} layers fit in too many ways; name them in their order (--layers)")
    if not chains:
        return list(layers) if in_order else known
    names = [",".join(layer.name for layer in chain) for chain in chains]
    if len(chains) > 1:
        raise ValueError(
            f"the layers fit in several orders, such as {names[0]} and {names[1]}, and their entries have none; name "
            f"them in their order, as in layers {names[0]} (on the command line --layers {names[0]})"
        )
    if chains[0] != known or in_order:
        notes.append(f"the layers stand in the order {names[0]}, the only one that fits")
    return chains[0]


def _chains(layers: Sequence[StoredLayer]) -> tuple[list[list[StoredLayer]], bool]:
    """Up to two orders of the layers that are chains, in which those whose names differ in numbers alone ascend, first
    those that stay within a module; and whether there are no more than could be tried."""
    patterns = [re.sub(r"\d+", "#", layer.name) for layer in layers]
    modules = [layer.name.rpartition(".")[0] for layer in layers]
    steps = 0

    def extended(chain: list[int]) -> Iterator[list[int]]:
        nonlocal steps
        steps += 1
        if len(chain) == len(layers):
            yield chain
        last = modules[chain[-1]] if chain else ""
        for index in sorted(range(len(layers)), key=lambda index: modules[index] != last):
            layer = layers[index]
            if index in chain or steps > _MOST_STEPS or (chain and not _fits(layers[chain[-1]], layer)):
                continue
            if all(k in chain for k in range(index) if patterns[k] == patterns[index]):
                yield from extended([*chain, index])

    orders = [[layers[index] for index in chain] for chain, _ in zip(extended([]), range(2), strict=False)]
    return orders, steps <= _MOST_STEPS


def _is_chain(layers: Sequence[StoredLayer]) -> bool:
    """Whether each layer can read the one before."""
    return all(_fits(before, after) for before, after in pairwise(layers))


def _fits(before: StoredLayer, after: StoredLayer) -> bool:
    """Whether a layer can read another: a linear layer after a convolution also all of its positions."""
    if before.weight.ndim > 2 and after.weight.ndim == 2:
        return after.in_dim % before.out_dim == 0
    return after.in_dim == before.out_dim and before.weight.ndim >= after.weight.ndim


def _positions(number: int) -> tuple[int, int]:
    """The height and width of so many positions: a square, or where there is none a row."""
    side = math.isqrt(number)
    return (side, side) if side * side == number else (1, number)
