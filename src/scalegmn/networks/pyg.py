"""Parameter graphs as PyTorch Geometric's `Batch`, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scalegmn.networks import features

if TYPE_CHECKING:
    from scalegmn.networks.params import NetParams
    from scalegmn.networks.spec import NetSpec


def to_pyg(params: NetParams) -> Any:
    """A `torch_geometric.data.Batch` of B graphs.

    Each has `x` [N, 1], `edge_index` [2, E] (rows sender, receiver; the spec's edge order), `edge_attr` [E, K],
    `node_type` [N] and, of networks that differ in it, `activation` [1], an index into `spec.activations`.
    """
    from torch_geometric.data import Batch, Data

    nodes = torch.cat(features.node_features(params), dim=1)
    edges = torch.cat([block.flatten(1, 2) for block in features.edge_features(params)], dim=1)
    edge_index = params.spec.edge_index.to(nodes.device)
    node_type = torch.cat(params.spec.node_types).to(nodes.device)
    graphs = [
        Data(x=x, edge_index=edge_index, edge_attr=edge_attr, node_type=node_type)
        for x, edge_attr in zip(nodes, edges, strict=True)
    ]
    if params.activation is not None:
        for graph, activation in zip(graphs, params.activation, strict=True):
            graph.activation = activation[None]
    return Batch.from_data_list(graphs)


def features_of_pyg(batch: Any, spec: NetSpec) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Node features, edge features and activations from what `to_pyg` returns, or from one `Data` of it, for networks
    without batch norms.

    Raises:
        ValueError: the graphs are not parameter graphs of `spec`, or it has batch norms: graphs lack statistics.
    """
    from torch_geometric.data import Batch

    if any(layer.norm == "batch" for layer in spec.layers):
        raise ValueError(f"a parameter graph has no statistics of batch norms, found {spec}; fold them first")
    if not isinstance(batch, Batch):
        batch = Batch.from_data_list([batch])
    num = batch.num_graphs
    expected = {"x": (num * spec.num_nodes, 1), "edge_attr": (num * spec.num_edges, spec.edge_dim)}
    for key, shape in expected.items():
        if tuple(batch[key].shape) != shape:
            raise ValueError(f"{key} has shape {tuple(batch[key].shape)}, expected {shape} for {num} x {spec}")
    offsets = torch.arange(num, device=batch.x.device) * spec.num_nodes
    edge_index = spec.edge_index.to(batch.x.device)[:, None, :] + offsets[None, :, None]
    if not torch.equal(batch.edge_index, edge_index.flatten(1)):
        raise ValueError(f"edge_index is not in the edge order of {spec}: build graphs with NetParams.to_pyg")
    activation: Tensor | None = batch.get("activation")
    if spec.is_hetero and activation is None:
        raise ValueError(f"activation: missing, expected [{num}] indices for {spec}")
    nodes = list(batch.x.reshape(num, spec.num_nodes, 1).split(spec.layout, dim=1))
    shapes = [(layer.out_dim, layer.in_dim // layer.groups) for layer in spec.layers]
    blocks = batch.edge_attr.reshape(num, spec.num_edges, -1).split([rows * columns for rows, columns in shapes], dim=1)
    edges = [block.unflatten(1, shape) for block, shape in zip(blocks, shapes, strict=True)]
    return nodes, edges, activation
