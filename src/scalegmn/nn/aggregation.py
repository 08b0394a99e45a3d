"""Aggregation of rows that belong together: messages per receiver, nodes per network."""

from __future__ import annotations

from torch import Tensor


def aggregate(rows: Tensor, index: Tensor, num_rows: int, way: str = "add") -> Tensor:
    """y_i = the sum, mean, minimum or maximum, componentwise, of all rows x_k with index_k = i; 0 where there are none.

    Args:
        rows: x, [E, D].
        index: [E] long.
        num_rows: of the result, N.
        way: `add`, `mean`, `min` or `max`.

    Returns:
        [N, D].
    """
    from torch_geometric.utils import scatter  # takes seconds to import, and only plain forms need it

    result: Tensor = scatter(rows, index, dim=0, dim_size=num_rows, reduce=way)
    return result
