"""Several layers side by side: channels that one norm reads, and positions that one attention reads."""

import pytest
import torch
from readings import assert_read, outputs
from torch import nn
from torch.nn import functional

import scalegmn
from scalegmn.interop.torch_modules import to_module
from scalegmn.symmetry.groups import GroupElement


class Joined(nn.Module):
    """A norm of the channels of two layers, as in the decoders of U-Nets."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 1), nn.Conv2d(2, 16, 1)
        self.norm, self.c = norm, nn.Conv2d(24, 2, 1)

    def forward(self, x):
        return self.c(functional.silu(self.norm(torch.cat([self.a(x), self.b(x)], 1))))


class Streams(nn.Module):
    """Words and places, with layers of their own, in one attention; a table beside what the step says."""

    def __init__(self, norms, rotary):
        super().__init__()
        self.words, self.places, self.step = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 24)
        self.of_words, self.of_places = nn.Linear(8, 24), nn.Linear(8, 24)
        self.norms = nn.ModuleList(
            nn.LayerNorm(4, elementwise_affine=False) if norms else nn.Identity() for _ in "qkqk"
        )
        self.table, self.rotary = nn.Parameter(torch.randn(3, 8)), rotary
        self.out = nn.Linear(8, 2)

    def turned(self, x):
        angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.3], dtype=x.dtype)
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1) if self.rotary else x

    def forward(self, x):
        shift, scale, gate = (self.step(x[:, 0]).reshape(-1, 3, 8) + self.table).chunk(3, 1)
        streams = [self.words(x), self.places(x[:, :2])]
        parts = [
            layer(h * (1 + scale) + shift) for layer, h in zip((self.of_words, self.of_places), streams, strict=True)
        ]
        heads = [part.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4) for part in parts]
        (q1, k1, v1), (q2, k2, v2) = heads
        q, k, p, r = (norm(value) for norm, value in zip(self.norms, (q1, k1, q2, k2), strict=True))
        q, k, v = self.turned(torch.cat([q, p], 2)), self.turned(torch.cat([k, r], 2)), torch.cat([v1, v2], 2)
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(torch.tanh(torch.cat(streams, 1) + gate * h))


@pytest.mark.parametrize("num_groups", [1, 6, 2], ids=["one group", "groups of one layer", "groups of both layers"])
def test_norms_of_channels_of_two_layers(num_groups, generator):
    torch.manual_seed(0)
    module = Joined(nn.GroupNorm(num_groups, 24)).double().eval()
    x = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    params = assert_read(module, x, generator)
    reading = scalegmn.read(module, x)
    places = [layer.place for layer in reading.layers if layer.state == "pinned"]
    assert {*places} <= {"c (Conv2d)"}  # summands of the output
    assert sum(item.num_channels * len(item.layers) for item in params.spec.permutation_classes) == 2 * 24
    wrong = GroupElement.sample(params, generator)
    wrong.permutations[0][:] = wrong.permutations[0].roll(1, 1)
    assert (outputs(to_module(wrong.act(params), module, x), x) - outputs(module, x)).abs().max() > 1e-3


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_two_streams_of_one_attention(norms, rotary, generator):
    """As in diffusion transformers: all neurons move; those of the two streams, and of the table, alike."""
    torch.manual_seed(0)
    module, x = Streams(norms, rotary).double().eval(), torch.randn(2, 4, 3, dtype=torch.float64)
    params = assert_read(module, x, generator)
    reading = scalegmn.read(module, x)
    assert reading.neurons_moved == 1
    assert not reading.pinned_places
    wrong = GroupElement.sample(params, generator)
    words = next(index for index, layer in enumerate(reading.layers) if layer.place.startswith("words"))
    wrong.permutations[words][:] = wrong.permutations[words].roll(1, 1)
    assert (outputs(to_module(wrong.act(params), module, x), x) - outputs(module, x)).abs().max() > 1e-3


class Shifted(nn.Module):
    """Half of the channels come from the position before."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        first, second = torch.tanh(self.a(x)).chunk(2, -1)
        return self.b(torch.cat([functional.pad(first, (0, 0, 1, -1)), second], -1))


def test_parts_of_a_layer_at_other_positions(generator):
    torch.manual_seed(0)
    module, x = Shifted().double().eval(), torch.randn(2, 5, 3, dtype=torch.float64)
    params = assert_read(module, x, generator)
    assert [item.num_channels for item in params.spec.permutation_classes] == [4, 4]


class Memory(nn.Module):
    """Learned keys and values before those of the words."""

    def __init__(self):
        super().__init__()
        self.a, self.q, self.k, self.v = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.keys, self.values = (nn.Parameter(torch.randn(2, 3, 4)) for _ in "kv")
        self.b = nn.Linear(8, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        q, k, v = (layer(h).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (torch.cat([own.expand(len(x), -1, -1, -1), of], 2) for own, of in ((self.keys, k), (self.values, v)))
        return self.b(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_learned_keys_and_values(generator):
    torch.manual_seed(0)
    module, x = Memory().double().eval(), torch.randn(2, 5, 3, dtype=torch.float64)
    assert_read(module, x, generator)
    assert scalegmn.read(module, x).neurons_moved == 1
