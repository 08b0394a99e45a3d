"""Networks as PyTorch modules: from a module to `NetParams`, and back.

The module is exported once (`torch.export`) and its graph of operations is followed with *numbers of neurons* in place
of activations: each value is an integer tensor of the activation's shape, which says whose neuron each element is.
What only moves elements (views, transposes, splits, concatenations) is then simply done to these numbers, and to the
numbers of a parameter's elements; what computes becomes a layer.
"""

from __future__ import annotations

import copy
import importlib
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.networks import ACTIVATIONS, LayerSpec, NetParams, NetSpec
from scalegmn.networks.scalar_groups import SCALES


def from_module(module: nn.Module, example_input: Tensor | Sequence[Tensor]) -> NetParams:
    """The parameters of a module, as a batch of one network; its batch norms as they evaluate.

    docs/architectures.md lists the layers and operations that are known.

    Args:
        module: the network; it is neither changed nor trained.
        example_input: what it is called with; only shapes and types count. Images [B, C, height, width], vectors
            [B, n], sequences [B, T, d] or, for embeddings, whole numbers [B, T].

    Raises:
        ValueError: an operation is not one of a parameter graph's; says which, and where in the module.
    """
    return Traced(module, example_input).read(module)


def to_module(params: NetParams, module: nn.Module, example_input: Tensor | Sequence[Tensor]) -> nn.Module:
    """A copy of a module with the parameters of one network of its architecture: the way back, to the bit.

    Args:
        params: one network.
        module: any module of this architecture, such as the one that `from_module` read.
        example_input: as in `from_module`.

    Raises:
        ValueError: as `from_module`; the parameters are of another architecture, of several networks, or differ where
            the module shares them.
    """
    written = copy.deepcopy(module)
    Traced(module, example_input).write(params, written)
    return written


FACTORY = r"[\w.]+:\w+"
"""How a command names code that makes networks, `package.module:factory`."""


def from_factory(name: str, input_shape: tuple[int, ...] | None) -> NetParams:
    """The network that the user's own code makes: this runs it. `package.module:factory`, a function without arguments
    that returns an `nn.Module`, or such a module; raises ValueError with its name."""
    if input_shape is None:
        raise ValueError(f"{name}: set --input_shape to that of an input, such as 1,1,28,28")
    place, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(place), attribute)
        module = found if isinstance(found, nn.Module) else found()
        return from_module(module.eval(), torch.zeros(input_shape))
    except Exception as error:  # whatever the user's code leads to
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from None


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """`1,1,28,28`, an option `--input_shape`, as numbers; raises ValueError."""
    if text is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ValueError(f"--input_shape: found {text}, expected numbers such as 1,1,28,28")
    return None if text is None else tuple(map(int, text.split(",")))


@dataclass(frozen=True)
class _Elements:
    """Elements of a parameter or buffer."""

    name: str
    """Of the parameter or buffer."""

    index: Tensor
    """Numbers of its elements, in any shape."""

    is_buffer: bool = False


@dataclass(frozen=True)
class _Neurons:
    """What neurons say."""

    ids: Tensor
    """Number of the neuron that each element belongs to, in the shape of the activations."""

    versions: dict[int, int]
    """Layer -> how often it had been changed, by activations and additions, when it said this."""

    factor: float = 1.0
    """They are still to be multiplied by this."""

    is_output: bool = False
    """They have gone through what only a network's output may: a softmax, an offset."""


@dataclass(frozen=True)
class _Input:
    """The network's input, elements of which are not yet neurons."""

    index: Tensor
    """Numbers of its elements, in any shape."""

    is_whole: bool
    """Whether the elements are whole numbers, which an embedding reads."""


@dataclass(frozen=True)
class _Scores:
    """How much the queries of each head attend to its keys."""

    queries: Tensor
    keys: Tensor
    """[heads, channels] numbers of neurons."""


@dataclass
class _Layer:
    """A layer while the module is followed."""

    place: str
    nodes: Tensor
    """[n_l] numbers of its neurons."""

    reads: Tensor | None
    """[n_{l-1}] numbers of the neurons that it reads; None: constant inputs of its own."""

    weight: _Elements | None
    """Of shape [n_l, n_{l-1} / groups, ...]; None: ones."""

    bias: _Elements | None = None
    residual: Tensor | None = None
    """[n_l] neurons that are added to its own."""

    statistics: tuple[_Elements, _Elements] | None = None
    version: int = 0
    is_activated: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of its `LayerSpec`."""


class Traced:
    """A module, followed once: the spec of its architecture, and where each parameter belongs.

    Args:
        module, example_input: as in `from_module`.

    Raises:
        ValueError: as `from_module`.
    """

    def __init__(self, module: nn.Module, example_input: Tensor | Sequence[Tensor]) -> None:
        inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
        training = [one for one in module.modules() if one.training]
        module.eval()
        try:
            with torch.no_grad():
                program = torch.export.export(module, inputs, strict=False)
        except Exception as error:  # whatever the module's own code raises
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{type(module).__name__} cannot be exported: {said[0]}") from error
        finally:
            for one in training:
                one.training = True
        self.layers: list[_Layer] = []
        self._places: dict[int, int] = {}  # neuron -> layer, -1 for the input
        self._input: Tensor | None = None
        self._entry: Tensor  # element of the input -> its neuron
        self._next = 0
        self._place = ""
        self._attended: list[Tensor] = []
        result = self._follow(program)
        self.spec = self._finish(result)

    # Reading and writing parameters

    def read(self, module: nn.Module) -> NetParams:
        """The parameters of a module of this architecture, as a batch of one network."""
        state = _state(module)

        def found(elements: _Elements | None, shape: tuple[int, ...], fill: float) -> Tensor:
            if elements is None:
                return reference.new_full((1, *shape), fill)
            return state[elements.name].detach().reshape(-1)[elements.index].reshape(1, *shape)

        reference = next(state[one.weight.name].detach() for one in self.layers if one.weight is not None)
        pairs = list(zip(self.layers, self.spec.layers, strict=True))
        statistics = tuple(
            one.statistics and torch.stack([found(part, (layer.out_dim,), 0) for part in one.statistics], dim=1)
            for one, layer in pairs
        )
        return NetParams(
            self.spec,
            tuple(found(one.weight, layer.weight_shape, 1) for one, layer in pairs),
            tuple(found(one.bias, (layer.out_dim,), 0) for one, layer in pairs),
            None,
            statistics if any(one is not None for one in statistics) else None,
        )

    def write(self, params: NetParams, module: nn.Module) -> None:
        """Sets the parameters of a module of this architecture to those of one network.

        Raises:
            ValueError: as `to_module`; the module is as it was.
        """
        if len(params) != 1 or params.spec != self.spec:
            raise ValueError(f"expected one network of {self.spec}, found {len(params)} of {params.spec}")
        state = _state(module)
        new = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        written = {name: torch.zeros(tensor.numel(), dtype=torch.bool) for name, tensor in state.items()}

        def put(name: str, index: Tensor, values: Tensor) -> None:
            flat, index, values = new[name].view(-1), index.reshape(-1), values.reshape(-1).to(new[name])
            again = written[name][index]
            if not torch.equal(flat[index[again]], values[again]):
                raise ValueError(f"{name}: several layers share it, expected equal values")
            flat[index] = values
            written[name][index] = True

        for index, one in enumerate(self.layers):
            for elements, values, fill in ((one.weight, params.weights, 1), (one.bias, params.biases, 0)):
                if elements is not None:
                    put(elements.name, elements.index, values[index][0])
                elif bool((values[index] != fill).any()):
                    kind = "weight" if fill else "bias"
                    raise ValueError(f"{one.place}: {kind}: the module has none, expected {fill} everywhere")
            if one.statistics is not None:
                for elements, values in zip(one.statistics, params.statistics[index][0], strict=True):
                    put(elements.name, elements.index, values)
        with torch.no_grad():
            for name, tensor in state.items():
                if written[name].any():  # the others are not read, or other names of those
                    tensor.copy_(new[name])

    # Following the module

    def _follow(self, program: torch.export.ExportedProgram) -> Any:
        """The value that the module returns."""
        signature, values = program.graph_signature, {}
        memory: dict[torch.fx.Node, torch.fx.Node] = {}  # value -> the first whose memory it may share
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        names = {id(tensor): name for name, tensor in reversed(program.state_dict.items())}  # of shared ones, the first
        for node in program.graph.nodes:
            if node.op == "placeholder":
                meta = node.meta["val"]
                if node.name in named:
                    tensor = program.state_dict.get(named[node.name], program.constants.get(named[node.name]))
                    name = names.get(id(tensor), named[node.name])
                    index = torch.arange(meta.numel()).reshape(meta.shape)
                    values[node] = _Elements(name, index, node.name in signature.inputs_to_buffers)
                elif node.name in signature.inputs_to_lifted_tensor_constants:
                    values[node] = program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
                elif isinstance(meta, Tensor):
                    if any(isinstance(value, _Input) for value in values.values()):
                        raise ValueError("expected a module of one input tensor, found several")
                    whole = not meta.is_floating_point()
                    values[node] = _Input(torch.arange(meta.numel()).reshape(meta.shape), whole)
                    self._entry = torch.full((meta.numel(),), -1)
                else:
                    values[node] = meta
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(program.graph_module)
            elif node.op == "output":
                (results,) = node.args
                if len(results) != 1:
                    raise ValueError(f"expected a module of one output tensor, found {len(results)}")
                return values[results[0]]
            else:
                self._place, name = _place(node), _operation(node)
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if any(one is _CHANGED for one in torch.utils._pytree.tree_leaves((args, kwargs))):
                    self._refuse("a value that shares memory with one that has been changed in place")
                values[node] = self._call(node, name.rstrip("_"), args, kwargs)
                is_changing = name.endswith("_") and not name.endswith("__")
                if is_changing or name in _MOVING | _UNCHANGED:
                    memory[node] = memory.get(node.args[0], node.args[0])
                if is_changing and isinstance(values[node.args[0]], _TRACED):
                    shared = [one for one in values if memory.get(one, one) is memory[node]]
                    values |= dict.fromkeys(shared, _CHANGED) | dict.fromkeys((node, node.args[0]), values[node])
        raise AssertionError("a graph has an output")

    def _call(self, node: torch.fx.Node, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What an operation returns."""
        traced = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, _TRACED)]
        if not traced:
            return node.target(*args, **kwargs)  # constants
        if name in _UNCHANGED:
            return args[0]
        if name in _MOVING:
            return self._moved(node, args, kwargs)
        if name in _POOLING:
            return self._pooled(node, name, args[0])
        activation = "sine" if name == "sin" else name
        if activation in ACTIVATIONS:
            return self._activated(args[0], activation)
        known = getattr(self, f"_op_{name}", None)
        if known is None:
            self._refuse(f"{node.target}")
        return known(node, *args, **kwargs)

    def _refuse(self, problem: str) -> None:
        """Raises ValueError for what is not known."""
        raise ValueError(f"{self._place}: {problem}: cannot be part of a parameter graph (docs/architectures.md)")

    # Values

    def _moved(self, node: torch.fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What moves elements, done to their numbers."""

        def numbers(value: Any) -> Any:
            if isinstance(value, _TRACED):
                return (value.ids if isinstance(value, _Neurons) else value.index).contiguous()
            return value

        first = next(one for one in torch.utils._pytree.tree_leaves(args) if isinstance(one, _TRACED))
        if isinstance(first, _Scores):
            return first
        is_traced = lambda value: isinstance(value, _TRACED)  # noqa: E731
        tree = torch.utils._pytree.tree_map(numbers, (args, kwargs), is_leaf=is_traced)
        moved = node.target(*tree[0], **tree[1])

        def value(tensor: Tensor) -> Any:
            return replace(first, ids=tensor) if isinstance(first, _Neurons) else replace(first, index=tensor)

        return list(map(value, moved)) if isinstance(moved, list | tuple) else value(moved)

    def _pooled(self, node: torch.fx.Node, name: str, value: Any) -> Any:
        """Values of the same channels at fewer, or more, positions: those of the last axes."""
        neurons = value if isinstance(value, _Neurons) else self._entered(value, 1)
        result = node.meta["val"]
        shape = (result if isinstance(result, Tensor) else result[0]).shape
        if not all(_is_constant(neurons.ids, axis) for axis in range(-int(name[-2]), 0)):
            self._refuse("pooling of channels")
        if "max" in name:
            self._largest(neurons)
        pooled = replace(neurons, ids=neurons.ids[(..., *[slice(1)] * int(name[-2]))].expand(*shape))
        return pooled if isinstance(result, Tensor) else [pooled, None]

    def _largest(self, neurons: _Neurons) -> None:
        """Notes that the largest of their values is read."""
        for one in neurons.versions:
            if one >= 0:
                self.layers[one].options["maximum"] = True

    def _op_mean(self, node: torch.fx.Node, x: Any, axes: Any = (), keepdim: bool = False, **_: Any) -> Any:
        if isinstance(x, _Scores):  # only to be shown
            return x
        if not isinstance(x, _Neurons | _Input):
            self._refuse("a mean of parameters")
        own = x.ids if isinstance(x, _Neurons) else x.index
        for axis in sorted({one % own.ndim for one in axes or range(own.ndim)}, reverse=True):
            if isinstance(x, _Neurons) and not _is_constant(own, axis):
                self._refuse("a mean over neurons")
            own = own.narrow(axis, 0, 1) if keepdim else own.select(axis, 0)
        return replace(x, ids=own) if isinstance(x, _Neurons) else replace(x, index=own)

    def _op_amax(self, node: torch.fx.Node, x: Any, axes: Any = (), keepdim: bool = False) -> Any:
        if isinstance(x, _Neurons):
            self._largest(x)
        return self._op_mean(node, x, axes, keepdim)

    def _activated(self, value: Any, name: str) -> Any:
        """After an activation function of its layer."""
        if not isinstance(value, _Neurons):
            self._refuse(f"{name} of what no layer says")
        self._check(value)
        owners = list(value.versions)
        if -1 in owners or any(self.layers[one].is_activated for one in owners):
            self._refuse(f"a second activation, {name}")
        if value.factor != 1 and name != "sine":
            self._refuse(f"{name} of a multiple")
        for one in owners:
            layer = self.layers[one]
            layer.options["activation"], layer.is_activated = name, True
            if name == "sine":
                layer.options["w0"] = float(value.factor)
            layer.version += 1
        return replace(value, versions={one: self.layers[one].version for one in owners}, factor=1.0)

    def _check(self, value: _Neurons) -> None:
        """Refuses values from before a change of their layer, and those that only an output may have."""
        if value.is_output:
            self._refuse("a layer that reads a softmax, an offset or a multiple")
        if any(layer >= 0 and self.layers[layer].version != version for layer, version in value.versions.items()):
            self._refuse("a layer that is read both before and after its activation or an addition")

    def _entered(self, value: Any, axis: int) -> _Neurons:
        """Neurons, of the input where it is one, whose channels lie along an axis."""
        if isinstance(value, _Neurons):
            self._check(value)
            if value.factor != 1:
                self._refuse("a layer that reads a multiple")
            return value
        if not isinstance(value, _Input):
            self._refuse("a layer that reads parameters")
        size = value.index.shape[axis]
        is_first = self._input is None
        ids = self._input_neurons(size)
        shape = [1] * value.index.ndim
        shape[axis] = size
        ids = ids.reshape(shape).expand_as(value.index)
        if is_first:
            self._entry[value.index] = ids
        if not torch.equal(self._entry[value.index], ids):
            self._refuse("a part of the input, or its channels in another order than elsewhere")
        return _Neurons(ids, {-1: 0})

    def _input_neurons(self, size: int) -> Tensor:
        """[n_0] numbers of the input's neurons."""
        if self._input is None:
            self._input = self._numbers(size, -1)
        if len(self._input) != size:
            self._refuse(f"input of {size} channels, which elsewhere has {len(self._input)}")
        return self._input

    def _numbers(self, size: int, layer: int) -> Tensor:
        """Numbers for new neurons of a layer."""
        first, self._next = self._next, self._next + size
        self._places |= dict.fromkeys(range(first, self._next), layer)
        return torch.arange(first, self._next)

    def _along(self, neurons: _Neurons, axis: int) -> Tensor:
        """[n] the neurons along an axis, where they are the same at all other places."""
        along = neurons.ids.movedim(axis, -1).reshape(-1, neurons.ids.shape[axis])
        if not bool((along == along[0]).all()):
            self._refuse("a layer that reads positions, not channels")
        return along[0]

    def _says(self, layer: _Layer, axis: int, shape: Sequence[int]) -> _Neurons:
        """What a new layer says, with its channels along an axis."""
        self.layers.append(layer)
        view = [1] * len(shape)
        view[axis] = len(layer.nodes)
        return _Neurons(layer.nodes.reshape(view).expand(*shape), {len(self.layers) - 1: 0})

    def _new(self, size: int, reads: Tensor | None, weight: _Elements | None, **rest: Any) -> _Layer:
        """A new layer of so many neurons."""
        return _Layer(self._place, self._numbers(size, len(self.layers)), reads, weight, **rest)

    # Layers

    def _layer(self, node: torch.fx.Node, value: Any, axis: int, weight: Any, bias: Any, groups: int = 1) -> _Neurons:
        """A linear layer or a convolution, whose weight is [out, in / groups, ...]."""
        if not isinstance(weight, _Elements) or not (bias is None or isinstance(bias, _Elements)):
            self._refuse("weights that are computed")
        neurons = self._entered(value, axis)
        along, index = self._along(neurons, axis), weight.index
        reads = torch.tensor(list(dict.fromkeys(along.tolist())))
        if len(reads) < len(along):  # all positions of an image in a row
            places = [(along == one).nonzero()[:, 0] for one in reads]
            if len({*map(len, places)}) > 1 or groups > 1 or index.ndim > 2:
                self._refuse("a layer that reads some channels more often than others")
            count = len(places[0])
            side = int(count**0.5)
            kernel = (side, side) if side * side == count else (1, count)
            index = index[:, torch.stack(places)].unflatten(2, kernel)
        if index.ndim == 3:
            index = index.unsqueeze(2)  # a convolution along one axis
        if index.ndim not in (2, 4):
            self._refuse("a convolution of a volume")
        options = {"groups": groups, "kernel": tuple(index.shape[2:]) or None}
        layer = self._new(len(index), reads, replace(weight, index=index), bias=bias, options=options)
        return self._says(layer, axis, node.meta["val"].shape)

    def _op_linear(self, node: torch.fx.Node, x: Any, weight: Any, bias: Any = None) -> Any:
        return self._layer(node, x, -1, weight, bias)

    def _op_addmm(self, node: torch.fx.Node, bias: Any, x: Any, weight: Any) -> Any:
        return self._layer(node, x, -1, replace(weight, index=weight.index.mT), bias)

    def _op_conv2d(self, node: torch.fx.Node, x: Any, weight: Any, bias: Any = None, *rest: Any, **options: Any) -> Any:
        groups = options.get("groups", rest[3] if len(rest) > 3 else 1)
        if len(node.meta["val"].shape) != weight.index.ndim:
            self._refuse("an input without its batch axis")
        return self._layer(node, x, 1, weight, bias, groups)

    _op_conv1d = _op_conv2d

    def _op_matmul(self, node: torch.fx.Node, x: Any, y: Any) -> Any:
        if isinstance(y, _Elements) and y.index.ndim == 2:
            return self._layer(node, x, -1, replace(y, index=y.index.mT), None)
        if isinstance(x, _Neurons) and isinstance(y, _Neurons):
            return _Scores(self._heads(x), self._heads(replace(y, ids=y.ids.mT)))
        if isinstance(x, _Scores) and isinstance(y, _Neurons):
            return self._attend(node, x, y)
        self._refuse("a product of values")

    _op_mm = _op_bmm = _op_matmul

    def _op_embedding(self, node: torch.fx.Node, weight: Any, x: Any, *rest: Any, **options: Any) -> Any:
        is_input = isinstance(x, _Input)
        if not isinstance(weight, _Elements) or not (is_input or isinstance(x, Tensor)):
            self._refuse("an embedding of what is computed")
        reads = self._input_neurons(len(weight.index)) if is_input else None
        options = {} if is_input else {"constant": True}
        layer = self._new(weight.index.shape[1], reads, replace(weight, index=weight.index.mT), options=options)
        return self._says(layer, -1, node.meta["val"].shape)

    def _constant(self, elements: _Elements, neurons: _Neurons) -> _Neurons:
        """Parameters that stand for activations, such as position embeddings: a layer of constant inputs of its own."""
        axis = self._channel_axis(neurons)
        index = elements.index
        index = index.reshape([1] * (neurons.ids.ndim - index.ndim) + list(index.shape))
        if index.shape[axis] != neurons.ids.shape[axis]:
            self._refuse(f"a parameter of {index.shape[axis]} channels beside {neurons.ids.shape[axis]}")
        rows = index.movedim(axis, 0).reshape(index.shape[axis], -1)
        rows = torch.stack(list(rows.mT.unique(dim=0)), dim=1)  # as expanded over batches, once
        layer = self._new(len(rows), None, replace(elements, index=rows), options={"constant": True})
        return self._says(layer, axis, index.shape)

    def _channel_axis(self, neurons: _Neurons) -> int:
        """The axis along which neurons differ."""
        axes = [axis for axis in range(neurons.ids.ndim) if not _is_constant(neurons.ids, axis)]
        if len(axes) != 1:
            self._refuse("channels along several axes")
        return axes[0]

    def _norm(self, node: torch.fx.Node, x: Any, axis: int, kind: str, weight: Any, bias: Any, **options: Any) -> Any:
        """A normalisation layer."""
        neurons = self._entered(x, axis)
        reads, statistics = self._along(neurons, axis), options.pop("statistics", None)
        size = len(reads)
        options |= {"norm": kind, "groups": size, "affine": weight is not None}
        scale = None if weight is None else replace(weight, index=weight.index[:, None])
        layer = self._new(size, reads, scale, bias=bias, statistics=statistics, options=options)
        return self._says(layer, axis, node.meta["val"].shape)

    def _op_batch_norm(self, node: torch.fx.Node, x: Any, *args: Any) -> Any:
        weight, bias, mean, variance, is_training, _, epsilon, _ = args
        if is_training or mean is None:
            self._refuse("a batch norm without running statistics")
        return self._norm(node, x, 1, "batch", weight, bias, statistics=(mean, variance), epsilon=epsilon)

    def _op_layer_norm(self, node: torch.fx.Node, x: Any, shape: Any, weight=None, bias=None, epsilon=1e-5, *_) -> Any:
        if len(shape) != 1:
            self._refuse("a layer norm over several axes")
        return self._norm(node, x, -1, "layer", weight, bias, epsilon=epsilon)

    def _op_rms_norm(self, node: torch.fx.Node, x: Any, shape: Any, weight=None, epsilon=None) -> Any:
        return self._op_layer_norm(node, x, shape, weight, None, epsilon or 0.0)

    def _op_group_norm(self, node: torch.fx.Node, x: Any, count: int, weight=None, bias=None, epsilon=1e-5, *_) -> Any:
        return self._norm(node, x, 1, "group", weight, bias, epsilon=epsilon, norm_groups=count)

    # Additions and products

    def _op_add(self, node: torch.fx.Node, x: Any, y: Any, alpha: float = 1) -> Any:
        if alpha != 1:
            self._refuse("an addition of a multiple")
        values = [x, y]
        if any(isinstance(value, _Scores) for value in values):
            self._check_masks(values)
            return next(value for value in values if isinstance(value, _Scores))
        neurons = [value for value in values if isinstance(value, _Neurons)]
        others = [value for value in values if not isinstance(value, _Neurons)]
        if not neurons:
            return self._prepared(node, *values)
        if not others:
            return self._sum(x, y, node.meta["val"].shape)
        if isinstance(others[0], _Elements):
            return self._with_elements(neurons[0], others[0], node.meta["val"].shape)
        if isinstance(others[0], _Input):
            return self._sum(neurons[0], self._entered(others[0], self._channel_axis(neurons[0])), neurons[0].ids.shape)
        return replace(neurons[0], is_output=True)

    def _op_sub(self, node: torch.fx.Node, x: Any, y: Any) -> Any:
        if isinstance(y, int | float | Tensor) or not isinstance(x, _Neurons):
            return self._op_add(node, x, y)
        self._refuse("a difference of values")

    def _prepared(self, node: torch.fx.Node, x: Any, y: Any) -> Any:
        """The input, shifted or scaled by constants before anything reads it."""
        for value, other in ((x, y), (y, x)):
            is_fixed = isinstance(other, int | float | Tensor) or getattr(other, "is_buffer", False)
            if isinstance(value, _Input) and is_fixed and value.index.shape == node.meta["val"].shape:
                return value
        self._refuse("an operation on the input")

    def _with_elements(self, neurons: _Neurons, elements: _Elements, shape: Sequence[int]) -> _Neurons:
        """Plus a parameter: the bias of a layer that has none, or activations of a layer of constant inputs."""
        self._check(neurons)
        (owner, *others), axis = neurons.versions, self._channel_axis(neurons)
        size = neurons.ids.shape[axis]
        is_bias = elements.index.numel() == size == _size(elements.index, axis - neurons.ids.ndim)
        if is_bias and not others and owner >= 0 and self.layers[owner].bias is None:
            layer = self.layers[owner]
            if layer.version == 0 and torch.equal(self._along(neurons, axis), layer.nodes):
                layer.bias, layer.version = replace(elements, index=elements.index.flatten()), 1
                return replace(neurons, versions={owner: 1})
        return self._sum(neurons, self._constant(elements, neurons), shape)

    def _sum(self, x: _Neurons, y: _Neurons, shape: Sequence[int]) -> _Neurons:
        """A residual connection into one of the two layers: one that has none yet."""
        for value in (x, y):
            self._check(value)
        if x.factor != 1 or y.factor != 1:
            self._refuse("an addition of a multiple")
        x, y = (replace(one, ids=one.ids.expand(*shape)) for one in (x, y))
        axis = self._channel_axis(x)
        first, second = self._along(x, axis), self._along(y, axis)

        def is_free(value: _Neurons, along: Tensor) -> bool:
            (owner, *others) = value.versions
            whole = not others and owner >= 0 and torch.equal(along, self.layers[owner].nodes)
            return whole and self.layers[owner].residual is None and not self._is_read(along)

        found = [pair for pair in ((y, second, first), (x, first, second)) if is_free(*pair[:2])]
        found.sort(key=lambda pair: -max(pair[0].versions))
        for value, _own, other in found:
            (owner,) = value.versions
            sources = {self._places[one] for one in other.tolist()}
            if len(sources) == 1 and max(sources) < owner:
                layer = self.layers[owner]
                layer.residual = other
                layer.options["residual_after"] = layer.is_activated
                layer.version += 1
                return replace(value, versions={owner: layer.version})
        self._refuse("a sum of two layers that are used elsewhere too")

    def _is_read(self, nodes: Tensor) -> bool:
        """Whether a layer, or a residual connection, reads one of these neurons."""
        readers = [one for layer in self.layers for one in (layer.reads, layer.residual) if one is not None]
        return any(bool(torch.isin(nodes, one).any()) for one in [*readers, *self._attended])

    def _op_cat(self, node: torch.fx.Node, values: Sequence[Any], axis: int = 0) -> Any:
        neurons = [value for value in values if isinstance(value, _Neurons)]
        if not neurons:
            if all(isinstance(value, _Input) for value in values):
                return replace(values[0], index=torch.cat([value.index for value in values], axis))
            self._refuse("a concatenation of parameters")
        channels = self._channel_axis(neurons[0])
        if axis % neurons[0].ids.ndim != channels:  # positions: what stands at others counts as zero here
            total = neurons[0]
            for value in values:
                if value is not neurons[0]:
                    own = self._constant(value, total) if isinstance(value, _Elements) else value
                    size = [*total.ids.shape]
                    size[axis] = 1
                    total, own = (replace(one, ids=one.ids.narrow(axis, 0, 1)) for one in (total, own))
                    total = self._sum(own, total, size)
            return replace(total, ids=total.ids.narrow(axis, 0, 1).expand(*node.meta["val"].shape))
        if len(neurons) < len(values):
            self._refuse("a concatenation with what no layer says")
        versions = {key: version for value in neurons for key, version in value.versions.items()}
        for value in neurons:
            self._check(value)
        return _Neurons(torch.cat([value.ids for value in neurons], axis), versions)

    def _op_mul(self, node: torch.fx.Node, x: Any, y: Any) -> Any:
        for value, other in ((x, y), (y, x)):
            if isinstance(value, _Scores):
                self._check_masks([other])
                return value
            if isinstance(value, _Neurons) and _is_number(other):
                return replace(value, factor=value.factor * float(other))
            if isinstance(value, _Neurons) and isinstance(other, _Elements):  # a scale per channel
                axis = self._channel_axis(value)
                reads = self._along(self._entered(value, axis), axis)
                if other.index.numel() == len(reads) == _size(other.index, axis - value.ids.ndim):
                    weight = replace(other, index=other.index.reshape(-1, 1))
                    layer = self._new(len(reads), reads, weight, options={"groups": len(reads)})
                    return self._says(layer, axis, node.meta["val"].shape)
        if any(isinstance(value, _Neurons) for value in (x, y)):
            self._refuse("a product of values")
        return self._prepared(node, x, y)

    def _op_div(self, node: torch.fx.Node, x: Any, y: Any) -> Any:
        if isinstance(x, _Neurons):
            if not _is_number(y):
                self._refuse("a quotient of values")
            return self._op_mul(node, x, 1 / float(y))
        return x if isinstance(x, _Scores) else self._prepared(node, x, y)

    def _op_softmax(self, node: torch.fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x if isinstance(x, _Scores) else replace(x, is_output=True)

    _op__softmax = _op_log_softmax = _op__log_softmax = _op_softmax

    def _op_masked_fill(self, node: torch.fx.Node, x: Any, *args: Any) -> Any:
        if not isinstance(x, _Scores):
            self._refuse("masks of values")
        return x

    # Attention

    def _check_masks(self, values: Sequence[Any]) -> None:
        """Refuses parameters among what scores are added to or multiplied by."""
        if any(isinstance(value, _Elements) and not value.is_buffer for value in values):
            self._refuse("attention with parameters of its own")

    def _heads(self, neurons: _Neurons) -> Tensor:
        """[heads, channels] of values [..., T, channels]."""
        self._check(neurons)
        if not _is_constant(neurons.ids, -2):
            self._refuse("a product of neurons with others than their own channels")
        rows = neurons.ids.select(-2, 0).flatten(0, -2).tolist()
        return torch.tensor(list(dict.fromkeys(map(tuple, rows))))

    def _attend(self, node: torch.fx.Node, scores: _Scores, values: _Neurons) -> _Neurons:
        """Multi-head attention: the values' neurons, tied with those of queries and keys."""
        heads = self._heads(values)
        queries, keys = scores.queries, scores.keys
        if not len(heads) == len(queries) == len(keys) or any(len(one.unique()) < one.numel() for one in (heads, keys)):
            self._refuse(f"{len(queries)} heads of queries, {len(keys)} of keys and {len(heads)} of values")
        for one in (queries, keys, heads):
            if self._is_read(one.flatten()):
                self._refuse("queries, keys or values that are read elsewhere too")
            self._attended.append(one.flatten())
        place = self._places[int(heads[0, 0])]
        attention = self.layers[place].options.setdefault("attention", {})
        attention[int(heads[0, 0])] = (queries.flatten(), keys.flatten(), len(heads))
        return replace(values, ids=values.ids.narrow(-2, 0, 1).expand(*node.meta["val"].shape))

    def _op_scaled_dot_product_attention(
        self, node: torch.fx.Node, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not all(isinstance(one, _Neurons) for one in (query, key, value)):
            self._refuse("attention to what no layer says")
        self._check_masks([*args, *kwargs.values()])
        return self._attend(node, _Scores(self._heads(query), self._heads(key)), value)

    # The spec

    def _finish(self, result: Any) -> NetSpec:
        """Layers as they are in the spec, in order, the output last."""
        if not isinstance(result, _Neurons):
            raise ValueError("expected a module whose output a layer says")
        output = list(dict.fromkeys(result.ids.flatten().tolist()))
        owners = {self._places[one] for one in output}
        last = max(owners)
        if len(owners) > 1 or last < 0 or {*output} != {*self.layers[last].nodes.tolist()}:
            raise ValueError("expected a module whose output is all that one layer says")
        if self._is_read(self.layers[last].nodes):
            raise ValueError(f"{self.layers[last].place}: the output is read by other layers")
        self.layers.append(self.layers.pop(last))
        self.layers[-1].options |= {"activation": "identity", "w0": 1.0}  # nobody rescales outputs
        self.layers = self._joined(self._cut())
        where = {int(one): index for index, layer in enumerate(self.layers) for one in layer.nodes}
        where |= {} if self._input is None else dict.fromkeys(self._input.tolist(), -1)
        specs, shared = [], {}
        for index, layer in enumerate(self.layers):
            options, constant = dict(layer.options), layer.reads is None
            activation = options.get("activation", "identity")
            if activation != "identity" and ACTIVATIONS[activation].group == SCALES:
                options.pop("maximum", None)  # which positive scalars do not mind
            if not constant:
                reads = where[int(layer.reads[0])]
                options["reads"] = None if reads == index - 1 else reads
            if layer.residual is not None:
                options["residual"] = where[int(layer.residual[0])]
            attention = options.pop("attention", None)
            if attention:
                ((queries, keys, heads),) = attention.values()
                options["attention"] = (where[int(queries[0])], where[int(keys[0])], heads)
            for own in (layer.weight, layer.bias, *(layer.statistics or ())):
                if own is None:
                    continue
                if len(own.index.unique()) < own.index.numel():
                    raise ValueError(f"{layer.place}: {own.name}: one parameter in several places of a layer")
                for first, other in shared.get(own.name, ()):
                    if torch.isin(own.index, other.index).any():
                        earlier = self.layers[first]
                        if not self._is_transposed(layer, own, earlier, other):
                            kind = "weights" if own is layer.weight else "parameters"
                            raise ValueError(f"{layer.place}: its {kind} are also those of {earlier.place}")
                        options["tied"] = first
                shared.setdefault(own.name, []).append((index, own))
            in_dim = layer.weight.index.shape[1] if constant else len(layer.reads)
            options["bias"] = layer.bias is not None
            specs.append(LayerSpec(in_dim, len(layer.nodes), **options))
        return NetSpec(tuple(specs))

    def _is_transposed(self, layer: _Layer, own: _Elements, earlier: _Layer, other: _Elements) -> bool:
        """Whether a layer's parameter is the weight of a linear layer whose transpose is an earlier one's."""
        pairs = ((layer, own), (earlier, other))
        plain = all(one is part.weight and part.reads is not None and one.index.ndim == 2 for part, one in pairs)
        return plain and torch.equal(own.index, other.index.mT)

    def _cut(self) -> list[_Layer]:
        """Layers whose neurons attention uses in parts, such as one of queries, keys and values, as several."""
        cut = []
        for layer in self.layers:
            own = [one for one in self._attended if torch.isin(one, layer.nodes).any()]
            rest = layer.nodes[~torch.isin(layer.nodes, torch.cat(own))] if own else layer.nodes
            if (own and layer.residual is not None) or (layer.options.get("groups", 1) > 1 and own):
                raise ValueError(f"{layer.place}: queries, keys or values of a layer with groups or an addition")
            for nodes in [*own, rest] if len(rest) else own:
                place = torch.tensor([int((layer.nodes == one).nonzero()) for one in nodes]) if own else slice(None)
                options = dict(layer.options)
                attention = options.pop("attention", {})
                if int(nodes[0]) in attention:
                    options["attention"] = {int(nodes[0]): attention[int(nodes[0])]}
                cut.append(_rows(layer, place, nodes, options=options))
        return cut

    def _joined(self, layers: list[_Layer]) -> list[_Layer]:
        """Layers that read several layers side by side as one layer for each: sums, or, channel by channel, parts."""
        joined, owners = [], {} if self._input is None else dict.fromkeys(self._input.tolist(), self._input)
        for layer in layers:
            reads = layer.reads
            for nodes in (one for one in (reads, layer.residual) if one is not None):
                self._check_order(layer, nodes, owners)
            known = [] if reads is None else [owners[one] for one in reads.tolist() if one in owners]
            sources = list({id(nodes): nodes for nodes in known}.values())
            if len(sources) == 1 and layer.options.get("groups", 1) == 1 and layer.weight is not None:
                parts = [replace(self._summands(layer, sources)[0], residual=layer.residual)]
            elif len(sources) < 2:
                parts = [layer]
            elif layer.residual is None and layer.options.get("groups", 1) == 1:
                parts = self._summands(layer, sources)
            elif layer.residual is None and layer.options.get("norm", "batch") == "batch":
                places = torch.arange(len(reads)).split([*map(len, sources)])
                parts = [_rows(layer, place, layer.nodes[place], reads=reads[place]) for place in places]
                parts = [replace(one, options={**one.options, "groups": len(one.nodes)}) for one in parts]
            else:
                raise ValueError(f"{layer.place}: reads several layers side by side, and has groups or an addition")
            joined += parts
            owners |= {one: part.nodes for part in parts for one in part.nodes.tolist()}
        return joined

    def _summands(self, layer: _Layer, sources: Sequence[Tensor]) -> list[_Layer]:
        """W x + b of a layer that reads several layers, as W_1 x_1, W_2 x_2 + (W_1 x_1), ..., the last with b."""
        found = []
        for nodes in sources:
            place = torch.tensor([int((layer.reads == one).nonzero()) for one in nodes])
            weight = replace(layer.weight, index=layer.weight.index[:, place])
            is_last = nodes is sources[-1]
            part = replace(layer, reads=nodes, weight=weight, residual=found[-1].nodes if found else None)
            if not is_last:
                options = {**layer.options, "activation": "identity"}
                part = replace(part, nodes=self._numbers(len(layer.nodes), -2), bias=None, options=options)
            found.append(part)
        return found

    def _check_order(self, layer: _Layer, nodes: Tensor, owners: dict[int, Tensor]) -> None:
        """Refuses a part of a layer, and, where channels stand for channels, another order than the layer's."""
        known = {id(owners[one]): owners[one] for one in nodes.tolist() if one in owners}
        whole = sum(map(len, known.values())) in (0, len(nodes))
        aligned = nodes is layer.residual or layer.options.get("groups", 1) > 1
        if not whole or (aligned and known and not torch.equal(torch.cat(list(known.values())), nodes)):
            raise ValueError(f"{layer.place}: reads a part of a layer, or its channels in another order")


def _rows(layer: _Layer, place: Tensor | slice, nodes: Tensor, **changes: Any) -> _Layer:
    """Some neurons of a layer, as a layer."""
    pairs = {name: getattr(layer, name) for name in ("weight", "bias")}
    own = {name: one and replace(one, index=one.index[place]) for name, one in pairs.items()}
    statistics = layer.statistics and tuple(replace(one, index=one.index[place]) for one in layer.statistics)
    return replace(layer, nodes=nodes, statistics=statistics, **own, **changes)


_TRACED = (_Elements, _Neurons, _Input, _Scores)

_CHANGED = object()
"""In place of a value whose memory has been changed through another one."""

_UNCHANGED = {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "contiguous",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
}
"""Operations that change nothing when a module evaluates."""

_MOVING = {
    *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "numpy_T", "movedim"),
    *("squeeze", "unsqueeze", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "expand"),
    *("getitem", "repeat", "tile", "mT", "swapaxes", "swapdims", "tensor_split", "expand_as", "view_as"),
}
"""Operations that move elements only."""

_POOLING = {
    *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d"),
}
"""Operations that join or repeat positions, channel by channel."""


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones by each of their names."""
    both = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name: tensor for named in both for name, tensor in named}


def _operation(node: torch.fx.Node) -> str:
    """`conv2d` for aten.conv2d.default."""
    return node.target.__name__ if node.target is operator.getitem else str(node.target).split(".")[1]


def _place(node: torch.fx.Node) -> str:
    """Where in the module an operation is done: `layer1.0.conv1 (Conv2d)`."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", nn.Module)}).values())
    path, kind = stack[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return f"{path or 'module'} ({name.rpartition('.')[2]})"


def _is_number(value: Any) -> bool:
    """Whether it is one number."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _size(tensor: Tensor, axis: int) -> int:
    """Along an axis counted from the end; 1 where it is broadcast."""
    return tensor.shape[axis] if -axis <= tensor.ndim else 1


def _is_constant(ids: Tensor, axis: int) -> bool:
    """Whether neurons are the same along an axis."""
    return bool((ids == ids.narrow(axis, 0, 1)).all())
