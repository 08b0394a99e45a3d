"""From a module to `NetParams`, and back."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from scalegmn.interop.torch_modules.parameters import read_parameters, write_parameters
from scalegmn.interop.torch_modules.reader import trace_module
from scalegmn.networks import NetParams


def from_module(module: nn.Module, example_input: Tensor | Sequence[Tensor]) -> NetParams:
    """The parameters of a module, as a batch of one network; its batch norms as they evaluate.

    docs/architectures.md lists the layers and operations that are known.

    Args:
        module: the network; it is neither changed nor trained.
        example_input: the input that it is called with; only shapes and types count. Images [B, C, height, width],
            vectors [B, n], sequences [B, T, d] or, for embeddings, whole numbers [B, T].

    Raises:
        ValueError: a parameter graph cannot represent an operation; names it and its place in the module.
    """
    layers, spec = trace_module(module, example_input)
    return read_parameters(module, layers, spec)


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
    layers, spec = trace_module(module, example_input)
    written = copy.deepcopy(module)
    write_parameters(params, written, layers, spec)
    return written
