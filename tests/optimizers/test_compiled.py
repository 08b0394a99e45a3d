"""Compiled steps of optimisers that read each parameter by itself give what the plain ones give, and are taken."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize, prune

from scalegmn.engine import native
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.optimizers import compiled
from scalegmn.optimizers.coordinates import Coordinates
from scalegmn.optimizers.evaluation import learned_curves
from scalegmn.optimizers.learned import STEPS_AT_ONCE, LearnedOptimizer, LearnedOptimizerConfig
from scalegmn.optimizers.meta_gradients import persistent_evolution
from scalegmn.optimizers.problems import ImageData, InnerProblem, ProblemConfig, initialized
from scalegmn.optimizers.rules import RULES

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")
SPEC = NetSpec((LayerSpec(7, 13, None, "relu"), LayerSpec(13, 3)))  # tensors that are no whole blocks of 64 parameters
NUM_NETWORKS, STEPS = 3, 5
kinds = pytest.mark.parametrize(
    ("network", "features", "rule"),
    [(network, features, rule) for network in ("ff", "mlp_lopt") for features in ("ng", "unf") for rule in RULES],
)


def calls_of(name, monkeypatch):
    """count(): how many calls of a compiled function there were since the last count."""
    calls, function = [], getattr(compiled, name)

    def counted(*arguments):
        calls.append(None)
        return function(*arguments)

    def count():
        number = len(calls)
        calls.clear()
        return number

    monkeypatch.setattr(compiled, name, counted)
    return count


@pytest.fixture
def num_compiled(monkeypatch):
    """num_compiled(): how many compiled steps there were since the last call."""
    return calls_of("step", monkeypatch)


@pytest.fixture
def num_trained(monkeypatch):
    """num_trained(): how many compiled trainings, of many steps each, there were since the last call."""
    return calls_of("train", monkeypatch)


@pytest.fixture
def plain(monkeypatch):
    """plain(function): what it returns without compiled code."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            return function()

    return call


def optimizer_for(spec, kind=LearnedOptimizer, **options):
    """One with other than initial parameters, so that all of them matter."""
    torch.manual_seed(0)
    half_life = 3.0 if options.get("rule", "adam") == "adam" else None
    optimizer = kind(
        LearnedOptimizerConfig(**{"network": "ff", "hidden_dim": 5, "half_life": half_life, **options}), spec
    )
    with torch.no_grad():
        for parameter in optimizer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return optimizer


def steps(optimizer, dtype=torch.float32, own=None):
    """The parameters [B, P] before and after each step, and the state after the last. Parameters are small beside their
    changes; some are 0, and so are some gradients, which have all sizes."""
    generator = torch.Generator().manual_seed(0)
    params, coordinates = initialized(SPEC, NUM_NETWORKS, "he", generator).to(dtype), Coordinates(SPEC)
    trajectory = [1e-3 * params.flatten()]
    state = optimizer.features.start(trajectory[0])
    for _ in range(STEPS):
        gradients = torch.randn(trajectory[0].shape, generator=generator)
        gradients *= 10 ** (12 * torch.rand(gradients.shape, generator=generator) - 10)
        gradients[:, ::5], gradients[:, ::11] = 0, 1e-40
        new, state = optimizer.step(params, trajectory[-1], gradients.to(dtype), state, coordinates, own)
        trajectory.append(new)
    return torch.stack(trajectory), state


def assert_plain(optimizer, plain, own=None):
    """Compiled steps are the plain ones to rounding in single precision: no further from double precision."""
    (found, found_state), (expected, expected_state) = (
        steps(optimizer, own=own),
        plain(lambda: steps(optimizer, own=own)),
    )
    for one, other in zip(found_state, expected_state, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-37)
    exact = copy.deepcopy(optimizer).double()
    own = own and {name: rows.double() for name, rows in own.items()}
    exact, _ = steps(exact, torch.float64, own)
    assert (found - exact).abs().max() < 2 * (expected - exact).abs().max() < 1e-4 * exact.diff(dim=0).abs().max()


@kinds
def test_steps_are_the_plain_ones(network, features, rule, num_compiled, plain):
    assert_plain(optimizer_for(SPEC, network=network, features=features, rule=rule), plain)
    assert num_compiled() == STEPS


@kinds
def test_each_network_may_have_an_optimizer_of_its_own(network, features, rule, num_compiled, plain):
    optimizer = optimizer_for(SPEC, network=network, features=features, rule=rule)
    own = {name: p.detach() + 0.1 * torch.randn(NUM_NETWORKS, *p.shape) for name, p in optimizer.named_parameters()}
    assert_plain(optimizer, plain, own)
    assert num_compiled() == STEPS
    assert (steps(optimizer)[0] - steps(optimizer, own=own)[0]).abs().max() > 1e-5


@pytest.mark.parametrize("hidden_dim", [1, 8, 33])
def test_all_widths(hidden_dim, num_compiled, plain):
    assert_plain(optimizer_for(SPEC, features="ng", hidden_dim=hidden_dim), plain)
    assert num_compiled() == STEPS


@pytest.mark.parametrize("features", ["ng", "unf"])
def test_the_number_of_threads_and_of_networks_does_not_matter(features):
    """To the bit, and neither does which call it is."""
    optimizer, threads = optimizer_for(SPEC, features=features), torch.get_num_threads()
    whole, _ = steps(optimizer)
    assert torch.equal(steps(optimizer)[0], whole)
    try:
        torch.set_num_threads(3)
        assert torch.equal(steps(optimizer)[0], whole)
    finally:
        torch.set_num_threads(threads)
    flat, coordinates = whole[0], Coordinates(SPEC)
    gradients, start = torch.randn_like(flat), optimizer.features.start
    new, _ = optimizer.step(None, flat, gradients, start(flat), coordinates)
    for row in range(NUM_NETWORKS):
        rows = slice(row, row + 1)
        alone, _ = optimizer.step(None, flat[rows], gradients[rows], start(flat[rows]), coordinates)
        assert torch.equal(alone, new[rows])


@pytest.mark.parametrize("features", ["ng", "unf"])
def test_the_default_type_does_not_matter(features):
    optimizer = optimizer_for(SPEC, features=features)
    flat, coordinates = steps(optimizer)[0][0], Coordinates(SPEC)

    def new():
        return optimizer.step(None, flat, flat + 1, optimizer.features.start(flat), coordinates)[0]

    expected = new()
    torch.set_default_dtype(torch.float64)
    try:
        found = new()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_pruned_layers_take_the_plain_path(num_compiled):
    optimizer, coordinates = optimizer_for(SPEC, features="unf"), Coordinates(SPEC)
    params = initialized(SPEC, NUM_NETWORKS, "he", torch.Generator().manual_seed(0))
    flat, start = params.flatten(), optimizer.features.start
    expected, _ = optimizer.step(params, flat, flat, start(flat), coordinates)
    assert num_compiled() == 1
    prune.identity(optimizer.network.mlp.linears[1], "weight")
    with torch.no_grad():
        found, _ = optimizer.step(params, flat, flat, start(flat), coordinates)
    assert num_compiled() == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Doubled(torch.nn.Linear):
    """A layer of a form of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_hook(name):
    def change(optimizer):
        optimizer.get_submodule(name).register_forward_hook(lambda module, inputs, outputs: 2 * outputs)

    return change


def with_layer(kind, **options):
    def change(optimizer):
        linears = optimizer.network.mlp.linears
        linears[0] = kind(linears[0].in_features, linears[0].out_features, **options)

    return change


def tie(optimizer):
    linears = optimizer.network.mlp.linears
    linears[1].bias = linears[0].bias


@pytest.mark.parametrize(
    "change",
    [
        with_hook(""),
        with_hook("network.mlp.linears.1"),
        with_hook("network.mlp.activation"),
        with_hook("rule"),
        with_layer(Doubled),
        with_layer(torch.nn.Linear, bias=False),
        lambda optimizer: setattr(optimizer.network.mlp, "activation", torch.nn.Tanh()),
        lambda optimizer: prune.random_unstructured(optimizer.network.mlp.linears[1], "bias", 0.5),
        lambda optimizer: prune.random_unstructured(optimizer.rule, "gains", 0.5),
        lambda optimizer: parametrize.register_parametrization(
            optimizer.network.mlp.linears[1], "bias", torch.nn.Tanh()
        ),
        tie,
    ],
)
def test_changed_optimizers_take_the_plain_form(change, num_compiled, num_trained):
    optimizer, problem = optimizer_for(drawn().params.spec), drawn()
    change(optimizer)
    found = learned_curves(optimizer, problem, 2)
    assert (num_compiled(), num_trained()) == (0, 0)
    flat, coordinates = problem.params.flatten(), Coordinates(problem.params.spec)
    _, gradients = problem.losses_and_gradients(flat, problem.batch(0))
    inputs, _ = optimizer.inputs(problem.params, flat, gradients, optimizer.features.start(flat))
    with torch.no_grad():
        flat = flat + optimizer(inputs, coordinates)
    losses, _ = problem.losses_and_gradients(flat, problem.batch(1))
    assert torch.equal(found.losses[:, 1], losses)


def test_wrong_shapes_are_refused():
    optimizer, coordinates = optimizer_for(SPEC, features="ng"), Coordinates(SPEC)
    flat = initialized(SPEC, NUM_NETWORKS, "he", torch.Generator().manual_seed(0)).flatten()
    state = optimizer.features.start(flat)
    with pytest.raises(ValueError, match="found a state of shapes"):
        optimizer.step(None, flat, flat, state[:1], coordinates)
    wider = Coordinates(NetSpec((LayerSpec(7, 14, None, "relu"), LayerSpec(14, 3))))
    with pytest.raises(ValueError, match=r"expected \[\(3, 157\)"):
        optimizer.step(None, flat, flat, state, wider)
    own = dict(optimizer.named_parameters())
    own["network.mlp.linears.0.weight"] = own["network.mlp.linears.0.weight"][:, :3]
    with pytest.raises(ValueError, match="expected weights of these"):
        optimizer.step(None, flat, flat, state, coordinates, own)


class Broken:
    """Networks whose gradients are not finite, or as large as numbers may be, from the third step on; the first one is
    sound."""

    batch_size = 4

    def __init__(self):
        self.params = initialized(SPEC, 5, "he", torch.Generator().manual_seed(0))

    def batch(self, step):
        return torch.tensor(step), torch.zeros(5)

    def losses_and_gradients(self, flat, batch):
        gradients = flat.clone()
        if batch[0] > 1:
            gradients[1:, 3] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])
        return flat.square().mean(1), gradients


@pytest.mark.parametrize("features", ["ng", "unf"])
def test_the_same_networks_diverge(features, num_compiled, plain):
    optimizer = optimizer_for(SPEC, features=features, rule="ng")
    found, expected = learned_curves(optimizer, Broken(), 6), plain(lambda: learned_curves(optimizer, Broken(), 6))
    assert num_compiled() == 6
    assert torch.equal(found.losses.isinf(), expected.losses.isinf())
    assert found.num_diverged == expected.num_diverged >= 3
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-5, atol=1e-6)


class Unbounded(Broken):
    """The loss of the first network is minus infinity."""

    def losses_and_gradients(self, flat, batch):
        losses, gradients = super().losses_and_gradients(flat, batch)
        return losses.index_fill(0, torch.tensor([0]), -torch.inf), gradients


def test_losses_of_minus_infinity_diverge():
    optimizer, flat = optimizer_for(SPEC), Unbounded().params.flatten()
    found = optimizer.train_networks(Unbounded(), flat, optimizer.features.start(flat), 2)
    assert found.diverged.tolist() == [True, False, False, False, False]
    assert torch.equal(found.parameters[0], flat[0])


@pytest.mark.parametrize(("exponent", "diverges"), [(88.5, False), (88.8, True), (1e4, True)])
def test_exponentials_end_where_single_precision_does(exponent, diverges, num_compiled, plain):
    optimizer = optimizer_for(SPEC, features="unf", rule="ng")
    with torch.no_grad():
        last = optimizer.network.mlp.linears[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.1, exponent / 0.01]))
    found = learned_curves(optimizer, Broken(), 1).parameters
    assert num_compiled() == 1
    expected = plain(lambda: learned_curves(optimizer, Broken(), 1)).parameters
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert bool((found < 1e30).all()) == diverges  # networks that diverge stay where they are


def test_evolution_is_compiled(num_trained, plain):
    config = ProblemConfig(batch_size=4, image_size=3)
    problem = InnerProblem.draw(config, ImageData(config), 3, torch.Generator().manual_seed(0))
    optimizer = optimizer_for(problem.params.spec)
    noise = torch.randn(3, sum(p.numel() for p in optimizer.parameters()))

    def estimate():
        return persistent_evolution(optimizer, problem, None, noise, window=4, horizon=8, sigma=0.01)

    found, population = estimate()
    assert num_trained() == 1
    expected, same_population = plain(estimate)
    torch.testing.assert_close(population.parameters, same_population.parameters, rtol=1e-5, atol=1e-6)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


class StepByStep(InnerProblem):
    """Networks that are trained step by step, as those of any problem of one's own."""


def drawn(problem=InnerProblem, num_networks=5, **options):
    config = ProblemConfig(batch_size=9, image_size=3, **options)
    return problem.draw(config, ImageData(config), num_networks, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("features", "rule"), [("ng", "ng"), ("unf", "adam"), ("unf", "unf")])
def test_trainings_are_steps_one_by_one(features, rule, num_compiled, num_trained):
    """To the bit, on any number of threads, with steps in several calls."""
    optimizer, threads = optimizer_for(drawn().params.spec, features=features, rule=rule), torch.get_num_threads()
    expected = learned_curves(optimizer, drawn(StepByStep), STEPS_AT_ONCE + 3)
    assert (num_compiled(), num_trained()) == (STEPS_AT_ONCE + 3, 0)
    try:
        torch.set_num_threads(3)
        found = learned_curves(optimizer, drawn(), STEPS_AT_ONCE + 3)
    finally:
        torch.set_num_threads(threads)
    assert (num_compiled(), num_trained()) == (0, 2)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.parameters, expected.parameters)
    assert found.losses.isfinite().all()


def test_trainings_go_on_where_others_ended():
    optimizer, problem = optimizer_for(drawn().params.spec), drawn()
    flat = problem.params.flatten()
    for steps in (3, 4):
        found, expected = (
            optimizer.train_networks(each, flat, optimizer.features.start(flat), steps)
            for each in (problem, drawn(StepByStep))
        )
        assert torch.equal(found.parameters, expected.parameters)
        for one, other in zip(found.state, expected.state, strict=True):
            assert torch.equal(one, other)
        flat = found.parameters


def test_trainings_end_where_networks_diverge(num_trained):
    """Others are not touched; losses are infinite from there on, also of later calls."""
    optimizer = optimizer_for(drawn().params.spec, features="ng", rule="ng")
    flat = drawn().params.flatten()
    sound = optimizer.train_networks(drawn(), flat, optimizer.features.start(flat), STEPS_AT_ONCE + 2)
    limit = float(sound.losses.max()) + 1
    flat[1, 0], flat[2], flat[3, 5] = torch.nan, 1e3 * flat[2], torch.inf
    found, expected = (
        optimizer.train_networks(each, flat, optimizer.features.start(flat), STEPS_AT_ONCE + 2, None, limit)
        for each in (drawn(), drawn(StepByStep))
    )
    assert num_trained() == 4
    assert found.diverged.tolist() == expected.diverged.tolist() == [False, True, True, True, False]
    assert torch.equal(found.losses, expected.losses)
    assert found.losses[1:4].isinf().all()
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.parameters[[0, 4]], sound.parameters[[0, 4]])
    assert torch.equal(found.losses[[0, 4]], sound.losses[[0, 4]])


def test_networks_that_diverged_stay():
    """Also where their losses are low again, in later calls of compiled code."""
    optimizer, flat = optimizer_for(drawn().params.spec, features="ng", rule="ng"), drawn().params.flatten()
    sound = optimizer.train_networks(drawn(), flat, optimizer.features.start(flat), STEPS_AT_ONCE + 3)
    limit = float(sound.losses[:, :STEPS_AT_ONCE].amax(1).median())
    assert (sound.losses[:, STEPS_AT_ONCE:] < limit).any(1).all()
    found, expected = (
        optimizer.train_networks(each, flat, optimizer.features.start(flat), STEPS_AT_ONCE + 3, None, limit)
        for each in (drawn(), drawn(StepByStep))
    )
    assert found.diverged.tolist() == expected.diverged.tolist()
    assert 0 < found.diverged.sum() < len(flat)
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.parameters, expected.parameters)


@pytest.mark.parametrize("problem", [InnerProblem, StepByStep])
@pytest.mark.parametrize(("num_networks", "num_steps"), [(0, 3), (3, 0)])
def test_no_networks_and_no_steps(num_networks, num_steps, problem):
    optimizer, problem = optimizer_for(drawn().params.spec), drawn(problem)[:num_networks]
    curves = learned_curves(optimizer, problem, num_steps)
    assert curves.losses.shape == (num_networks, num_steps)
    assert torch.equal(curves.parameters, problem.params.flatten())


@pytest.mark.parametrize("exponent", [88.8, 1e4])
def test_trainings_end_where_an_update_is_infinite(exponent):
    optimizer, problem = optimizer_for(drawn().params.spec, features="unf", rule="ng"), drawn()
    with torch.no_grad():
        last = optimizer.network.mlp.linears[-1]
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.1, exponent / 0.01]))
    flat = problem.params.flatten()
    found = optimizer.train_networks(problem, flat, optimizer.features.start(flat), 2)
    assert found.diverged.all()
    assert torch.equal(found.parameters, flat)
    assert found.losses[:, 0].isfinite().all()
    assert found.losses[:, 1].isinf().all()


@pytest.mark.parametrize("options", [{"num_networks": 4}, {"hidden_dims": ((31,),)}])
def test_trainings_of_wrong_shapes_are_refused(options):
    problem, coordinates = drawn(), Coordinates(drawn().params.spec)
    optimizer, flat = optimizer_for(problem.params.spec), problem.params.flatten()
    given, state = dict(optimizer.named_parameters()), optimizer.features.start(flat)
    classifiers = drawn(**options).classifiers(range(2), copies=1)
    with pytest.raises(ValueError, match="found images for"):
        compiled.compiled_training(
            optimizer.features, optimizer.rule, given, flat, state, coordinates, classifiers, 1.0
        )


@pytest.mark.parametrize("options", [{"activations": ("tanh",)}, {"kind": "cnn"}])
def test_other_networks_are_trained_step_by_step(options, num_compiled, num_trained):
    problem = drawn(hidden_dims=((4, 4),), **options)
    curves = learned_curves(optimizer_for(problem.params.spec), problem, 2)
    assert (num_compiled(), num_trained()) == (2, 0)
    assert curves.losses.isfinite().all()


class Subclass(LearnedOptimizer):
    """With a form of its own."""

    def forward(self, inputs, coordinates):
        return -inputs.gradients


@pytest.mark.parametrize(
    "options", [{"canonical": True}, {"features": "factored"}, {"network": "lstm"}, {"kind": Subclass}]
)
def test_other_optimizers_take_the_plain_form(options, num_compiled):
    trajectory, _ = steps(optimizer_for(SPEC, **options))
    assert num_compiled() == 0
    assert (trajectory.diff(dim=0) != 0).any()


def test_double_precision_takes_the_plain_form(num_compiled):
    steps(optimizer_for(SPEC).double(), torch.float64)
    assert num_compiled() == 0
