"""Contexts: to which role, scalar group and network rows of features belong.

Modules that treat rows differently (`ByRole`, `ByScalarGroup`) are called as module(context, x, ...) with the context
of the rows of x; modules around them pass it on, and modules in their place that treat all rows alike do not read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from scalegmn.networks.parameter_indices import ROLES
from scalegmn.networks.scalar_groups import ScalarGroup

__all__ = ["ROLES", "EdgeContext", "NodeContext", "select_branches"]


@dataclass(frozen=True)
class NodeContext:
    """Role, scalar group and network of n rows of node features; `context[index]` is the context of `rows[index]`.

    Attributes:
        role: [n] long, index into `ROLES`.
        group: [n] long, index into `groups`.
        network: [n] long, the network of each row.
        groups: the scalar groups for which the model has branches; one unless its symmetry is `hetero`.
    """

    role: Tensor
    group: Tensor
    network: Tensor
    groups: tuple[ScalarGroup, ...]

    def __getitem__(self, index: Tensor | slice) -> NodeContext:
        """The context of `rows[index]`, for an index, a mask or a slice of rows."""
        return NodeContext(self.role[index], self.group[index], self.network[index], self.groups)


class EdgeContext(NamedTuple):
    """The contexts of the nodes at both ends of E edges."""

    receiver: NodeContext
    sender: NodeContext


def select_branches(
    branches: Sequence[tuple[Tensor, nn.Module]], context: NodeContext, inputs: Sequence[Tensor]
) -> Tensor:
    """Rows [n, out] of which each branch computes those of its mask; rows of no branch are zero.

    Args:
        branches: (mask [n] bool, module called as module(context, *inputs)).
        context: of the n rows.
        inputs: [n, D] each.
    """
    outputs = [(mask, module(context[mask], *(x[mask] for x in inputs))) for mask, module in branches]
    result: Tensor = outputs[0][1].new_zeros(len(inputs[0]), outputs[0][1].shape[-1])
    for mask, rows in outputs:
        result[mask] = rows
    return result
