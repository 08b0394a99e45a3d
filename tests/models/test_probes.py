"""ScaleGMN with probes: what neurons compute for learned inputs keeps every symmetry."""

from dataclasses import replace

import pytest
import torch
from contract import EngineContract, build, error, flat
from torch import nn

from scalegmn.models.scalegmn import BranchConfig, ScaleGMNConfig
from scalegmn.networks import BUILT_IN, LayerSpec, NetSpec
from scalegmn.networks.evaluate import activations
from scalegmn.nn.probes import Answers, ProbeImages, Probes
from scalegmn.symmetry.groups import GroupElement

SMALL = ScaleGMNConfig(hidden_dim=6, num_layers=3, out_dim=3, num_probes=5, probe_images=ProbeImages(image_size=7))
SINE, RELU = NetSpec.mlp([2, 5, 4, 2], "sine", 2.0), NetSpec.mlp([2, 5, 4, 2], "relu")
CNN = NetSpec((LayerSpec(2, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2)))
RESIDUAL = NetSpec(
    (
        LayerSpec(2, 5, None, "relu"),
        LayerSpec(5, 4, None, "relu"),
        LayerSpec(4, 3, None, "relu", residual=0),
        LayerSpec(3, 2),
    )
)
HETERO_CNN = NetSpec((*(replace(layer, activation="hetero") for layer in CNN.layers[:2]), CNN.layers[2]))
TANH_CNN = NetSpec((*(replace(layer, activation="tanh") for layer in CNN.layers[:2]), CNN.layers[2]))
HETERO_MLP = NetSpec.mlp([2, 5, 4, 2], "hetero", 2.0)
STAGES = NetSpec(
    (
        LayerSpec(2, 4, (3, 3), "relu"),
        LayerSpec(4, 4, (3, 2), "relu", residual=0),
        LayerSpec(4, 3, (2, 2), "tanh"),
        LayerSpec(3, 5, None, "relu"),
        LayerSpec(5, 4, None, "tanh"),
        LayerSpec(4, 2),
    )
)
"""Convolutions, one of which is added to, and several linear layers, with both kinds of scalars."""
STRIDE_1 = ProbeImages(image_size=5, stride=1)
BRANCH = BranchConfig(statistics=True, answers=True, hidden_dims=(8,))
EDITS = {"output": "parameters", "normalize": False}
CASES = [
    ("sign", SINE, {"normalize": True}),
    ("sign", SINE, {"direction": "bidirectional", **EDITS}),
    ("scale", RELU, {"direction": "bidirectional", "readout": "full_graph", "normalize": True}),
    ("scale", RELU, EDITS),
    ("scale", CNN, {"direction": "bidirectional"}),
    ("scale", CNN, EDITS),
    ("scale", RESIDUAL, {"node_positions": "none"}),
    ("hetero", HETERO_MLP, {"direction": "bidirectional", **EDITS}),
    ("hetero", HETERO_CNN, {"readout": "full_graph"}),
    ("permutation", NetSpec.mlp([2, 5, 4, 2], "gelu"), {"direction": "bidirectional", "normalize": False}),
    ("permutation", SINE, EDITS),
    ("scale", CNN, {"branch": BRANCH}),
    ("scale", RELU, {"branch": replace(BRANCH, statistics=False), "direction": "bidirectional", "sizes": True}),
    ("hetero", HETERO_CNN, {"branch": BRANCH, "direction": "bidirectional", "sizes": True, "normalize": True}),
    ("hetero", HETERO_CNN, {"branch": replace(BRANCH, answers=False)}),
    ("sign", SINE, {"branch": BRANCH, "readout": "full_graph"}),
    ("permutation", SINE, {"branch": replace(BRANCH, statistics=False)}),
    ("sign", SINE, {"probe_losses": 2, "direction": "bidirectional", **EDITS}),
    ("scale", RELU, {"probe_losses": 2, "direction": "bidirectional", "output": "parameters", "normalize": True}),
    ("hetero", HETERO_MLP, {"probe_losses": 1, "readout": "full_graph", "direction": "bidirectional"}),
    ("hetero", HETERO_MLP, {"probe_losses": 1, **EDITS}),
    ("permutation", SINE, {"probe_losses": 2, "message_function": "product", "branch": BRANCH}),
    ("scale", RESIDUAL, {"probe_losses": 2}),
    ("scale", CNN, {"probe_losses": 2, "direction": "bidirectional"}),
    ("scale", CNN, {"probe_losses": 2, **EDITS}),
    ("sign", TANH_CNN, {"probe_losses": 1, "direction": "bidirectional", "normalize": True, "readout": "full_graph"}),
    ("hetero", HETERO_CNN, {"probe_losses": 2, "branch": BRANCH}),
    ("hetero", HETERO_CNN, {"probe_losses": 1, "direction": "bidirectional", **EDITS}),
    ("permutation", TANH_CNN, {"probe_losses": 2, "normalize": False}),
    ("hetero", STAGES, {"probe_losses": 2, "direction": "bidirectional", "probe_images": STRIDE_1, **EDITS}),
    ("hetero", STAGES, {"probe_losses": 1, "equal_outputs": True, "readout": "full_graph", "probe_images": STRIDE_1}),
]


class TestProbes(EngineContract):
    @pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], str(case[1]), *map(str, case[2].values())]))
    def case(self, request):
        symmetry, spec, options = request.param
        return replace(SMALL, symmetry=symmetry, **options), spec

    def test_every_probe_is_seen(self, model, nets):
        params = nets(3)
        before = flat(model(params))
        for probe in range(5):
            with torch.no_grad():
                model.probes.inputs[probe] += 0.1
            after = flat(model(params))
            assert (after - before).abs().max() > 1e-9
            before = after

    def test_inference_is_evaluation_without_a_graph(self, model, nets):
        params = nets(3)
        expected = flat(model(params))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output = flat(model(params))
            assert not output.requires_grad
            torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("branch", [BranchConfig(), BRANCH], ids=["graph", "branch"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("spec", [RELU, CNN], ids=str)
def test_six_decades(spec, direction, branch, random_params, generator):
    params = random_params(spec, 6)
    model = build(replace(SMALL, symmetry="scale", direction=direction, normalize=True, branch=branch), spec)
    model.fit_normalization([params])
    element = GroupElement.sample(params, generator, decades=3.0)
    sizes = torch.cat(element.scales, 1).abs().log10()
    assert sizes.min() < -2.5
    assert sizes.max() > 2.5
    assert error(model, params, element) <= 1e-9


@pytest.mark.parametrize(("symmetry", "spec"), [("sign", SINE), ("scale", RELU)])
def test_a_bias_is_seen_failing(symmetry, spec, random_params, generator, monkeypatch):
    """Where the networks are read as they are, canonical ones being the same for all scales."""
    params = random_params(spec, 6)
    model = build(replace(SMALL, symmetry=symmetry), spec)
    monkeypatch.setattr(model, "canonical", lambda params: (params, None))
    element = GroupElement.sample(params, generator)
    assert error(model, params, element) <= 1e-9
    biased = nn.Linear(5, 6, dtype=torch.float64)
    biased.weight = model.probes.hidden_linear.weight
    model.probes.hidden_linear = biased
    assert error(model, params, element) > 1e-6


def test_statistics_that_move_are_seen_failing(random_params, generator, monkeypatch):
    """Those of weights as they are, in the branch."""
    params = random_params(CNN, 6)
    model = build(replace(SMALL, symmetry="scale", branch=BRANCH), CNN)
    element = GroupElement.sample(params, generator)
    assert error(model, params, element) <= 1e-9
    monkeypatch.setattr("scalegmn.symmetry.statistics._canonical", lambda params: params)
    assert error(model, params, element) > 1e-6


def test_answers_by_hand():
    answers = torch.tensor([[[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]], [[1e4, -1e4], [-1e4, 1e4]]])
    features = Answers(2, 2, None)(answers.double())
    expected = torch.tensor([[1, 1, 1.5, 0.5], [2, 0, 0, 2]]).double()
    torch.testing.assert_close(features[:, :4], expected)
    assert features[1, 4] == 4
    constant = torch.ones(1, 2, 3, requires_grad=True)
    Answers(2, 3, None)(constant).sum().backward()
    assert constant.grad.isfinite().all()


def test_branch_is_added(random_params):
    params = random_params(CNN, 3)
    model = build(replace(SMALL, symmetry="scale", branch=BRANCH), CNN)
    model.fit_normalization([params])
    features = []
    model.branch.register_forward_hook(lambda module, inputs, output: features.append((inputs, output)))
    together = model(params)
    (statistics, answers), added = features[0]
    assert statistics.shape == (3, model.statistics(params).shape[1])
    torch.testing.assert_close(answers, model.answers(model.probes(params)[1]))
    model.branch = None
    torch.testing.assert_close(together - added, model(params))


def test_images_at_the_start():
    """Strokes are in [-1, 1], mostly dark, and smooth; a rate changes how they are stored, not what they are."""
    torch.manual_seed(0)
    images = Probes(200, 4, CNN, 3, ProbeImages(image_size=8, start="strokes")).inputs
    assert images.abs().max() <= 1
    assert -0.5 < images.mean() < -0.3
    neighbours = images - images.mean(), (images - images.mean()).roll(1, -1)
    assert (neighbours[0] * neighbours[1]).mean() > 0.4 * neighbours[0].square().mean()
    torch.manual_seed(0)
    fast = Probes(200, 4, CNN, 3, ProbeImages(image_size=8, start="strokes", rate=30))
    torch.testing.assert_close(30 * fast.inputs, images)


def test_images_of_a_higher_rate_move_faster(random_params):
    params, gradients = random_params(CNN, 2), []
    for rate in (1, 30):
        torch.manual_seed(0)
        probes = Probes(5, 4, CNN, 3, ProbeImages(image_size=8, rate=rate)).double()
        features, answers = probes(params)
        (answers.square().sum() + features[1].square().sum()).backward()
        gradients.append(probes.inputs.grad)
    torch.testing.assert_close(gradients[1], 30 * gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", [BranchConfig(), BRANCH], ids=["graph", "branch"])
@pytest.mark.parametrize(("symmetry", "names"), [("sign", ["sine", "tanh"]), ("permutation", ["gelu", "relu"])])
def test_networks_of_several_architectures(symmetry, names, branch, random_params):
    """Depths and widths in one batch, as one by one; the last layer has the last scale."""
    layouts, (first, second) = [[2, 4, 3, 5, 2], [2, 3, 2], [2, 6, 3, 2]], names
    specs = [NetSpec.mlp(layout, name) for layout, name in zip(layouts, (first, second, first), strict=True)]
    model = build(replace(SMALL, symmetry=symmetry, max_hidden_layers=3, branch=branch), specs[0])
    nets = [random_params(spec, 2) for spec in specs]
    model.fit_normalization(nets)
    assert (model.probes.scales != 1).all()
    alone = torch.cat([model(params[index : index + 1]) for params in nets for index in range(2)])
    torch.testing.assert_close(model(nets), alone, rtol=1e-9, atol=1e-9)
    model.engine = "plain"
    torch.testing.assert_close(model(nets), alone, rtol=1e-9, atol=1e-9)


def test_features_by_hand(random_params):
    params = random_params(SINE, 2)
    model = build(replace(SMALL, normalize=True), SINE)
    model.fit_normalization([params[:1], params[1:]])
    points, x, values = model.probes.inputs, model.probes.inputs.expand(2, -1, -1), []
    for weight, bias in zip(params.weights, params.biases, strict=True):
        values.append(torch.einsum("bpj,bij->bip", x, weight) + bias[..., None])  # of the networks as stored
        x = torch.sin(2 * values[-1]).mT
    scales = torch.stack([z.square().mean().sqrt() for z in values])
    torch.testing.assert_close(model.probes.scales, scales, rtol=1e-12, atol=0)
    features, answers = model.probes(params)
    assert (features[0] == 0).all()
    torch.testing.assert_close(features[2], values[1] / scales[1] @ model.probes.hidden_linear.weight.T)
    torch.testing.assert_close(answers, values[-1].mT)
    torch.testing.assert_close(features[3], values[2] / scales[2] @ model.probes.output_linear.weight.T)
    torch.testing.assert_close(activations(params, points)[-1].mT, values[2])


def test_no_chain_and_other_inputs_are_refused(random_params):
    grouped = NetSpec((LayerSpec(2, 4, None, "relu"), LayerSpec(4, 4, None, "relu", groups=2), LayerSpec(4, 2)))
    with pytest.raises(ValueError, match=r"scalegmn_args.num_probes: found 5, expected 0 for .*, no chain"):
        replace(SMALL, symmetry="scale").build(grouped)
    with pytest.raises(ValueError, match=r"probe_images.image_size: 2 is too small for CNN"):
        replace(SMALL, symmetry="scale", probe_images=ProbeImages(2, padding="valid")).build(CNN)
    from_input = NetSpec((*STAGES.layers[:1], replace(STAGES.layers[1], residual=-1), *STAGES.layers[2:]))
    with pytest.raises(ValueError, match=r"probe_images: found a residual connection from the input, expected none"):
        replace(SMALL, symmetry="hetero", probe_images=STRIDE_1).build(from_input)
    with pytest.raises(ValueError, match=r"image_size: found 0, expected at least 1; .*num_probes: found -1"):
        replace(SMALL, num_probes=-1, probe_images=ProbeImages(0))
    model = build(replace(SMALL, symmetry="scale"), CNN)
    with pytest.raises(ValueError, match=r"num_probes: the probes are images, .*found MLP"):
        model(random_params(RELU, 2))


def test_hidden_values_follow_the_activation_of_each_network(random_params):
    """In a mixed batch each network answers with its own activation."""
    spec = NetSpec.mlp([2, 5, 4, 2], "hetero")
    params = random_params(spec, 2, [BUILT_IN.index(name) for name in ("relu", "tanh")])
    model = build(replace(SMALL, symmetry="hetero"), spec)
    own = params.replace(spec=NetSpec.mlp([2, 5, 4, 2], "relu"), activation=None)
    mixed, relu = model.probes(params)[0], model.probes(own)[0]
    torch.testing.assert_close(mixed[2][0], relu[2][0])
    assert (mixed[2][1] - relu[2][1]).abs().max() > 0.1


def test_a_branch_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"scalegmn_args.branch: found one, but .* no readout; use vector output"):
        replace(SMALL, branch=BRANCH, **EDITS)
    with pytest.raises(ValueError, match=r"branch.answers: found True, but num_probes is 0; use probes, or False"):
        replace(SMALL, num_probes=0, branch=BRANCH)
    wrong = replace(BRANCH, hidden_dims=(), dropout=1.0)
    with pytest.raises(ValueError, match=r"branch.dropout: found 1.0.*branch.hidden_dims: found \[\], expected"):
        replace(SMALL, branch=wrong)
    with pytest.raises(ValueError, match=r"probe_images.rate: found 0, expected above 0"):
        replace(SMALL, probe_images=ProbeImages(rate=0))
    one = NetSpec.mlp([2, 5, 4, 1], "sine")
    with pytest.raises(
        ValueError, match=r"branch.answers: found True, expected False for .*, which has one output, and softmax"
    ):
        replace(SMALL, branch=BRANCH).build(one)


MLPS = [[2, 4, 3, 5, 2], [2, 3, 2], [2, 6, 3, 2]]
SEVERAL = [
    ("sign", list(map(NetSpec.mlp, MLPS, ("sine", "tanh", "sine")))),
    ("permutation", list(map(NetSpec.mlp, MLPS, ("gelu", "relu", "gelu")))),
    ("scale", [CNN, NetSpec((LayerSpec(2, 6, (1, 1), "relu"), LayerSpec(6, 3, (3, 3), "relu"), *CNN.layers[1:]))]),
]


@pytest.mark.parametrize(("symmetry", "specs"), SEVERAL, ids=["sign", "permutation", "CNNs"])
def test_gradients_of_networks_of_several_architectures(symmetry, specs, random_params):
    model = build(replace(SMALL, symmetry=symmetry, max_hidden_layers=3, probe_losses=2), specs[0])
    nets = [random_params(spec, 2) for spec in specs]
    model.fit_normalization(nets)
    assert (model.gradients.scales != 1).all()
    alone = torch.cat([model(params[index : index + 1]) for params in nets for index in range(2)])
    torch.testing.assert_close(model(nets), alone, rtol=1e-9, atol=1e-9)
    model.engine = "plain"
    torch.testing.assert_close(model(nets), alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", [SINE, RESIDUAL, TANH_CNN], ids=str)
def test_gradients_by_hand(spec, random_params):
    """Those of autograd, for losses whose derivatives by the answers are the signals."""
    params = random_params(spec, 3).map(lambda x: x.requires_grad_())
    model = build(replace(SMALL, symmetry=spec.symmetries[0], probe_losses=2), spec)
    model.canonical = lambda params: (params, None)
    model.fit_normalization([params[:2], params[2:]])
    probes, gradients = model.probes, model.gradients
    answers = probes(params)[1]
    nodes, edges = gradients(params, probes.pre_activations)
    signals = gradients.signals(answers.flatten(1)).view(3, 2, 5, 2).detach()
    losses = [(signals[:, loss] * answers).sum() for loss in range(2)]
    by_weights = [torch.autograd.grad(loss, params.weights, retain_graph=True) for loss in losses]
    for layer, scale in enumerate(gradients.scales[spec.num_layers :]):
        expected = torch.stack([of_loss[layer] for of_loss in by_weights], dim=3).flatten(3)
        torch.testing.assert_close(edges[layer], expected / scale, rtol=1e-9, atol=1e-12)
        assert expected.square().mean().sqrt().item() == pytest.approx(scale.item())

    def answers_with(offset):
        """Those of networks whose second hidden layer has these biases more."""
        biases = (params.biases[0], params.biases[1] + offset, *params.biases[2:])
        return probes(params.replace(biases=biases))[1]

    per_probe = torch.autograd.functional.jacobian(
        lambda offset: torch.einsum("bhpo,bpo->hp", signals, answers_with(offset)),
        torch.zeros(4, dtype=torch.float64),
    )
    weight = gradients.hidden_linear.weight
    expected = torch.einsum("hpi,dhp->id", per_probe, weight.unflatten(1, (2, 5))) / gradients.scales[1]
    torch.testing.assert_close(nodes[2].sum(0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("broken", ["networks as stored", "a bias"])
@pytest.mark.parametrize("of", ["linear layers", "CNNs"])
def test_gradients_that_move_otherwise_are_seen_failing(broken, of, random_params, generator, monkeypatch):
    """Gradients of relu networks as they are stored go by 1 / q; a bias does not change sign with the neuron."""
    specs = {"linear layers": (RELU, SINE), "CNNs": (CNN, TANH_CNN)}[of]
    symmetry, spec = ("scale", specs[0]) if broken == "networks as stored" else ("sign", specs[1])
    params = random_params(spec, 6)
    model = build(replace(SMALL, symmetry=symmetry, probe_losses=2, direction="bidirectional", **EDITS), spec)
    element = GroupElement.sample(params, generator)
    assert error(model, params, element) <= 1e-9
    if broken == "a bias":
        biased = nn.Linear(10, 6, dtype=torch.float64)
        biased.weight = model.gradients.hidden_linear.weight
        model.gradients.hidden_linear = biased
    else:
        monkeypatch.setattr(model, "canonical", lambda params: (params, None))
    assert error(model, params, element) > 1e-6


@pytest.mark.parametrize("spec", [RELU, CNN], ids=str)
def test_gradients_follow_the_classes(spec, random_params):
    """With `equal_outputs` the order of outputs does not matter; without it does."""
    params = random_params(spec, 6)
    renumbered = params.replace(
        weights=(*params.weights[:-1], params.weights[-1].flip(1)),
        biases=(*params.biases[:-1], params.biases[-1].flip(1)),
    )
    for equal in (True, False):
        model = build(replace(SMALL, symmetry="scale", probe_losses=2, equal_outputs=equal), spec)
        model.fit_normalization([params])
        difference = (model(params) - model(renumbered)).abs().max()
        assert (difference <= 1e-9) == equal


def test_gradients_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"probe_losses: found 2, but num_probes is 0; use probes, or 0"):
        replace(SMALL, num_probes=0, probe_losses=2)
    with pytest.raises(ValueError, match=r"probe_losses: found -1, expected 0 or more"):
        replace(SMALL, probe_losses=-1)
    with pytest.raises(ValueError, match=r"probe_losses: found 2, which is exact for scales with norm_epsilon 0 alone"):
        replace(SMALL, symmetry="scale", probe_losses=2, norm_epsilon=1e-10)
