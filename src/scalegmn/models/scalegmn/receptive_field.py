"""What each message passing layer must compute, because something later reads it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from scalegmn.networks import NetSpec
from scalegmn.nn.context import ROLES
from scalegmn.nn.message_passing import NeededParts

if TYPE_CHECKING:
    from scalegmn.models.scalegmn.config import ScaleGMNConfig


def needed_by_role(config: ScaleGMNConfig, spec: NetSpec, by_layer: Sequence[NeededParts]) -> list[NeededParts]:
    """Per message passing layer, which roles of nodes and which edges between roles something later reads.

    This is the receptive field of a chain with one hidden layer, input -> hidden -> output: the fewer layers a network
    has, the sooner a message comes from one end to the other. Models that read only chains of one depth drop the roles
    that do not occur in `by_layer`, the receptive field by layer.
    """
    by_role = receptive_field(config, len(ROLES) - 1, skips=skips_hidden_layers(spec))
    if config.max_hidden_layers is not None or spec.residuals or not spec.is_chain:
        return by_role
    roles = [{spec.roles[layer] for layer in of_chains.nodes} for of_chains in by_layer]
    return [
        replace(needed, nodes=tuple(role for role in needed.nodes if ROLES[role] in occurring))
        for needed, occurring in zip(by_role, roles, strict=True)
    ]


def skips_hidden_layers(spec: NetSpec) -> bool:
    """Whether the output layer reads the network's input."""
    last = spec.num_layers - 1
    senders = [spec.sender(last), *(residual.source for residual in spec.residuals if residual.receiver == last)]
    return any(sender < 0 for sender in senders)


def receptive_field(config: ScaleGMNConfig, last: int, skips: bool = False) -> list[NeededParts]:
    """Per message passing layer, what something later reads, found from the readout back.

    Args:
        config: the hyper-parameters.
        last: the last of the sets of nodes 0..last of a chain; block k of edges goes from set k - 1 to set k.
        skips: whether edges into the last set come from set 0, too.
    """

    def ends_of(blocks: Collection[int]) -> set[int]:
        """The sets of nodes at either end of edge blocks."""
        return {block - 1 for block in blocks} | set(blocks) | ({0} if skips and last in blocks else set())

    bidirectional = config.direction == "bidirectional"
    nodes: set[int] = set(range(last + 1))
    edges: set[int] = set()
    backward_edges: set[int] = set()
    if config.output == "parameters":
        nodes, edges = set(range(1, last + 1)), set(range(1, last + 1))
    elif config.readout == "last_layer":
        nodes = {0, last} if bidirectional else {last}
    needed = []
    for _ in range(config.num_layers):
        needed.append(NeededParts(*(tuple(sorted(part)) for part in (nodes, edges, backward_edges))))
        # the blocks whose messages these nodes receive: along the edges, and against them
        along, against = {k for k in nodes if k > 0}, {k + 1 for k in nodes if k < last}
        before = nodes | ends_of(edges) | ends_of(backward_edges) | ends_of(along)
        if config.update_edges:
            edges = edges | along
        if bidirectional:
            before |= ends_of(against)
            if config.update_edges and config.symmetry == "scale":
                backward_edges = backward_edges | against
        nodes = before
    return needed[::-1]


def residual_ends(spec: NetSpec, against: bool) -> set[str]:
    """The roles of nodes at which residual connections end or, against them, start."""
    last = spec.num_layers - 1
    outside = any(residual.source < 0 if against else residual.receiver == last for residual in spec.residuals)
    ends = {"input" if against else "output"} if outside else set()
    return ends | {"hidden"} if spec.residuals else ends
