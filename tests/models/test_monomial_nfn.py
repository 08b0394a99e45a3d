import pytest
import torch
from contract import Contract, build, error, flat

from scalegmn.models.monomial_nfn import MonomialLayer, MonomialNFNConfig, path_norms
from scalegmn.models.nfn import NFNConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.symmetry.groups import GroupElement

SPECS = [
    NetSpec.mlp([2, 5, 4, 3, 2], "sine", 6.0),
    NetSpec.mlp([3, 4, 2], "tanh"),
    NetSpec.mlp([2, 5, 4, 1], "relu"),
    NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2))),
    NetSpec((LayerSpec(2, 4, (2, 2), "tanh"), LayerSpec(4, 3, (1, 1)))),
]
CONFIGS = [
    MonomialNFNConfig(hidden_dims=(4, 3), readout_dim=16),
    MonomialNFNConfig(hidden_dims=(4,), readout_dim=16, normalize=False, out_dim=1),
    MonomialNFNConfig(output="parameters", hidden_dims=(4, 3)),
    MonomialNFNConfig(output="parameters", hidden_dims=(4,), heads=2),
]


class TestMonomialNFN(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param

    def test_keeps_scales_of_six_decades(self, model, nets, generator):
        params = nets(4)
        element = GroupElement.sample(params, generator, permute=False, decades=3.0)
        assert error(model, params, element) <= 1e-9


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nfn_does_not_keep_scalars(spec, random_params, generator):
    params = random_params(spec, 4)
    model = build(NFNConfig(hidden_dims=(4, 3), num_frequencies=0, readout_dim=16), spec)
    assert error(model, params, GroupElement.sample(params, generator, permute=False)) > 1e-3


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pooling_without_path_norms_or_absolute_values_is_caught(spec, random_params, generator, monkeypatch):
    params, model = random_params(spec, 4), build(CONFIGS[0], spec)
    element = GroupElement.sample(params, generator, permute=False)
    if model.has_signs:
        model.has_signs = False
    else:
        pooled = model.pooled
        ones = lambda norms: [torch.ones_like(x) for x in norms]  # noqa: E731
        monkeypatch.setattr(model, "pooled", lambda features, i, o: pooled(features, ones(i), ones(o)))
    assert error(model, params, element) > 1e-3


def test_path_norms_follow_the_scalars(random_params, generator):
    params = random_params(SPECS[3], 3)
    element = GroupElement.sample(params, generator, permute=False)

    def norms(params):
        return path_norms([w.reshape(*w.shape[:3], -1) for w in params.weights], params.biases)

    for before, after, power in zip(norms(params), norms(element.act(params)), (1, -1), strict=True):
        for x, y, q in zip(before, after, element.scales, strict=True):
            torch.testing.assert_close(y, x * q.abs() ** power, rtol=1e-12, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("layout", [(2, 3, 1), (1, 3, 3, 2), (1, 3, 3, 3, 1)], ids=str)
def test_all_linear_equivariant_maps_are_there(layout, activation, random_params, generator):
    """As many as there are matrices M with M g = g M for some random g of the group."""
    spec = NetSpec.mlp(layout, activation)
    size, equations = spec.num_parameters, []
    basis = torch.eye(size, dtype=torch.float64)
    for _ in range(8):
        one = GroupElement.sample(random_params(spec, 1), generator)
        repeated = GroupElement(*(tuple(x.expand(size, -1) for x in part) for part in (one.permutations, one.scales)))
        g = repeated.act(random_params(spec, size).unflatten(basis)).flatten().mT.contiguous()
        equations.append(torch.kron(basis, g) - torch.kron(g.mT.contiguous(), basis))
    gram = sum(e.mT @ e for e in equations)
    dimension = int((torch.linalg.eigvalsh(gram) < 1e-8).sum())
    layer = MonomialLayer(layout, [1] * (len(layout) - 1), activation == "tanh", 1, 1)
    maps = sum(parameter.numel() for parameter in layer.parameters()) - layout[-1]  # without the constant of b_L
    assert maps == dimension


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"monomial_nfn_args.out_dim: found 0.*hidden_dims: found \[\]"):
        MonomialNFNConfig(hidden_dims=(), out_dim=0)
    for activation in ("gelu", "hetero"):
        with pytest.raises(ValueError, match=r"monomial_nfn reads networks of one scalar group, sign or scale, found"):
            MonomialNFNConfig().build(NetSpec.mlp([2, 3, 1], activation))
    with pytest.raises(ValueError, match="monomial_nfn reads hidden neurons"):
        MonomialNFNConfig().build(NetSpec.mlp([2, 3], "relu"))
    both = NetSpec((LayerSpec(2, 3, None, "relu"), LayerSpec(3, 3, None, "tanh"), LayerSpec(3, 1)))
    with pytest.raises(ValueError, match="of scale and sign"):
        MonomialNFNConfig().build(both)


def test_changes_of_a_silent_neuron_have_gradients(random_params):
    params = random_params(SPECS[2], 2).map(lambda x: 0 * x)
    model = build(CONFIGS[0], SPECS[2])
    flat(model(params)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
