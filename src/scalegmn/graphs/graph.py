"""The parameter graph in dense blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scalegmn.networks import NetParams, NetSpec


@dataclass(frozen=True)
class ParameterGraph:
    """The parameter graphs of B networks of one spec, as one block of nodes and one of edges per layer.

    Gathering a node's features onto its edges is broadcasting, aggregation a sum over one axis; there are no index
    tensors.

    Attributes:
        spec: the architecture.
        nodes: per node layer 0..L, [B, n_l, D].
        edges: per block l = 1..L (at index l - 1), [B, n_l, n_{l-1}, D]: receiver, then sender.
    """

    spec: NetSpec
    nodes: tuple[Tensor, ...]
    edges: tuple[Tensor, ...]

    @classmethod
    def from_params(cls, params: NetParams) -> ParameterGraph:
        """The graph with raw features: biases on nodes (D = 1), weights or padded kernels on edges (D = K)."""
        return cls(params.spec, tuple(params.node_features()), tuple(params.edge_features()))
