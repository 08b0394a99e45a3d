"""Layers that exporters write with several operators: scaled parameters, biases that are added, norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scalegmn.interop.onnx.operators import Node
from scalegmn.interop.onnx.values import GraphValues, OperatorStep, Step


def with_factors(
    values: GraphValues, operator: str, inputs: tuple[str, ...], attributes: dict[str, Any]
) -> tuple[str, ...]:
    """The inputs of a Gemm, with alpha and beta multiplied into its parameters and an entry of bias per neuron."""
    if operator != "Gemm":
        return inputs
    changed = list(inputs)
    for index, key in ((1, "alpha"), (2, "beta")):
        factor, name = attributes.pop(key, 1.0), inputs[index] if index < len(inputs) else ""
        constant = values.constant(name) if name else None
        if constant is None and factor != 1 and name:
            raise ValueError(f"{key}: found {factor:g} beside a computed value, expected 1")
        if constant is None:
            continue
        if index == 2:
            weight = values.value(inputs[1])
            constant = _per_neuron(constant, weight.shape[0 if attributes.get("transB", 0) else 1])
        if factor != 1 or constant is not values.value(name):
            changed[index] = f"{name} (of {inputs[0]})"
            values.set(changed[index], constant * factor)
    return tuple(changed)


def layer_with_bias(
    values: GraphValues, operator: str, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Step | None:
    """The layer whose output a constant is added to, with the constant in its bias; None: it is no such sum."""
    if operator != "Add":
        return None
    for name, other in (inputs, inputs[::-1]):
        layer, added = values.producers.get(name), values.constant(other)
        if layer is None or added is None or layer.operator not in ("Gemm", "MatMul", "Conv"):
            continue
        weight = values.constant(layer.inputs[1])
        if weight is None or values.num_uses[name] > 1 or not isinstance(layer.module, OperatorStep):
            continue
        is_convolution = layer.operator == "Conv"
        size = values.value(name).shape[1 if is_convolution else -1]
        shape = (size, *[1] * (weight.ndim - 2)) if is_convolution else (size,)
        if added.numel() > 1 and _without_ones(added.shape, len(shape)) != shape:
            continue
        bias, (x, parameter, *rest) = _per_neuron(added.reshape(-1), size), layer.inputs
        if rest and rest[0]:
            first = values.constant(rest[0])
            is_offset = added.numel() == 1 and outputs[0] == values.output
            if first is None or is_offset:  # of the output, which is left out as of modules
                continue
            bias = first + bias
        module: nn.Module = layer.module
        if layer.operator == "MatMul":
            module = OperatorStep(_matmul_with_bias, layer.module.node)
        bias_name = f"{other} (of {name})"
        values.set(bias_name, bias)
        return Step(layer.place, layer.operator, module, (x, parameter, bias_name), outputs)
    return None


def group_norm(
    values: GraphValues,
    place: str,
    operator: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    attributes: dict[str, Any],
) -> Step | None:
    """The group norm that exporters spell as an instance norm of [N, groups, values]; None: it is none."""
    reshaped = values.producers.get(inputs[0])
    if operator != "InstanceNormalization" or reshaped is None or reshaped.operator != "Reshape":
        return None
    scale, shift = (values.constant(name) for name in inputs[1:3])
    source, shape = values.value(reshaped.inputs[0]), values.value(inputs[0]).shape
    is_plain = scale is not None and shift is not None and bool((scale == 1).all()) and bool((shift == 0).all())
    if not is_plain or len(shape) != 3 or shape[0] != source.shape[0] or source.shape[1] % shape[1]:
        return None
    return Step(
        place,
        operator,
        OperatorStep(_group_norm_of_values, Node(attributes, ())),
        (reshaped.inputs[0], inputs[1]),
        outputs,
    )


def rms_norm(
    values: GraphValues, place: str, operator: str, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> Step | None:
    """The RMS norm that exporters spell as x / sqrt(mean(x^2) + epsilon); None: it is none."""
    if operator not in ("Mul", "Div"):
        return None
    for x, other in (inputs, inputs[::-1]) if operator == "Mul" else (inputs,):
        root = values.unwrapped(other)
        if operator == "Mul":
            inverse = values.producers.get(root)
            if inverse is None or inverse.operator not in ("Reciprocal", "Div"):
                continue
            above = values.constant(inverse.inputs[0]) if inverse.operator == "Div" else torch.ones(1)
            if above is None or above.numel() != 1 or above.item() != 1:
                continue
            root = values.unwrapped(inverse.inputs[-1])
        mean = _mean_of_squares(values, root, values.unwrapped(x))
        if mean is not None:
            node = Node({"axes": mean[0], "epsilon": mean[1]}, ())
            return Step(place, "RMSNormalization", OperatorStep(_rms_norm_of_values, node), (x,), outputs)
    return None


def _mean_of_squares(values: GraphValues, root: str, x: str) -> tuple[int, float] | None:
    """Over how many of the last axes `root` is sqrt(mean(x^2) + epsilon), and epsilon; None: it is not."""
    steps: list[Step] = []
    for operators in (("Sqrt",), ("Add",), ("ReduceMean",), ("Pow", "Mul")):
        step = values.producers.get(root)
        if step is None or step.operator not in operators:
            return None
        computed = [values.unwrapped(name) for name in step.inputs if name and values.constant(name) is None]
        if len({*computed}) != 1:
            return None
        steps.append(step)
        root = computed[0]
    _, added, mean, square = steps
    epsilon, exponent = (
        [value for name in step.inputs if (value := values.constant(name)) is not None] for step in (added, square)
    )
    is_square = not exponent if square.operator == "Mul" else [item.item() for item in exponent] == [2]
    rank = values.value(mean.inputs[0]).ndim
    kept = values.value(mean.outputs[0]).shape
    if root != x or not is_square or epsilon[0].numel() != 1 or len(kept) != rank:
        return None
    shape = values.value(mean.inputs[0]).shape
    axes = sorted(axis for axis in range(rank) if kept[axis] != shape[axis])
    is_last = bool(axes) and axes == [*range(rank - len(axes), rank)]
    return (len(axes), epsilon[0].item()) if is_last else None


def _matmul_with_bias(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b."""
    return functional.linear(x, weight.mT, bias)


def _rms_norm_of_values(node: Node, x: Tensor) -> Tensor:
    """An RMS norm without scale over the last axes."""
    return functional.rms_norm(x, x.shape[-node.get("axes") :], None, node.get("epsilon"))


def _group_norm_of_values(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    """A group norm without scale and shift, as [N, groups, values]."""
    groups = scale.numel()
    return functional.group_norm(x, groups, None, None, node.get("epsilon", 1e-5)).reshape(len(x), groups, -1)


def _per_neuron(constant: Tensor, size: int) -> Tensor:
    """A bias as [n]."""
    if constant.numel() == size and constant.ndim == 1:
        return constant
    if constant.numel() not in (1, size):
        raise ValueError(f"a bias {tuple(constant.shape)}, expected ({size},)")
    return constant.flatten().expand(size).clone()


def _without_ones(shape: torch.Size, num_axes: int) -> tuple[int, ...]:
    """A shape without its first axes, while these are 1 and too many."""
    sizes = tuple(shape)
    while len(sizes) > num_axes and sizes[0] == 1:
        sizes = sizes[1:]
    return sizes
