import pytest
import torch
from contract import Contract, build

from scalegmn.engine.memory import saved_bytes
from scalegmn.models.gradmetanet import GradMetaNetConfig, SetOfSetsLayer
from scalegmn.networks import BUILT_IN, LayerSpec, NetSpec
from scalegmn.networks.evaluate import evaluate
from scalegmn.networks.gradients import gradient_factors

SPECS = [
    NetSpec.mlp([2, 5, 4, 1], "sine", 6.0),
    NetSpec.mlp([3, 4, 2], "relu"),
    NetSpec.mlp([2, 5, 4, 1], "hetero"),
]
SMALL = {"num_probes": 5, "hidden_dim": 8, "num_layers": 2}
CONFIGS = [
    GradMetaNetConfig(**SMALL, readout_dim=16),
    GradMetaNetConfig(**SMALL, output="parameters"),
    GradMetaNetConfig(**SMALL, output="parameters", heads=2),
]
KINDS = [BUILT_IN.index(name) for name in ("relu", "tanh", "gelu")]


class TestGradMetaNet(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


def test_what_a_backward_pass_keeps_can_be_measured(random_params):
    """As training does at its start."""
    model = build(CONFIGS[0], SPECS[0])
    assert saved_bytes(model, random_params(SPECS[0], 2)) > 0


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_inference_mode(spec, random_params):
    params, model = random_params(spec, 3, KINDS if spec.is_hetero else None), build(CONFIGS[0], spec)
    with torch.inference_mode():
        output = model(params)
    torch.testing.assert_close(output, model(params), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_factors_make_up_the_gradients(spec, random_params, generator):
    """Those of autograd, for each network and probe."""
    params = random_params(spec, 3, KINDS if spec.is_hetero else None).map(lambda x: x.requires_grad_())
    u, v = (torch.randn(4, size, generator=generator).double() for size in (spec.layout[0], spec.layout[-1]))
    xs, gs = gradient_factors(params, u, v)
    torch.testing.assert_close(xs[-1], evaluate(params, u))
    answers = (v * evaluate(params, u)).sum(2)
    tensors = [*params.weights, *params.biases]
    for net in range(3):
        for probe in range(4):
            gradients = torch.autograd.grad(answers[net, probe], tensors, retain_graph=True)
            of_weights, of_biases = gradients[: spec.num_layers], gradients[spec.num_layers :]
            for layer, (weight, bias) in enumerate(zip(of_weights, of_biases, strict=True)):
                g, x = gs[layer + 1][net, probe], xs[layer][net, probe]
                torch.testing.assert_close(torch.outer(g, x), weight[net], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(g, bias[net], rtol=1e-9, atol=1e-12)
    by_input = torch.autograd.functional.jacobian(lambda x: (v * evaluate(params, x)).sum((1, 2)), u)
    torch.testing.assert_close(gs[0], by_input, rtol=1e-9, atol=1e-12)


def test_layer_commutes_with_permutations_of_probes_and_neurons(generator):
    layer, h = SetOfSetsLayer(3).double(), torch.randn(2, 4, 5, 3, generator=generator).double()
    p, n = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)
    torch.testing.assert_close(layer(h[:, p][:, :, n]), layer(h)[:, p][:, :, n])
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 9 + 3


def test_probes_are_a_set(random_params):
    params, model = random_params(SPECS[0], 3), build(CONFIGS[0], SPECS[0])
    before = model(params)
    with torch.no_grad():
        model.inputs.copy_(model.inputs.flip(0))
        assert (model(params) - before).abs().max() > 1e-6  # their signals stayed
        model.signals.copy_(model.signals.flip(0))
    torch.testing.assert_close(model(params), before, rtol=1e-9, atol=1e-10)


def test_scales_are_root_mean_squares(random_params):
    params, model = random_params(SPECS[0], 6), build(CONFIGS[0], SPECS[0])
    model.fit_normalization([params[:2], params[2:]])
    xs, gs = gradient_factors(params, model.inputs, model.signals)
    for values, scales in ((xs, model.activation_scales), (gs, model.signal_scales)):
        torch.testing.assert_close(scales, torch.stack([x.square().mean().sqrt() for x in values]))


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"gradmetanet_args.num_probes: found 0.*normalize: found True, but probes"):
        GradMetaNetConfig(num_probes=0, normalize=True)
    for spec in (NetSpec.mlp([2, 3], "sine"), NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 2)))):
        with pytest.raises(ValueError, match=r"gradmetanet reads linear layers with hidden ones, found .*; use"):
            GradMetaNetConfig().build(spec)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=["vector", "parameters"])
def test_what_a_step_keeps_is_counted(config):
    """Derivatives within the forward pass do not disturb it."""
    assert build(config, SPECS[0]).networks_at_once(torch.device("cpu")) > 1
