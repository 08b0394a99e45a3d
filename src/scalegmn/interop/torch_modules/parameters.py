"""Reading the parameters of a module into `NetParams`, and writing them back."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scalegmn.interop.torch_modules.layers import ReadLayer
from scalegmn.interop.torch_modules.values import Elements, Joined
from scalegmn.networks import NetParams, NetSpec


def read_parameters(
    tensors: Mapping[str, Tensor], layers: Sequence[ReadLayer], spec: NetSpec, is_copied: bool = True
) -> NetParams:
    """The parameters of a module as a batch of one network, in the widest of their types.

    Args:
        tensors: parameters and buffers of a module of the traced architecture, see `named_tensors`.
        layers: the traced layers, in the order of the spec.
        spec: the architecture.
        is_copied: whether they have memory of their own; else they may share that of the tensors.

    Raises:
        ValueError: there are no weights, or a value is not finite; names the tensor.
    """
    used = [part for layer in layers for part in _parts(layer.weight)]
    weights = [tensors[part.name].detach() for part in used]
    if not weights:
        raise ValueError("expected a module with weights, found none that its output depends on")
    dtypes = {weight.real.dtype if weight.is_complex() else weight.dtype for weight in weights}
    reference = flattened(weights[0]).to(functools.reduce(torch.promote_types, dtypes))

    def read(elements: Elements | Joined | None, shape: tuple[int, ...], fill: float) -> Tensor:
        if elements is None:
            return reference.new_full((1, *shape), fill)
        if isinstance(elements, Joined):
            sizes = [*shape]
            sizes[elements.axis] //= len(elements.parts)
            return torch.cat([read(part, tuple(sizes), fill) for part in elements.parts], elements.axis + 1)
        chosen = elements.of(flattened(tensors[elements.name].detach()))
        values = chosen.reshape(1, *shape).to(reference)
        if not values.sum().isfinite() and not values.isfinite().all():  # a sum may overflow
            raise ValueError(f"{elements.name}: found NaN or infinity, expected finite numbers")
        if elements.scale != 1:
            return values * elements.scale
        return values.clone() if elements.is_view and is_copied else values

    pairs = list(zip(layers, spec.layers, strict=True))
    statistics = tuple(
        torch.stack([read(elements, (layer_spec.out_dim,), 0) for elements in layer.statistics], dim=1)
        if layer.statistics
        else None
        for layer, layer_spec in pairs
    )
    return NetParams(
        spec,
        tuple(read(layer.weight, layer_spec.weight_shape, not layer_spec.is_zero) for layer, layer_spec in pairs),
        tuple(read(layer.bias, (layer_spec.out_dim,), 0) for layer, layer_spec in pairs),
        None,
        statistics if any(tensor is not None for tensor in statistics) else None,
    )


def _parts(elements: Elements | Joined | None) -> tuple[Elements, ...]:
    """The elements of each parameter."""
    return elements.parts if isinstance(elements, Joined) else () if elements is None else (elements,)


def write_parameters(params: NetParams, module: nn.Module, layers: Sequence[ReadLayer], spec: NetSpec) -> None:
    """Sets the parameters of a module to those of one network, to the bit; the module stays as it was where that
    fails. Arguments and errors as of `written_tensors`."""
    tensors = named_tensors(module)
    new = written_tensors(params, tensors, layers, spec)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if new[name] is not tensor:
                tensor.copy_(new[name])


def written_tensors(
    params: NetParams, tensors: Mapping[str, Tensor], layers: Sequence[ReadLayer], spec: NetSpec
) -> dict[str, Tensor]:
    """Parameters and buffers with the parameters of one network in their places; those that nothing reads as they are.

    Args:
        params: one network, whose memory the tensors may share.
        tensors: parameters and buffers of a module of the traced architecture; they stay as they are.
        layers: the traced layers, in the order of the spec.
        spec: the architecture.

    Raises:
        ValueError: the parameters are of another architecture, of several networks, or differ where the module shares
            them.
    """
    if len(params) != 1 or params.spec != spec:
        raise ValueError(f"expected one network of {spec}, found {len(params)} of {params.spec}")
    new: dict[str, Tensor] = {}
    is_written: dict[str, Tensor | None] = {}
    """Which numbers of a parameter are; None: all of them."""

    def put(elements: Elements | Joined, values: Tensor) -> None:
        if isinstance(elements, Joined):
            for part, piece in zip(elements.parts, values.chunk(len(elements.parts), elements.axis), strict=True):
                put(part, piece)
            return
        name = elements.name
        is_new = name not in new
        values = values.reshape(elements.index.shape).to(tensors[name].real)
        if is_new and _is_whole(elements, tensors[name]):
            new[name], is_written[name] = _whole(elements, values, tensors[name]), None
            return
        if is_new:
            new[name] = tensors[name].detach().clone(memory_format=torch.contiguous_format)
        flat = flattened(new[name])
        known = elements.of(flat)
        if elements.scale != 1:  # what is there already stays to the bit
            values = torch.where(known * elements.scale == values, known, values / elements.scale)
        mask = is_written.setdefault(name, torch.zeros(flat.numel(), dtype=torch.bool))
        if not is_new:
            is_equal = torch.equal(known, values) if mask is None else not (elements.of(mask) & (known != values)).any()
            if not is_equal:
                raise ValueError(f"{name}: several layers share it, expected equal values")
        if mask is not None:
            elements.put(flat, values)
            elements.mark(mask)

    for index, layer in enumerate(layers):
        fill_of = {"weight": int(not spec.layers[index].is_zero), "bias": 0}
        pairs = (("weight", layer.weight, params.weights), ("bias", layer.bias, params.biases))
        for kind, elements, values in pairs:
            fill = fill_of[kind]
            if elements is not None:
                put(elements, values[index][0])
            elif bool((values[index] != fill).any()):
                raise ValueError(f"{layer.place}: {kind}: the module has none, expected {fill} everywhere")
        statistics = params.statistics[index] if params.statistics else None
        if layer.statistics is not None and statistics is not None:
            moments: Sequence[Elements | Joined] = layer.statistics
            for moment, row in zip(moments, statistics[0], strict=True):
                put(moment, row)
    same = {id(tensors[name]): tensor for name, tensor in new.items()}  # shared ones under each of their names
    return {name: same.get(id(tensor), tensor) for name, tensor in tensors.items()}


def _is_whole(elements: Elements, parameter: Tensor) -> bool:
    """Whether elements are all numbers of a real parameter, each once, as a view."""
    is_view = elements.is_view and elements.scale == 1 and not parameter.is_complex()
    return is_view and elements.index.numel() == parameter.numel() and elements.is_once


def _whole(elements: Elements, values: Tensor, parameter: Tensor) -> Tensor:
    """A parameter whose elements have these values, in their memory if it has its order."""
    if values.stride() == elements.index.stride():
        return values.as_strided((values.numel(),), (1,)).view(parameter.shape)
    new = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    elements.put(flattened(new), values)
    return new


def flattened(tensor: Tensor) -> Tensor:
    """All numbers of a parameter, real and imaginary parts of complex ones, sharing its memory where they can."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; shared ones under each of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
