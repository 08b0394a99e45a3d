"""From modules to parameters and back; what the symmetries that a spec claims do to the module's own forward pass."""

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, ResNet18, architecture, traced
from readings import assert_read
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.interop.torch_modules.program import export, operation
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.scalar_groups import SCALES
from scalegmn.symmetry.canonicalize import canonicalize_phase, canonicalize_scale
from scalegmn.symmetry.groups import GroupElement, PhaseShift

each = pytest.mark.parametrize("name", ARCHITECTURES)


def change(module, x, params):
    """How far the module's output moves with other parameters, beside the spread of its outputs."""
    with torch.no_grad():
        before = module(x)
        return ((to_module(params, module, x)(x) - before).abs().max() / before.std()).item()


@each
def test_round_trip_to_the_bit(name):
    module, params, x = traced(name)
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    other = type(module)() if name == "gpt" else ARCHITECTURES[name][0]()
    written = to_module(params, other.double(), x)
    for key, tensor in written.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(tensor, state[key]), key
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    assert NetSpec.from_dict(params.spec.to_dict()) == params.spec


@each
def test_group_action_leaves_the_function(name, generator):
    module, params, x = traced(name)
    element = GroupElement.sample(params, generator)
    moved = element.act(params)
    assert change(module, x, moved) < 1e-9
    assert change(module, x, element.inverse().act(moved)) < 1e-9
    differ = sum((a != b).sum() for a, b in zip(params.weights, moved.weights, strict=True))
    assert differ > 0.8 * sum(weight.numel() for weight in params.weights)


@each
def test_features_move_with_the_parameters(name, generator):
    _, params, _ = traced(name)
    element = GroupElement.sample(params, generator)
    moved = element.act(params)
    expected = [
        *element.act_on_nodes(params.node_features(), params.spec),
        *element.act_on_edges(params.edge_features(), params.spec),
    ]
    for found, own in zip([*moved.node_features(), *moved.edge_features()], expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "resnet18" else ()) for name in ARCHITECTURES]
)
def test_wrong_elements_change_the_function(name):
    """A neuron that moves without those it is tied to; a scalar where there is none."""
    module, params, x = traced(name)
    spec = params.spec
    identity = GroupElement(
        tuple(torch.arange(layer.out_dim)[None] for layer in spec.layers[:-1]),
        tuple(torch.ones(1, layer.out_dim, dtype=torch.float64) for layer in spec.layers[:-1]),
    )
    assert change(module, x, identity.act(params)) == 0
    free = {
        layer
        for tie in spec.permutation_classes
        if len(tie.layers) == 1 and tie.num_blocks == 1
        for layer in tie.layers
    }
    scaled = {layer for tie in spec.scaling_classes if spec.class_symmetry(tie) == SCALES for layer in tie.layers}
    scaled |= {*spec.reciprocal_layers}
    single = {layer for tie in spec.scaling_classes if len(tie.layers) == 1 for layer in tie.layers}
    tried = 0
    for index, layer in enumerate(spec.layers[:-1]):
        if index not in free and layer.out_dim > 1 and not _is_shared(spec, index):
            permutations = list(identity.permutations)
            permutations[index] = torch.arange(layer.out_dim).roll(1)[None]
            assert change(module, x, replace(identity, permutations=tuple(permutations)).act(params)) > 1e-6, index
            tried += 1
        if index not in scaled & single and layer.affine and not _is_shared(spec, index):
            scales = list(identity.scales)
            scales[index] = torch.full_like(scales[index], 2)
            assert change(module, x, replace(identity, scales=tuple(scales)).act(params)) > 1e-9, index
            tried += 1
    assert tried or name in ("mlp", "cnn", "siren")


def _is_shared(spec, index):
    """Whether the module cannot hold the weights of this layer apart from those of another."""
    return any(index in (layer.tied, spec.sender(place)) for place, layer in enumerate(spec.layers) if layer.tied == 0)


@each
def test_canonical_networks_are_the_same_function(name):
    module, params, x = traced(name)
    assert change(module, x, canonicalize_scale(params)) < 1e-9
    assert change(module, x, canonicalize_phase(params)) < 1e-9


def test_half_turns_of_sines(generator):
    module, params, x = traced("siren")
    turned = PhaseShift.sample(params, generator).act(params)
    assert not torch.equal(turned.biases[0], params.biases[0])
    assert change(module, x, turned) < 1e-9


def test_specs_by_hand():
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    module = nn.Sequential(block, nn.Linear(4 * 6 * 6, 2))
    spec = from_module(module, torch.randn(1, 3, 6, 6)).spec
    assert spec.layers == (
        LayerSpec(3, 4, (3, 3), bias=False),
        LayerSpec(4, 4, None, "relu", groups=4, norm="batch", epsilon=1e-5),
        LayerSpec(4, 2, (6, 6)),
    )
    assert spec.layout == (3, 4, 4, 2)
    assert [(tie.layers, tie.channels) for tie in spec.permutation_classes] == [((0, 1), slice(0, 4))]
    assert [tie.layers for tie in spec.scaling_classes] == [(0,), (1,)]
    assert spec.edge_index[:, 12:16].tolist() == [[3, 4, 5, 6], [7, 8, 9, 10]]
    assert not spec.is_chain


def test_attention_by_hand():
    _, params, _ = traced("gpt")
    spec = params.spec
    place = next(index for index, layer in enumerate(spec.layers) if layer.attention)
    query, key, heads = spec.layers[place].attention
    assert (heads, spec.layers[place].out_dim) == (3, 24)
    assert spec.reciprocal_layers == {key: query}
    assert [spec.layers[index].constant for index in (0, 1)] == [False, True]
    assert spec.layers[-1].tied == 0
    assert spec.layout[:4] == (20, 24, 9, 24)
    assert spec.roles[:4] == ("input", "hidden", "input", "hidden")
    assert spec.attention_index.shape == (2, 2 * 24 * 8)
    assert spec.residual_index.shape == (2, 3 * 24)


def test_batch_norms_fold():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5).double().eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    module = nn.Sequential(nn.Linear(3, 5).double(), norm, nn.Linear(5, 2).double())
    params = from_module(module, torch.randn(2, 3, dtype=torch.float64))
    folded = params.with_batch_norm_folded()
    x = torch.randn(5, dtype=torch.float64)
    scale, shift = folded.weights[1][0, :, 0], folded.biases[1][0]
    torch.testing.assert_close(scale * x + shift, norm(x[None])[0], rtol=1e-12, atol=1e-12)
    assert folded.spec.layers[1].norm is None
    assert folded.with_batch_norm_folded() is folded


def test_networks_of_one_architecture_are_joined():
    parts = [from_module(ResNet18(4, 3).double(), torch.randn(1, 3, 32, 32).double()) for _ in range(2)]
    both = NetParams.cat(parts)
    assert len(both) == 2
    assert torch.equal(both[1:].statistics[1], parts[1].statistics[1])
    with pytest.raises(ValueError, match=r"expected one network of .*, found 2"):
        to_module(both, ResNet18(4, 3), torch.randn(1, 3, 32, 32))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.value, self.gate, self.last = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.value(x) * torch.sigmoid(self.gate(x)))


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + 0.1) + self.last(torch.relu(x))


class Written(nn.Module):
    """Layers a, b and c, linear ones or convolutions first, a parameter p, and whatever is done with them."""

    def __init__(self, forward, layers="linear", parameter=(6,)):
        super().__init__()
        self.p = nn.Parameter(torch.randn(parameter))
        if layers == "linear":
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        else:
            self.a, self.b, self.c = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def halves_swapped(x):
    return torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], dim=1)


def transposed(m, x, activation):
    """b and its transpose in a row."""
    return m.c(activation(functional.linear(activation(m.b(activation(m.a(x)))), m.b.weight.t())))


def attended(m, x, mask):
    h = torch.relu(m.a(x))
    return m.c((m.b(h) @ functional.linear(h, m.p[:6]).mT + mask).softmax(-1) @ functional.linear(h, m.p[6:]))


LINEAR, IMAGE = (4, 3), (2, 1, 5, 5)
EXACT = {
    "channels in another order": (Written(lambda m, x: m.c(halves_swapped(torch.relu(m.a(x))))), LINEAR),
    "and a residual": (
        Written(lambda m, x: (lambda h: m.c(torch.relu(h + m.b(halves_swapped(h)))))(m.a(x))),
        LINEAR,
    ),
    "transposed": (Written(lambda m, x: transposed(m, x, torch.relu)), LINEAR),
    "transposed, odd": (Written(lambda m, x: transposed(m, x, torch.tanh)), LINEAR),
    "largest, odd": (Written(lambda m, x: m.c(torch.tanh(m.a(x)).amax((2, 3))), "image"), IMAGE),
    "largest, sine": (
        Written(lambda m, x: m.c(functional.max_pool2d(torch.sin(3 * m.a(x)), 3).flatten(1)), "image"),
        IMAGE,
    ),
    "largest before the activation": (
        Written(lambda m, x: m.c(torch.tanh(functional.adaptive_max_pool2d(m.a(x), 1)).flatten(1)), "image"),
        IMAGE,
    ),
    "in place": (Written(lambda m, x: m.c(m.b(m.a(x).relu_()).flatten(1).relu_())), LINEAR),
    "the output of a batch norm": (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.BatchNorm1d(6)), LINEAR),
    "the output after an activation": (
        Written(lambda m, x: (lambda h: h + torch.tanh(m.b(h)))(m.a(x))),
        LINEAR,
    ),
    "a mean of the input": (Written(lambda m, x: m.c(torch.relu(m.a(x.mean(1))))), (4, 3, 3)),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_written_otherwise(name, generator):
    module, shape = EXACT[name]
    module, x = module.double().eval(), torch.randn(shape, dtype=torch.float64, generator=generator)
    params = from_module(module, x)
    element = GroupElement.sample(params, generator)
    assert change(module, x, params) == 0
    assert change(module, x, element.act(params)) < 1e-9
    assert change(module, x, element.inverse().act(element.act(params))) < 1e-9
    assert change(module, x, canonicalize_scale(params)) < 1e-9
    assert change(module, x, canonicalize_phase(params)) < 1e-9


class Choosing(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


UNKNOWN = [
    (Gated(), (2, 3), r"module \(Gated\): an activation is multiplied by another value \(a gate\), expected"),
    (
        Written(lambda m, x: m.c(torch.relu(functional.linear(torch.relu(m.b(m.a(x))), m.b.weight.flip(0))))),
        LINEAR,
        r"module \(Written\): a part of its weights are also those of b \(Linear\)",
    ),
    (Raw(), (2, 3), r"last \(Linear\): a layer reads a value after a softmax or an offset"),
    (nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)), (2, 3), r"1 \(PReLU\): aten.prelu"),
    (nn.LSTM(3, 4), (5, 2, 3), "found 3: choose one by output="),
    (
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 2)),
        (2, 3),
        r"2 \(ReLU\): relu is a second activation of one layer",
    ),
    (nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)), (2, 3), "reads a value after a softmax"),
    (nn.Sequential(nn.Linear(8, 4)), (2, 3), "Sequential cannot be exported: "),
    (Choosing(), (2, 3), "Choosing cannot be exported: "),
    (
        Written(lambda m, x: (lambda h: (h.view(-1, 6).mul_(2), m.c(torch.relu(h)))[1])(m.a(x))),
        LINEAR,
        "shares memory with one that has been changed in place",
    ),
    (
        Written(
            lambda m, x: m.c(
                functional.linear(torch.relu(functional.linear(x, m.a.weight, m.p)), m.b.weight, m.p.flip(0))
            )
        ),
        LINEAR,
        "a part of its parameters are also those of",
    ),
    (
        Written(lambda m, x: m.c(torch.relu(functional.linear(x, m.p.expand(6, 3)))), parameter=(1, 3)),
        LINEAR,
        "p is one parameter in several places of a layer",
    ),
    (
        Written(lambda m, x: m.c(functional.conv2d(m.b(m.a(x)), 2 * m.b.weight).mean((2, 3))), "image"),
        IMAGE,
        "a part of its weights are also those of b",
    ),
    (Written(lambda m, x: m.c((m.a(x) * m.p).mean((2, 3))), "image", (3,)), IMAGE, "multiplied by another value"),
    (
        Written(lambda m, x: m.c((m.a(x) + m.p).mean((2, 3))), "image", (3,)),
        IMAGE,
        "a parameter with 1 channels is added to 3 channels",
    ),
    (Written(lambda m, x: m.c(m.a(x).mean(1)), "image"), IMAGE, "mean over channels, expected over positions"),
    (
        Written(lambda m, x: m.c(m.b(x * m.p))),
        (4, 1),
        "mul of the network's input and a parameter",
    ),
    (Written(lambda m, x: m.c(functional.avg_pool1d(m.a(x), 3, 1, 1))), (4, 5, 3), "pooling over channels"),
    (
        Written(lambda m, x: m.c(torch.relu(m.a(x[:, :3]) + functional.linear(x[:, 3:], m.p))), parameter=(6, 3)),
        (4, 6),
        "a part of the input",
    ),
    (
        Written(lambda m, x: attended(m, x, m.p[:5, :5]), parameter=(12, 6)),
        (2, 5, 3),
        "attention scores meet a parameter",
    ),
]
"""Modules with an operation that no layer describes, the shape of an input, and what a strict reading says."""


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    UNKNOWN,
)
def test_what_is_not_known_is_named(module, shape, message):
    with pytest.raises(ValueError, match=message) as found:
        from_module(module, torch.randn(shape), strict=True)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("index", [i for i, (*_, message) in enumerate(UNKNOWN) if "exported" not in message])
def test_what_is_not_known_is_pinned(index, generator):
    module, shape, _ = UNKNOWN[index]
    assert_read(module.double().eval(), torch.randn(shape, dtype=torch.float64), generator)


def test_parameters_of_another_architecture():
    module, params, x = traced("mlp")
    other, y = architecture("siren")
    with pytest.raises(ValueError, match="expected one network of MLP"):
        to_module(params, other, y)
    moved = replace(params, biases=tuple(bias + 1 for bias in params.biases))
    assert change(module, x, moved) > 0.1
    module, params, x = traced("gpt")
    with pytest.raises(ValueError, match=r"wte.weight: several layers share it, expected equal values"):
        to_module(replace(params, weights=(params.weights[0] + 1, *params.weights[1:])), module, x)
    no_bias = next(index for index, layer in enumerate(params.spec.layers) if not layer.bias)
    biases = list(params.biases)
    biases[no_bias] = biases[no_bias] + 1
    with pytest.raises(ValueError, match="bias: the module has none, expected 0 everywhere"):
        to_module(replace(params, biases=tuple(biases)), module, x)


def test_training_goes_on():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    module[1].eval()
    from_module(module, torch.randn(2, 3))
    assert [one.training for one in module.modules()] == [True, True, False, True, True]


def test_activations_of_what_is_no_output_are_named():
    with pytest.raises(ValueError, match=r"0 \(ReLU\): relu is applied to a value that is not a layer's output; docs"):
        from_module(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), torch.randn(2, 3), strict=True)


def test_padding_keeps_channels(generator):
    module = nn.Sequential(
        *(nn.ReflectionPad2d(1), nn.Conv2d(1, 4, 3), nn.ZeroPad2d(2), nn.ReLU(), nn.ReplicationPad2d(1)),
        *(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
    ).double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    params = from_module(module, x)
    assert change(module, x, GroupElement.sample(params, generator).act(params)) < 1e-9
    module[2] = nn.ConstantPad2d(2, 0.5)
    with pytest.raises(ValueError, match=r"2 \(ConstantPad2d\): padding with another number than 0"):
        from_module(module, x, strict=True)


EINSUMS = (
    *("bi,oi->bo", "oi,bi->bo", "bti,io->bto", "bti,oi->bot", "io,bti->bto", "bhqd,bhkd->bhqk", "bhqk,bhkd->bqhd"),
    *("bqhd,bkhd->bhqk", "bthd,hdf->btf", "bti,hid->bhtd", "nbh,nho->nbo", "btd,tde->bte", "bchw,oc->bohw"),
    *("kbt,dbt->bdk", "ab,bc->ca", "b h i , h o -> b i o", "bik,oik->bo", "...i,oi->...o", "...id,...jd->...ij"),
    *("...ij,...jd->i...d", "b...,bo->o...", "bi,oi", "bi,ij,oj->bo"),
)

SUMS = ("bi,bj->bij", "bi,bi->b", "ij,j->i", "bcd,dc->b", "be,beo->bo", "bi,ij,bj->b")
"""Einsums that are products, element by element, that are summed up, at the end at least."""


@pytest.mark.parametrize("equation", [*EINSUMS, *SUMS, "bii,bo->bo"])
def test_einsums_are_matrix_products(equation, generator):
    class Einsum(nn.Module):
        def forward(self, *values):
            return torch.einsum(equation, *values)

    sizes = {letter: 2 + place % 5 for place, letter in enumerate("abcdefhijknoqtw")}
    terms = equation.replace(" ", "").split("->")[0].replace("...", "ht").split(",")
    values = tuple(
        torch.randn([sizes[letter] for letter in term], generator=generator, dtype=torch.float64) for term in terms
    )
    program = export(Einsum(), values)
    (result,) = torch.fx.Interpreter(program.graph_module).run(*values)
    assert torch.allclose(result, Einsum()(*values), rtol=0, atol=1e-12)
    names = {operation(node) for node in program.graph.nodes if node.op == "call_function"}
    assert ("einsum" in names) == (equation == "bii,bo->bo")
    assert ("mul" in names) == (equation in SUMS)


def test_einsums_that_broadcast_stay(generator):
    class Einsum(nn.Module):
        def forward(self, x, y):
            return torch.einsum("bi,oi->bo", x, y)

    values = torch.randn(3, 1, generator=generator), torch.randn(4, 5, generator=generator)
    program = export(Einsum(), values)
    (result,) = torch.fx.Interpreter(program.graph_module).run(*values)
    assert torch.allclose(result, Einsum()(*values))


class EinsumAttention(nn.Module):
    """Attention of two heads as einsums, whose queries, keys and values lie side by side for each head."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        q, k, v = self.qkv(torch.relu(self.embed(x))).unflatten(-1, (2, 3, 4)).unbind(-2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(2))


def test_attention_written_as_einsums(generator):
    torch.manual_seed(0)
    module, x = EinsumAttention().double().eval(), torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    assert_read(module, x, generator)
    spec = from_module(module, x, strict=True).spec
    assert len(spec.layers) == 5
    assert {index for item in spec.permutation_classes for index in item.layers} == {0, 1, 2, 3}


class Cached(nn.Module):
    """Keeps what it computes from a parameter while it evaluates, as the attention biases of LeViT."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.cache = nn.Linear(4, 6), nn.Linear(6, 3), {}
        self.table = nn.Parameter(torch.randn(3, 6))

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training or "biases" not in self.cache:
            self.cache["biases"] = self.table[[0, 2, 1]]
        return self.last(torch.relu(self.first(x) + self.cache["biases"]))


def test_tensors_that_modules_keep_while_they_evaluate_are_computed_anew():
    x, modules = torch.randn(2, 3, 4, dtype=torch.float64), [Cached().double().eval() for _ in range(2)]
    outputs = [module(x) for module in modules]
    params = [from_module(module, x) for module in modules]
    for module, expected in zip(modules, outputs, strict=True):
        assert torch.equal(module(x), expected)  # it keeps nothing of the export
    assert torch.equal(to_module(params[1], modules[0], x)(x), outputs[1])
    assert params[0].spec == params[1].spec
