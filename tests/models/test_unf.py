import pytest
import torch
from architectures import traced
from contract import Contract, build, error, flat, without_residuals

from scalegmn.models.unf import UNFConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.nn.universal import UniversalLayer, blocks_of, cut, joined
from scalegmn.symmetry.groups import GroupElement

RESIDUAL = NetSpec((LayerSpec(1, 4, None, "tanh"), LayerSpec(4, 4, None, "tanh", residual=0), LayerSpec(4, 1)))
PARTLY = NetSpec(
    (
        LayerSpec(2, 3, None, "tanh"),
        LayerSpec(3, 2, None, "tanh", residual=-1),
        LayerSpec(2, 5, None, "tanh", residual=0),
        LayerSpec(5, 2),
    )
)
"""The second layer's neurons stay, as the inputs do; of the third layer, two are coupled to nothing."""
TANH_CNN = NetSpec(
    (LayerSpec(2, 4, (2, 2), "tanh"), LayerSpec(4, 3, (3, 1), "tanh"), LayerSpec(3, 5, None, "tanh"), LayerSpec(5, 2))
)
SPECS = [
    NetSpec.mlp([2, 5, 4, 1], "sine", 6.0),
    NetSpec.mlp([3, 4, 2], "hetero"),
    NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2))),
    RESIDUAL,
    PARTLY,
]
CONFIGS = [
    UNFConfig(hidden_dims=(4, 3), readout_dim=16),
    UNFConfig(output="parameters", hidden_dims=(4,), heads=2, normalize=False),
    UNFConfig(hidden_dims=(3, 4), readout_dim=16, products=True),
    UNFConfig(output="parameters", hidden_dims=(4,), products=True, init="balanced"),
]


class TestUNF(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param


@pytest.mark.parametrize("spec", [RESIDUAL, PARTLY], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.output}-{config.init}")
def test_permutations_that_tear_coupled_neurons_apart_are_seen(config, spec, random_params, generator):
    params = random_params(spec, 6)
    element = GroupElement.sample(without_residuals(params), generator, scale=False)
    assert error(build(config, spec), params, element) > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("spec", [NetSpec.mlp([1, 2, 3, 2], "tanh"), RESIDUAL], ids=str)
def test_all_linear_equivariant_maps_are_there(spec, random_params, generator):
    """As many as there are matrices M with M g = g M for some random g of the group, and all different."""
    size, equations, basis = spec.num_parameters, [], torch.eye(spec.num_parameters, dtype=torch.float64)
    networks = random_params(spec, size).unflatten(basis)
    for _ in range(6):
        permutations = GroupElement.sample(networks[:1], generator, scale=False).permutations
        repeated = tuple(x.expand(size, -1) for x in permutations)
        g = GroupElement(repeated, tuple(torch.ones(size, x.shape[1]).double() for x in repeated))
        matrix = g.act(networks).flatten().mT.contiguous()
        equations.append(torch.kron(basis, matrix) - torch.kron(matrix.mT.contiguous(), basis))
    gram = sum(e.mT @ e for e in equations)
    dimension = int((torch.linalg.eigvalsh(gram) < 1e-8).sum())
    blocks = blocks_of(spec)
    layer, maps = UniversalLayer(blocks, 1, 1).double(), []
    for parameter in layer.parameters():
        parameter.zero_()
    for name, parameter in layer.named_parameters():
        for place in range(0 if name.endswith("bias") else parameter.numel()):
            parameter.view(-1)[place] = 1
            maps.append(joined(blocks, layer(cut(blocks, networks)), networks).flatten().flatten())
            parameter.view(-1)[place] = 0
    assert len(maps) == dimension == torch.linalg.matrix_rank(torch.stack(maps))


@torch.no_grad()
@pytest.mark.parametrize("spec", [RESIDUAL, PARTLY, TANH_CNN], ids=str)
def test_products_start_invariant_to_signs(spec, random_params, generator):
    """As far as the architecture has them; from a balanced start alone. Features keep their size."""
    params = random_params(spec, 6)
    element = GroupElement.sample(params, generator)
    assert any((q < 0).any() for q in element.scales)
    changes = []
    for init in ("published", "balanced"):
        torch.manual_seed(0)
        model = UNFConfig(hidden_dims=(16, 16), readout_dim=32, products=True, init=init).build(spec).double()
        changes.append(error(model, params, element))
    assert changes[0] > 0.1
    assert changes[1] < 1e-9
    features = cut(model.blocks, params)
    for layer in model.layers:
        new = layer(features)
        assert 0.5 < torch.cat([x.flatten() for x in new]).square().mean().sqrt() < 4
        features = list(map(torch.tanh, new))


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("name", ["dense", "grouped", "resnet, two stages", "vit", "gpt"])
def test_any_architecture_is_read(name, products, generator):
    """Residual connections, groups, norms, attention, shared weights; its parameters are cut and joined again."""
    _, params, _ = traced(name)
    nets = params.cat([params.map(lambda x: x + 0.1 * torch.randn_like(x)) for _ in range(4)])
    model = build(UNFConfig(hidden_dims=(2, 2), readout_dim=8, products=products), params.spec)
    assert error(model, nets, GroupElement.sample(nets, generator, scale=False)) <= 1e-9
    folded = nets.with_batch_norm_folded()
    blocks = blocks_of(folded.spec)
    again = joined(blocks, cut(blocks, folded), folded)
    free = [layer.affine for layer in folded.spec.layers], [layer.bias for layer in folded.spec.layers]
    for tensors, others, is_free in zip(
        (again.weights, again.biases), (folded.weights, folded.biases), free, strict=True
    ):
        for x, y, kept in zip(tensors, others, is_free, strict=True):
            assert torch.equal(x, y if kept else torch.zeros_like(y))


def test_wrong_configurations_and_networks_are_refused(random_params):
    with pytest.raises(ValueError, match=r"unf_args.out_dim: found 0.*hidden_dims: found \[\]"):
        UNFConfig(hidden_dims=(), out_dim=0)
    with pytest.raises(ValueError, match=r"hidden_dims: found \[4, 3\], expected an even last one for products"):
        UNFConfig(products=True, hidden_dims=(4, 3))
    with pytest.raises(ValueError, match=r"unf_args.products: found False, expected True for init balanced"):
        UNFConfig(init="balanced")
    with pytest.raises(ValueError, match="found shared ones in network of"):
        UNFConfig(output="parameters").build(traced("gpt")[1].spec)
    loose = without_residuals(random_params(RESIDUAL, 2))
    with pytest.raises(ValueError, match="whose neurons are coupled otherwise"):
        build(CONFIGS[0], RESIDUAL)(loose)


def test_constants_of_layers_start_at_zero(random_params):
    blocks = blocks_of(RESIDUAL)
    layer, params = UniversalLayer(blocks, 1, 2).double(), random_params(RESIDUAL, 2)
    assert flat(layer(cut(blocks, params.map(torch.zeros_like)))[0]).abs().max() == 0
