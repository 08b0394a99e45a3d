"""Activations with a parameter: the slope of leaky relu and the approximation of gelu are part of their names."""

import json

import pytest
import torch
from torch import nn

import scalegmn
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.probegen import ProbeGenConfig
from scalegmn.networks import ACTIVATIONS, Activation, NetParams, NetSpec, register_activation
from scalegmn.networks.activations import gelu, leaky_relu
from scalegmn.networks.evaluate import activate, evaluate
from scalegmn.symmetry.canonicalize import canonicalize_scale
from scalegmn.symmetry.groups import GroupElement

MODULES = {
    "leaky_relu(0.2)": nn.LeakyReLU(0.2),
    "leaky_relu(-1.5)": nn.LeakyReLU(-1.5),
    "leaky_relu(1e-05)": nn.LeakyReLU(1e-5),
    "leaky_relu": nn.LeakyReLU(),
    "relu": nn.LeakyReLU(0.0),
    "gelu": nn.GELU(),
    "gelu(tanh)": nn.GELU("tanh"),
}


@pytest.mark.parametrize("name", MODULES)
def test_functions(name, generator):
    """What PyTorch computes, of modules read as a network and of ProbeGen's probes alike."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 6), MODULES[name], nn.Linear(6, 4), MODULES[name], nn.Linear(4, 3)).double()
    params = scalegmn.from_module(module, torch.zeros(2, 2, dtype=torch.float64))
    assert [layer.activation for layer in params.spec.layers] == [name, name, "identity"]
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    expected = module(x).detach()
    torch.testing.assert_close(evaluate(params, x)[0], expected, rtol=1e-9, atol=1e-9)
    if "(" in name:
        other = params.replace(spec=params.spec.with_activation(name.partition("(")[0]))
        assert (evaluate(other, x)[0] - expected).abs().max() > 1e-7
    model = ProbeGenConfig(num_probes=5, generator="none", hidden_dim=8, num_linears=2).build(params.spec).double()
    model.readout = nn.Identity()
    torch.testing.assert_close(model(params)[0], module(model.codes).flatten(), rtol=1e-9, atol=1e-9)
    assert NetSpec.from_dict(json.loads(json.dumps(params.spec.to_dict()))) == params.spec


@pytest.mark.parametrize(
    "name",
    [
        *("leaky_relu(0.20)", "leaky_relu(0.01)", "leaky_relu(0.0)", "leaky_relu(nan)", "leaky_relu(inf)"),
        *("leaky_relu(x)", "leaky_relu()", "gelu(none)", "gelu(sigmoid)", "tanh(2.0)", "leaky_relu(0.2"),
        *("leaky_relu(0.2)\n", "(0.2)"),
    ],
)
def test_other_names_are_none(name):
    """Every function has a single name, so that equal networks have equal specs."""
    assert name not in ACTIVATIONS
    with pytest.raises(ValueError, match="unknown activation"):
        NetSpec.mlp([2, 3, 1], name)
    with pytest.raises(ValueError, match=r"activation: found .*, expected one of"):
        ACTIVATIONS.require(name)


def test_names():
    assert [leaky_relu(slope) for slope in (0.2, 1, 0, 0.01)] == [
        "leaky_relu(0.2)",
        "leaky_relu(1.0)",
        "relu",
        "leaky_relu",
    ]
    assert (gelu("none"), gelu("tanh")) == ("gelu", "gelu(tanh)")
    assert "leaky_relu(0.2)" not in list(ACTIVATIONS)
    with pytest.raises(ValueError, match=r"found 'cube\(3\)', expected a name without brackets"):
        register_activation(Activation("cube(3)", lambda z, w0: z**3))


def test_symmetry(random_params, generator):
    """Those of leaky relu: scales, which change a network of gelu."""
    for name, is_kept in (("leaky_relu(0.2)", True), ("gelu(tanh)", False)):
        params = random_params(NetSpec.mlp([2, 5, 4, 1], name), 3)
        x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        scales = tuple(torch.rand(3, n, generator=generator, dtype=torch.float64) + 0.5 for n in (5, 4))
        same = tuple(torch.arange(n).expand(3, n) for n in (5, 4))
        change = (evaluate(GroupElement(same, scales).act(params), x) - evaluate(params, x)).abs().max()
        assert (change < 1e-9) == is_kept
        assert params.spec.symmetries == (("scale",) * 2 if is_kept else ("permutation",) * 2)
    params = random_params(NetSpec.mlp([2, 5, 4, 1], "leaky_relu(0.2)"), 3)
    canonical = canonicalize_scale(params)
    assert not torch.equal(canonical.weights[0], params.weights[0])
    torch.testing.assert_close(evaluate(canonical, x), evaluate(params, x), rtol=1e-9, atol=1e-9)


def test_networks_that_differ(generator):
    """Each with its own; the names follow the built-in ones."""
    names = ["leaky_relu(0.2)", "relu", "gelu(tanh)", "leaky_relu(0.3)"]
    tensors = [
        torch.randn(4, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (5,), (1, 5), (1,))
    ]
    params = NetParams.from_tensors(tensors[::2], tensors[1::2], names)
    assert params.spec.extra_activations == ("gelu(tanh)", "leaky_relu(0.2)", "leaky_relu(0.3)")
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    for k, name in enumerate(names):
        z = x @ tensors[0][k].mT + tensors[1][k]
        expected = activate(z, name) @ tensors[2][k].mT + tensors[3][k]
        torch.testing.assert_close(evaluate(params, x)[k], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("config", [NGGNNConfig, NGTConfig])
def test_embedding_of_activations(config, engine, generator):
    """A leaky relu of another slope has the row of leaky relu; a sine, which has none, is refused."""
    tensors = [
        torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (5,), (1, 5), (1,))
    ]

    def networks(*names):
        return NetParams.from_tensors(
            [t[:1].repeat(3, *[1] * (t.ndim - 1)) for t in tensors[::2]],
            [t[:1].repeat(3, 1) for t in tensors[1::2]],
            names,
        )

    params = networks("leaky_relu(0.2)", "leaky_relu", "identity")
    model = config(activation_embedding=True).build(params.spec).double().eval()
    model.engine = engine
    answers = model(params)
    assert len(model.graph.activations) == 7
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-9, atol=1e-9)
    assert (answers[0] - answers[2]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="activation_embedding: there is none for sine; use false"):
        model(networks("sine", "relu", "identity"))
    assert config().build(params.spec).double().eval()(networks("sine", "relu", "identity")).isfinite().all()
    assert model(networks("relu", "tanh", "gelu")).isfinite().all()
