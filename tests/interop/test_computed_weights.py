"""Weights that are computed from parameters: how many units move, counted by hand."""

import pytest
import torch
from readings import assert_read
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.symmetry.groups import GroupElement


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return functional.conv2d(x, w, self.bias, padding=1, groups=self.groups)


class NormedByBatchNorm(nn.Conv2d):
    """As in BiT: a batch norm of the weights, of one batch whose channels are the rows."""

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        w = functional.batch_norm(rows, None, None, training=True, eps=1e-6).reshape_as(self.weight)
        return functional.conv2d(x, w, self.bias, padding=1)


class Causal(nn.Conv2d):
    """As in PixelCNN: no weights of later pixels."""

    def forward(self, x):
        mask = torch.ones(3, 3, dtype=x.dtype)
        mask[1, 1:], mask[2] = 0, 0
        return functional.conv2d(x, self.weight * mask, self.bias, padding=1)


class Gained(nn.Linear):
    """Weight norm, written out."""

    def __init__(self, in_dim, out_dim):
        super().__init__(in_dim, out_dim)
        self.gain = nn.Parameter(torch.ones(out_dim, 1))

    def forward(self, x):
        return functional.linear(x, self.gain * self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Degrees(nn.Linear):
    """As in MADE: a unit reads those of lower degrees."""

    def __init__(self, in_dim, out_dim, in_degrees, out_degrees):
        super().__init__(in_dim, out_dim)
        lower = torch.arange(out_dim)[:, None] % out_degrees >= torch.arange(in_dim) % in_degrees
        self.register_buffer("mask", lower.float())

    def forward(self, x):
        return functional.linear(x, self.mask * self.weight, self.bias)


def image_net(kind, **options):
    layers = kind(3, 6, 3), nn.ReLU(), kind(6, 8, 3, **options), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def gained_net():
    return nn.Sequential(Gained(5, 6), nn.Tanh(), Gained(6, 7), nn.Tanh(), nn.Linear(7, 2))


CASES = {
    "standardised": (lambda: image_net(Standardised), (2, 3, 5, 5), [6, 8]),
    "standardised, in groups": (lambda: image_net(Standardised, groups=2), (2, 3, 5, 5), [6, 8]),
    "normed by a batch norm": (lambda: image_net(NormedByBatchNorm), (2, 3, 5, 5), [6, 8]),
    "of earlier pixels": (lambda: image_net(Causal), (2, 3, 5, 5), [6, 8]),
    "with a gain": (gained_net, (4, 5), [6, 7]),
    "of lower degrees": (
        lambda: nn.Sequential(Degrees(4, 6, 4, 3), nn.ReLU(), Degrees(6, 9, 3, 3), nn.ReLU(), Degrees(9, 4, 3, 4)),
        (4, 4),
        [2, 2, 2, 3, 3, 3],
    ),
}
"""Name -> a module, the shape of its input, and its units that may be permuted, class by class."""


@pytest.mark.parametrize("name", CASES)
def test_units_that_move(name, generator):
    make, shape, classes = CASES[name]
    torch.manual_seed(0)
    params = assert_read(make().double().eval(), torch.randn(shape, dtype=torch.float64), generator)
    assert sorted(item.num_channels for item in params.spec.permutation_classes) == classes


def test_gains_move_with_their_rows(generator):
    module, x = gained_net().double().eval(), torch.randn(4, 5, dtype=torch.float64)
    module[0].gain.data.uniform_(0.5, 1.5)
    params = from_module(module, x)
    moved = to_module(GroupElement.sample(params, generator).act(params), module, x)
    torch.testing.assert_close(moved(x), module(x), rtol=1e-9, atol=1e-9)
    moved[0].gain.data = module[0].gain.data
    assert (moved(x) - module(x)).abs().max() > 1e-3
