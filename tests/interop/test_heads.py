"""Heads of attention: rotary embeddings, heads of queries that share keys, norms of heads, biases of scores."""

import math
from dataclasses import replace

import pytest
import torch
from readings import assert_read
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import from_module, read, to_module
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.symmetry.groups import GroupElement

STEPS, DIM = 5, 4


def angles(x):
    """[T, pairs]: each pair of channels has a frequency of its own."""
    return torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.3 ** torch.arange(x.shape[-1] // 2)


def by_halves(x):
    half = x.shape[-1] // 2
    cos, sin = angles(x).cos().repeat(1, 2), angles(x).sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def by_neighbours(x):
    cos, sin = (f(angles(x)).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


def by_parts(x):
    (even, odd), cos, sin = (x[..., ::2], x[..., 1::2]), angles(x).cos(), angles(x).sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def by_complex_numbers(x):
    turns = torch.polar(torch.ones_like(angles(x)), angles(x))
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)


def of_a_part(x):
    return torch.cat([by_halves(x[..., :2]), x[..., 2:]], -1)


def normalised(x):
    return functional.normalize(x, dim=-1)


class Attention(nn.Module):
    """Attention of `heads` heads of queries and `groups` of keys and values, between linear layers."""

    def __init__(self, turned=None, heads=4, groups=2, form="repeated", norm=None, bias=None):
        super().__init__()
        self.turned, self.heads, self.groups, self.form, self.bias = turned, heads, groups, form, bias
        self.first, self.last = nn.Linear(3, 6), nn.Linear(heads * DIM, 2)
        self.q, self.k, self.v = (nn.Linear(6, size * DIM) for size in (heads, groups, groups))
        self.norms = nn.ModuleList([norm(DIM), norm(DIM)] if norm else [nn.Identity(), nn.Identity()])
        self.words = nn.Embedding(2 * STEPS - 1, heads)
        self.table = nn.Parameter(torch.randn(2 * STEPS - 1, heads))
        self.slopes = nn.Parameter(torch.rand(heads, 1, 1))

    def biases(self):
        """Of scores, [heads, T, T]."""
        distance = torch.arange(STEPS)[:, None] - torch.arange(STEPS)
        places = distance + STEPS - 1
        if self.bias == "embedding":
            return self.words(places).permute(2, 0, 1)[None]
        if self.bias == "table":
            return self.table[places.view(-1)].view(STEPS, STEPS, -1).permute(2, 0, 1)
        return -self.slopes.exp() * distance.abs()

    def forward(self, x):
        h = self.first(x).tanh()
        q, k, v = (layer(h).unflatten(-1, (-1, DIM)) for layer in (self.q, self.k, self.v))
        q, k = (norm(item) for norm, item in zip(self.norms, (q, k), strict=True))
        q, k, v = (item.transpose(1, 2) for item in (q, k, v))
        if self.turned:
            q, k = self.turned(q), self.turned(k)
        repeats = self.heads // self.groups
        if self.form == "operation":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif self.form == "grouped":
            scores = q.unflatten(1, (-1, repeats)) @ k[:, :, None].mT / math.sqrt(DIM)
            mixed = (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)
        elif self.form == "einsum":  # one head of keys, without an axis
            scores = torch.einsum("b h i d, b j d -> b h i j", q, k[:, 0]) / math.sqrt(DIM)
            mixed = torch.einsum("b h i j, b j d -> b h i d", scores.softmax(-1), v[:, 0])
        else:
            k, v = (item.repeat_interleave(repeats, 1) for item in (k, v))
            scores = q @ k.mT / math.sqrt(DIM)
            mixed = (scores + self.biases() if self.bias else scores).softmax(-1) @ v
        return self.last(mixed.transpose(1, 2).flatten(2))


def made(*args, **options):
    torch.manual_seed(0)
    return Attention(*args, **options).double().eval(), torch.randn(2, STEPS, 3, dtype=torch.float64)


GROUPED, ALONE = {"heads": 4, "groups": 2}, {"heads": 2, "groups": 2}
KINDS = {
    "halves": ((by_halves,), GROUPED, (0, 1, 0, 1)),
    "halves, one head of keys": ((by_halves,), {"heads": 3, "groups": 1}, (0, 1, 0, 1)),
    "one head of keys, by letters": ((), {"heads": 3, "groups": 1, "form": "einsum"}, ()),
    "halves, as many keys": ((by_halves,), ALONE, (0, 1, 0, 1)),
    "neighbours": ((by_neighbours,), GROUPED, (0, 0, 1, 1)),
    "neighbours, by parts": ((by_parts,), {**GROUPED, "form": "grouped"}, (0, 0, 1, 1)),
    "complex numbers": ((by_complex_numbers,), {**GROUPED, "form": "operation"}, (0, 0, 1, 1)),
    "a part of the channels": ((of_a_part,), GROUPED, (0, 0, -1, -1)),
    "not turned": ((), {**GROUPED, "form": "grouped"}, ()),
    "norms of heads": ((by_halves,), {**GROUPED, "norm": nn.RMSNorm}, (0, 1, 2, 3)),
    "cosines": ((normalised,), GROUPED, ()),
}
"""Name -> arguments, options, and the pairs of channels of a head."""


@pytest.mark.parametrize("name", KINDS)
def test_heads_move(name, generator):
    args, options, pairs = KINDS[name]
    module, x = made(*args, **options)
    params = assert_read(module, x, generator)
    heads, groups = options["heads"], options["groups"]
    (attention,) = params.spec.heads
    assert (attention.num_heads, attention.num_repeats, attention.rotary) == (groups, heads // groups, pairs)
    counts = {layer: item.num_channels for item in params.spec.permutation_classes for layer in item.layers}
    query, key, values, result = attention.query, attention.key, attention.values, attention.result
    assert [counts[query], counts[key], counts[values], counts[result]] == [
        DIM * heads, DIM * groups, DIM * groups, DIM * heads
    ]  # fmt: skip
    moved = GroupElement.sample(params, generator)
    order = moved.permutations[query][0].reshape(groups, -1, DIM) % DIM
    fixed = torch.tensor([pair >= 0 for pair in pairs] or [False] * DIM)
    assert torch.equal(order[..., fixed], torch.arange(DIM)[fixed].expand_as(order[..., fixed]))
    assert fixed.all() or not torch.equal(order, torch.arange(DIM).expand_as(order))
    has_scalars = "norm" not in options and args != (normalised,)
    assert bool((moved.scales[query] != 1).any()) == has_scalars


@pytest.mark.parametrize("bias", ["embedding", "table", "slopes"])
@pytest.mark.parametrize("groups", [4, 2])
def test_biases_of_scores_move_with_their_heads(bias, groups, generator):
    module, x = made(groups=groups, bias=bias)
    params = assert_read(module, x, generator)
    assert read(module, x).neurons_moved == 1
    (table,) = params.spec.heads[0].score_biases
    moved = GroupElement.sample(params, generator, scale=False)
    assert not torch.equal(moved.permutations[table], torch.arange(4)[None])
    stays = tuple(torch.arange(4)[None] if i == table else p for i, p in enumerate(moved.permutations))
    wrong = to_module(replace(moved, permutations=stays).act(params), module, x)
    assert (wrong(x) - module(x)).abs().max() > 1e-3


def test_what_turned_channels_do_not_keep(generator):
    module, x = made(by_halves, **ALONE)
    params = from_module(module, x)
    (attention,) = params.spec.heads
    element = GroupElement.sample(params, generator)
    place = torch.tensor([1, 0, 3, 2, 4, 5, 6, 7])[None]  # the pairs of a head
    pairs = {attention.query: place, attention.key: place}
    moved = tuple(pairs.get(i, torch.arange(p.shape[1])[None]) for i, p in enumerate(element.permutations))
    ones = tuple(torch.ones_like(q) for q in element.scales)
    exchanged = to_module(GroupElement(moved, ones).act(params), module, x)
    assert (exchanged(x) - module(x)).abs().max() > 1e-3
    half = {attention.query: torch.tensor([2.0, 1, 1, 1, 1, 1, 1, 1]), attention.key: torch.tensor([0.5] + [1.0] * 7)}
    scales = tuple(half.get(i, q[0]).double()[None] for i, q in enumerate(ones))
    identity = tuple(torch.arange(p.shape[1])[None] for p in element.permutations)
    scaled = to_module(GroupElement(identity, scales).act(params), module, x)  # one channel of a pair
    assert (scaled(x) - module(x)).abs().max() > 1e-3


def test_heads_that_are_turned_differently_stay():
    def by_head(x):
        return torch.cat([by_halves(x[:, :1]), by_parts(x[:, 1:])], 1)

    module, x = made(by_head, **ALONE)
    reading = read(module, x)
    assert {layer.place for layer in reading.layers if layer.state == "pinned"} == {"q (Linear)", "k (Linear)"}


def test_sizes_of_heads_are_checked():
    layers = (LayerSpec(3, 8), LayerSpec(3, 4, reads=-1), LayerSpec(3, 4, reads=-1))
    repeated = LayerSpec(4, 8, groups=4, affine=False, bias=False, attention=(0, 1, 4))
    last = LayerSpec(8, 1)
    NetSpec((*layers, repeated, last))
    for wrong, problem in (
        (replace(repeated, attention=(0, 1, 3)), "found 3 heads"),
        (replace(repeated, rotary=(0, 0, 1)), "rotary: found 3 channels, expected the 2 of a head"),
        (replace(repeated, score_biases=(1,), attention=(0, 1, 2)), "score_biases: layer 1 has 4 neurons, expected 2"),
        (replace(repeated, affine=True), "expected as many copies of values"),
    ):
        with pytest.raises(ValueError, match=problem):
            NetSpec((*layers, wrong, last))


class Normalised(nn.Module):
    """Queries, keys and values of one layer behind one batch norm; scores that are bounded; a shared embedding."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.all = nn.Embedding(7, 4), nn.BatchNorm1d(12), nn.Linear(4, 12)
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        h = self.words(x) * 2
        q, k, v = self.norm(self.all(h).flatten(0, 1)).reshape(*x.shape, 3, 2, 2).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT / 3).tanh() * 3).softmax(-1) @ v
        h = h + self.mix(mixed.transpose(1, 2).flatten(2))
        return functional.linear(h, self.words.weight) / 30


def test_what_heads_are_cut_from_and_what_bounds_scores(generator):
    torch.manual_seed(0)
    module = Normalised().double().eval()
    assert_read(module, torch.randint(7, (2, STEPS)), generator)
    assert read(module, torch.randint(7, (2, STEPS))).neurons_moved == 1
