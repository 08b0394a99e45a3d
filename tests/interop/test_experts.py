"""Mixtures of experts: experts change places as a whole, together with the neurons of the router that gate them."""

from dataclasses import replace

import pytest
import torch
from contract import build
from readings import Written, assert_read, outputs
from torch import nn
from torch.nn import functional

import scalegmn
from scalegmn.interop.torch_modules import to_module
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.networks import CoupledChannels, LayerSpec, NetParams, NetSpec
from scalegmn.symmetry.groups import GroupElement

WIDTH, HIDDEN = 6, 8
X = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))


def deep():
    layers = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 5), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(5, WIDTH))


def gated():
    names = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    layers = {name: nn.Linear(*sizes, bias=False) for name, sizes in names.items()}
    return Written(lambda m, x: m.down(functional.silu(m.gate(x)) * m.up(x)), **layers)


def softmax(m, x):
    return m.router(x).softmax(-1)


def sigmoid(m, x):
    return m.router(x).sigmoid()


def top_two(m, x):
    scores = m.router(x)
    values, places = scores.topk(2, -1)
    return torch.zeros_like(scores).scatter(-1, places, values.softmax(-1))


def masked(m, x):
    scores = m.router(x)
    return scores.masked_fill(scores < scores.topk(2, -1).values[..., -1:], -torch.inf).softmax(-1)


def one_hot(m, x):
    values, places = softmax(m, x).topk(2, -1)
    return (values[..., None] * functional.one_hot(places, m.router.out_features)).sum(-2)


def with_bias_of_choice(m, x):
    scores = m.router(x).sigmoid()
    places = (scores + m.bias).topk(2, -1).indices
    return torch.zeros_like(scores).scatter(-1, places, scores.gather(-1, places))


def loop(gates):
    def forward(m, x):
        g = gates(m, x)
        return sum(g[..., i : i + 1] * expert(x) for i, expert in enumerate(m.experts))

    return forward


def unbound(m, x):
    result = torch.zeros_like(x)
    for gate, expert in zip(softmax(m, x).unbind(-1), m.experts, strict=True):
        result = result + gate[..., None] * expert(x)
    return result


def stacked(axis, gates=softmax):
    def forward(m, x):
        g = gates(m, x).unsqueeze(-1).movedim(-2, axis) if axis != -1 else gates(m, x).unsqueeze(-2)
        return (g * torch.stack([expert(x) for expert in m.experts], axis)).sum(axis)

    return forward


def einsum(m, x):
    return torch.einsum("be,beo->bo", softmax(m, x), torch.stack([expert(x) for expert in m.experts], 1))


def matmul(m, x):
    return (softmax(m, x).unsqueeze(1) @ torch.stack([expert(x) for expert in m.experts], 1)).squeeze(1)


def with_shared(m, x):
    return m.shared(x) + loop(softmax)(m, x)


def tokens_by_index(m, x):
    values, places = softmax(m, x).topk(2, -1)
    result = torch.zeros_like(x)
    for mask, expert in zip(functional.one_hot(places, len(m.experts)).permute(2, 1, 0), m.experts, strict=True):
        rank, tokens = torch.where(mask)
        result.index_add_(0, tokens, expert(x[tokens]) * values[tokens, rank, None])
    return result


def tokens_in_place(m, x):
    values, places = softmax(m, x).topk(2, -1)
    result = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        tokens, rank = torch.where(places == number)
        result[tokens] += expert(x[tokens]) * values[tokens, rank, None]
    return result


def tokens_by_mask(m, x):
    value, place = softmax(m, x).max(-1)
    result = torch.zeros_like(x)
    for number, expert in enumerate(m.experts):
        mask = place == number
        result[mask] = expert(x[mask]) * value[mask][:, None]
    return result


def as_one_product(m, x):
    hidden = torch.relu(torch.einsum("bd,edh->beh", x, m.w) + m.b)
    return torch.einsum("be,beo->bo", softmax(m, x), torch.einsum("beh,eho->beo", hidden, m.v) + m.c)


def as_batches(m, x):
    x, g = x.expand(len(m.w), *x.shape), softmax(m, x)
    return ((functional.silu(torch.bmm(x, m.w)) * torch.bmm(x, m.u)) @ m.v * g.mT[..., None]).sum(0)


def by_number(m, x):
    g = top_two(m, x)
    return sum(g[:, i, None] * (torch.relu(x @ m.w[i] + m.b[i]) @ m.v[i] + m.c[i]) for i in range(len(m.w)))


def parameters(count):
    sizes = {"w": (WIDTH, HIDDEN), "u": (WIDTH, HIDDEN), "b": (HIDDEN,), "v": (HIDDEN, WIDTH), "c": (WIDTH,)}
    return {name: nn.Parameter(torch.randn(count, *size)) for name, size in sizes.items()}


MIXTURES = {
    "a loop": (loop(softmax), mlp),
    "a loop, sigmoids": (loop(sigmoid), gated),
    "a loop, deep experts": (loop(softmax), deep),
    "a loop, two of all": (loop(top_two), mlp),
    "a loop, masked": (loop(masked), gated),
    "a loop, one hot": (loop(one_hot), mlp),
    "a loop, a bias of the choice": (loop(with_bias_of_choice), mlp),
    "gates one by one": (unbound, mlp),
    "stacked first": (stacked(0), mlp),
    "stacked before the last axis": (stacked(-2, top_two), gated),
    "stacked last": (stacked(-1), mlp),
    "einsum of stacked": (einsum, mlp),
    "product with stacked": (matmul, mlp),
    "a shared expert": (with_shared, mlp),
    "tokens of each expert": (tokens_by_index, gated),
    "tokens in place": (tokens_in_place, mlp),
    "tokens by mask": (tokens_by_mask, mlp),
    "experts as one product": (as_one_product, None),
    "experts as batches": (as_batches, None),
    "experts by number": (by_number, None),
}
"""Name -> how experts are weighted, and what makes one; None: they are parameters."""


def mixture(forward, expert, count, bias=True):
    """A mixture beside a residual connection, between two linear layers."""
    torch.manual_seed(0)
    layers = {"experts": nn.ModuleList(expert() for _ in range(count))} if expert else parameters(count)
    if forward is with_shared:
        layers["shared"] = mlp()
    layers |= {"router": nn.Linear(WIDTH, count, bias=bias), "bias": nn.Parameter(torch.randn(count) / 9)}
    first, last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)

    def written(m, x):
        h = torch.tanh(m.first(x))
        return m.last(h + forward(m, h))

    return Written(written, first=first, last=last, **layers).double().eval()


def orders(params):
    """Layers whose blocks are experts, and those of the gates."""
    spec = params.spec
    experts = [index for index, layer in enumerate(spec.layers) if layer.gates]
    assert all(spec.block_order[index] >= 0 for index in experts)
    return experts, [gate for index in experts for gate in spec.layers[index].gates]


def moved_alone(params, layers, generator):
    """Parameters with the part of a random element that moves these layers, and those that move with them."""
    element, spec = GroupElement.sample(params, generator, scale=False), params.spec
    together = {index for item in spec.permutation_classes if {*item.layers} & {*layers} for index in item.layers}
    permutations = tuple(
        order if index in together else torch.arange(order.shape[1]).expand_as(order)
        for index, order in enumerate(element.permutations)
    )
    return GroupElement(permutations, element.scales).act(params)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_change_places(name, count, generator):
    module = mixture(*MIXTURES[name], count, bias=count < 8)
    reading = scalegmn.read(module, X)
    params = reading.params
    assert reading.neurons_moved == 1
    (experts,), gates = orders(params)
    assert [params.spec.width(gate) for gate in gates] == [count] * len(gates)
    assert f"{count} experts change places as a whole" in str(reading)
    y = outputs(module, X)
    for _ in range(3):
        element = GroupElement.sample(params, generator)
        assert (element.permutations[gates[0]] != torch.arange(count)).any()
        torch.testing.assert_close(outputs(to_module(element.act(params), module, X), X), y, rtol=1e-9, atol=1e-9)
    for alone in ([experts], gates):
        moved = to_module(moved_alone(params, alone, generator), module, X)
        assert (outputs(moved, X) - y).abs().max() > 1e-3, alone


@pytest.mark.parametrize("name", ["a loop, deep experts", "stacked first", "experts as batches", "tokens in place"])
def test_a_mixture_is_read_exactly(name, generator):
    assert_read(mixture(*MIXTURES[name], 4), X, generator)


def by_place(m, x):
    g = softmax(m, x) * torch.arange(1.0, 5.0)
    return sum(g[:, i, None] * expert(x) for i, expert in enumerate(m.experts))


def in_groups(m, x):
    """Two experts of the half with the largest score: pairs of experts stay together."""
    scores = softmax(m, x)
    halves = scores.unflatten(-1, (2, 2))
    g = (halves * (halves.amax(-1, keepdim=True) == scores.amax(-1)[:, None, None])).flatten(1)
    return sum(g[:, i, None] * expert(x) for i, expert in enumerate(m.experts))


def averaged(m, x):
    return torch.stack([expert(x) for expert in m.experts]).mean(0) * softmax(m, x).amax(-1, keepdim=True)


@pytest.mark.parametrize(("forward", "count"), [(by_place, 4), (in_groups, 4), (averaged, 4), (averaged, WIDTH + 1)])
def test_experts_that_places_tell_apart_stay(forward, count, generator):
    """Nor is a router taken for one that gates no experts, nor a layer that is as wide as experts are many."""
    module = mixture(forward, mlp, count)
    params = assert_read(module, X, generator)
    assert orders(params) == ([], [])
    hidden = [item for item in params.spec.permutation_classes if item.num_channels == HIDDEN]
    assert len(hidden) == count


def last_by_half(m, x):
    """The best expert, of which the last one counts half."""
    g = softmax(m, x)
    best = g * (g == g.amax(-1, keepdim=True)) * torch.tensor([1.0] * 7 + [0.5], dtype=x.dtype)
    return sum(best[:, i, None] * expert(x) for i, expert in enumerate(m.experts))


@pytest.mark.parametrize("row", range(4))
def test_one_position_does_not_hide_that_a_place_counts(row):
    """Also where it chooses another expert."""
    params = scalegmn.from_module(mixture(last_by_half, mlp, 8), X[row : row + 1])
    assert orders(params) == ([], [])


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize(("limits", "expected"), [((20.0, 20.0, 20.0, 20.0), 1), ((20.0, 20.0, 20.0, 30.0), 0)])
def test_experts_with_other_numbers_stay(limits, expected, is_inside):
    """Also where they make no difference for the example input."""
    numbers = iter(limits)

    def inside(m, x):
        return m.down(m.up(x).clamp(-m.limit, m.limit))

    def behind(m, x):
        return m.down(torch.relu(m.up(x))).clamp(-m.limit, m.limit)

    def bounded():
        layers = {"up": nn.Linear(WIDTH, HIDDEN), "down": nn.Linear(HIDDEN, WIDTH)}
        return Written(inside if is_inside else behind, limit=next(numbers), **layers)

    params = scalegmn.from_module(mixture(loop(softmax), bounded, 4), X)
    assert len(orders(params)[0]) == expected


def test_mixtures_of_a_transformer(generator):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            layers = {"experts": nn.ModuleList(gated() for _ in range(4)), "router": nn.Linear(WIDTH, 4, bias=False)}
            self.mixture = Written(tokens_by_index, **layers)

        def forward(self, x):
            h = self.n1(x)
            x = x + self.attention(h, h, h, need_weights=False)[0]
            return x + self.mixture(self.n2(x).flatten(0, 1)).view_as(x)

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, WIDTH), Block(), Block(), nn.Linear(WIDTH, 2)).double().eval()
    x = X[:8].view(2, 4, 4)
    params = assert_read(module, x, generator)
    assert len(orders(params)[0]) == 2
    assert scalegmn.read(module, x).neurons_moved == 1


def test_a_model_sees_which_expert_a_gate_has(generator):
    """NG-GNN, which reads `attention_index`; all models are invariant to experts that move (`test_kinds`)."""
    params = scalegmn.from_module(mixture(*MIXTURES["a loop, two of all"], 4), X)
    nets = NetParams.cat([params, params.map(lambda x: x * (1 + 0.3 * torch.rand_like(x)))])
    config = NGGNNConfig(num_frequencies=0, pooling="mean", hidden_dim=8, num_layers=2, out_dim=3)
    model = build(config, nets.spec)
    model.fit_normalization([nets])
    y = model(nets)
    element = GroupElement.sample(nets, generator, scale=False)
    torch.testing.assert_close(model(element.act(nets)), y, rtol=1e-9, atol=1e-9)
    (experts,), gates = orders(nets)
    for alone in ([experts], gates):
        assert (model(moved_alone(nets, alone, generator)) - y).abs().max() > 1e-6, alone


def test_gates_are_checked():
    layers = (LayerSpec(3, 2, unscaled=True), LayerSpec(3, 8, None, "relu", reads=-1, gates=(0,)), LayerSpec(8, 1))
    spec = NetSpec(layers)
    assert spec.permutation_classes == (CoupledChannels((0,), slice(0, 2), 2), CoupledChannels((1,), slice(0, 8), 2))
    assert spec.block_order == {0: 0, 1: 0}
    assert spec.attention_index.tolist() == [[3] * 4 + [4] * 4, [*range(5, 13)]]
    assert NetSpec.from_dict(spec.to_dict()) == spec
    for wrong, problem in (
        (replace(layers[1], gates=(1,)), "gates 0: found 1, expected a layer from 0 to 0"),
        (replace(layers[1], out_dim=9), "gates: layer 0 has 2 neurons, expected a divisor of 9"),
    ):
        with pytest.raises(ValueError, match=problem):
            NetSpec((layers[0], wrong, LayerSpec(wrong.out_dim, 1)))


def test_several_networks_move_at_once(generator):
    module = mixture(*MIXTURES["stacked first"], 4)
    params = scalegmn.from_module(module, X)
    nets = NetParams.cat([params, params.map(lambda x: 2 * x)])
    element = GroupElement.sample(nets, generator)
    back = element.inverse().act(element.act(nets))
    for tensor, other in zip(back.weights, nets.weights, strict=True):
        torch.testing.assert_close(tensor, other)
