"""Spellings of the same layers: whoever writes a network otherwise loses no symmetry."""

from functools import partial

import pytest
import torch
from readings import Written, assert_needs_all_of_a_move, assert_read
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import read


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


def w_x(module, x):
    return (module.v @ torch.relu(module.w @ x.T + module.b[:, None]) + module.c[:, None]).T


def stacked(module, x):
    return module.out(torch.stack([layer(x) for layer in module.layers]).amax(0))


def experts(module, x):
    gates = module.gate(x).softmax(-1)
    return module.out(torch.einsum("be,beo->bo", gates, torch.stack([expert(x) for expert in module.layers], 1)))


@torch.library.custom_op("scalegmn_tests::grouped_mm_fallback", mutates_args=())
def grouped_product(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """As that of transformers: rows up to each end by a matrix of their own, rows behind the last are 0."""
    result = x.new_zeros(len(x), weights.shape[2])
    for weight, start, end in zip(weights, [0, *ends.tolist()], ends.tolist(), strict=False):
        result[start:end] = x[start:end] @ weight
    return result


@grouped_product.register_fake
def _(x, weights, ends):
    return x.new_empty(len(x), weights.shape[2])


def sorted_by_expert(module, x):
    best, chosen = module.router(x).softmax(-1).max(-1)
    chosen, order = chosen.sort()
    ends = torch.histc(chosen.double(), 2, 0, 1).cumsum(0, dtype=torch.int32)
    h = torch.relu(grouped_product(x[order], module.w, ends))
    return (grouped_product(h, module.v, ends) * best[order, None])[order.argsort()]


def time_beside_state(module, x):
    for step in range(3):
        time = torch.full((len(x), 1), step / 3, dtype=x.dtype)
        x = x + 0.3 * module.layer(torch.cat([x, time], 1)).tanh() @ module.w
    return x


def assigned(module, x):
    h = torch.empty(len(x), 2, 6, dtype=x.dtype)
    h[:, 0] = torch.relu(module.first(x))
    h[:, 1, :] = torch.tanh(module.second(x))
    return module.out(h).sum(1)


def assigned_where_negative(module, x):
    h = module.first(x)
    h[h < 0] = 0
    return module.out(h)


def snake(module, x):
    h = module.first(x)
    return module.out(h + torch.sin(module.a * h) ** 2 / module.a)


def splines(module, x):
    weight = (module.w * module.scale[..., None]).flatten(1)
    h = functional.linear(torch.exp(-((x[..., None] - module.grid) ** 2)).flatten(1), weight)
    return module.out(torch.exp(-((h[..., None] - module.grid) ** 2)).flatten(1))


def splines_of_hidden(module, x):
    h = torch.exp(-((module.first(x)[..., None] - module.grid) ** 2)).flatten(1)
    return functional.linear(h, (module.w * module.scale[..., None]).flatten(1))


def linear(n, m=3):
    return nn.Linear(n, m)


MODULES = {
    "w @ x": (w_x, {"w": (6, 4), "b": (6,), "v": (3, 6), "c": (3,)}, 6),
    "w @ x without a batch": (lambda m, x: m.v @ torch.relu(m.w @ x[0]), {"w": (6, 4), "v": (3, 6)}, 6),
    "einsum without a result": (
        lambda m, x: torch.einsum("bi,ij", torch.relu(torch.einsum("bi,ij", x, m.w)), m.v),
        {"w": (4, 6), "v": (6, 3)},
        6,
    ),
    "einsum of an ensemble": (
        lambda m, x: torch.einsum("ebi,eio->ebo", torch.relu(torch.einsum("bi,eio->ebo", x, m.w)), m.v).mean(0),
        {"w": (2, 4, 6), "v": (2, 6, 3)},
        12,
    ),
    "einsum of three": (
        lambda m, x: torch.einsum("bi,ij,bj->b", m.first(x), m.w, m.second(x)),
        {"first": partial(linear, 4, 6), "second": partial(linear, 4, 5), "w": (6, 5)},
        11,
    ),
    "sums of products": (
        lambda m, x: (m.v * torch.relu((m.w * x[:, None]).sum(-1))[:, None]).sum(-1),
        {"w": (6, 4), "v": (3, 6)},
        6,
    ),
    "stack": (
        stacked,
        {"layers": lambda: nn.ModuleList([nn.Linear(4, 6) for _ in range(3)]), "out": partial(linear, 6)},
        18,
    ),
    "experts as an einsum": (
        experts,
        {
            "layers": lambda: nn.ModuleList([nn.Linear(4, 6) for _ in range(2)]),
            "gate": partial(linear, 4, 2),
            "out": partial(linear, 6),
        },
        12,
    ),
    "low rank": (
        lambda m, x: m.out(torch.relu(functional.linear(x, m.u @ m.v))),
        {"u": (6, 2), "v": (2, 4), "out": partial(linear, 6)},
        8,
    ),
    "a weight plus one of low rank": (
        lambda m, x: m.out(torch.relu(functional.linear(x, m.w + 0.5 * (m.u @ m.v), m.b))),
        {"w": (6, 4), "u": (6, 2), "v": (2, 4), "b": (6,), "out": partial(linear, 6)},
        8,
    ),
    "x (w + u v)": (
        lambda m, x: m.out(torch.relu(x @ (m.w - m.u @ m.v / 3))),
        {"w": (4, 6), "u": (4, 2), "v": (2, 6), "out": partial(linear, 6)},
        8,
    ),
    "rows sorted by expert": (sorted_by_expert, {"router": partial(linear, 4, 2), "w": (2, 4, 6), "v": (2, 6, 3)}, 6),
    "time beside the state": (time_beside_state, {"layer": partial(linear, 5, 6), "w": (6, 4)}, 6),
    "parts of zeros assigned": (
        assigned,
        {"first": partial(linear, 4, 6), "second": partial(linear, 4, 6), "out": partial(linear, 6)},
        12,
    ),
    "zeros where negative": (assigned_where_negative, {"first": partial(linear, 4, 6), "out": partial(linear, 6)}, 6),
    "the larger of two": (
        lambda m, x: m.out(torch.max(m.first(x), 0.1 * m.first(x))),
        {"first": partial(linear, 4, 6), "out": partial(linear, 6)},
        6,
    ),
    "snake": (snake, {"first": partial(linear, 4, 6), "a": (6,), "out": partial(linear, 6)}, 12),
    "radial basis functions": (
        lambda m, x: m.out(torch.exp(-((m.width * torch.cdist(x, m.centres)) ** 2))),
        {"centres": (6, 4), "width": (6,), "out": partial(linear, 6)},
        12,
    ),
    "radial basis functions, written out": (
        lambda m, x: m.out(
            torch.exp(-(x[:, None].expand(3, 6, 4) - m.centres[None].expand(3, 6, 4)).pow(2).sum(-1).sqrt())
        ),
        {"centres": (6, 4), "out": partial(linear, 6)},
        6,
    ),
    "embeddings of numbers": (
        lambda m, x: m.out(torch.relu(torch.addcmul(m.b, m.w, x[..., None])).mean(1)),
        {"w": (4, 6), "b": (4, 6), "out": partial(linear, 6)},
        12,
    ),
    "a matrix for each feature": (
        lambda m, x: m.out(torch.relu((torch.cos(x[..., None] * m.w)[:, :, None] @ m.v).squeeze(2)).flatten(1)),
        {"w": (4, 5), "v": (4, 5, 6), "out": partial(linear, 24)},
        29,
    ),
    "splines": (splines, {"w": (6, 4, 5), "scale": (6, 4), "grid": None, "out": partial(linear, 30)}, 12),
    "splines of hidden neurons": (
        splines_of_hidden,
        {"first": partial(linear, 4, 6), "w": (3, 6, 5), "scale": (3, 6), "grid": None},
        6,
    ),
}


def module_of(forward, layers):
    torch.manual_seed(0)
    made = {}
    for name, given in layers.items():
        made[name] = parameter(*given) if isinstance(given, tuple) else given() if given else None
    module = Written(forward, **{name: layer for name, layer in made.items() if layer is not None})
    if "grid" in made:
        module.register_buffer("grid", torch.linspace(-1, 1, 5))
    return module.double()


@pytest.mark.parametrize("name", MODULES)
def test_neurons_are_free_however_they_are_written(name, generator):
    """At least as many neurons as a reader counts move, and the function stays."""
    forward, layers, free = MODULES[name]
    module, x = module_of(forward, layers), torch.randn(3, 4, generator=generator, dtype=torch.float64)
    params = assert_read(module, x, generator)
    moved = {layer for item in params.spec.permutation_classes for layer in item.layers}
    with_weights = [index for index in moved if params.spec.layers[index].affine]
    assert sum(params.spec.layers[index].out_dim for index in with_weights) >= free
    assert_needs_all_of_a_move(module, x, params)


VIEWS = {
    "moveaxis": lambda h: h.moveaxis(1, 0).moveaxis(0, 1),
    "ravel": lambda h: h.ravel().view(3, 6),
    "hstack": lambda h: torch.hstack([h[:, :3], h[:, 3:]]),
    "hsplit": lambda h: torch.cat(torch.hsplit(h, 2), 1),
    "broadcast_to": lambda h: h[:, None].broadcast_to(3, 2, 6).mean(1),
    "unfold": lambda h: h.unfold(1, 3, 3).flatten(1),
    "gather": lambda h: h.gather(1, torch.arange(6).flip(0).expand(3, -1)),
    "quantile": lambda h: torch.stack([h, h + 1, 2 * h], 1).quantile(0.3, 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_operations_that_others_make_up(name, generator):
    torch.manual_seed(0)
    module = Written(
        lambda m, x: m.out(VIEWS[name](torch.relu(m.first(x)))), first=nn.Linear(4, 6), out=nn.Linear(6, 3)
    ).double()
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    params = assert_read(module, x, generator)
    assert any(0 in item.layers for item in params.spec.permutation_classes)


PRODUCTS = {
    "tensordot": (lambda m, x: torch.tensordot(torch.relu(torch.tensordot(x, m.w, 1)), m.v, 1), (4, 6), (6, 3)),
    "inner": (lambda m, x: torch.inner(torch.relu(torch.inner(x, m.w)), m.v), (6, 4), (3, 6)),
    "addmv and mv": (lambda m, x: torch.mv(m.v, torch.relu(torch.addmv(m.b, m.w, x[0]))), (6, 4), (3, 6)),
    "dot": (lambda m, x: torch.dot(m.v, torch.relu(torch.mv(m.w, x[0]))), (6, 4), (6,)),
    "a matrix for the whole batch": (
        lambda m, x: torch.bmm(m.v.expand(3, -1, -1), torch.relu(m.w[None] @ x[..., None])).squeeze(-1),
        (6, 4),
        (1, 3, 6),
    ),
    "ones beside the channels": (
        lambda m, x: functional.pad(torch.relu(functional.pad(x, (0, 1), value=1.0) @ m.w), (1, 0), value=1.0) @ m.v,
        (5, 6),
        (7, 3),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_by_any_name(name, generator):
    forward, first, second = PRODUCTS[name]
    module = module_of(forward, {"w": first, "v": second, "b": (6,)})
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    params = assert_read(module, x, generator)
    assert sum(item.num_channels for item in params.spec.permutation_classes) == 6


def test_weights_that_are_a_softmax_are_read(generator):
    module = module_of(lambda m, x: torch.relu(x @ m.w.softmax(0)) @ m.v, {"w": (4, 6), "v": (6, 3)})
    assert_read(module, torch.randn(3, 4, generator=generator, dtype=torch.float64), generator)


def assigned_as(module, x, dtype):
    h = torch.zeros(len(x), 2, 6, dtype=dtype)
    h[:, 0], h[:, 1] = torch.relu(module.first(x)), torch.relu(module.second(x))
    return module.out(h.to(x)).sum(1)


def read_through_a_view(module, x):
    h = module.first(x)
    view = torch.atleast_3d(h)
    h[:, :2] = module.second(x)[:, 2:4]
    return module.out(torch.relu(view[..., 0]))


def written_through_a_view(module, x):
    h = module.first(x)
    torch.atleast_3d(h)[:, :2] = torch.tanh(module.second(x)[:, 2:4, None])
    return module.out(torch.relu(h))


TWO = {"first": partial(linear, 4, 6), "second": partial(linear, 4, 6), "out": partial(linear, 6)}
LOW_RANK = {"u": (6, 2), "v": (2, 4), "out": partial(linear, 6)}
OTHERS = {
    "masks assigned": (partial(assigned_as, dtype=torch.bool), TWO),
    "whole numbers assigned": (partial(assigned_as, dtype=torch.int64), TWO),
    "single precision assigned": (partial(assigned_as, dtype=torch.float32), TWO),
    "read through a view": (read_through_a_view, TWO),
    "written through a view": (written_through_a_view, TWO),
    "masks times weights": (
        lambda m, x: m.out(torch.relu((m.w * (x > 0)[:, None]).sum(-1))),
        {"w": (6, 4), "out": partial(linear, 6)},
    ),
    "a row plus low rank": (
        lambda m, x: m.out(torch.relu(functional.linear(x, m.u @ m.v + m.w))),
        {"w": (4,), **LOW_RANK},
    ),
    "a column plus low rank": (
        lambda m, x: m.out(torch.relu(functional.linear(x, m.u @ m.v + m.w))),
        {"w": (6, 1), **LOW_RANK},
    ),
    "low rank, rounded": (
        lambda m, x: m.out(torch.relu(functional.linear(x, torch.div(m.u @ m.v, 0.1, rounding_mode="floor")))),
        LOW_RANK,
    ),
}


OF_ALL_ELEMENTS = {
    "a norm": lambda m, x: m.out(torch.relu(m.first(x)) * m.w.norm()),
    "a scalar product": lambda m, x: m.out(torch.relu(m.first(x) + torch.dot(m.w, m.v))),
    "a norm of its own weights": lambda m, x: m.out(torch.relu(m.first(x)) / m.first.weight.norm()),
    "a temperature": lambda m, x: m.out(((m.first(x) @ m.second(x).T) * m.w.norm()).softmax(-1) @ m.first(x)),
}


@pytest.mark.parametrize("name", OF_ALL_ELEMENTS)
def test_numbers_that_are_computed_from_all_of_a_parameter(name, generator):
    """It is a part of what is read."""
    module = module_of(OF_ALL_ELEMENTS[name], {"w": (5,), "v": (5,), **TWO})
    assert_read(module, torch.randn(3, 4, generator=generator, dtype=torch.float64), generator)


@pytest.mark.parametrize("name", OTHERS)
def test_what_looks_like_another_spelling_is_read_as_it_is(name, generator):
    """Numbers that change their type, memory that several values share, sums that spread a row."""
    module = module_of(*OTHERS[name])
    assert_read(module, torch.randn(3, 4, generator=generator, dtype=torch.float64), generator)


class Mixer(nn.Module):
    """An MLP over positions as convolutions whose channels are the positions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.over_positions = nn.Sequential(nn.Conv1d(5, 7, 1), nn.GELU(), nn.Conv1d(7, 5, 1))

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.over_positions(x)).mean(1)


class ByAutocast(nn.Module):
    """Angles that are computed without autocast from a part of what others read."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("rates", torch.linspace(1, 2, 4))

    @torch.autocast("cpu", enabled=False)
    def angles(self, x):
        return torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None] * self.rates.to(x)

    def forward(self, x):
        x = torch.cat([x[:, :1] + 1, x], 1)
        return self.last(torch.relu(self.first(x + torch.cat([self.angles(x[:, 1:]), x[0, :1]]))))


class Words(nn.Module):
    """Class tokens of which there are none; positions that the values of a mask choose."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.tokens = nn.Linear(4, 6), nn.Linear(6, 3), nn.Parameter(torch.zeros(1, 0, 6))

    def forward(self, x, mask):
        h = torch.cat([self.tokens.expand(len(x), -1, -1), torch.relu(self.first(x))], 1)
        return self.last(torch.relu(h[:, mask.nonzero()[:, 0]]))


class NormedHeads(nn.Module):
    """Attention whose queries and keys are normed, with a gain for each channel of each head."""

    def __init__(self):
        super().__init__()
        self.first, self.out, self.last = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.queries, self.keys, self.values = (nn.Linear(12, 12) for _ in range(3))
        self.gain_of_queries, self.gain_of_keys = parameter(3, 1, 4), parameter(3, 1, 4)

    def forward(self, x):
        x = self.first(x)
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.queries, self.keys, self.values))
        q, k = (
            functional.normalize(q, dim=-1) * self.gain_of_queries,
            functional.normalize(k, dim=-1) * self.gain_of_keys,
        )
        return self.last(x + self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kind", [Mixer, ByAutocast, NormedHeads])
def test_modules_written_otherwise(kind, generator):
    torch.manual_seed(0)
    module, x = kind().double(), torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    params = assert_read(module, x, generator)
    first = next(index for index, item in enumerate(read(module, x).layers) if item.place.startswith("first"))
    assert any(first in item.layers for item in params.spec.permutation_classes)
    assert_needs_all_of_a_move(module, x, params)
    if kind is NormedHeads:
        assert read(module, x).neurons_moved == 1


def test_tokens_of_which_there_are_none_and_sizes_that_values_give():
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([True, False, True, True, False])
    reading = read(Words().double(), inputs)
    assert reading.neurons_moved == 1


def test_products_of_a_size_that_values_give():
    torch.manual_seed(0)

    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w, self.out = nn.Linear(4, 6), parameter(2, 6), nn.Linear(2, 3)

        def forward(self, x, mask):
            h = torch.relu(self.first(x))[mask.nonzero()[:, 0]]
            return self.out((h[:, None] * self.w).sum(-1))

    inputs = torch.randn(5, 4, dtype=torch.float64), torch.tensor([True, False, True, True, False])
    assert read(Chosen().double(), inputs).params.spec.num_layers > 0


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.RNNCell])
def test_the_input_as_a_state_is_pinned(cell, generator):
    torch.manual_seed(0)
    module = Written(
        lambda m, x: m.out(m.cell(torch.relu(m.first(x)), x)),
        first=nn.Linear(4, 6),
        cell=cell(6, 4),
        out=nn.Linear(4, 3),
    ).double()
    assert_read(module, torch.randn(3, 4, generator=generator, dtype=torch.float64), generator)
