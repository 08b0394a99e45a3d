import math

import pytest
import torch
from contract import Contract, build, error, flat

from scalegmn.models.phasor import PhasorConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.nn.phasor import BOTH, INVARIANT, PHASE, SIGN, PhasorLayer, harmonics, products
from scalegmn.symmetry.groups import GroupElement, PhaseShift

SPECS = [
    NetSpec.mlp([2, 5, 4, 1], "sine", 6.0),
    NetSpec.mlp([2, 5, 4, 3, 3], "sine", 30.0),
    NetSpec.mlp([3, 4, 2], "sine", 1.0),
]
SMALL = {"hidden_dim": 8, "num_layers": 2}
CONFIGS = [
    PhasorConfig(**SMALL, readout_dim=16),
    PhasorConfig(**SMALL, normalize=False, out_dim=3),
    PhasorConfig(**SMALL, output="parameters"),
    PhasorConfig(**SMALL, output="parameters", heads=3),
    PhasorConfig(hidden_dim=6, num_layers=1, output="parameters"),
]
CASES = [(config, spec) for config in CONFIGS for spec in SPECS]


class TestPhasor(Contract):
    @pytest.fixture(params=CASES, ids=str)
    def case(self, request):
        return request.param

    def test_keeps_phase_with_permutations_and_signs(self, model, nets, generator):
        params = nets(6)
        for _ in range(3):
            shift = PhaseShift.sample(params, generator, largest=5)
            assert error(model, params, shift) <= 1e-9
            element = GroupElement.sample(params, generator)
            assert error(model, shift.act(params), element) <= 1e-9

    def test_parts_of_half_turns_are_seen(self, model, nets, generator):
        params = nets(6)
        quarter = PhaseShift(tuple(k / 2 + 0.25 for k in PhaseShift.sample(params, generator).turns))
        assert error(model, params, quarter) > 1e-3

    def test_biases_are_read_in_one_place(self, model, nets):
        """A half-turn of a bias without its outgoing weights is another function."""
        params = nets(4)
        moved = params.replace(biases=(params.biases[0] + math.pi / params.spec.layers[0].w0, *params.biases[1:]))
        assert (flat(model(moved)) - flat(model(params))).abs().max() > 1e-6


@pytest.mark.parametrize("output", ["vector", "parameters"])
def test_scalegmn_does_not_keep_the_phase_of_stored_networks(output, random_params, generator):
    params = random_params(SPECS[0], 6)
    config = ScaleGMNConfig(hidden_dim=8, num_layers=2, output=output, direction="bidirectional")
    assert error(build(config, SPECS[0]), params, PhaseShift.sample(params, generator)) > 1e-3


def characters(q, k):
    """The factor of each character, [4, B, n, 1]."""
    turned = (-1.0) ** k
    return torch.stack([torch.ones_like(q), q, turned, q * turned])[..., None]


def test_harmonics_and_products_have_one_character_each(generator):
    theta, q = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    q, k = q.sign(), torch.randint(-4, 5, (3, 5), generator=generator).double()
    expected = characters(q, k)
    x = harmonics(theta)[..., None]
    torch.testing.assert_close(harmonics(q * theta + k * math.pi)[..., None], expected * x, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(products(expected * x), expected * products(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrong", [(SIGN, BOTH), (PHASE, BOTH), (INVARIANT, PHASE)])
def test_a_map_between_characters_is_caught(wrong, random_params, generator):
    params = random_params(SPECS[0], 4)
    model = build(CONFIGS[0], SPECS[0])

    def exchange(layer, _, output):
        order = list(range(4))
        order[wrong[0]], order[wrong[1]] = wrong[1], wrong[0]
        return output[order]

    model.layers[0].mix.register_forward_hook(exchange)
    shift = PhaseShift.sample(params, generator).act(params)
    moved = GroupElement.sample(params, generator, permute=False).act(shift)
    assert (model(moved) - model(params)).abs().max() > 1e-3


def test_messages_are_sums_over_neurons(generator):
    """The definition, one neuron after the other."""
    layer = PhasorLayer(3).double()
    nodes = [torch.randn(4, 1, n, 3, generator=generator, dtype=torch.float64) for n in (2, 3, 2)]
    weights = [torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (2, 3))]
    seen = []
    layer.mix.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(nodes, weights)
    for i in range(3):
        _, below, above = seen[1][:, 0, i].split(3, -1)
        expected = torch.zeros(2, 4, 3, dtype=torch.float64)
        for j in range(2):
            w, u = weights[0][0, i, j], weights[1][0, j, i]
            expected[0, SIGN] += w * nodes[0][BOTH, 0, j] / math.sqrt(2)
            expected[0, INVARIANT] += w**2 * nodes[0][INVARIANT, 0, j] / 2
            expected[1, BOTH] += u * nodes[2][SIGN, 0, j] / math.sqrt(2)
            expected[1, INVARIANT] += u**2 * nodes[2][INVARIANT, 0, j] / 2
        torch.testing.assert_close(torch.stack([below, above]), expected)


def test_is_smooth_where_canonical_biases_jump(random_params):
    """Networks on both sides of theta = pi / 2 have nearly the same output."""
    params = random_params(SPECS[0], 2)
    model = build(CONFIGS[0], SPECS[0])
    first = params.biases[0].clone()
    outputs = []
    for side in (-1e-9, 1e-9):
        first[:, 0] = (math.pi / 2 + side) / 6.0
        outputs.append(model(NetParams(params.spec, params.weights, (first.clone(), *params.biases[1:]))))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-6


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"phasor_args.hidden_dim: found 0.*num_layers: found 0, expected at least 1"):
        PhasorConfig(hidden_dim=0, num_layers=0)
    for spec in (
        NetSpec.mlp([2, 3, 1], "tanh"),
        NetSpec.mlp([2, 3], "sine"),
        NetSpec((LayerSpec(1, 3, (3, 3), "sine"), LayerSpec(3, 2))),
    ):
        with pytest.raises(ValueError, match=r"phasor reads linear layers with sines between, found .*; use scalegmn"):
            PhasorConfig().build(spec)
    residual = NetSpec((LayerSpec(2, 3, None, "sine"), LayerSpec(3, 3, None, "sine", residual=0), LayerSpec(3, 1)))
    with pytest.raises(ValueError, match="phasor knows of no residual connections"):
        PhasorConfig().build(residual)
