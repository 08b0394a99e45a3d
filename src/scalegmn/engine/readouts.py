"""Fast forms of readouts."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from scalegmn.engine.dispatch import FastForms
from scalegmn.engine.modules import run, run_mlp
from scalegmn.engine.rows import Rows
from scalegmn.nn.readout import DeepSetReadout, EndsReadout, GraphReadout, OutputReadout

Total = Callable[[Tensor], Tensor]
"""Rows of hidden nodes, [B, n, D] or [n, D] of all networks -> their sum in each network, [B, D]."""


def _plain(readout: nn.Module, rows: Rows, inputs: Tensor, hidden: Tensor, outputs: Tensor, total: Total) -> Tensor:
    context = rows.context(hidden.shape[:-1], hidden.device)
    return readout(context, inputs, hidden.flatten(0, -2), outputs)


read = FastForms(_plain)
"""read(readout, rows, inputs, hidden, outputs, total) -> [B, out_dim], of the features of input nodes [B, n_0, d], of
hidden nodes [B, n, d] or [n, d], which `rows` describe, and of output nodes [B, n_L, d]."""


@read.register(OutputReadout)
def _outputs(
    readout: OutputReadout, rows: Rows, inputs: Tensor, hidden: Tensor, outputs: Tensor, total: Total
) -> Tensor:
    return run_mlp(readout.mlp, outputs.flatten(1))


@read.register(EndsReadout)
def _ends(readout: EndsReadout, rows: Rows, inputs: Tensor, hidden: Tensor, outputs: Tensor, total: Total) -> Tensor:
    ends = readout.output_projection(outputs.flatten(1)), readout.input_projection(inputs.flatten(1))
    return run_mlp(readout.mlp, *ends)


@read.register(GraphReadout)
def _graph(readout: GraphReadout, rows: Rows, inputs: Tensor, hidden: Tensor, outputs: Tensor, total: Total) -> Tensor:
    pooled = total(run(readout.invariant_layer, rows, hidden))
    return run_mlp(readout.mlp, pooled, inputs.flatten(1), outputs.flatten(1))


@read.register(DeepSetReadout)
def _deep_set(
    readout: DeepSetReadout, rows: Rows, inputs: Tensor, hidden: Tensor, outputs: Tensor, total: Total
) -> Tensor:
    ends = (readout.local_mlp(nodes).sum(1) for nodes in (inputs, outputs))
    first, last = ends
    return readout.global_mlp(first + total(readout.local_mlp(hidden)) + last)
