"""Readouts: from node features to one vector per network.

Every readout is called as readout(context, inputs, hidden, outputs): the features of the input nodes [B, n_0, d], of
the hidden nodes of all networks [n, d], and of the output nodes [B, n_L, d]; `context` belongs to the hidden nodes.
Built for `num_statistics` S, it reads S numbers of each network, [B, S], beside the nodes, as a fifth argument.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from scalegmn.nn.aggregation import aggregate
from scalegmn.nn.context import NodeContext
from scalegmn.nn.mlp import BuildMLP


class OutputReadout(nn.Module):
    """MLP(concatenated output nodes), which are fixed points of the group. For forward models.

    Args:
        dim: width d of node features.
        num_outputs: n_L.
        out_dim: width of the result.
        mlp: builds the MLP.
        num_statistics: S.
    """

    def __init__(self, dim: int, num_outputs: int, out_dim: int, mlp: BuildMLP, num_statistics: int = 0) -> None:
        super().__init__()
        self.mlp = mlp(num_outputs * dim + num_statistics, out_dim)

    def forward(
        self, context: NodeContext, inputs: Tensor, hidden: Tensor, outputs: Tensor, *statistics: Tensor
    ) -> Tensor:
        """Features of nodes, see the module's docstring -> [B, out_dim]."""
        new: Tensor = self.mlp(outputs.flatten(1), *statistics)
        return new


class EndsReadout(nn.Module):
    """MLP([project(output nodes), project(input nodes)]), each concatenated. For bidirectional models.

    Args:
        dim: width d of node features and of both projections.
        num_inputs: n_0.
        num_outputs: n_L.
        out_dim: width of the result.
        project: builds the projections: a Linear, or an MLP.
        mlp: builds the MLP, 2d + S -> out_dim.
        num_statistics: S.
    """

    def __init__(
        self,
        dim: int,
        num_inputs: int,
        num_outputs: int,
        out_dim: int,
        project: Callable[[int, int], nn.Module],
        mlp: BuildMLP,
        num_statistics: int = 0,
    ) -> None:
        super().__init__()
        self.output_projection = project(num_outputs * dim, dim)
        self.input_projection = project(num_inputs * dim, dim)
        self.mlp = mlp(2 * dim + num_statistics, out_dim)

    def forward(
        self, context: NodeContext, inputs: Tensor, hidden: Tensor, outputs: Tensor, *statistics: Tensor
    ) -> Tensor:
        """Features of nodes, see the module's docstring -> [B, out_dim]."""
        ends = self.output_projection(outputs.flatten(1)), self.input_projection(inputs.flatten(1))
        new: Tensor = self.mlp(*ends, *statistics)
        return new


class GraphReadout(nn.Module):
    """MLP([sum over hidden nodes of g(x), input nodes, output nodes]), g an invariant layer (ScaleGMN, eq. 17).

    Args:
        dim: width d of node features.
        num_ends: n_0 + n_L.
        invariant_layer: g, d -> readout_dim, called as g(context, x).
        readout_dim: width of g(x).
        out_dim: width of the result.
        mlp: builds the MLP.
        num_statistics: S.
    """

    def __init__(
        self,
        dim: int,
        num_ends: int,
        invariant_layer: nn.Module,
        readout_dim: int,
        out_dim: int,
        mlp: BuildMLP,
        num_statistics: int = 0,
    ) -> None:
        super().__init__()
        self.invariant_layer = invariant_layer
        self.mlp = mlp(readout_dim + num_ends * dim + num_statistics, out_dim)

    def forward(
        self, context: NodeContext, inputs: Tensor, hidden: Tensor, outputs: Tensor, *statistics: Tensor
    ) -> Tensor:
        """Features of nodes, see the module's docstring -> [B, out_dim]."""
        pooled = aggregate(self.invariant_layer(context, hidden), context.network, len(inputs))
        new: Tensor = self.mlp(pooled, inputs.flatten(1), outputs.flatten(1), *statistics)
        return new


class EqualOutputs(nn.Module):
    """readout(..., the mean over output nodes of MLP(x) in their place): the same for outputs in any order.

    Args:
        readout: a readout of one output node.
        dim: width d of node features.
        mlp: builds the MLP.
    """

    def __init__(self, readout: nn.Module, dim: int, mlp: BuildMLP) -> None:
        super().__init__()
        self.readout = readout
        self.mlp = mlp(dim, dim)

    def pooled(self, outputs: Tensor) -> Tensor:
        """[B, n_L, d] -> [B, 1, d]."""
        mean: Tensor = self.mlp(outputs).mean(1, keepdim=True)
        return mean

    def forward(
        self, context: NodeContext, inputs: Tensor, hidden: Tensor, outputs: Tensor, *statistics: Tensor
    ) -> Tensor:
        """Features of nodes, see the module's docstring -> [B, out_dim]."""
        new: Tensor = self.readout(context, inputs, hidden, self.pooled(outputs), *statistics)
        return new


class DeepSetReadout(nn.Module):
    """MLP(sum over all nodes of MLP(x)), permutation-invariant (Zaheer et al., 2017).

    Args:
        dim: width d of node features.
        readout_dim: width of the sum.
        out_dim: width of the result.
        mlp: builds both MLPs.
        num_statistics: S, read by the second one.
    """

    def __init__(self, dim: int, readout_dim: int, out_dim: int, mlp: BuildMLP, num_statistics: int = 0) -> None:
        super().__init__()
        self.local_mlp = mlp(dim, readout_dim)
        self.global_mlp = mlp(readout_dim + num_statistics, out_dim)

    def forward(
        self, context: NodeContext, inputs: Tensor, hidden: Tensor, outputs: Tensor, *statistics: Tensor
    ) -> Tensor:
        """Features of nodes, see the module's docstring -> [B, out_dim]."""
        pooled = aggregate(self.local_mlp(hidden), context.network, len(inputs))
        total = pooled + self.local_mlp(inputs).sum(1) + self.local_mlp(outputs).sum(1)
        new: Tensor = self.global_mlp(total, *statistics)
        return new
