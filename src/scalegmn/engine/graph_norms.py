"""SiLU of `GraphNorm`, and its gradient, by `graph_norms.cpp`.

Shape letters: B networks, N nodes, d width.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from scalegmn.engine import native
from scalegmn.engine.derivatives import once_differentiable
from scalegmn.engine.row_programs import LANES
from scalegmn.nn.pna import GraphNorm


def silu_of_norm(norm: GraphNorm, x: Tensor) -> Tensor:
    """SiLU(norm(x)) of the nodes of B networks, [B, N, d]; d is a multiple of `LANES`.

    Raises:
        ValueError: shapes do not fit.
    """
    if x.ndim != 3 or x.shape[2:] != norm.weight.shape or x.shape[2] % LANES or not x.numel():
        raise ValueError(f"found shape {[*x.shape]}, expected [B, N, {len(norm.weight)}], a multiple of {LANES}")
    result: Tensor = _SiluOfNorm.apply(x.to(norm.weight.dtype), norm.weight, norm.bias, norm.epsilon)  # type: ignore[no-untyped-call]
    return result


class _SiluOfNorm(torch.autograd.Function):
    """There are no second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
        """SiLU(scale * (x - mean) / (deviation + epsilon) + shift)."""
        x, scale, shift = (tensor.contiguous() for tensor in (x, scale, shift))
        result, moments = torch.empty(x.shape, dtype=x.dtype), x.new_empty(len(x), 2)
        _call([x, scale, shift, result, moments], epsilon, backward=False)
        ctx.epsilon = epsilon
        ctx.save_for_backward(x, scale, shift, moments)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, scale and shift."""
        x, scale, shift, moments = ctx.saved_tensors
        gradients = [torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(shift)]
        _call([x, scale, shift, x, moments, gradient.contiguous(), *gradients], ctx.epsilon, backward=True)
        return (*gradients, None)


def _call(tensors: list[Tensor], epsilon: float, backward: bool) -> None:
    """Runs the library; tensors as in graph_norms.cpp."""
    library, shape = native.library(), tensors[0].shape
    assert library is not None
    words = [tensors[0].dtype == torch.float64, *shape, torch.get_num_threads()]
    words += [*(x.data_ptr() for x in tensors), *[0] * (9 - len(tensors))]
    words.append(struct.unpack("q", struct.pack("d", epsilon))[0])
    library.graph_norm((ctypes.c_int64 * len(words))(*words), ctypes.c_int64(backward))
