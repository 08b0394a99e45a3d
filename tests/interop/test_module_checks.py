"""What is read from a module is what it computes, and has the symmetries that are claimed; else it is refused."""

import importlib.util
import math

import pytest
import torch
from readings import assert_read, outputs
from torch import nn
from torch.nn import functional

from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.interop.torch_modules.execution import NOISE, generic_tensors
from scalegmn.interop.torch_modules.operators import OPERATORS, Operator, activations
from scalegmn.interop.torch_modules.program import export
from scalegmn.interop.torch_modules.values import unique_columns
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.canonicalize import canonicalize_phase
from scalegmn.symmetry.groups import GroupElement


class Written(nn.Module):
    """Layers a, b and c, parameters w and p, and whatever is done with them."""

    def __init__(self, forward, w=(6, 3), p=(6,)):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.w, self.p = nn.Parameter(torch.randn(w)), nn.Parameter(torch.randn(p))
        self.written = forward

    def forward(self, *args, **kwargs):
        return self.written(self, *args, **kwargs)


def read(forward, shape=(5, 3), strict=False, **sizes):
    torch.manual_seed(0)
    module, x = Written(forward, **sizes).double().eval(), torch.randn(shape, dtype=torch.float64)
    return module, x, from_module(module, x, strict=strict)


def assert_exact(module, x, params, generator):
    """Back to the bit; random group elements leave the outputs, and so do canonical phases."""
    with torch.no_grad():
        y = module(x)
        assert torch.equal(to_module(params, module, x)(x), y)
        for moved in (GroupElement.sample(params, generator).act(params), canonicalize_phase(params)):
            torch.testing.assert_close(to_module(moved, module, x)(x), y, rtol=1e-9, atol=1e-9)


def test_values_that_are_not_finite_are_refused():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[2].bias[1] = math.nan
    with pytest.raises(ValueError, match=r"^2\.bias: found NaN or infinity, expected finite numbers$"):
        from_module(module, torch.zeros(1, 3))


# Factors and offsets

SCALED = {
    "before the bias of a sine": lambda m, x: m.c(torch.sin(6 * (x @ m.w.T) + m.p)),
    "before the bias of a head": lambda m, x: 0.1 * (torch.tanh(m.a(x)) @ m.b.weight.T) + m.p,
    "before a relu": lambda m, x: m.c(torch.relu(0.5 * m.a(x))),
    "before a layer": lambda m, x: m.c(3 * torch.relu(m.a(x))),
    "of a summand": lambda m, x: m.c(torch.tanh(torch.relu(m.a(x)) + 0.2 * functional.linear(x, m.w))),
    "subtracted": lambda m, x: m.c(torch.tanh(torch.relu(m.a(x)) - functional.linear(x, m.w))),
    "subtracted with alpha": lambda m, x: m.c(torch.sub(torch.relu(m.a(x)), functional.linear(x, m.w), alpha=2)),
    "addmm": lambda m, x: m.c(torch.relu(torch.addmm(m.p, x, m.w.T, beta=0.5, alpha=3))),
    "Python's sum": lambda m, x: m.c(torch.relu(sum([m.a(x), functional.linear(x, m.w)]))),
}


@pytest.mark.parametrize("name", SCALED)
def test_factors_are_part_of_the_weights(name, generator):
    module, x, params = read(SCALED[name])
    assert_exact(module, x, params, generator)
    if params.spec.is_chain:
        torch.testing.assert_close(evaluate(params, x)[0], module(x), rtol=1e-12, atol=1e-12)


def test_the_frequency_of_a_sine_is_that_of_its_bias_too():
    module, _, params = read(SCALED["before the bias of a sine"])
    assert params.spec.layers[0].w0 == 1
    torch.testing.assert_close(params.weights[0][0], 6 * module.w)
    _, _, usual = read(lambda m, x: m.c(torch.sin(6 * (x @ m.w.T + m.p))))
    assert usual.spec.layers[0].w0 == 6


ELEMENTWISE = {
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(),
    "log_sigmoid": nn.LogSigmoid(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activations_that_are_not_built_in(name, generator):
    module, x, params = read(lambda m, x: m.c(ELEMENTWISE[name](m.a(x))))
    assert params.spec.layers[0].activation == name
    torch.testing.assert_close(evaluate(params, x)[0], module(x), rtol=1e-12, atol=1e-12)
    assert_exact(module, x, params, generator)


def test_bounds(generator):
    for bounds, name in (((0, 6), "relu6"), ((-1, 1), "hardtanh"), ((0, None), "relu")):
        module, x, params = read(lambda m, x, bounds=bounds: m.c(m.a(x).clamp(*bounds)))
        assert params.spec.layers[0].activation == name
        assert_exact(module, x, params, generator)
    assert_exact(*read(lambda m, x: m.c(torch.tanh(m.a(x))).clamp(0, 1)), generator)
    with pytest.raises(ValueError, match="only a network's output may have"):
        read(lambda m, x: m.c(m.a(x).clamp(-2, 3)), strict=True)
    with pytest.raises(ValueError, match=r"module \(Written\): the layer that was read gives other values"):
        read(lambda m, x: m.c(functional.elu(m.a(x), alpha=0.5)), strict=True)


BESIDE = {
    "a residual around an activation": lambda m, x: (lambda h: m.c(torch.relu(h + m.b(torch.relu(h)))))(m.a(x)),
    "a residual of sines": lambda m, x: (lambda h: m.c(h + m.b(torch.sin(3 * h))))(m.a(x)),
    "two activations of one layer": lambda m, x: (lambda h: m.c(m.b(torch.tanh(h)) + torch.relu(h)))(m.a(x)),
    "activation of the input beside a layer": lambda m, x: functional.linear(
        torch.relu(torch.cat([m.c(m.a(x)), x], -1)), m.p
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_activations_beside_what_they_read(name, generator):
    module, x, params = read(BESIDE[name], p=(2, 5))
    assert not params.spec.is_chain
    assert_exact(module, x, params, generator)


# Attention


def scores_and_values(m, x, heads=2):
    h = torch.relu(m.a(x))
    q, k, v = (functional.linear(h, part).unflatten(-1, (heads, -1)).transpose(1, 2) for part in m.w.chunk(3))
    return q @ k.mT / math.sqrt(3), v, h


def attention(change):
    """The change of scores, or of their softmax."""

    def forward(m, x):
        scores, v, _ = scores_and_values(m, x)
        return m.c((change(m, scores) @ v).transpose(1, 2).flatten(2))

    return forward


def slopes(scores):
    distance = torch.arange(scores.shape[-1])
    return -torch.tensor([0.5, 2.0]).view(2, 1, 1) * (distance[:, None] - distance).abs()


BIASES = {
    "a bias per head": lambda m, s: (s + m.p[:50].view(1, 2, 5, 5)).softmax(-1),
    "a bias from an embedding": lambda m, s: (
        s + functional.embedding(torch.arange(25) % 10, m.p[:20].view(10, 2)).T.view(1, 2, 5, 5)
    ).softmax(-1),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_of_scores_belong_to_heads(name, generator):
    module, x, params = read(attention(BIASES[name]), (2, 5, 3), w=(18, 6), p=(60,), strict=True)
    assert_exact(module, x, params, generator)
    assert params.spec.heads[0].score_biases


SCORES = {
    "a temperature": (lambda m, s: (s / m.p[0]).softmax(-1), "meet a parameter"),
    "a gate": (lambda m, s: (s * torch.sigmoid(s)).softmax(-1), "combined with other scores"),
    "a product": (lambda m, s: (s * s).softmax(-1), "combined with other scores"),
    "a sum": (lambda m, s: (s + s.mT).softmax(-1), "combined with other scores"),
    "no softmax": (lambda m, s: s, "without a softmax"),
    "two softmaxes": (lambda m, s: s.softmax(-1).softmax(-1), "another function than one softmax"),
    "a softmax over queries": (lambda m, s: s.softmax(-2), "another function than one softmax"),
    "slopes that differ by head": (
        lambda m, s: (s + slopes(s)).softmax(-1),
        "meet constants that differ by head",
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_see_more_than_queries_and_keys_are_refused(name):
    change, message = SCORES[name]
    with pytest.raises(ValueError, match=message) as error:
        read(attention(change), (2, 5, 3), w=(18, 6), p=(60,), strict=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_see_more_than_queries_and_keys_are_pinned(name, generator):
    module, x, params = read(attention(SCORES[name][0]), (2, 5, 3), w=(18, 6), p=(60,))
    assert_read(module, x, generator)
    assert not params.spec.layers[0].pinned  # what queries, keys and values read
    assert not params.spec.reciprocal_layers
    assert any(layer.pinned or layer.blocks == 2 for layer in params.spec.layers)  # heads stay
    heads = torch.arange(6).view(1, 2, 3).flip(1).flatten()
    values = max(index for index, layer in enumerate(params.spec.layers) if layer.blocks == 2 and layer.affine)
    weights = list(params.weights)
    weights[values] = weights[values][:, heads]
    assert (
        outputs(to_module(params.replace(weights=tuple(weights)), module, x), x) - outputs(module, x)
    ).abs().max() > 1e-3


def test_masks_and_scales_are_no_parameters(generator):
    causal = torch.ones(5, 5).tril().bool()
    masked = attention(lambda m, s: (2 * s).masked_fill(~causal, -math.inf).softmax(-1))
    assert_exact(*read(masked, (2, 5, 3), w=(18, 6)), generator)


# What the checks find


def wrong_rule(monkeypatch, name, rule):
    item = OPERATORS[name]
    monkeypatch.setitem(OPERATORS._items, name, Operator(item.family, rule, item.reads_input))


def test_a_gate_that_is_taken_for_nothing_is_found_by_its_symmetries(monkeypatch):
    wrong_rule(monkeypatch, "mul", lambda call, x, y: x)
    with pytest.raises(ValueError, match=r"a \(Linear\): neurons of this layer do not have the symmetries") as error:
        read(lambda m, x: m.c(m.a(x) * torch.sigmoid(functional.linear(x, m.w))), strict=True)
    assert "please report it" in str(error.value)
    module, x, params = read(lambda m, x: m.c(m.a(x) * torch.sigmoid(functional.linear(x, m.w))))
    assert params.spec.layers[0].pinned  # what is claimed holds
    assert_exact(module, x, params, torch.Generator().manual_seed(0))


def test_another_activation_is_found_by_its_values(monkeypatch):
    monkeypatch.setitem(activations.ACTIVATIONS, "tanh", "sigmoid")
    with pytest.raises(ValueError, match=r"module \(Written\): the layer that was read gives other values"):
        read(lambda m, x: m.c(torch.tanh(m.a(x))), strict=True)


def test_unforeseen_errors_are_one_line_and_ask_for_a_report(monkeypatch):
    def rule(call, *args):
        raise IndexError("out of range")

    wrong_rule(monkeypatch, "tanh", rule)
    with pytest.raises(ValueError, match=r"^Written: module \(Written\): IndexError: out of range; .*report it$"):
        read(lambda m, x: m.c(torch.tanh(m.a(x))), strict=True)


def test_the_module_and_random_numbers_stay_as_they_are():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 2)).train()
    state, random = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    from_module(module, torch.zeros(2, 3))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(part.training for part in module.modules())


def test_dropout_that_is_never_off_is_refused():
    with pytest.raises(ValueError, match="dropout draws random numbers when the module evaluates"):
        read(lambda m, x: m.c(functional.dropout(torch.relu(m.a(x)))), strict=True)


# What exports insert


def autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = m.a(x)
    with torch.enable_grad():
        h = torch.relu(h.float()).type_as(x)
    return m.c(h.to("cpu").to(x.dtype))


def test_contexts_and_casts_change_nothing():
    module, x = Written(autocast), torch.randn(4, 3)
    params = from_module(module, x)
    assert str(params.spec) == "MLP [3, 6, 2] (relu)"
    assert torch.equal(params.weights[0][0], module.a.weight)


def test_exported_modules_are_read():
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    params = from_module(torch.export.export(module, (x,)).module(), x)
    assert torch.equal(params.weights[0][0], module[0].weight)


def test_what_the_output_does_not_depend_on_is_left_out():
    _, _, params = read(lambda m, x: (lambda h: (m.b(h), m.c(h))[1])(torch.relu(m.a(x))))
    assert params.spec.num_parameters == 3 * 6 + 6 + 6 * 2 + 2


def test_errors_of_export_print_nothing(capfd):
    with pytest.raises(ValueError, match=r"cannot be exported.*use torch\.where"):
        read(lambda m, x: m.c(m.b(m.a(x))) if x.sum() > 0 else m.c(m.a(x)), strict=True)
    assert capfd.readouterr() == ("", "")


REFUSED = {
    "a rounded quotient": (lambda m, x: m.c(torch.div(m.a(x), 2, rounding_mode="floor")), "rounded to whole numbers"),
    "positions of constants": (
        lambda m, x: m.c(torch.cat([m.a(x), torch.ones(5, 6)], 0).relu()),
        "concatenated with constants other than 0",
    ),
    "a part of the input": (lambda m, x: m.c(m.a(x)) + functional.linear(x[:, :2], m.w[:2, :2]), "concatenate what"),
    "float8": (lambda m, x: m.c(m.a(x)), "call module.float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line(name):
    forward, message = REFUSED[name]
    module = Written(forward)
    if name == "float8":
        module.a.weight = nn.Parameter(module.a.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=message) as error:
        from_module(module, torch.randn(5, 3), strict=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(set(REFUSED) - {"float8"}))
def test_what_a_strict_reading_refuses_is_pinned(name, generator):
    module, x, _ = read(REFUSED[name][0])
    assert_read(module, x, generator)


def test_positions_of_zeros_and_of_the_input(generator):
    assert_exact(*read(lambda m, x: m.c(torch.relu(torch.cat([m.a(x), x.new_zeros(2, 6)], 0)))), generator)
    words = lambda m, x: m.c(torch.relu(torch.cat([functional.linear(x, m.b.weight), x], 1)))  # noqa: E731
    assert_exact(*read(words, (2, 4, 6)), generator)


# Parametrisations


def pruned():
    module = nn.Linear(3, 6)
    nn.utils.prune.random_unstructured(module, "weight", 0.5)
    return module


PARAMETRIZED = {
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 6)),
    "weight norm by a hook": lambda: nn.utils.weight_norm(nn.Linear(3, 6)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 6)),
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(nn.Linear(3, 6)),
    "pruning": pruned,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_computed_weights_are_read(name):
    module, x = nn.Sequential(PARAMETRIZED[name](), nn.Tanh(), nn.Linear(6, 2)).eval(), torch.randn(4, 3)
    y, keys = module(x), set(module.state_dict())
    params = from_module(module, x)
    torch.testing.assert_close(params.weights[0][0], module[0].weight)
    torch.testing.assert_close(evaluate(params, x)[0], y)
    plain = to_module(params, module, x)
    assert torch.equal(plain(x), y)
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(module.state_dict()) == keys
    assert torch.equal(module(x), y)


# Inputs and outputs


def test_one_of_several_outputs():
    def heads(m, x):
        h = torch.relu(m.a(x))
        return {"policy": m.c(h), "value": (m.b(h), None)}

    module, x = Written(heads), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"found 2: choose one by output=\.\.\., one of 'policy', 'value'"):
        from_module(module, x, strict=True)
    with pytest.raises(ValueError, match=r"output: found 'q', expected one of 'policy', 'value'"):
        from_module(module, x, output="q", strict=True)
    assert str(from_module(module, x, output="policy").spec) == "MLP [3, 6, 2] (relu)"
    params = from_module(module, x, output="value")
    assert params.spec.layout == (3, 6, 6)
    assert torch.equal(to_module(params, module, x, output="value")(x)["policy"], module(x)["policy"])


def test_inputs_by_name_and_several():
    module = Written(lambda m, x, y: m.c(torch.relu(m.b(torch.cat([x, y], -1)))))
    x = {"x": torch.randn(4, 2), "y": torch.randn(4, 4)}
    assert from_module(module, x).spec.layout == (6, 6, 2)
    assert from_module(module, tuple(x.values())).spec.layout == (6, 6, 2)


def test_features_of_the_input_are_its_channels(generator):
    frequencies = torch.randn(2, 3, dtype=torch.float64)

    def nerf(m, x):
        angles = x @ frequencies.T
        features = torch.cat([x, angles.sin(), angles.cos()[:, :1]], -1)
        h = torch.relu(functional.linear(features, m.w))
        return m.c(functional.linear(torch.cat([h, features], -1), m.p))

    module, x, params = read(nerf, w=(6, 6), p=(6, 12))
    assert params.spec.layout[0] == 6
    assert_exact(module, x, params, generator)


def test_constants_that_follow_shapes(generator):
    module, x, params = read(lambda m, x: m.c(torch.relu(m.b(torch.cat([x, torch.ones_like(x)], -1)))))
    assert params.spec.layout == (6, 6, 2)
    assert_exact(module, x, params, generator)


def test_a_vector_as_weight_and_a_single_channel(generator):
    assert_exact(*read(lambda m, x: torch.relu(m.a(x)) @ m.p), generator)
    module = lambda m, x: x + functional.linear(torch.tanh(functional.linear(x, m.w)), m.p)  # noqa: E731
    assert_exact(*read(module, (5, 1), w=(6, 1), p=(1, 6)), generator)
    bias = lambda m, x: torch.relu(m.a(x)) @ m.w.T + m.p  # noqa: E731
    assert_exact(*read(bias, w=(1, 6), p=(1,)), generator)


def test_compiled_modules_are_unwrapped():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    params = from_module(torch.compile(module), torch.randn(2, 3))
    assert torch.equal(params.weights[0][0], module[0].weight)


def test_mixed_types_are_read_in_the_widest():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    module[0].float()
    module.forward = lambda x: module[2](torch.relu(module[0](x)).double())
    params = from_module(module, torch.randn(2, 3))
    assert {weight.dtype for weight in params.weights} == {torch.float64}
    written = to_module(params, module, torch.randn(2, 3))
    assert written[0].weight.dtype == torch.float32


def test_parameters_that_are_parts_of_other_tensors(generator):
    """Slices of one vector (`vector_to_parameters`), every second number of one, and one number everywhere."""
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(module.parameters()), module.parameters())
    module[0].bias = nn.Parameter(torch.randn(12, dtype=torch.float64)[::2])
    module[2].bias = nn.Parameter(torch.randn(1, dtype=torch.float64).expand(6))
    module.append(nn.Tanh()).append(nn.Linear(2, 6).double()).append(nn.Tanh()).append(module[2])
    x = torch.randn(4, 3, dtype=torch.float64)
    params = from_module(module, x)
    assert all(torch.equal(params.weights[i][0], module[2 * i].weight) for i in range(5))
    assert torch.equal(params.biases[0][0], module[0].bias)
    assert_exact(module, x, params.unflatten(params.flatten()), generator)


def test_tensors_without_numbers_are_refused():
    with pytest.raises(ValueError, match=r"^weight: found a tensor without numbers"):
        from_module(nn.Linear(2, 3, device="meta"), torch.zeros(1, 2))


def test_unique_columns():
    table = torch.randint(-3, 9, (3, 200)) * torch.tensor([[1], [2**30], [2**40]])
    expected = table.unique(dim=1, return_inverse=True, return_counts=True)
    assert all(map(torch.equal, unique_columns(table), expected))


def test_large_parameters_are_moved_everywhere():
    """Random numbers are used again, and no two rows of a matrix are the same."""
    module = nn.Linear(512, 600)
    nn.init.zeros_(module.weight)
    weight = generic_tensors(export(module, torch.zeros(1, 512)), torch.float32)["weight"]
    assert weight.numel() > NOISE
    assert len(weight.unique(dim=0)) == 600
    assert 0.09 < weight.std() < 0.11


@pytest.mark.skipif(
    importlib.util.find_spec("torch._functorch.predispatch") is None, reason="earlier versions export vmap's operations"
)
def test_vmap_is_refused_with_a_remedy():
    """As in flex_attention, which makes its masks so."""
    with pytest.raises(ValueError, match=r"computes with vmap.*use scaled_dot_product_attention"):
        read(lambda m, x: torch.func.vmap(lambda row: m.c(torch.relu(m.a(row))))(x))
