"""Models as a run calls them: in the run's precision, compiled or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def mark_batch_size_dynamic(inputs: Any) -> None:
    """Tells `torch.compile` that the number of networks varies, so that it does not compile a model for each number.

    Args:
        inputs: a batch, whose `tensors()` have one row per network.
    """
    for tensor in inputs.tensors():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


class InPrecision(nn.Module):
    """A model that computes in the precision of a Fabric and returns outputs in at least single precision.

    Args:
        model: the model.
        fabric: defines the precision.
        compiled: whether `model` is compiled.
    """

    def __init__(self, model: nn.Module, fabric: Fabric, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.fabric, self.compiled = model, fabric, compiled

    def forward(self, inputs: Any) -> Any:
        """The model's outputs."""
        if self.compiled:
            mark_batch_size_dynamic(inputs)
        with self.fabric.autocast():
            outputs = self.model(inputs)
        convert = self.fabric.strategy.precision.convert_output
        return outputs.map(convert) if hasattr(outputs, "map") else convert(outputs)  # networks, or tensors
