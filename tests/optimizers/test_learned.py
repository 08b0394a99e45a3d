"""Learned optimisers commute with the symmetries that they claim, and with no other; untrained, they are Adam."""

import pytest
import torch
from torch import nn

from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.optimizers.coordinates import Coordinates
from scalegmn.optimizers.evaluation import hand_designed_curves, learned_curves
from scalegmn.optimizers.features import FEATURES
from scalegmn.optimizers.hand_designed import HandDesigned
from scalegmn.optimizers.learned import UPDATE_NETWORKS, LearnedOptimizerConfig
from scalegmn.optimizers.rules import RULES, AdamRelativeRule, Moments
from scalegmn.symmetry.groups import GroupElement

STEPS = 6
ALONE = {"permutation": {"scale": False}, "sign": {"permute": False}, "scale": {"permute": False}}


def chain(activation, layout=(5, 6, 4, 3)):
    last = len(layout) - 2
    return NetSpec(
        tuple(
            LayerSpec(layout[i], layout[i + 1], None, activation if i < last else "identity") for i in range(last + 1)
        )
    )


class Regression:
    """Networks that fit random targets, another batch in every step."""

    def __init__(self, params, seed=0):
        self.params, self.seed = params, seed

    def batch(self, step):
        generator = torch.Generator().manual_seed(self.seed + step)
        spec = self.params.spec
        shape = (8, 2, 5, 5) if spec.is_cnn else (8, spec.layout[0])
        inputs = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return inputs, torch.randn(8, spec.layout[-1], generator=generator, dtype=torch.float64)

    def losses(self, flat, batch):
        params = self.params.unflatten(flat)
        outputs = (evaluate_cnn if params.spec.is_cnn else evaluate)(params, batch[0])
        return (outputs - batch[1]).square().mean((1, 2))

    def losses_and_gradients(self, flat, batch):
        with torch.enable_grad():
            leaf = flat.detach().requires_grad_()
            losses = self.losses(leaf, batch)
            return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


def optimizer_for(spec, **options):
    """One with other than initial parameters, so that all of them matter."""
    torch.manual_seed(0)
    optimizer = LearnedOptimizerConfig(**{"hidden_dim": 8, "num_layers": 2, **options}).build(spec).double()
    with torch.no_grad():
        for parameter in optimizer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return optimizer


def commutation_error(curves, params, **element_options):
    """The largest relative difference of losses, step by step, of networks and of moved copies of them."""
    element = GroupElement.sample(params, torch.Generator().manual_seed(1), **element_options)
    first, second = curves(Regression(params)), curves(Regression(element.act(params)))
    assert first.losses.isfinite().all()
    assert (first.losses[:, 1] != first.losses[:, 0]).all()
    return float(((first.losses - second.losses).abs() / first.losses).max())


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("features", list(FEATURES))
@pytest.mark.parametrize("network", list(UPDATE_NETWORKS))
def test_learned_optimizers_commute_as_they_claim(network, features, activation, random_params):
    params = random_params(chain(activation), 3).map(lambda tensor: 0.5 * tensor)
    optimizer = optimizer_for(params.spec, network=network, features=features)
    assert "permutation" in optimizer.exact_symmetries
    for symmetry in ("permutation", {"relu": "scale", "tanh": "sign"}[activation]):
        error = commutation_error(lambda problem: learned_curves(optimizer, problem, STEPS), params, **ALONE[symmetry])
        if symmetry in optimizer.exact_symmetries:
            assert error < 1e-9, symmetry
        else:
            assert error > 1e-6, symmetry
    claims = network.startswith("scalegmn")
    assert (optimizer.exact_symmetries >= {"permutation", "scale" if activation == "relu" else "sign"}) == claims


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_every_rule_keeps_symmetries(rule, activation, random_params):
    params = random_params(chain(activation), 3).map(lambda tensor: 0.5 * tensor)
    optimizer = optimizer_for(params.spec, rule=rule)
    assert commutation_error(lambda problem: learned_curves(optimizer, problem, STEPS), params) < 1e-9


def test_canonical_coordinates_make_any_network_commute_with_scales(random_params):
    params = random_params(chain("relu"), 3).map(lambda tensor: 0.5 * tensor)
    optimizer = optimizer_for(params.spec, network="ff", canonical=True)
    assert optimizer.exact_symmetries == {"permutation", "scale"}
    assert commutation_error(lambda problem: learned_curves(optimizer, problem, STEPS), params) < 1e-9


@pytest.mark.parametrize("network", ["scalegmn", "scalegmn_forward", "ff"])
def test_kernels(network, random_params):
    layers = (LayerSpec(2, 4, (3, 3), "relu"), LayerSpec(4, 3, (3, 3), "relu"), LayerSpec(3, 2))
    params = random_params(NetSpec(layers), 2).map(lambda tensor: 0.3 * tensor)
    optimizer = optimizer_for(params.spec, network=network)
    error = commutation_error(lambda problem: learned_curves(optimizer, problem, STEPS), params)
    assert error < 1e-9 if network != "ff" else error > 1e-6


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_hand_designed_optimizers_commute_with_signs_not_with_scales(kind, random_params):
    optimizer = HandDesigned(kind)
    assert optimizer.exact_symmetries == {"permutation", "sign"}
    rates = torch.full((3,), 0.01, dtype=torch.float64)
    for activation, expected in (("tanh", True), ("relu", False)):
        params = random_params(chain(activation), 3).map(lambda tensor: 0.5 * tensor)
        error = commutation_error(lambda problem: hand_designed_curves(optimizer, problem, STEPS, rates), params)
        assert error < 1e-9 if expected else error > 1e-6


@pytest.mark.parametrize("network", ["ff", "lstm", "nfn", "ng_gnn", "ng_t", "scalegmn"])
def test_untrained_is_adam(network, random_params):
    """Of scalegmn, on networks without scales."""
    params = random_params(chain("tanh"), 3)
    torch.manual_seed(0)
    optimizer = LearnedOptimizerConfig(network=network, hidden_dim=8).build(params.spec).double()
    expected = [layer.clone().requires_grad_() for layer in params.flatten()]
    adams = [torch.optim.Adam([flat], lr=optimizer.rule.log_rate.exp().item()) for flat in expected]
    problem = Regression(params)
    for step in range(4):
        for index, (flat, adam) in enumerate(zip(expected, adams, strict=True)):
            adam.zero_grad()
            stacked = params.flatten().index_put((torch.tensor([index]),), flat[None])
            problem.losses(stacked, problem.batch(step))[index].backward()
            adam.step()
    found = learned_curves(optimizer, problem, 4).parameters
    torch.testing.assert_close(found, torch.stack([flat.detach() for flat in expected]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "options"), [("sgd", {"momentum": 0.9}), ("adam", {})])
def test_hand_designed_optimizers_are_those_of_torch(kind, options, random_params):
    params, problem = random_params(chain("tanh"), 2), None
    problem, rates = Regression(params), torch.tensor([0.01, 0.03], dtype=torch.float64)
    found = hand_designed_curves(HandDesigned(kind), problem, 5, rates).parameters
    build = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind]
    for index, rate in enumerate(rates.tolist()):
        flat = nn.Parameter(params.flatten().clone())
        own = build([flat], lr=rate, **options)
        for step in range(5):
            own.zero_grad()
            problem.losses(flat, problem.batch(step)).sum().backward()
            own.step()
        torch.testing.assert_close(found[index], flat[index].detach(), rtol=1e-9, atol=1e-12)


def test_after_a_half_life_half_is_left_of_what_is_learned(generator):
    lasting, fading = AdamRelativeRule(0.1), AdamRelativeRule(0.1, half_life=20)
    for rule in (lasting, fading):
        nn.init.ones_(rule.gains)
    outputs = torch.randn(3, 5, 2, generator=generator)
    moments = Moments(torch.randn(3, 5, generator=generator), torch.ones(3, 5), torch.tensor([20.0, 40.0, 1e4]))
    shares = torch.tensor([1 / 2, 1 / 4, 0])[:, None, None]
    found, expected = fading(outputs, moments), lasting(shares * outputs, moments)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[2], -0.1 * moments.adam()[2])
    assert (found - lasting(outputs, moments)).abs().min() > 1e-4


def test_coordinates_lead_to_the_graph_and_back(random_params, generator):
    layers = (LayerSpec(2, 4, (3, 1), "relu"), LayerSpec(4, 3, (1, 1), "relu"), LayerSpec(3, 2))
    params = random_params(NetSpec(layers), 2)
    coordinates = Coordinates(params.spec)
    values = torch.randn(2, coordinates.num_parameters, 3, generator=generator, dtype=torch.float64)
    weights, biases = coordinates.to_graph(values)
    assert [tuple(w.shape) for w in weights] == [(2, 4, 2, 9), (2, 3, 4, 3), (2, 2, 3, 3)]
    assert torch.equal(coordinates.from_graph(weights, biases), values)
    own = params.unflatten(values[..., 1])
    assert torch.equal(weights[0].unflatten(-1, (3, 3))[..., 1, :], own.weights[0].flatten(3))
    edges = [torch.arange(w.shape[1] * w.shape[2]).view(1, w.shape[1], w.shape[2], 1).double() for w in weights]
    nodes = [torch.zeros(1, b.shape[1], 1).double() for b in biases]
    spread = params.unflatten(coordinates.spread(edges, nodes).expand(2, -1, -1)[..., 0])
    assert torch.equal(spread.weights[0][0, :, :, 2, 0], edges[0][0, ..., 0])


def test_factored_means(random_params):
    """Of squares that are products of one number per row and one per column, and of their kernels' mean."""
    spec = NetSpec((LayerSpec(2, 4, (3, 1), "relu"), LayerSpec(4, 2)))
    params = random_params(spec, 2).map(torch.square)
    rows, columns, products = (
        params.unflatten(x[..., 0]) for x in Coordinates(spec).factored(params.flatten()[..., None])
    )
    weight = params.weights[0]
    assert torch.allclose(rows.weights[0][:, :, 1, 2, 0], weight.mean((2, 3, 4)), rtol=1e-12)
    assert torch.allclose(columns.weights[0][:, 3, :, 0, 0], weight.mean((1, 3, 4)), rtol=1e-12)
    expected = weight.mean((2, 3, 4))[:, 2] * weight.mean((1, 3, 4))[:, 1] / weight.mean((1, 2, 3, 4))
    assert torch.allclose(products.weights[0][:, 2, 1, 0, 0], expected, rtol=1e-12)
    outer = params.replace(weights=(weight, params.biases[0][:, None, :] * params.biases[1][:, :, None]))
    (_, _, again) = Coordinates(spec).factored(outer.flatten()[..., None])
    assert torch.allclose(spec_weight(outer, again), outer.weights[1], rtol=1e-12)
    assert torch.equal(products.biases[0], params.biases[0])


def spec_weight(params, values):
    """The last weight of values [B, P, 1]."""
    return params.unflatten(values[..., 0]).weights[1]


@pytest.mark.parametrize("network", ["scalegmn", "ng_gnn", "ff", "lstm", "ng_t"])
def test_other_widths_and_depths(network, random_params):
    optimizer = optimizer_for(chain("relu"), network=network)
    for layout in ((5, 9, 7, 3), (5, 6, 3), (4, 6, 5, 4, 2)):
        params = random_params(chain("relu", layout), 2)
        assert learned_curves(optimizer, Regression(params), 2).parameters.isfinite().all()


def test_what_cannot_be_trained_is_refused(random_params):
    params = random_params(chain("relu", (5, 6, 3)), 1)
    with pytest.raises(ValueError, match="the optimiser has maps for each layer"):
        learned_curves(optimizer_for(chain("relu"), network="nfn"), Regression(params), 1)
    with pytest.raises(ValueError, match="trains chains of layers with"):
        learned_curves(optimizer_for(chain("tanh")), Regression(params), 1)
    with pytest.raises(ValueError, match=r"optimizer.network: found 'x', expected one of ff"):
        LearnedOptimizerConfig(network="x")
