"""SiLU of `GraphNorm`, as a program of `plans`, by `graph_norms.cpp`.

Shape letters: B networks, N nodes, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import nn

from scalegmn.engine.row_programs import LANES, Address, InputPlace, Nodes, Numbers, ResultPlace, bits
from scalegmn.nn.pna import GraphNorm

NORM = 2
"""The first word of such a program, where others say whether their numbers are in double precision."""


class NormProgram:
    """SiLU(norm(x)) of the nodes of B networks, [B, N, 1, d], like a `RowProgram` that a plan runs.

    There are no second derivatives.

    Args:
        norm: the module; d is a multiple of `LANES`.
    """

    num_given = 0
    rounds = False
    ends_with_rows = True

    def __init__(self, norm: GraphNorm) -> None:
        self.width, self.epsilon = len(norm.weight), norm.epsilon
        assert self.width % LANES == 0
        self.tensors: list[tuple[ref[nn.Module], str]] = [(ref(norm), "weight"), (ref(norm), "bias")]

    @staticmethod
    def tape_size(shape: Sequence[int], halves: bool, num_threads: int) -> int:
        """Mean and deviation of each network, as in `RowProgram`."""
        return 2 * shape[0]

    @staticmethod
    def flags(needed: Sequence[bool]) -> list[bool]:
        """None: what is needed has an address."""
        return []

    def words(
        self,
        numbers: Numbers,
        shape: Sequence[int],
        inputs: Sequence[InputPlace],
        parameters: Sequence[tuple[torch.Size, tuple[Address, Address]]],
        result: ResultPlace,
        tape: Address,
        flags: Sequence[bool] | None,
        nodes: Nodes | None = None,
    ) -> list[Any]:
        """What graph_norms.cpp reads; arguments as in `RowProgram`."""
        (x,), ((_, scale), (_, shift)) = inputs, parameters
        assert not x.gradient.adds  # nothing else reads them, and they stand one after the other
        assert not flags
        assert nodes is None
        words: list[Any] = [NORM, numbers.dtype == torch.float64, *shape[:2], self.width, numbers.num_threads]
        words += [x.address, scale[0], shift[0], result.address, tape]
        words += [result.gradient, x.gradient.address, scale[1], shift[1], bits(self.epsilon)]
        return words
