"""Reading the parameters of a module into `NetParams`, and writing them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scalegmn.interop.torch_modules.layers import TracedLayer
from scalegmn.interop.torch_modules.values import Elements
from scalegmn.networks import NetParams, NetSpec


def read_parameters(module: nn.Module, layers: Sequence[TracedLayer], spec: NetSpec) -> NetParams:
    """The parameters of a module as a batch of one network.

    Args:
        module: a module of the traced architecture.
        layers: the traced layers, in the order of the spec.
        spec: the architecture.
    """
    state = _tensors(module)
    reference = next(state[layer.weight.name].detach() for layer in layers if layer.weight is not None)

    def read(elements: Elements | None, shape: tuple[int, ...], fill: float) -> Tensor:
        if elements is None:
            return reference.new_full((1, *shape), fill)
        return state[elements.name].detach().reshape(-1)[elements.index].reshape(1, *shape)

    pairs = list(zip(layers, spec.layers, strict=True))
    statistics = tuple(
        torch.stack([read(elements, (layer_spec.out_dim,), 0) for elements in layer.statistics], dim=1)
        if layer.statistics
        else None
        for layer, layer_spec in pairs
    )
    return NetParams(
        spec,
        tuple(read(layer.weight, layer_spec.weight_shape, 1) for layer, layer_spec in pairs),
        tuple(read(layer.bias, (layer_spec.out_dim,), 0) for layer, layer_spec in pairs),
        None,
        statistics if any(tensor is not None for tensor in statistics) else None,
    )


def write_parameters(params: NetParams, module: nn.Module, layers: Sequence[TracedLayer], spec: NetSpec) -> None:
    """Sets the parameters of a module to those of one network, to the bit.

    Args:
        params: one network.
        module: a module of the traced architecture.
        layers: the traced layers, in the order of the spec.
        spec: the architecture.

    Raises:
        ValueError: the parameters are of another architecture, of several networks, or differ where the module shares
            them; the module stays as it was.
    """
    if len(params) != 1 or params.spec != spec:
        raise ValueError(f"expected one network of {spec}, found {len(params)} of {params.spec}")
    state = _tensors(module)
    new = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    is_written = {name: torch.zeros(tensor.numel(), dtype=torch.bool) for name, tensor in state.items()}

    def put(elements: Elements, values: Tensor) -> None:
        name, index = elements.name, elements.index.reshape(-1)
        flat, values = new[name].view(-1), values.reshape(-1).to(new[name])
        again = is_written[name][index]
        if not torch.equal(flat[index[again]], values[again]):
            raise ValueError(f"{name}: several layers share it, expected equal values")
        flat[index] = values
        is_written[name][index] = True

    for index, layer in enumerate(layers):
        for elements, values, fill in ((layer.weight, params.weights, 1), (layer.bias, params.biases, 0)):
            if elements is not None:
                put(elements, values[index][0])
            elif bool((values[index] != fill).any()):
                kind = "weight" if fill else "bias"
                raise ValueError(f"{layer.place}: {kind}: the module has none, expected {fill} everywhere")
        statistics = params.statistics[index] if params.statistics else None
        if layer.statistics is not None and statistics is not None:
            for elements, row in zip(layer.statistics, statistics[0], strict=True):
                put(elements, row)
    with torch.no_grad():
        for name, tensor in state.items():
            if is_written[name].any():  # the others are not read, or other names of those
                tensor.copy_(new[name])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; shared ones under each of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
