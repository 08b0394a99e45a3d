"""What each message passing layer must compute, because something later reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scalegmn.engine.layout import LayerReads
from scalegmn.networks import NetSpec
from scalegmn.nn.context import ROLES

if TYPE_CHECKING:
    from scalegmn.models.scalegmn.config import ScaleGMNConfig


def reads_by_role(config: ScaleGMNConfig, spec: NetSpec, reads: Sequence[LayerReads]) -> list[LayerReads]:
    """Per message passing layer, what is read of any networks, by role: most in those with one hidden layer.

    Where all networks are chains of one depth, less: only roles that occur in `reads`.
    """
    last = spec.num_layers - 1
    into_output = {spec.sender(last), *(residual.source for residual in spec.residuals if residual.receiver == last)}
    by_role = receptive_field(config, len(ROLES) - 1, skips=min(into_output) < 0)
    if config.max_hidden_layers is not None or spec.residuals or not spec.is_chain:
        return by_role
    roles = [{spec.roles[layer] for layer in chain_reads.nodes} for chain_reads in reads]
    return [
        replace(role_reads, nodes=tuple(group for group in role_reads.nodes if ROLES[group] in occurring))
        for role_reads, occurring in zip(by_role, roles, strict=True)
    ]


def receptive_field(config: ScaleGMNConfig, last: int, skips: bool = False) -> list[LayerReads]:
    """Per message passing layer, what anything later reads in a chain of groups 0..last: from the readout back.

    Args:
        config: the model.
        last: the number of blocks of edges.
        skips: whether the last group reads the first, too.
    """

    def ends_of(blocks: Collection[int]) -> set[int]:
        """The groups at either end of edge blocks."""
        return {block - 1 for block in blocks} | set(blocks) | ({0} if skips and last in blocks else set())

    bidirectional = config.direction == "bidirectional"
    nodes: set[int] = set(range(last + 1))
    edges: set[int] = set()
    backward_edges: set[int] = set()
    if config.output == "parameters":
        nodes, edges = set(range(1, last + 1)), set(range(1, last + 1))
    elif config.readout == "last_layer":
        nodes = {0, last} if bidirectional else {last}
    reads = []
    for _ in range(config.num_layers):
        reads.append(LayerReads(*(tuple(sorted(part)) for part in (nodes, edges, backward_edges))))
        along, against = {group for group in nodes if group > 0}, {group + 1 for group in nodes if group < last}
        before = nodes | ends_of(edges) | ends_of(backward_edges) | ends_of(along)
        if config.update_edges:
            edges = edges | along
        if bidirectional:
            before |= ends_of(against)
            if config.update_edges and config.symmetry == "scale":
                backward_edges = backward_edges | against
        nodes = before
    return reads[::-1]
