"""How much memory intermediate results may take, and how many networks fit into it.

What a model's backward pass keeps is measured on a forward pass of one and of three networks, once per model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from scalegmn.networks import NetParams, NetSpec

TENSOR = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Bytes of one feature tensor, of which there are ten or so at a time, that make full use of a kind of device."""

_MEASURED = 3
"""Networks in the larger of the two measured batches."""


def tensor_bytes(device: torch.device) -> int:
    """The size of a feature tensor that makes full use of the device."""
    return TENSOR.get(device.type, TENSOR["cpu"])


def kept_bytes(device: torch.device) -> int:
    """Bytes of intermediate results that a forward pass may keep for its backward pass."""
    return torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else 960 << 20


class Kept(NamedTuple):
    """Bytes that a forward pass keeps for its backward pass: fixed + B per_network."""

    fixed: int
    per_network: int


def networks_at_once(model: nn.Module, spec: NetSpec, device: torch.device, feature_bytes: int | None = None) -> int:
    """How many networks make full use of a device, if a backward pass can keep everything of them; at least 1.

    Args:
        model: a metanetwork.
        spec: the largest networks that it reads.
        device: whose memory counts.
        feature_bytes: bytes of one network's features in one layer, where those of all networks that pass at once
            should be at most `tensor_bytes`.
    """
    most = tensor_bytes(device) // feature_bytes if feature_bytes else None
    if most is not None and most <= 1:
        return 1
    kept = measure_kept(model, spec)
    fitting = (kept_bytes(device) - kept.fixed) // max(kept.per_network, 1)
    return max(1, fitting if most is None else min(most, fitting))


_Key = tuple[NetSpec, torch.dtype, torch.device, bool]
_CACHE: WeakKeyDictionary[nn.Module, dict[_Key, Kept]] = WeakKeyDictionary()


def measure_kept(model: nn.Module, spec: NetSpec) -> Kept:
    """What a model keeps of networks of `spec`, as it is now: in training or not, where and of which type it is.

    It is measured at the first call for each of these. Random state, buffers and gradients are as before, and a
    compiled model is not compiled for it.
    """
    weight = next(model.parameters())
    key = (spec, weight.dtype, weight.device, model.training)
    measured = _CACHE.setdefault(model, {})
    if key not in measured:
        networks = _networks(spec, weight)
        of_one = saved_bytes(model, networks[:1])
        # a single network may fill the memory: then nothing but it matters
        many = saved_bytes(model, networks) if _MEASURED * of_one < kept_bytes(weight.device) else _MEASURED * of_one
        per_network = (many - of_one) // (_MEASURED - 1)
        measured[key] = Kept(max(of_one - per_network, 0), per_network)
    return measured[key]


def saved_bytes(model: nn.Module, params: NetParams) -> int:
    """Bytes that a forward pass saves for its backward pass, the inputs included, the model's own tensors not.

    As if gradients of the inputs were wanted too: that counts what the forward pass makes of them before the first
    parameter.
    """
    stored = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        """Keeps storages, so that no other takes their place, and for derivatives within the forward pass their values,
        but not the tensors: a graph that holds its own output is never freed."""
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()

    hooks = saved_tensors_hooks(keep, lambda tensor: tensor)
    with _undisturbed(model), torch.enable_grad(), hooks:
        model.forward(params.map(lambda tensor: tensor.detach().requires_grad_()).with_batch_norm_folded())
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in stored)


def _networks(spec: NetSpec, like: Tensor) -> NetParams:
    """Some networks of a spec, one activation after the other where networks differ in it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(_MEASURED, *shape, generator=generator, dtype=torch.float64).to(like)

    weights = tuple(random(*layer.weight_shape) / layer.in_dim**0.5 for layer in spec.layers)
    biases = tuple(random(layer.out_dim) for layer in spec.layers)
    activation = None
    if spec.is_hetero:
        names = ("tanh", "relu", "tanh")
        activation = torch.tensor([spec.activations.index(name) for name in names], device=like.device)
    statistics = None
    if any(layer.norm == "batch" for layer in spec.layers):
        statistics = tuple(random(2, layer.out_dim).abs() if layer.norm == "batch" else None for layer in spec.layers)
    return NetParams(spec, weights, biases, activation, statistics)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Sets random state and buffers back afterwards."""
    before = [buffer.clone() for buffer in model.buffers()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in zip(model.buffers(), before, strict=True):
                    buffer.copy_(values)
