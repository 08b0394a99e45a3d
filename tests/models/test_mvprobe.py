from dataclasses import replace

import pytest
import torch
from contract import Contract, build, error

from scalegmn.models.mvprobe import MVProbeConfig, Product, standardized
from scalegmn.networks import LayerSpec, NetParams, NetSpec, linear_products
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.groups import BasisChange, GroupElement

MATRIX = NetSpec((LayerSpec(6, 4, bias=False),))
ADAPTER = NetSpec.mlp([6, 3, 5], "identity")
DEEP = NetSpec.mlp([5, 3, 4, 2], "identity")
ADAPTERS = NetSpec(
    (
        LayerSpec(6, 3, bias=False),
        LayerSpec(3, 5, bias=False, pinned=True),
        LayerSpec(7, 2, bias=False, constant=True, opaque=True),
        LayerSpec(2, 4, bias=False),
    )
)
CONFIG = MVProbeConfig(num_probes=5, projection_dim=4, representation_dim=8, out_dim=3)


class TestMVProbe(Contract):
    @pytest.fixture(params=[MATRIX, ADAPTER, DEEP, ADAPTERS], ids=str)
    def case(self, request):
        return CONFIG, request.param

    def test_keeps_no_more(self, model, nets, generator):
        """Of a change of basis, the half that what reads the neurons does not undo; other inputs."""
        params = nets(6)
        if any(len(product) > 1 for product in model.products):
            element = BasisChange.sample(params, generator)
            assert error(model, params, element) <= 1e-9
            assert error(model, params, replace(element, inverses=element.bases)) > 1e-3
        flipped = params.replace(weights=(params.weights[0].flip(2), *params.weights[1:]))
        assert (model(flipped) - model(params)).abs().max() > 1e-3

    def test_a_broken_model_is_caught(self, model, nets, generator):
        """One that reads a factor."""
        params = nets(6)
        element = BasisChange.sample(params, generator)
        if all(len(product) == 1 for product in model.products):
            pytest.skip("has one factor")
        for moving in (element, GroupElement.sample(params, generator)):
            assert error(lambda nets: model(nets) + nets.weights[0][:, 0, :1], params, moving) > 1e-3


@pytest.mark.parametrize("spec", [ADAPTER, DEEP], ids=str)
def test_basis_changes_keep_the_function(spec, random_params, generator):
    params = random_params(spec, 4)
    element, x = BasisChange.sample(params, generator), torch.randn(7, spec.layout[0], dtype=torch.float64)
    moved = element.act(params)
    assert (moved.flatten() - params.flatten()).abs().max() > 0.1
    torch.testing.assert_close(evaluate(moved, x), evaluate(params, x), rtol=1e-10, atol=1e-10)
    broken = replace(element, inverses=element.bases).act(params)
    assert (evaluate(broken, x) - evaluate(params, x)).abs().max() > 1e-3
    torch.testing.assert_close(element.inverse().act(moved).flatten(), params.flatten(), rtol=1e-10, atol=1e-10)


def test_only_linear_networks_have_other_bases(random_params, generator):
    params = random_params(NetSpec.mlp([3, 4, 2], "relu"), 2)
    assert torch.equal(BasisChange.sample(params, generator).act(params).flatten(), params.flatten())


def test_views_are_those_of_the_product(random_params):
    """The definition, with the matrix multiplied out and the biases as its last column."""
    params = random_params(DEEP, 3)
    model = build(CONFIG, DEEP)
    product = Product.of(params, (0, 1, 2))
    (w1, w2, w3), (b1, b2, b3) = params.weights, (bias[..., None] for bias in params.biases)
    x = torch.cat([w3 @ w2 @ w1, w3 @ (w2 @ b1 + b2) + b3], dim=2)
    (views,) = model.views
    (u, z), (v, w) = views.from_right, views.from_left
    read = []
    products = (x @ u, x.mT @ v, x @ x.mT @ w, x.mT @ x @ z)
    for s, projection in zip(products, views.projections, strict=True):
        mean, deviation = s.mean((1, 2), keepdim=True), s.std((1, 2), correction=0, keepdim=True)
        read.append(torch.relu(((s - mean) / deviation).mT @ projection.weight.mT).flatten(1))
    torch.testing.assert_close(product.times(u), products[0])
    torch.testing.assert_close(model(params), model.readout(model.encoder(torch.cat(read, 1))), rtol=1e-9, atol=1e-10)


def test_zero_matrices_are_read():
    """Adapters as they start have B = 0."""
    weights = (torch.randn(2, 3, 6), torch.zeros(2, 5, 3))
    params = NetParams(ADAPTER, weights, (torch.zeros(2, 3), torch.zeros(2, 5)))
    model = CONFIG.build(ADAPTER)
    model(params).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not standardized(torch.zeros(2, 3, 4)).any()


def test_nothing_of_the_size_of_the_product_is_made():
    """2^36 numbers of a product of rank 1."""
    spec = NetSpec((LayerSpec(2**18, 1, bias=False), LayerSpec(1, 2**18, bias=False)))
    params = NetParams(
        spec, (torch.ones(1, 1, 2**18), torch.ones(1, 2**18, 1)), (torch.zeros(1, 1), torch.zeros(1, 2**18))
    )
    config = MVProbeConfig(num_probes=2, projection_dim=1, representation_dim=2, out_dim=1)
    assert config.build(spec)(params).isfinite().all()


@pytest.mark.parametrize(
    "layers",
    [
        (LayerSpec(2, 3, activation="relu"), LayerSpec(3, 2)),
        (LayerSpec(1, 3, (3, 3)), LayerSpec(3, 2)),
        (LayerSpec(2, 2), LayerSpec(2, 2, residual=-1)),
        (LayerSpec(2, 3), LayerSpec(2, 3, reads=-1), LayerSpec(3, 2)),  # the first is read by none
        (LayerSpec(2, 3), LayerSpec(3, 2, pinned=True), LayerSpec(3, 2, reads=0)),  # read twice
        (LayerSpec(2, 3, pinned=True), LayerSpec(3, 2)),
        (LayerSpec(2, 3), LayerSpec(4, 2, constant=True)),
    ],
)
def test_other_networks_are_no_products(layers):
    spec = NetSpec(layers)
    assert linear_products(spec) == ()
    with pytest.raises(ValueError, match=r"mvprobe reads linear layers without activations, found .*; use scalegmn"):
        CONFIG.build(spec)


def test_wrong_configurations_and_networks_are_refused(random_params):
    with pytest.raises(ValueError, match=r"mvprobe_args.normalize: found true, but each view is standardised"):
        MVProbeConfig(normalize=True)
    with pytest.raises(ValueError, match=r"mvprobe_args.num_probes: found 0, expected at least 1"):
        MVProbeConfig(num_probes=0)
    model = CONFIG.build(ADAPTER).double()
    for spec in (NetSpec.mlp([6, 3, 5], "tanh"), NetSpec(tuple(replace(x, bias=False) for x in ADAPTER.layers))):
        with pytest.raises(ValueError, match="the model was built for"):
            model(random_params(spec, 2))
