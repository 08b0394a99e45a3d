"""Values that are moved between positions: how many units move, counted by hand."""

import pytest
import torch
from readings import Written, assert_needs_all_of_a_move, assert_read
from torch import nn
from torch.nn import functional

SENDERS, RECEIVERS = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 2, 3, 0, 3])
IMAGE = (2, 3, 6, 6)


def conv(in_dim, out_dim):
    return nn.Conv2d(in_dim, out_dim, 3, padding=1)


def graph_layer(m, x):
    h = m.a(x).relu()
    sums = torch.zeros(4, 6, dtype=x.dtype).index_add(0, RECEIVERS, h[SENDERS])
    most = torch.zeros_like(h).scatter_reduce(0, RECEIVERS[:, None].expand(-1, 6), h[SENDERS], "amax")
    return m.last((m.b(torch.cat([sums, h], -1)) + m.c(most)).relu())


def grid_of_vectors(m, x):
    places = x * 4
    first = places.floor().long()
    weight = places - first
    corners = [
        m.table((first[:, 0] + i + 31 * (first[:, 1] + j)) % 16) * (weight[:, :1] - 1 + i) * (weight[:, 1:] - 1 + j)
        for i in (0, 1)
        for j in (0, 1)
    ]
    return m.last(m.a(sum(corners)).relu())


def plane(m, x):
    return m.last(m.a(functional.grid_sample(m.plane, x[None, :, None], align_corners=True)[0, :, :, 0].mT).relu())


def patches(m, x):
    return m.last(m.b(functional.unfold(m.a(x).relu(), 3, padding=1).mT).relu().mean(1))


CASES = {
    "pixels that are shuffled": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 2)),
        IMAGE,
        [4, 8],
    ),
    "pixels side by side": (
        lambda: nn.Sequential(conv(3, 5), nn.ReLU(), nn.PixelUnshuffle(2), conv(20, 6), nn.ReLU(), conv(6, 2)),
        IMAGE,
        [5, 6],
    ),
    "patches": (lambda: Written(patches, a=conv(3, 4), b=nn.Linear(36, 8), last=nn.Linear(8, 2)), IMAGE, [4, 8]),
    "a graph's neighbours": (
        lambda: Written(graph_layer, a=nn.Linear(5, 6), b=nn.Linear(12, 7), c=nn.Linear(6, 7), last=nn.Linear(7, 2)),
        (4, 5),
        [6, 7],
    ),
    "a grid of vectors": (
        lambda: Written(grid_of_vectors, table=nn.Embedding(16, 3), a=nn.Linear(3, 8), last=nn.Linear(8, 1)),
        (6, 2),
        [3, 8],
    ),
    "a plane of vectors": (
        lambda: Written(plane, plane=nn.Parameter(torch.randn(1, 3, 4, 4)), a=nn.Linear(3, 8), last=nn.Linear(8, 1)),
        (6, 2),
        [3, 8],
    ),
    "a bilinear layer, whose second channels stay": (
        lambda: Written(
            lambda m, x: m.last(m.both(m.a(x).tanh(), m.b(x).tanh()).tanh()),
            a=nn.Linear(5, 6),
            b=nn.Linear(5, 4),
            both=nn.Bilinear(6, 4, 7),
            last=nn.Linear(7, 2),
        ),
        (3, 5),
        [6, 7],
    ),
}
"""Name -> a module, the shape of its input, and its units that may be permuted, class by class."""


@pytest.mark.parametrize("name", CASES)
def test_units_that_move(name, generator):
    make, shape, classes = CASES[name]
    torch.manual_seed(0)
    module, x = make().double().eval(), torch.rand(shape, dtype=torch.float64)
    params = assert_read(module, x, generator)
    assert_needs_all_of_a_move(module, x, params)
    assert sorted(item.num_channels for item in params.spec.permutation_classes) == classes
