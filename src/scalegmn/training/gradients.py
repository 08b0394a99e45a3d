"""Gradients of a batch: summed over micro-batches, and over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def backward_in_micro_batches(
    loss: Callable[[Any, Tensor], Tensor],
    inputs: Any,
    target: Tensor,
    max_size: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
    batch_size: int | None = None,
) -> Tensor:
    """Adds the gradient of a batch's mean loss, one micro-batch after the other: memory does not grow with the batch.

    Args:
        loss: (inputs, target) -> the mean over them.
        inputs: a batch that can be sliced, or one process's share of it.
        target: [B, ...].
        max_size: the largest number of networks in a micro-batch.
        backward: adds the gradient of a scalar to the parameters' gradients.
        batch_size: the number of networks of the whole batch, over which the mean is taken; None: B.

    Returns:
        The mean loss, or the share's contribution to it, detached.
    """
    total = torch.zeros((), device=target.device)
    num_micro_batches = max(1, math.ceil(len(target) / max_size))
    size = max(1, math.ceil(len(target) / num_micro_batches))  # equal sizes: the largest decides on memory
    for start in range(0, len(target), size):
        rows = slice(start, start + size)
        part = (inputs, target) if num_micro_batches == 1 else (inputs[rows], target[rows])
        contribution = loss(*part) * (len(part[1]) / (batch_size or len(target)))
        backward(contribution)
        total = total + contribution.detach()
    return total


def sum_over_processes(
    fabric: Fabric, parameters: nn.Parameter, loss: Tensor, flags: Sequence[bool]
) -> tuple[Tensor, list[bool]]:
    """Sums the processes' gradients and losses in a single message.

    Args:
        fabric: the processes.
        parameters: one tensor, whose gradient becomes the sum.
        loss: this process's contribution to the loss.
        flags: wishes of this process.

    Returns:
        The whole loss, and for each flag whether any process has set it.
    """
    assert parameters.grad is not None
    bits = torch.tensor(flags).to(loss)
    message = cast(Tensor, fabric.all_reduce(torch.cat([loss[None], bits, parameters.grad]), reduce_op="sum"))
    total, counts, summed = torch.split(message, [1, len(bits), parameters.numel()])
    parameters.grad.copy_(summed)
    return total[0], (counts > 0).tolist()
