"""Kinds of modules, and how many of their units move: the classes that are read are those counted by hand."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from contract import build, error, flat
from readings import assert_needs_all_of_a_move, assert_read
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import PinnedNeurons, from_module, to_module
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.networks import NetParams
from scalegmn.symmetry.groups import GroupElement


class Written(nn.Module):
    """Named layers, and what is done with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


class Attention(nn.Module):
    """Attention of several heads, written out, with a bias of scores."""

    def __init__(self, width=8, heads=2, bias=None, groups=None):
        super().__init__()
        self.heads, self.bias, self.groups = heads, bias, groups or heads
        inner = width // heads * self.groups
        self.q, self.k, self.v, self.o = (nn.Linear(width, size) for size in (width, inner, inner, width))
        if bias == "table":
            self.table = nn.Embedding(9, heads)

    def forward(self, x):
        sizes = ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        q, k, v = (layer(x).unflatten(-1, (heads, -1)).transpose(1, 2) for layer, heads in sizes)
        k, v = (item.repeat_interleave(self.heads // self.groups, 1) for item in (k, v))
        if self.bias == "cosine":
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        if self.bias == "table":
            scores = scores + self.table(distance + 4).permute(2, 0, 1)
        if self.bias == "slopes":
            scores = scores - 2.0 ** -torch.arange(1, self.heads + 1).view(-1, 1, 1) * distance.abs()
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer's block between two linear layers."""

    def __init__(self, attention, norm=nn.LayerNorm, gated=False, is_first=True):
        super().__init__()
        self.first, self.last, self.attention = nn.Linear(3, 8), nn.Linear(8, 2), attention
        self.n1, self.n2 = norm(8), norm(8)
        self.up, self.down, self.is_first = nn.Linear(8, 12), nn.Linear(12, 8), is_first
        self.gate = nn.Linear(8, 12) if gated else None

    def mlp(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x) if self.gate else functional.gelu(self.up(x)))

    def forward(self, x):
        x = self.first(x)
        if self.is_first:
            x = x + self.attention(self.n1(x))
            x = x + self.mlp(self.n2(x))
        else:
            x = self.n1(x + self.attention(x))
            x = self.n2(x + self.mlp(x))
        return self.last(x)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.relu(x + self.inner(x))


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Pooled(nn.Module):
    """Convolutions, the mean over positions, and a linear layer."""

    def __init__(self, body, width):
        super().__init__()
        self.body, self.last = body, nn.Linear(width, 2)

    def forward(self, x):
        return self.last(self.body(x).mean((2, 3)))


def conv(inner, outer, size=3, **options):
    return nn.Conv2d(inner, outer, size, padding=size // 2, **options)


def norm_relu(width):
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())


def unet(m, x):
    first = torch.relu(m.a(x))
    inner = torch.relu(m.b(functional.max_pool2d(first, 2)))
    return m.out(torch.relu(m.c(torch.cat([first, functional.interpolate(inner, scale_factor=2)], 1))))


def dense(m, x):
    first = torch.relu(m.a(x))
    second = torch.relu(m.b(first))
    third = torch.relu(m.c(torch.cat([first, second], 1)))
    return m.last(torch.cat([first, second, third], 1).mean((2, 3)))


def low_rank(m, x):
    return m.last(torch.relu(m.w(x) + m.b(m.a(x))))


def experts(m, x):
    weights = m.router(x).softmax(-1)
    return m.last(sum(weights[..., i : i + 1] * e(x) for i, e in enumerate((m.e0, m.e1))))


def tokens(m, x):
    x = m.first(x).tanh()
    values, places = m.router(x).softmax(-1).topk(2, -1)
    result = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        chosen, rank = torch.where(places == number)
        result.index_add_(0, chosen, expert(x[chosen]) * values[chosen, rank, None])
    return m.last(x + result)


def stacked(m, x):
    x = m.first(x).tanh()
    scores = m.router(x)
    values, places = scores.topk(2, -1)
    gates = torch.zeros_like(scores).scatter(-1, places, values.softmax(-1))
    return m.last(x + (gates[..., None] * torch.stack([expert(x) for expert in m.experts], -2)).sum(-2))


def encoded(x):
    return torch.cat([x] + [f(2**i * x) for i in range(2) for f in (torch.sin, torch.cos)], -1)


def nerf(m, x):
    points, directions = encoded(x[..., :2]), encoded(x[..., 2:])
    h = torch.relu(m.a(points))
    h = torch.relu(m.b(torch.cat([h, points], -1)))
    return m.rgb(torch.relu(m.d(torch.cat([m.feature(h), directions], -1))))


def filters(m, x):
    z = torch.sin(m.f0(x))
    z = m.g0(z) * torch.sin(m.f1(x))
    return m.last(m.g1(z) * torch.sin(m.f2(x)))


def towers(m, x):
    return functional.cosine_similarity(m.b(torch.relu(m.a(x))), m.d(torch.relu(m.c(x))), dim=-1)


def modulated(m, x):
    scale, shift = m.film(torch.relu(m.context(x.mean(1, keepdim=True)))).chunk(2, -1)
    return m.last(torch.relu((1 + scale) * m.a(x) + shift))


def autoencoder(m, x):
    return functional.linear(torch.relu(m.a(x)), m.a.weight.t(), m.bias)


L = nn.Linear


def hard_swish(x):
    return x * functional.relu6(x + 3, inplace=True) / 6


def computed():
    return {"a": L(3, 6), "g": nn.Parameter(torch.randn(6)), "h": nn.Parameter(torch.randn(6)), "last": L(6, 2)}


VECTOR, SEQUENCE, IMAGE = (5, 4), (2, 5, 3), (2, 3, 8, 8)

KINDS = {
    "BERT block": (lambda: Block(Attention(), is_first=False), SEQUENCE, [8, 8, 8, 12]),
    "GPT block": (lambda: Block(Attention()), SEQUENCE, [8, 8, 8, 12]),
    "block with RMS norm and a gated MLP": (
        lambda: Block(Attention(), nn.RMSNorm, gated=True),
        SEQUENCE,
        [8, 8, 8, 12],
    ),
    "T5 block": (lambda: Block(Attention(bias="table"), nn.RMSNorm), SEQUENCE, [8, 2, 8, 8, 12]),
    "block with slopes": (lambda: Block(Attention(bias="slopes")), SEQUENCE, [8, 8, 8, 12]),
    "block with cosines": (lambda: Block(Attention(bias="cosine")), SEQUENCE, [8, 8, 8, 12]),
    "grouped queries": (lambda: Block(Attention(heads=4, groups=2)), SEQUENCE, [8, 8, 4, 4, 8, 12]),
    "one key for all queries": (lambda: Block(Attention(groups=1)), SEQUENCE, [8, 8, 4, 4, 8, 12]),
    "ResNet block": (
        lambda: Pooled(
            nn.Sequential(conv(3, 6), nn.ReLU(), Residual(nn.Sequential(conv(6, 4), norm_relu(4), conv(4, 6)))), 6
        ),
        IMAGE,
        [6, 4],
    ),
    "MobileNet block": (
        lambda: Pooled(
            nn.Sequential(conv(3, 6, 1), norm_relu(6), conv(6, 6, groups=6), norm_relu(6), conv(6, 4, 1)), 4
        ),
        IMAGE,
        [6, 4],
    ),
    "squeeze and excite": (lambda: Pooled(nn.Sequential(conv(3, 6), nn.ReLU(), SqueezeExcite(6)), 6), IMAGE, [6, 3]),
    "U-Net": (
        lambda: Written(unet, a=conv(3, 4), b=conv(4, 6), c=conv(10, 5), out=nn.Conv2d(5, 2, 1)),
        IMAGE,
        [4, 6, 5],
    ),
    "DenseNet block": (
        lambda: Written(dense, a=conv(3, 4), b=conv(4, 5), c=conv(9, 6), last=L(15, 2)),
        IMAGE,
        [4, 5, 6],
    ),
    "grouped convolution": (
        lambda: Pooled(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4, groups=2), nn.ReLU()), 4),
        IMAGE,
        [6, 4],
    ),
    "group norm": (lambda: Pooled(nn.Sequential(conv(3, 6), nn.GroupNorm(2, 6), nn.SiLU()), 6), IMAGE, [6]),
    "norm of the batch": (
        lambda: nn.Sequential(L(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), L(6, 2)),
        VECTOR,
        [6],
    ),
    "low rank adaptation": (
        lambda: Written(low_rank, w=L(4, 6), a=L(4, 2, bias=False), b=L(2, 6, bias=False), last=L(6, 2)),
        VECTOR,
        [6, 2],
    ),
    "mixture of experts": (
        lambda: Written(experts, router=L(4, 2), e0=L(4, 6), e1=L(4, 6), last=L(6, 2)),
        VECTOR,
        [6],
    ),
    "NeRF": (
        lambda: Written(nerf, a=L(10, 6), b=L(16, 5), feature=L(5, 4), d=L(14, 7), rgb=L(7, 3)),
        VECTOR,
        [6, 5, 4, 7],
    ),
    "product of filters": (
        lambda: Written(filters, f0=L(4, 6), f1=L(4, 6), f2=L(4, 6), g0=L(6, 6), g1=L(6, 6), last=L(6, 2)),
        VECTOR,
        [6, 6, 6],
    ),
    "two towers": (lambda: Written(towers, a=L(4, 6), b=L(6, 5), c=L(4, 7), d=L(7, 5)), VECTOR, [6, 5, 7]),
    "feature-wise modulation": (
        lambda: Written(modulated, context=L(3, 4), film=L(4, 12), a=L(3, 6), last=L(6, 2)),
        SEQUENCE,
        [4, 6],
    ),
    "autoencoder with tied weights": (
        lambda: Written(autoencoder, a=L(4, 6), bias=nn.Parameter(torch.randn(4))),
        VECTOR,
        [6],
    ),
    "bag of words": (lambda: nn.Sequential(nn.EmbeddingBag(7, 6), L(6, 2)), (3, 4), [6]),
    "bidirectional LSTM": (
        lambda: Written(lambda m, x: m.last(m.r(x)[0]), r=nn.LSTM(3, 4, bidirectional=True), last=L(8, 2)),
        SEQUENCE,
        [4, 4],
    ),
    "hard swish, written in place": (
        lambda: Written(lambda m, x: m.last(hard_swish(m.a(x))), a=L(4, 6), last=L(6, 2)),
        VECTOR,
        [6],
    ),
    "last position, by its place": (
        lambda: Written(lambda m, x: m.last(torch.relu(m.a(x))[:, [-1]]), a=L(3, 6), last=L(6, 2)),
        SEQUENCE,
        [6],
    ),
    "scale of 1 + g": (
        lambda: Written(lambda m, x: m.last(functional.layer_norm(m.a(x), (6,)) * (1 + m.g)), **computed()),
        SEQUENCE,
        [6],
    ),
    "decay exp(-exp(g))": (
        lambda: Written(lambda m, x: m.last(m.a(x).tanh() * torch.exp(-m.g.exp())), **computed()),
        SEQUENCE,
        [6],
    ),
    "share of two parameters": (
        lambda: Written(lambda m, x: m.last(m.a(x).tanh() * torch.sigmoid(m.g - 2 * m.h)[None]), **computed()),
        SEQUENCE,
        [6],
    ),
    "a gate for each head": (
        lambda: Written(
            lambda m, x: m.last(
                (
                    functional.scaled_dot_product_attention(
                        *(layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
                    )
                    * m.gate(x).sigmoid().mT[..., None]
                )
                .transpose(1, 2)
                .flatten(2)
            ),
            **{name: L(3, 8) for name in "qkv"},
            gate=L(3, 2),
            last=L(8, 2),
        ),
        SEQUENCE,
        [2, 8, 8],
    ),
    "experts as one product, weighted": (
        lambda: Written(
            lambda m, x: m.last(
                (torch.einsum("beh,ehd->bed", torch.einsum("bd,edh->beh", x, m.w).relu(), m.v) * m.g(x)[..., None]).sum(
                    1
                )
            ),
            w=nn.Parameter(torch.randn(3, 4, 8)),
            v=nn.Parameter(torch.randn(3, 8, 12)),
            g=L(4, 3),
            last=L(12, 2),
        ),
        VECTOR,
        [3, 24, 12],
    ),
    "tokens of each expert": (
        lambda: Written(
            tokens,
            first=L(4, 8),
            router=L(8, 4),
            experts=nn.ModuleList(nn.Sequential(L(8, 6), nn.ReLU(), L(6, 8)) for _ in range(4)),
            last=L(8, 2),
        ),
        (9, 4),
        [8, 4, 24],
    ),
    "stacked experts, two of all": (
        lambda: Written(
            stacked,
            first=L(4, 8),
            router=L(8, 4, bias=False),
            experts=nn.ModuleList(
                Written(
                    lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x)), gate=L(8, 6), up=L(8, 6), down=L(6, 8)
                )
                for _ in range(4)
            ),
            last=L(8, 2),
        ),
        VECTOR,
        [8, 4, 24],
    ),
    "products of two vectors": (
        lambda: Written(lambda m, x: m.a(x).tanh() @ m.b(x).tanh().mT, a=L(4, 6), b=L(4, 6)),
        VECTOR,
        [6],
    ),
    "a mixer's channels": (
        lambda: Written(
            lambda m, x: (lambda h: m.last((h + m.mix(h.mT).relu().mT).mean(1)))(m.a(x)),
            a=L(3, 8),
            mix=L(SEQUENCE[1], SEQUENCE[1]),
            last=L(8, 2),
        ),
        SEQUENCE,
        [8],
    ),
    "GRU of two layers": (
        lambda: Written(lambda m, x: m.last(m.r(x)[0]), r=nn.GRU(3, 4, 2), last=L(4, 2)),
        SEQUENCE,
        [4, 4],
    ),
}
"""Name -> a module, the shape of its input, and its units that may be permuted, class by class, counted by hand."""


def of_kind(name):
    """A module, and an input of it."""
    make, shape, _ = KINDS[name]
    torch.manual_seed(0)
    x = torch.randint(7, shape) if name == "bag of words" else torch.randn(shape, dtype=torch.float64)
    return make().double().eval(), x


@pytest.mark.parametrize("name", KINDS)
def test_units_that_move(name, generator):
    module, x = of_kind(name)
    params = assert_read(module, x, generator)
    assert_needs_all_of_a_move(module, x, params)
    assert sorted(item.num_channels for item in params.spec.permutation_classes) == sorted(KINDS[name][2])


OPTIONS = {"hidden_dim": 8, "num_layers": 2, "out_dim": 3}
GRAPH = ScaleGMNConfig(direction="bidirectional", readout="full_graph", **OPTIONS)
MODELS = {
    "hetero": replace(GRAPH, symmetry="hetero"),
    "permutation": replace(GRAPH, symmetry="permutation"),
    "ng_gnn": NGGNNConfig(num_frequencies=0, pooling="mean", **OPTIONS),
    "statnn": StatNNConfig(hidden_dim=8, out_dim=3),
}


@pytest.mark.parametrize("name", KINDS)
def test_models_read_each_kind(name, generator):
    """They keep its symmetries and see all its parameters; those that read graphs see rows that move alone."""
    params = from_module(*of_kind(name))
    nets = NetParams.cat([params, *(params.map(lambda x: x * (1 + 0.3 * torch.rand_like(x))) for _ in range(3))])
    first = next(index for index, layer in enumerate(nets.spec.layers) if layer.affine)
    for kind, config in MODELS.items():
        model = build(config, nets.spec)
        model.fit_normalization([nets])
        element = GroupElement.sample(nets, generator, scale=kind == "hetero")
        assert error(model, nets, element) <= 1e-9, kind
        leaves = nets.map(lambda x: x.requires_grad_())
        flat(model(leaves)).square().sum().backward()
        unseen = [
            index
            for index, layer in enumerate(nets.spec.layers)
            if (layer.affine and not leaves.weights[index].grad.any())
            or (layer.bias and not leaves.biases[index].grad.any())
        ]
        assert unseen == [], kind
        weights = list(nets.weights)
        weights[first] = weights[first].flip(1)
        moved = model(replace(nets, weights=tuple(weights)))
        assert kind == "statnn" or (flat(moved) - flat(model(nets))).abs().max() > 1e-6, kind


def test_what_is_pinned_is_said_once():
    module = Written(lambda m, x: m.b(m.a(x).sort(-1).values), a=L(4, 6), b=L(6, 2))
    with pytest.warns(
        PinnedNeurons, match=r"Written: no symmetry moves the neurons of a \(Linear\), .*scalegmn inspect"
    ) as seen:
        from_module(module, torch.randn(VECTOR))
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", PinnedNeurons)
        from_module(nn.Sequential(L(4, 6), nn.ReLU(), L(6, 2)), torch.randn(VECTOR))


def test_parameters_from_which_scales_are_computed_move_with_their_channels(generator):
    module = Written(lambda m, x: m.last(m.a(x).tanh() * torch.exp(-m.g.exp())), **computed()).double().eval()
    x = torch.randn(SEQUENCE, dtype=torch.float64)
    params = from_module(module, x)
    moved = to_module(GroupElement.sample(params, generator).act(params), module, x)
    torch.testing.assert_close(moved(x), module(x), rtol=1e-9, atol=1e-9)
    moved.g.data = module.g.data
    assert (moved(x) - module(x)).abs().max() > 1e-3


def test_parameters_that_differ_from_channel_to_channel_by_constants_stay():
    module = Written(lambda m, x: m.last(m.a(x).tanh() * (m.g + torch.arange(6))), **computed()).double().eval()
    params = from_module(module, torch.randn(SEQUENCE, dtype=torch.float64))
    assert not params.spec.permutation_classes
