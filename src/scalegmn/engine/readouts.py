"""Fast forms of readouts."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from scalegmn.engine.dispatch import FastForms
from scalegmn.engine.modules import run, run_mlp
from scalegmn.engine.rows import Rows
from scalegmn.nn.readout import DeepSetReadout, EndsReadout, EqualOutputs, GraphReadout, OutputReadout

Total = Callable[[Tensor], Tensor]
"""Rows of hidden nodes, [B, n, D] or [n, D] of all networks -> their sum in each network, [B, D]."""


def _plain(
    readout: nn.Module, rows: Rows, inputs: Tensor, hidden: Tensor, outputs: Tensor, total: Total, *statistics: Tensor
) -> Tensor:
    context = rows.context(hidden.shape[:-1], hidden.device)
    return readout(context, inputs, hidden.flatten(0, -2), outputs, *statistics)


read = FastForms(_plain)
"""read(readout, rows, inputs, hidden, outputs, total, *statistics) -> [B, out_dim], of the features of input nodes
[B, n_0, d], of hidden nodes [B, n, d] or [n, d], which `rows` describe, of output nodes [B, n_L, d], and of what else
the readout was built for, [B, S]."""


@read.register(OutputReadout)
def _outputs(
    readout: OutputReadout,
    rows: Rows,
    inputs: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    total: Total,
    *statistics: Tensor,
) -> Tensor:
    return run_mlp(readout.mlp, outputs.flatten(1), *statistics)


@read.register(EndsReadout)
def _ends(
    readout: EndsReadout, rows: Rows, inputs: Tensor, hidden: Tensor, outputs: Tensor, total: Total, *statistics: Tensor
) -> Tensor:
    ends = readout.output_projection(outputs.flatten(1)), readout.input_projection(inputs.flatten(1))
    return run_mlp(readout.mlp, *ends, *statistics)


@read.register(GraphReadout)
def _graph(
    readout: GraphReadout,
    rows: Rows,
    inputs: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    total: Total,
    *statistics: Tensor,
) -> Tensor:
    pooled = total(run(readout.invariant_layer, rows, hidden))
    return run_mlp(readout.mlp, pooled, inputs.flatten(1), outputs.flatten(1), *statistics)


@read.register(EqualOutputs)
def _equal_outputs(
    readout: EqualOutputs,
    rows: Rows,
    inputs: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    total: Total,
    *statistics: Tensor,
) -> Tensor:
    return read(readout.readout, rows, inputs, hidden, readout.pooled(outputs), total, *statistics)


@read.register(DeepSetReadout)
def _deep_set(
    readout: DeepSetReadout,
    rows: Rows,
    inputs: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    total: Total,
    *statistics: Tensor,
) -> Tensor:
    ends = (readout.local_mlp(nodes).sum(1) for nodes in (inputs, outputs))
    first, last = ends
    return readout.global_mlp(first + total(readout.local_mlp(hidden)) + last, *statistics)
