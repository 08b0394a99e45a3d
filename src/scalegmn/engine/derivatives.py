"""Backward passes without derivatives of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiable(backward: Backward) -> Backward:
    """A backward pass whose results raise RuntimeError where they are differentiated.

    PyTorch's decorator of this name raises it only where all of a graph is run: `torch.autograd.grad` goes past it to
    the tensors that it is asked for, and second derivatives then lack what goes through this function.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return results
        tensors = [result for result in results if result is not None]
        read = [tensor for tensor in (*gradients, *ctx.saved_tensors) if tensor is not None]
        refusing = iter(_Refusing.apply(len(tensors), *tensors, *read))  # type: ignore[no-untyped-call]
        return tuple(None if result is None else next(refusing) for result in results)

    return wrapped


class _Refusing(torch.autograd.Function):
    """The first tensors, as functions of all."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As they are."""
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Raises RuntimeError."""
        raise RuntimeError("the fast form has no second derivatives; build the model with engine: plain")
