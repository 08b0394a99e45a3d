"""The equivariant layers of NFN: how many maps they have, of all that there are."""

from itertools import pairwise, permutations, product

import pytest
import torch

from scalegmn.nn.weight_space import HiddenNeuronLayer


def number_of_maps(layout):
    """The dimension of all linear maps of weights and biases that commute with permutations of hidden neurons: the mean
    square of the number of values that a permutation leaves in place."""
    squares = []
    for order in product(*(list(permutations(range(n))) for n in layout[1:-1])):
        kept = [layout[0], *(sum(i == k for i, k in enumerate(of_layer)) for of_layer in order), layout[-1]]
        squares.append((sum(a * b for a, b in pairwise(kept)) + sum(kept[1:])) ** 2)
    return sum(squares) / len(squares)


@pytest.mark.parametrize("layout", [(2, 3, 2), (1, 3, 4, 3), (2, 3, 3, 3, 2)])
def test_maps_of_hidden_neurons(layout):
    """All of them but one term, from b_{L-1} to W_L, which has a map for each output; none is there twice."""
    layer = HiddenNeuronLayer(layout, [1] * (len(layout) - 1), 1, 1).double()
    sizes = [*((b, a, 1) for a, b in pairwise(layout)), *((b, 1) for b in layout[1:])]
    counts = [torch.Size(size).numel() for size in sizes]

    def values(x):
        tensors = [part.unflatten(1, size) for part, size in zip(x.split(counts, 1), sizes, strict=True)]
        weights, biases = layer(tensors[: len(layout) - 1], tensors[len(layout) - 1 :])
        return torch.cat([tensor.flatten(1) for tensor in (*weights, *biases)], 1)

    unit, zero = torch.eye(sum(counts), dtype=torch.float64), torch.zeros(1, sum(counts), dtype=torch.float64)
    maps = []
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for parameter in layer.parameters():
            for k in range(parameter.numel()):
                parameter.view(-1)[k] = 1
                maps.append((values(unit) - values(zero)).flatten())
                parameter.view(-1)[k] = 0
    rank = torch.linalg.matrix_rank(torch.stack(maps)).item()
    assert rank == number_of_maps(layout) - layout[-1]
