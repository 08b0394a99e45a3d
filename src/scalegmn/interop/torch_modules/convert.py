"""From a module to `NetParams`, and back."""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from scalegmn.interop.torch_modules.layers import ReadLayer
from scalegmn.interop.torch_modules.parameters import named_tensors, read_parameters, write_parameters
from scalegmn.interop.torch_modules.program import ExampleInput, drop_caches, without_parametrizations
from scalegmn.interop.torch_modules.reader import trace_module
from scalegmn.interop.torch_modules.reading import Reading
from scalegmn.networks import NetParams, NetSpec

_READINGS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[ReadLayer], NetSpec]] = weakref.WeakKeyDictionary()
"""Module -> what identifies its architecture and input, and its layers and spec, for `to_module`."""


class PinnedNeurons(UserWarning):
    """No symmetry moves some neurons of a module, as something that no layer describes reads them."""


def from_module(
    module: nn.Module, example_input: ExampleInput, output: int | str | None = None, strict: bool = False
) -> NetParams:
    """The parameters of a module, as a batch of one network; its batch norms as they evaluate.

    docs/architectures.md lists the layers and operations that are known. The neurons and parameters that others read
    are pinned: they are part of the network, and no symmetry moves them. What is read is verified: layer by layer the
    values that the module computes are compared with those of the layers that were read, and random elements of the
    symmetries that the spec claims must leave the module's outputs unchanged.

    Args:
        module: the network; it is neither changed nor trained.
        example_input: the input that it is called with; several inputs in order, or by name. Images [B, C, height,
            width], vectors [B, n], sequences [B, T, d] or, for embeddings, whole numbers [B, T]. Beside inputs of
            floating point numbers, or beside a first of whole numbers, others (masks, positions) are constants.
        output: which output of a module with several counts: its place in a tuple or list, or its name; all, if it is
            not given.
        strict: refuses what would be pinned.

    Warns:
        PinnedNeurons: neurons are pinned; names their layers.

    Raises:
        ValueError: the module cannot be exported, or, if `strict`, has an operation that no layer describes; names it
            and its place in the module.
    """
    reading = read(module, example_input, output, strict)
    if places := reading.pinned_places:
        listed = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        warnings.warn(
            f"{type(module).__name__}: no symmetry moves the neurons of {listed}, which are read by operations that no "
            "layer describes; print(scalegmn.read(module, example_input)) or scalegmn inspect says why",
            PinnedNeurons,
            stacklevel=2,
        )
    return reading.params


def read(
    module: nn.Module, example_input: ExampleInput, output: int | str | None = None, strict: bool = False
) -> Reading:
    """What `from_module` reads, with what was recognised and which neurons are free, tied or pinned, and why.

    `print(scalegmn.read(module, x))` shows a line for each layer. Arguments and errors as of `from_module`.
    """
    plain = without_parametrizations(module)
    layers, spec = trace_module(plain, example_input, output, strict)
    _READINGS[module] = (_signature(module, example_input, output), layers, spec)
    return Reading.of(read_parameters(named_tensors(plain), layers, spec), layers)


def to_module(
    params: NetParams, module: nn.Module, example_input: ExampleInput, output: int | str | None = None
) -> nn.Module:
    """A copy of a module with the parameters of one network of its architecture: the way back, to the bit.

    A module whose weights are computed from others (weight norm, pruning) becomes one that has the weights themselves.

    Args:
        params: one network.
        module: any module of this architecture, such as the one that `from_module` read.
        example_input: as in `from_module`.
        output: as in `from_module`.

    Raises:
        ValueError: as `from_module`; the parameters are of another architecture, of several networks, or differ where
            the module shares them.
    """
    plain = without_parametrizations(module)
    signature = _signature(module, example_input, output)
    known, layers, spec = _READINGS.get(module, (None, [], None))
    if known != signature or spec is None:
        layers, spec = trace_module(plain, example_input, output, is_strict=False)
        _READINGS[module] = (signature, layers, spec)
    drop_caches(plain)
    written = copy.deepcopy(plain) if plain is module else plain
    write_parameters(params, written, layers, spec)
    return written


def _signature(module: nn.Module, example_input: ExampleInput, output: int | str | None) -> Any:
    """What layers and spec of a module depend on."""
    tensors = [(name, tensor.shape, tensor.data_ptr()) for name, tensor in named_tensors(module).items()]
    inputs = [
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
        for leaf in _pytree.tree_leaves(example_input)
    ]
    return repr(module), tensors, repr(inputs), output
