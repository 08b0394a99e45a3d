"""Fast forms of messages and edge updates on blocks of edges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalegmn.engine.dispatch import FastForms
from scalegmn.engine.edges import DenseEdges, Edges
from scalegmn.engine.modules import (
    after_first_linear,
    first_linear,
    hidden_layers,
    invariant_then_linear,
    run,
)
from scalegmn.engine.programs import (
    concat_message_program,
    concat_update_program,
    edge_update_program,
    message_program,
)
from scalegmn.engine.rows import GatheredRows, Rows, ScaledRows, gathered, linear, times
from scalegmn.nn.messages import ConcatEdgeUpdate, ConcatMessage, ProductMessage, ScaleEdgeUpdate, ScaleMessage


def _plain_message(
    message: nn.Module,
    aggregator: str,
    edges: Edges,
    senders: Tensor,
    receivers: Tensor,
    positions: Tensor | GatheredRows | None,
) -> Tensor:
    """A message function in its plain form, on edges that are multiplied out."""
    features, others = edges.multiplied_out(), [] if positions is None else [gathered(positions)]
    shape = features.shape[:-1]
    ends = [edges.at_receivers(receivers), edges.at_senders(senders)]
    inputs = [x.expand(*shape, x.shape[-1]).flatten(0, -2) for x in (*ends, features, *others)]
    return edges.aggregate(message(edges.context(), *inputs).unflatten(0, shape), aggregator)


def _plain_edge_update(update: nn.Module, edges: Edges, senders: Tensor, receivers: Tensor) -> Tensor:
    """An edge update in its plain form, on edges that are multiplied out."""
    features = edges.multiplied_out()
    shape = features.shape[:-1]
    ends = [edges.at_receivers(receivers), edges.at_senders(senders)]
    inputs = [x.expand(*shape, x.shape[-1]).flatten(0, -2) for x in (*ends, features)]
    return update(edges.context(), *inputs).unflatten(0, shape)


send = FastForms(lambda message, nodes: nodes)
"""send(message, nodes) is what messages read of their senders [B, S, d] or [S, d], once for all edges."""

receive = FastForms(_plain_message)
"""receive(message, aggregator, edges, senders, receivers, positions) is what the receivers of a block get, [B, R, d] or
[R, d]. Edges [B, R, S, d], `send` of nodes [B, S, d], nodes [B, R, d], positions broadcasting to [R, S, d]; of sparse
blocks [E, d], [S, d], [R, d], [E, d]. Receivers are not needed by messages with a fast form."""

edge_ends = FastForms(lambda update, rows, nodes: (nodes, nodes))
"""edge_ends(update, rows, nodes) is what an edge update reads of nodes as senders, and as receivers."""

updated_edges = FastForms(_plain_edge_update)
"""updated_edges(update, edges, senders, receivers): new features [B, R, S, D] or [E, D], for `edge_ends` of both."""


@send.register(ProductMessage)
@send.register(ScaleMessage)
def _send_product(message: ProductMessage | ScaleMessage, nodes: Tensor) -> Tensor:
    return message.node_linear(nodes)


@receive.register(ScaleMessage)
def _receive_scale(
    message: ScaleMessage,
    aggregator: str,
    edges: Edges,
    senders: Tensor,
    receivers: Tensor | None,
    positions: Tensor | GatheredRows | None,
) -> Tensor:
    if isinstance(edges, DenseEdges):
        form, extra = _form(edges), None if positions is None else gathered(positions)[None]
        extra_width = 0 if extra is None else extra.shape[-1]
        program = message_program(message, edges.rows.role, senders, form, extra_width)
        if program is not None:
            inputs = _inputs(edges, form, message.edge_linear.weight, edges.at_senders(senders))
            total = program(edges.values.shape[:3], inputs, extra=extra)
            return total if aggregator == "add" else total / edges.degree
    x = edges.times_senders(edges.linear(message.edge_linear.weight), senders)
    extras = [] if positions is None else [positions]
    return edges.aggregate(run(message.net, edges.rows, x, *extras), aggregator)


def _form(edges: DenseEdges) -> str:
    """How a program reads edges."""
    if edges.updates or edges.matrix is None:
        return "features"
    return "scaled" if edges.matrix.shape[-1] == 1 and edges.shift is None else "product"


def _inputs(edges: DenseEdges, form: str, weight: Tensor, factor: Tensor | None = None) -> list[Tensor]:
    """What a program reads of edges in a form, and of a factor by which W e is multiplied."""
    if form == "features":
        return [edges.features()] if factor is None else [edges.features(), factor]
    with torch.autocast(weight.device.type, enabled=False):
        product = edges.linear(weight)
    if isinstance(product, ScaledRows):
        return [gathered(product.values), *([] if factor is None else [factor]), product.scale]
    return [product] if factor is None else [product, factor]


@receive.register(ProductMessage)
def _receive_product(
    message: ProductMessage,
    aggregator: str,
    edges: Edges,
    senders: Tensor,
    receivers: Tensor | None,
    positions: Tensor | GatheredRows | None,
) -> Tensor:
    return edges.aggregate(edges.times_senders(edges.linear(message.edge_linear.weight), senders), aggregator)


@send.register(ConcatMessage)
def _send_concat(message: ConcatMessage, nodes: Tensor) -> Tensor:
    """The senders' part of the first Linear."""
    return first_linear(message.mlp, nodes)[1]


@receive.register(ConcatMessage)
def _receive_concat(
    message: ConcatMessage,
    aggregator: str,
    edges: Edges,
    senders: Tensor,
    receivers: Tensor | None,
    positions: Tensor | GatheredRows | None,
) -> Tensor:
    """The last Linear acts on the aggregate."""
    first, last = message.mlp.linears[0], message.mlp.linears[-1]
    own, degree, total = first.weight[:, : first.in_features // 2], edges.degree, None
    if isinstance(edges, DenseEdges):
        form = _form(edges)
        program = concat_message_program(message, senders, form)
        if program is not None:
            total = program(edges.values.shape[:3], [*_inputs(edges, form, own), edges.at_senders(senders)])
    if total is None:
        total = edges.sum(hidden_layers(message.mlp, edges.linear(own, edges.at_senders(senders))))
    if aggregator == "mean":
        count = max(degree, 1) if isinstance(degree, int) else degree.clamp_min(1)
        reached = min(degree, 1) if isinstance(degree, int) else degree.clamp_max(1)  # 0: no message comes, nor a bias
        return linear(total / count, last.weight, reached * last.bias)
    return linear(total, last.weight, degree * last.bias)


@edge_ends.register(ScaleEdgeUpdate)
def _ends_scale(update: ScaleEdgeUpdate, rows: Rows, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Their parts of phi's first Linear."""
    first = update.phi.linears[0]
    weight = torch.cat(first.weight.chunk(2, dim=1))
    bias = torch.cat([torch.zeros_like(first.bias), first.bias])
    return invariant_then_linear(update.invariant, rows, nodes, weight, bias).chunk(2, dim=-1)


@updated_edges.register(ScaleEdgeUpdate)
def _update_scale(update: ScaleEdgeUpdate, edges: Edges, senders: Tensor, receivers: Tensor) -> Tensor:
    if isinstance(edges, DenseEdges):
        form = _form(edges)
        program = edge_update_program(update, senders, form)
        if program is not None:
            inputs = _inputs(edges, form, update.linear.weight)
            ends = edges.at_senders(senders), edges.at_receivers(receivers)
            return program(edges.values.shape[:3], [*ends, *inputs])
    factor = after_first_linear(update.phi, edges.at_senders(senders) + edges.at_receivers(receivers))
    new = times(edges.linear(update.linear.weight), factor)
    return new.product() if isinstance(new, ScaledRows) else new


@edge_ends.register(ConcatEdgeUpdate)
def _ends_concat(update: ConcatEdgeUpdate, rows: Rows, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Their parts of phi's first Linear."""
    first = update.phi.linears[0]
    _, sender, receiver = first.weight.chunk(3, dim=1)
    return linear(nodes, sender), linear(nodes, receiver, first.bias)


@updated_edges.register(ConcatEdgeUpdate)
def _update_concat(update: ConcatEdgeUpdate, edges: Edges, senders: Tensor, receivers: Tensor) -> Tensor:
    weight, _, _ = update.phi.linears[0].weight.chunk(3, dim=1)
    if isinstance(edges, DenseEdges):
        form = _form(edges)
        program = concat_update_program(update, senders, form)
        if program is not None:
            both = edges.at_senders(senders), edges.at_receivers(receivers)
            return program(edges.values.shape[:3], [*_inputs(edges, form, weight), *both])
    ends = edges.at_senders(senders) + edges.at_receivers(receivers)
    return after_first_linear(update.phi, edges.linear(weight, ends))
