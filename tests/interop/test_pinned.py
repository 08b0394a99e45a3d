"""What no layer describes is pinned: the network is complete, its claimed group is smaller, and never wrong."""

import pytest
import torch
from readings import assert_read
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.models import NGGNNConfig, NGTConfig, ScaleGMNConfig, StatNNConfig
from scalegmn.networks import NetParams
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.measure import assert_invariant


class Written(nn.Module):
    """Layers a, b and c, a parameter w, and whatever is done with them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.w = nn.Parameter(torch.randn(6, 6))
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def read(forward, shape=(5, 3)):
    torch.manual_seed(0)
    module, x = Written(forward).double().eval(), torch.randn(shape, dtype=torch.float64)
    return module, x, from_module(module, x)


class Pinned(nn.Module):
    """A layer that moves, one that is sorted, and one that reads what is sorted."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x):
        sorted_values = torch.relu(self.b(torch.relu(self.a(x)))).sort(-1).values
        return self.d(torch.relu(self.c(sorted_values)))


def drawn(kind, seed):
    torch.manual_seed(seed)
    return kind().double().eval()


@pytest.fixture
def pinned():
    module, x = drawn(Pinned, 0), torch.randn(4, 3, dtype=torch.float64)
    return module, x, from_module(module, x)


def test_which_neurons_move(pinned, generator):
    module, x, params = pinned
    assert [layer.pinned for layer in params.spec.layers] == [False, True, False, False]
    assert [layer.opaque for layer in params.spec.layers] == [False, False, True, False]
    assert [item.layers for item in params.spec.permutation_classes] == [(0,), (2,)]
    element = GroupElement.sample(params, generator)
    moved = element.act(params)
    assert not torch.equal(moved.weights[1], params.weights[1])  # by what it reads
    assert torch.equal(moved.biases[1], params.biases[1])
    assert not torch.equal(moved.weights[2], params.weights[2])
    turned = params.replace(weights=(params.weights[0], params.weights[1].flip(1), *params.weights[2:]))
    assert (to_module(turned, module, x)(x) - module(x)).abs().max() > 1e-3  # pinned neurons do not permute


def test_memory_that_is_changed_in_parts(generator):
    def forward(m, x):
        h = torch.zeros(len(x), 6, dtype=x.dtype)
        h[:, :3] = m.a(x)[:, :3]
        h[:, 3:] = torch.tanh(m.b(torch.relu(m.a(x))))[:, 3:]
        return m.c(h)

    module, x, params = read(forward)
    assert_read(module, x, generator)
    assert params.spec.layers[-1].opaque


def test_a_layer_that_is_used_twice(generator):
    module, x, params = read(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.b(torch.relu(m.a(x))))))))
    assert_read(module, x, generator)
    assert sum(layer.in_dim == layer.out_dim == 6 for layer in params.spec.layers) == 1  # its parameters are there once
    assert all(layer.pinned for layer in params.spec.layers[:2])


def test_random_numbers(generator):
    def forward(m, x):
        h = torch.tanh(m.a(x))
        return m.c(torch.relu(m.b(h)) + 0.1 * torch.randn_like(h))

    module, x, params = read(forward)
    assert not params.spec.layers[0].pinned
    with torch.no_grad():
        torch.manual_seed(3)
        y = module(x)
        torch.manual_seed(3)
        moved = to_module(GroupElement.sample(params, generator).act(params), module, x)(x)
    torch.testing.assert_close(moved, y, rtol=1e-9, atol=1e-9)


def test_the_same_operations_twice_are_one():
    _, _, params = read(lambda m, x: m.c(torch.tanh(m.a(x)).sort().values * torch.tanh(m.a(x)).shape[1]))
    assert str(params.spec) == str(read(lambda m, x: m.c(6 * torch.tanh(m.a(x)).sort().values))[2].spec)


def test_several_outputs(generator):
    module, x, _ = read(lambda m, x: (m.c(torch.relu(m.a(x))), m.b(torch.relu(m.a(x)))))
    assert_read(module, x, generator)
    with pytest.raises(ValueError, match="choose one by output"):
        from_module(module, x, strict=True)


@pytest.mark.parametrize(
    "config",
    [
        ScaleGMNConfig(symmetry="hetero", hidden_dim=16, num_layers=3, readout="full_graph", out_dim=3),
        ScaleGMNConfig(symmetry="hetero", hidden_dim=16, num_layers=3, direction="bidirectional", out_dim=3),
        ScaleGMNConfig(symmetry="permutation", hidden_dim=16, num_layers=3, out_dim=3),
        NGGNNConfig(hidden_dim=16, out_dim=3),
        NGTConfig(node_dim=16, edge_dim=8, attention_dim=16, num_heads=2, out_dim=3),
        StatNNConfig(hidden_dim=16, out_dim=3, features="invariant"),
    ],
    ids=lambda config: f"{config.name}-{getattr(config, 'symmetry', '')}-{getattr(config, 'direction', '')}",
)
def test_models(pinned, config, generator):
    _, x, params = pinned
    others = NetParams.cat([params, *(from_module(drawn(Pinned, seed), x) for seed in (1, 2))])
    model = config.build(params.spec).double().eval()
    model.fit_normalization([others])
    scale = getattr(config, "symmetry", "") == "hetero" or config.name == "statnn"
    assert_invariant(model, others, generator, scale=scale)


def test_models_tell_the_places_of_pinned_neurons(pinned):
    _, _, params = pinned
    torch.manual_seed(1)
    model = ScaleGMNConfig(symmetry="permutation", hidden_dim=16, num_layers=4, out_dim=3).build(params.spec)
    model = model.double().eval()
    model.fit_normalization([params])
    order = torch.tensor([1, 0, 2, 3, 4])
    weights, biases = list(params.weights), list(params.biases)
    weights[2] = weights[2][:, :, order]  # of what reads them: another function
    other = params.replace(weights=tuple(weights), biases=tuple(biases))
    with torch.no_grad():
        assert (model(other) - model(params)).abs().max() > 1e-6


def test_parameters_stay_where_a_group_acts_on_changes(pinned, generator):
    _, _, params = pinned
    element = GroupElement.sample(params, generator)
    back = element.inverse().act(element.act(params))
    for before, after in zip(params.tensors(), back.tensors(), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)
    assert len(NetParams.cat([params, params])) == 2


def test_functional_attention_with_relative_positions(generator):
    def forward(m, x):
        h = torch.relu(m.a(x))
        q = functional.linear(h, m.w)
        angles = torch.arange(5, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=x.dtype)
        even, odd = q[..., :3], q[..., 3:]
        turned = torch.cat([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1)
        return m.c((turned @ turned.mT).softmax(-1) @ m.b(h))

    module, x, params = read(forward, (2, 5, 3))
    assert_read(module, x, generator)
    assert not params.spec.layers[0].pinned
