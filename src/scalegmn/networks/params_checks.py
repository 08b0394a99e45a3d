"""Whether tensors are the parameters of networks of one architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scalegmn.networks.activations import HETERO

if TYPE_CHECKING:
    from scalegmn.networks.params import NetParams


def check_params(params: NetParams) -> None:
    """Raises ValueError, which names the layer, unless number, shapes, types and devices of all tensors fit the spec.

    Values are not read, but for the activations of networks on the CPU.
    """
    spec = params.spec
    for name, tensors in (("weights", params.weights), ("biases", params.biases)):
        if len(tensors) != spec.num_layers:
            raise ValueError(f"{name}: found {len(tensors)} tensors, expected {spec.num_layers} for {spec}")
    reference = params.biases[0]
    num = reference.shape[0] if reference.ndim else 0
    for index, layer in enumerate(spec.layers):
        _check_tensor(f"layer {index}: weight", params.weights[index], (num, *layer.weight_shape), reference)
        _check_tensor(f"layer {index}: bias", params.biases[index], (num, layer.out_dim), reference)
    if not reference.is_floating_point():
        raise ValueError(f"layer 0: bias is {reference.dtype}, expected a floating point type")
    _check_statistics(params, num)
    _check_activation(params, num)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], reference: Tensor) -> None:
    """Raises ValueError unless a tensor has this shape, and type and device of the first bias."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype != reference.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {reference.dtype}, as the first bias is")
    if tensor.device != reference.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {reference.device}, where the first bias is")


def _check_statistics(params: NetParams, num: int) -> None:
    """Raises ValueError unless batch norms, and they alone, have statistics."""
    spec, statistics = params.spec, params.statistics
    with_statistics = [layer.norm == "batch" for layer in spec.layers]
    if statistics is None:
        if any(with_statistics):
            raise ValueError(f"layer {with_statistics.index(True)}: statistics of a batch norm are missing")
        return
    if len(statistics) != spec.num_layers:
        raise ValueError(f"statistics: found {len(statistics)} entries, expected {spec.num_layers} for {spec}")
    for index, (layer, item) in enumerate(zip(spec.layers, statistics, strict=True)):
        if item is None and with_statistics[index]:
            raise ValueError(f"layer {index}: statistics of a batch norm are missing")
        if item is not None:
            if not with_statistics[index]:
                raise ValueError(f"layer {index}: statistics are given, expected none, as it is no batch norm")
            _check_tensor(f"layer {index}: statistics", item, (num, 2, layer.out_dim), params.biases[0])


def _check_activation(params: NetParams, num: int) -> None:
    """Raises ValueError unless networks that differ in their activation have one each."""
    activation, hidden = params.activation, [layer.activation for layer in params.spec.layers]
    if activation is None:
        if HETERO in hidden:
            raise ValueError(
                f"layer {hidden.index(HETERO)}: its activation is {HETERO}; expected {num} indices in `activation`, "
                "found None"
            )
        return
    if HETERO not in hidden:
        raise ValueError(f"activation: found indices, expected None, as no layer of {params.spec} is {HETERO}")
    if activation.shape != (num,) or activation.dtype != torch.long:
        raise ValueError(
            f"activation: found {activation.dtype} of shape {tuple(activation.shape)}, expected torch.int64 of ({num},)"
        )
    if activation.device != params.biases[0].device:
        raise ValueError(f"activation is on {activation.device}, expected {params.biases[0].device}")
    if activation.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(activation):
        names = params.spec.activations
        wrong = [index for index in activation.tolist() if not 0 <= index < len(names)]
        if wrong:
            raise ValueError(f"activation: found index {wrong[0]}, expected 0 to {len(names) - 1}: {', '.join(names)}")
