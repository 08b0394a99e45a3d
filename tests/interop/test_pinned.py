"""What no layer describes is pinned: the network is complete, its claimed group is smaller, and never wrong."""

import math
from dataclasses import replace

import pytest
import torch
from readings import assert_read
from torch import nn
from torch.nn import functional

import scalegmn
from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.models import NGGNNConfig, NGTConfig, ScaleGMNConfig, StatNNConfig
from scalegmn.networks import NetParams
from scalegmn.networks.scalar_groups import ALL_SCALARS, TRIVIAL
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
    assert not any(layer.opaque or layer.pinned for layer in params.spec.layers)


def test_memory_that_is_changed_under_a_view(generator):
    def forward(m, x):
        h = torch.relu(m.a(x))
        first = h[:, :2]
        h[:, :3] = torch.tanh(h[:, :3])
        return m.c(h) + first

    module, x, params = read(forward)
    assert_read(module, x, generator)
    assert params.spec.layers[-1].opaque


def test_a_layer_that_is_used_twice(generator):
    module, x, params = read(lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.b(torch.relu(m.a(x))))))))
    assert_read(module, x, generator)
    assert params.spec.layers[2].same_neurons == (1,)
    assert [item.layers for item in params.spec.permutation_classes] == [(0, 1, 2)]  # both read what has one order
    assert params.spec.class_symmetry(params.spec.scaling_classes[0]).symmetry == "permutation"  # of relu and tanh
    with pytest.raises(ValueError, match="several layers share it"):
        to_module(params.replace(weights=(*params.weights[:2], 2 * params.weights[2], params.weights[3])), module, x)


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


def test_outputs_that_are_no_real_numbers():
    def scores_and_class(self, x):
        scores = self.c(torch.relu(self.a(x)))
        return scores, scores.argmax(-1)

    assert read(scores_and_class)[2].spec.num_layers == 2
    with pytest.raises(ValueError, match="expected a module that returns real numbers, found int64: return its scores"):
        read(lambda self, x: scores_and_class(self, x)[1])


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


# Operations that compute each channel alike


def rms(h, weight):
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * weight


ALIKE = {
    "a gate": lambda m, x: m.c(torch.sigmoid(m.a(x)) * functional.linear(x, m.w[:, :3])),
    "a gated linear unit": lambda m, x: functional.linear(functional.glu(m.a(x)), m.c.weight[:, :3]),
    "SwiGLU": lambda m, x: (lambda h: m.c(functional.silu(m.b(h)) * functional.linear(h, m.w)))(torch.relu(m.a(x))),
    "halves of a layer": lambda m, x: (lambda h: functional.linear(h[0] * h[1].tanh(), m.c.weight[:, :3]))(
        m.a(x).chunk(2, -1)
    ),
    "gelu written out": lambda m, x: (
        lambda h: m.c(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))
    )(m.a(x)),
    "a root mean square norm": lambda m, x: m.c(torch.relu(m.b(rms(m.a(x), m.w[0])))),
    "a layer norm": lambda m, x: (
        lambda h: m.c((h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt())
    )(m.a(x)),
    "squeeze and excite": lambda m, x: (lambda h: m.c(h * torch.sigmoid(m.b(h.mean(1, keepdim=True)))))(
        torch.relu(m.a(x))
    ),
    "a gate that all channels meet": lambda m, x: m.c(
        torch.relu(m.a(x)) * torch.sigmoid(functional.linear(x, m.w[:1, :3]))
    ),
    "weights of a mean": lambda m, x: (
        lambda h: m.c((functional.linear(h, m.w[:1]).softmax(1) * h).sum(1, keepdim=True))
    )(torch.relu(m.a(x))),
    "a slope per channel": lambda m, x: m.c(functional.prelu(m.a(x), m.w[0])),
    "a temperature": lambda m, x: m.c(torch.tanh(m.a(x) / m.w[0, 0])),
    "a maximum of two": lambda m, x: (lambda h: m.c(torch.maximum(h, m.b(h))))(torch.tanh(m.a(x))),
    "a softmax over channels": lambda m, x: m.c(m.a(x).softmax(-1)),
    "an elementwise function": lambda m, x: m.c(torch.special.erf(m.a(x))),
    "an offset": lambda m, x: m.c(torch.relu(m.b(m.a(x)) + 1.5)),
    "a value before and after": lambda m, x: (lambda h: m.c(torch.sin(h)) + functional.linear(h, m.w[:2]))(m.a(x)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_operations_that_compute_channels_alike(name, generator):
    shape = (2, 5, 3) if name in ("squeeze and excite", "weights of a mean") else (5, 3)
    module, x, params = read(ALIKE[name], shape)
    assert_read(module, x, generator)
    hidden = [layer for layer in params.spec.layers[:-1] if layer.affine and not layer.constant]
    assert any(not layer.pinned for layer in hidden)
    moved = {index for item in params.spec.permutation_classes for index in item.layers}
    assert 0 in moved


def test_a_gate_of_one_channel_is_pinned_alone(generator):
    module, x, params = read(ALIKE["a gate that all channels meet"])
    assert [layer.out_dim for layer in params.spec.layers if layer.pinned] == [1]
    (tied,) = params.spec.permutation_classes
    assert len(tied.layers) == 2  # what the gate multiplies, and the product
    wrong = params.replace(weights=(-params.weights[0], *params.weights[1:]))
    assert (to_module(wrong, module, x)(x) - module(x)).abs().max() > 1e-3


def test_a_layer_reads_a_sum_of_all_channels(generator):
    module, x, params = read(lambda m, x: functional.linear(torch.relu(m.a(x)).sum(-1, keepdim=True), m.w[:2, :1]))
    assert_read(module, x, generator)
    assert not params.spec.layers[0].pinned
    assert params.spec.layers[-1].opaque
    assert "not foreseen" not in str(scalegmn.read(module, x))


def test_a_gate_takes_the_scalars_of_its_values(generator):
    module, x, params = read(ALIKE["SwiGLU"])
    tied = next(item for item in params.spec.permutation_classes if len(item.layers) > 1)
    assert len(tied.layers) == 3  # gate, value, and their product
    scaled = GroupElement.sample(params, generator, permute=False)
    assert [params.spec.class_symmetry(item) for item in params.spec.scaling_classes[1:]] == [TRIVIAL, ALL_SCALARS]
    gate, values, product = tied.layers
    assert bool((scaled.scales[gate] == 1).all())
    assert bool((scaled.scales[values] < 0).any())
    assert torch.equal(scaled.scales[values], scaled.scales[product])
    too_far = replace(scaled, scales=tuple(2 * q if i == gate else q for i, q in enumerate(scaled.scales)))
    assert (to_module(too_far.act(params), module, x)(x) - module(x)).abs().max() > 1e-3
    wrong = params.replace(weights=tuple(w.flip(1) if i == tied.layers[0] else w for i, w in enumerate(params.weights)))
    assert (to_module(wrong, module, x)(x) - module(x)).abs().max() > 1e-3  # the gate alone


def test_channels_that_differ_are_pinned(generator):
    weights = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)
    for forward in (
        lambda m, x: m.c(torch.relu(m.a(x)) * weights + 1),
        lambda m, x: (lambda h: m.c(h * h.flip(-1)))(torch.relu(m.a(x))),
        lambda m, x: m.c(torch.relu(m.a(x)).cumsum(-1)),
        lambda m, x: m.c((torch.relu(m.a(x)) + weights).square()),
    ):
        module, x, params = read(forward)
        assert_read(module, x, generator)
        assert params.spec.layers[0].pinned


def test_values_that_are_mixed_over_positions_keep_their_channels(generator):
    def forward(m, x):
        h = torch.relu(m.a(x))
        q, k = (functional.linear(h, part).unflatten(-1, (2, 3)).transpose(1, 2) for part in (m.w, m.w))
        v = m.b(h).unflatten(-1, (2, 3)).transpose(1, 2)
        scores = torch.relu(q.sort(-1).values @ k.sort(-1).values.mT)
        return m.c((scores @ v).transpose(1, 2).flatten(2))

    module, x, params = read(forward, (2, 5, 3))
    assert_read(module, x, generator)
    (values,) = [layer for layer in params.spec.layers if layer.blocks > 1]
    assert values.blocks == 2
    assert not values.pinned
    (wrong,) = [index for index, layer in enumerate(params.spec.layers) if layer is values]
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    weights, biases = list(params.weights), list(params.biases)
    weights[wrong], biases[wrong] = weights[wrong][:, order], biases[wrong][:, order]
    weights[-1] = weights[-1][:, :, order]
    other = to_module(params.replace(weights=tuple(weights), biases=tuple(biases)), module, x)
    assert (other(x) - module(x)).abs().max() > 1e-3  # heads as a whole


def test_numbers_of_64_bits_that_are_rounded(generator):
    module, x, params = read(lambda m, x: m.c(torch.relu(m.b(m.a(x).float().square().double()))))
    assert_read(module, x, generator)
    assert [layer.pinned for layer in params.spec.layers[:2]] == [True, False]


def test_a_reading_tells_what_moves(pinned):
    module, x, params = pinned
    reading = scalegmn.read(module, x)
    assert reading.params.spec == params.spec
    assert [layer.state for layer in reading.layers] == ["free", "pinned", "free", "output"]
    assert "aten.sort" in reading.layers[1].reason
    assert reading.neurons_moved == pytest.approx(13 / 18)
    assert "72.2% of the hidden neurons" in str(reading)


KINDS = {
    "transposed convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 5, 4, 2, 1), nn.Tanh()),
            nn.ConvTranspose2d(5, 1, 3),
        ),
        (2, 2, 6, 6),
    ),
    "along one axis": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 3, 2), nn.ReplicationPad1d(1)),
        (2, 2, 7),
    ),
    "volumes": (
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 6, 2), nn.ReLU(), nn.MaxPool3d(2), nn.ConvTranspose3d(6, 4, 2), nn.ReLU()),
            *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)),
        ),
        (2, 2, 5, 5, 5),
    ),
    "instance norms": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 3, 1)),
        (2, 2, 6, 6),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_layers_are_free(name, generator):
    make, shape = KINDS[name]
    module, x = drawn(make, 0), torch.randn(shape, dtype=torch.float64)
    params = assert_read(module, x, generator)
    assert not any(layer.pinned for layer in params.spec.layers)
    assert from_module(module, x, strict=True).spec == params.spec


def test_batch_norms_without_weight_take_no_signs(generator):
    layers = nn.Linear(3, 6), nn.Tanh(), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2)
    module, x = nn.Sequential(*layers).double().eval(), torch.randn(4, 3, dtype=torch.float64)
    params = assert_read(module, x, generator)
    assert not params.spec.class_symmetry(params.spec.scaling_classes[0]).signs
