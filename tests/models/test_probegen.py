import pytest
import torch
from contract import Contract, build
from memory import share_of_budget

from scalegmn.models.probegen import ProbeGenConfig
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.canonicalize import canonicalize

SPECS = [
    NetSpec.mlp([2, 5, 4, 2], "sine", 6.0),
    NetSpec.mlp([3, 4, 1], "relu"),
    NetSpec.mlp([2, 5, 4, 1], "hetero"),
    NetSpec((LayerSpec(1, 3, (3, 3), "hetero"), LayerSpec(3, 4, (3, 1), "hetero"), LayerSpec(4, 2))),
    NetSpec((LayerSpec(2, 4, (2, 2), "tanh"), LayerSpec(4, 3, (1, 1)))),
]
CNN = NetSpec((*(LayerSpec(i, 16, (3, 3), "relu") for i in (1, 16, 16)), LayerSpec(16, 10)))
SMALL = {"num_probes": 6, "latent_dim": 4, "generator_channels": 2, "hidden_dim": 32, "num_linears": 3, "image_size": 8}
CONFIGS = [
    ProbeGenConfig(**SMALL),
    ProbeGenConfig(**SMALL, generator="none", out_dim=1),
    ProbeGenConfig(**{**SMALL, "image_size": 16}, extra_generator_layer=True, padding="valid", stride=1),
]


class TestProbeGen(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


def test_invariant_to_phase(random_params):
    params = random_params(SPECS[0], 4)
    model = build(CONFIGS[0], SPECS[0])
    canonical = canonicalize(params, ("phase",))
    assert not torch.equal(canonical.biases[0], params.biases[0])
    torch.testing.assert_close(model(canonical), model(params), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_reads_answers_alone(spec, random_params):
    """The output is the MLP's, of the answers that the networks give one at a time."""
    params = random_params(spec, 3, [1, 2, 1] if "hetero" in spec.symmetries else None)
    model = build(CONFIGS[0], spec)
    alone = [params[index : index + 1] for index in range(3)]
    answers = [evaluate_cnn(p, model.probes()) if spec.is_cnn else evaluate(p, model.probes()) for p in alone]
    assert answers[0].shape == (1, 6, spec.layout[-1])
    expected = model.readout(torch.cat(answers).flatten(1))
    torch.testing.assert_close(model(params), expected, rtol=1e-10, atol=1e-12)


def test_published_generators_are_linear_but_for_one_tanh():
    """Kernels, widths and sizes; the sum of codes gives the sum of images, before the tanh and without biases."""
    for extra in (False, True):
        model = ProbeGenConfig(padding="valid", extra_generator_layer=extra).build(CNN).double()
        assert model.probes().shape == (128, 1, 32, 32)
        assert model.probes().abs().max() < 1
        *layers, last = model.generator
        assert isinstance(last, torch.nn.Tanh)
        widths = [(layer.in_channels, layer.out_channels) for layer in layers]
        middle = [(32, 32)] if extra else []
        assert widths == [(32, 128), (128, 64), (64, 32), *middle, (32, 16), (16, 1)]
        with torch.no_grad():
            for layer in layers:
                layer.bias.zero_()
        linear = torch.nn.Sequential(*layers)
        a, b = model.codes[:2, None]
        torch.testing.assert_close(linear(a + b), linear(a) + linear(b), rtol=1e-10, atol=1e-12)
    inr = ProbeGenConfig(num_probes=64).build(NetSpec.mlp([2, 32, 32, 1], "sine"))
    assert [(layer.in_features, layer.out_features) for layer in inr.generator] == [(32, 32), (32, 2)]
    assert [layer.in_features for layer in inr.readout.linears] == [64, *[256] * 5]


def test_learns_where_to_look():
    """Networks of class 1 differ from the others at one place only: probes move there."""
    torch.manual_seed(0)
    spec = NetSpec.mlp([1, 1, 1], "tanh")
    labels = torch.arange(64) % 2
    shift = torch.where(labels == 1, -4.0, -6.0)[:, None]  # a step at 2, or at 3
    ones = torch.ones(64, 1, 1)
    params = NetParams(spec, (2 * ones, ones), (shift, torch.zeros(64, 1)))
    model = ProbeGenConfig(num_probes=4, hidden_dim=16, num_linears=2, out_dim=2).build(spec)
    with torch.no_grad():
        model.generator[-1].bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(params), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("spec", [NetSpec.mlp([2, 32, 32, 1], "sine"), NetSpec.mlp([2, 4, 1], "hetero"), CNN], ids=str)
def test_memory_is_estimated(padding, spec, random_params):
    params = random_params(spec, 32, [1, 2] * 16 if "hetero" in spec.symmetries else None)
    model = ProbeGenConfig(num_probes=16, padding=padding).build(spec)
    assert 0.1 < share_of_budget(model, params.map(lambda tensor: tensor.float())) < 1


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"probegen_args.num_linears: found 1.*image_size: found 28.*use 8, 16, 32"):
        ProbeGenConfig(num_linears=1, image_size=28)
    with pytest.raises(ValueError, match=r"output: found parameters, but probing changes no network.*normalize: found"):
        ProbeGenConfig(output="parameters", normalize=True)
    with pytest.raises(ValueError, match="image_size: 8 is too small for CNN"):
        ProbeGenConfig(**SMALL, padding="valid").build(
            NetSpec((*(LayerSpec(i, 3, (3, 3), "relu") for i in (1, 3, 3)), LayerSpec(3, 2)))
        )
    with pytest.raises(ValueError, match="found a convolution, layer 1, after a linear"):
        ProbeGenConfig().build(NetSpec((LayerSpec(1, 3, None, "relu"), LayerSpec(3, 2, (3, 3)))))
