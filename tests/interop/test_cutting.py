"""Layers of which others read parts: how many of their units move, counted by hand."""

from dataclasses import replace

import pytest
import torch
from readings import Written, assert_read
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.symmetry.groups import GroupElement

IMAGE, SEQUENCE = (2, 3, 6, 6), (2, 6, 5)


def conv(in_dim, out_dim, size=3, **options):
    return nn.Conv2d(in_dim, out_dim, size, padding=size // 2, **options)


def concatenated_sum(m, x):
    both = torch.cat([m.a(x).relu(), m.b(x).relu()], 1)
    return m.last((both + m.c(both)).relu().mean((2, 3)))


def padded_sum(m, x):
    h = m.a(x).relu()
    return m.last((functional.pad(h, (0, 0, 0, 0, 2, 2)) + m.c(m.b(h).relu())).relu().mean((2, 3)))


def squeezed_sum(m, x):
    h = m.a(x).relu()
    h = torch.cat([h, m.b(h).relu()], 1)
    gate = functional.hardsigmoid(m.up(m.down(h.mean((2, 3), keepdim=True)).relu()))
    return m.last((h * gate).mean((2, 3)))


def shuffled(x, groups):
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def shuffled_halves(m, x):
    h = m.stem(x).relu()
    for unit in m.units:
        first, second = h.chunk(2, 1)
        h = shuffled(torch.cat([first, unit(second)], 1), 2)
    return m.last(h.mean((2, 3)))


def shuffled_groups(m, x):
    h = m.stem(x).relu()
    return m.last((h + m.c(m.b(shuffled(m.a(h).relu(), 2)))).relu().mean((2, 3)))


def merged_patches(m, x):
    h = m.a(x)
    return m.last(m.reduce(m.norm(torch.cat([h[:, 0::2], h[:, 1::2]], -1))).mean(1))


def unit():
    return nn.Sequential(conv(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), conv(8, 8, 1), nn.ReLU())


CASES = {
    "sum of concatenated layers": (
        lambda: Written(concatenated_sum, a=conv(3, 4), b=conv(3, 3), c=conv(7, 7), last=nn.Linear(7, 2)),
        IMAGE,
        [3, 4],
    ),
    "sum with padded channels": (
        lambda: Written(padded_sum, a=conv(3, 4), b=conv(4, 6), c=conv(6, 8), last=nn.Linear(8, 2)),
        IMAGE,
        [2, 2, 4, 6],
    ),
    "squeeze and excite of concatenated layers": (
        lambda: Written(
            squeezed_sum,
            a=conv(3, 4),
            b=conv(4, 4, groups=4),
            down=conv(8, 2, 1),
            up=conv(2, 8, 1),
            last=nn.Linear(8, 2),
        ),
        IMAGE,
        [2, 4],
    ),
    "halves that are shuffled": (
        lambda: Written(
            shuffled_halves, stem=conv(3, 16), units=nn.ModuleList([unit(), unit()]), last=nn.Linear(16, 2)
        ),
        IMAGE,
        [4, 4, 4, 4, 8, 8, 8, 8],
    ),
    "groups that are shuffled": (
        lambda: Written(
            shuffled_groups,
            stem=conv(3, 16),
            a=conv(16, 16, 1, groups=2),
            b=conv(16, 16, groups=16),
            c=conv(16, 16, 1, groups=2),
            last=nn.Linear(16, 2),
        ),
        IMAGE,
        [4, 4, 4, 4, 8, 8],
    ),
    "neighbours side by side before a norm": (
        lambda: Written(
            merged_patches, a=nn.Linear(5, 8), norm=nn.LayerNorm(16), reduce=nn.Linear(16, 6), last=nn.Linear(6, 2)
        ),
        SEQUENCE,
        [6, 8],
    ),
    "channels in the reverse order": (
        lambda: Written(
            lambda m, x: m.last(m.a(x).tanh() + m.b(x).tanh().flip(-1)),
            a=nn.Linear(5, 6),
            b=nn.Linear(5, 6),
            last=nn.Linear(6, 2),
        ),
        SEQUENCE,
        [6],
    ),
    "channels that meet those of their layer in the reverse order": (
        lambda: Written(
            lambda m, x: m.last(m.a(x).tanh() + m.a(x).tanh().flip(-1)), a=nn.Linear(5, 6), last=nn.Linear(6, 2)
        ),
        SEQUENCE,
        [],
    ),
}
"""Name -> a module, the shape of its input, and its units that may be permuted, class by class, counted by hand."""


@pytest.mark.parametrize("name", CASES)
def test_cells_that_move(name, generator):
    make, shape, classes = CASES[name]
    torch.manual_seed(0)
    params = assert_read(make().double().eval(), torch.randn(shape, dtype=torch.float64), generator)
    assert sorted(item.num_channels for item in params.spec.permutation_classes) == classes


def test_a_cell_that_moves_alone_is_seen(generator):
    module = CASES["sum of concatenated layers"][0]().double().eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    params = from_module(module, x)
    element = GroupElement.sample(params, generator, scale=False)
    alone = params.spec.permutation_classes[0].layers[0]
    orders = [
        order if layer == alone else torch.arange(order.shape[1])[None]
        for layer, order in enumerate(element.permutations)
    ]
    moved = to_module(replace(element, permutations=tuple(orders)).act(params), module, x)
    assert (moved(x) - module(x)).abs().max() > 1e-3
