import pytest
import torch
from contract import Contract, build, error

from scalegmn.models.hidden_probe import HiddenProbeConfig, unscaled_responses
from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.networks.cnn import cnn_activations, evaluate_cnn
from scalegmn.networks.evaluate import activations, evaluate
from scalegmn.symmetry.groups import GroupElement, PhaseShift

SPECS = [
    NetSpec.mlp([2, 5, 4, 2], "sine", 6.0),
    NetSpec.mlp([3, 4, 1], "relu"),
    NetSpec.mlp([2, 5, 4, 1], "hetero"),
    NetSpec((LayerSpec(1, 3, (3, 3), "hetero"), LayerSpec(3, 4, (3, 1), "hetero"), LayerSpec(4, 2))),
    NetSpec((LayerSpec(2, 4, (2, 2), "relu"), LayerSpec(4, 4, (1, 1), "relu", residual=0), LayerSpec(4, 3))),
]
SMALL = {"num_probes": 6, "latent_dim": 4, "generator_channels": 2, "hidden_dim": 32, "num_linears": 3, "image_size": 8}
RELU, TANH = (BUILT_IN.index(name) for name in ("relu", "tanh"))
CONFIGS = [
    HiddenProbeConfig(**SMALL, stride=1, neuron_dim=8),
    HiddenProbeConfig(**SMALL, stride=1, generator="none", out_dim=1, neuron_dim=8),
]


class TestHiddenProbe(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


def test_invariant_to_phase(random_params, generator):
    params = random_params(SPECS[0], 4)
    model = build(CONFIGS[0], SPECS[0])
    shift = PhaseShift.sample(params, generator)
    assert error(model, params, shift) <= 1e-9
    quarter = PhaseShift(tuple(k / 2 for k in shift.turns))
    assert error(model, params, quarter) > 1e-3


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pooling_without_the_even_map_or_sizes_is_caught(spec, random_params, generator):
    """Pooled responses as they are move with signs, and with scales."""
    params = random_params(spec, 4, [RELU, TANH, RELU, TANH] if spec.is_hetero else None)

    def broken(params):
        x = torch.randn(6, spec.layout[0], *[8, 8] * spec.is_cnn, generator=torch.Generator().manual_seed(1)).double()
        layers = cnn_activations(params, x, 1) if spec.is_cnn else activations(params, x)
        return torch.cat([layer.mean(2) for layer in layers[:-1]], 1)

    assert error(broken, params, GroupElement.sample(params, generator, permute=False)) > 1e-3
    assert error(broken, params, GroupElement.sample(params, generator, scale=False)) <= 1e-9


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pools_hidden_responses_of_each_network(spec, random_params):
    """The definition, one network and one neuron after the other."""
    params = random_params(spec, 3, [RELU, TANH, RELU] if spec.is_hetero else None)
    model = build(CONFIGS[0], spec)
    probes = model.probes()
    for index in range(3):
        net = params[index : index + 1]
        run, last = (cnn_activations, evaluate_cnn) if spec.is_cnn else (activations, evaluate)
        options = {"stride": 1} if spec.is_cnn else {}
        *hidden, answers = run(net, probes, **options)
        torch.testing.assert_close(answers, last(net, probes, **options))
        scales = net.spec.layers[0].activation == "relu" or (spec.is_hetero and index != 1)
        layers = []
        for depth, x in enumerate(hidden, 1):
            pooled = torch.zeros(8, dtype=torch.float64)
            for neuron in range(x.shape[2]):
                u = x[0, :, neuron]
                u = u / u.square().mean().sqrt() if scales and u.any() else u
                t = torch.tensor([depth / spec.num_layers], dtype=torch.float64)
                pooled += (model.rho(torch.cat([u, t])) + model.rho(torch.cat([-u, t]))) / x.shape[2]
            layers.append(pooled)
        expected = model.readout(torch.cat([answers.flatten(), torch.stack(layers).mean(0)]))
        torch.testing.assert_close(model(net)[0], expected, rtol=1e-9, atol=1e-10)


def test_tells_networks_of_one_function_apart(random_params, generator):
    """A neuron that is split in two changes no answer, but what hidden neurons are."""
    params = random_params(NetSpec.mlp([2, 3, 1], "tanh"), 4)
    (first, last), (bias, out) = params.weights, params.biases
    twice = NetParams(
        NetSpec.mlp([2, 4, 1], "tanh"),
        (torch.cat([first, first[:, :1]], 1), torch.cat([last[..., :1] / 2, last[..., 1:], last[..., :1] / 2], 2)),
        (torch.cat([bias, bias[:, :1]], 1), out),
    )
    model = build(CONFIGS[0], params.spec)
    torch.testing.assert_close(evaluate(twice, model.probes()), evaluate(params, model.probes()))
    assert (model(twice) - model(params)).abs().max() > 1e-3


def test_several_architectures_and_silent_neurons(random_params):
    specs = [NetSpec.mlp([2, 5, 4, 1], "relu"), NetSpec.mlp([2, 3, 1], "relu")]
    model = build(CONFIGS[0], specs[0])
    nets = [random_params(spec, 2) for spec in specs]
    together = model(nets)
    torch.testing.assert_close(together, torch.cat([model(params) for params in nets]), rtol=1e-10, atol=1e-12)
    silent = nets[1].map(lambda x: -x.abs()).replace(biases=tuple(-b.abs() for b in nets[1].biases))
    silent = silent.map(lambda x: x.requires_grad_())
    silent = silent.replace(weights=(0 * silent.weights[0], silent.weights[1]))
    x = [torch.relu(silent.biases[0])[..., None].expand(-1, -1, 6)]
    (scaled,) = unscaled_responses(silent, x)
    assert not scaled.any()
    model(silent).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"hidden_probe_args.neuron_dim: found 0, expected at least 1"):
        HiddenProbeConfig(neuron_dim=0)
    with pytest.raises(ValueError, match=r"hidden_probe reads hidden neurons, found MLP \[2, 3\].*; use probegen"):
        HiddenProbeConfig().build(NetSpec.mlp([2, 3], "sine"))
    with pytest.raises(ValueError, match=r"hidden_probe_args.stride: found stride 2 and padding same"):
        HiddenProbeConfig(**SMALL).build(SPECS[-1])
