"""Inner problems: what they draw, what they measure."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from scalegmn.engine import native
from scalegmn.interop.torch_modules import from_module
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.optimizers import problems
from scalegmn.optimizers.evaluation import Curves, hand_designed_curves, steps_to, tuned
from scalegmn.optimizers.hand_designed import HandDesigned
from scalegmn.optimizers.problems import ImageData, InnerProblem, ProblemConfig, initialized


@pytest.fixture(scope="module")
def digits():
    return ImageData(ProblemConfig())


def test_images_are_split_and_standardised(digits):
    assert [len(digits.labels[split]) for split in ("train", "val", "test")] == [1294, 144, 359]
    rows = torch.cat(list(digits.rows.values()))
    assert rows.sort().values.tolist() == list(range(1797))
    assert abs(float(digits.pixels["train"].mean())) < 1e-5
    assert float(digits.pixels["train"].std()) == pytest.approx(1, abs=1e-3)
    small = ImageData(ProblemConfig(image_size=4, kind="cnn"))
    assert small.shape == (1, 4, 4)


@pytest.fixture
def num_compiled(monkeypatch):
    """num_compiled(): how often compiled code gave losses and gradients."""
    calls, compiled = [], problems.losses_and_gradients

    def counted(*arguments):
        calls.append(None)
        return compiled(*arguments)

    monkeypatch.setattr(problems, "losses_and_gradients", counted)
    return lambda: len(calls)


needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize(("hidden_dims", "batch_size"), [((7, 5), 9), ((32, 7), 33), ((16, 4), 1)])
def test_losses_are_those_of_torch(hidden_dims, batch_size, is_compiled, digits, num_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    config = ProblemConfig(hidden_dims=(hidden_dims,), batch_size=batch_size)
    problem = InnerProblem.draw(config, digits, 4, torch.Generator().manual_seed(0))
    flat, (images, labels) = problem.params.flatten(), problem.batch(3)
    losses, gradients = problem.losses_and_gradients(flat, (images, labels))
    assert num_compiled() == is_compiled
    for index in range(4):
        n, m = hidden_dims
        module = nn.Sequential(nn.Linear(64, n), nn.ReLU(), nn.Linear(n, m), nn.ReLU(), nn.Linear(m, 10))
        tensors = [t[index] for pair in zip(problem.params.weights, problem.params.biases, strict=True) for t in pair]
        for parameter, tensor in zip(module.parameters(), tensors, strict=True):
            parameter.data.copy_(tensor)
        loss = nn.functional.cross_entropy(module(images[index]), labels[index])
        loss.backward()
        torch.testing.assert_close(losses[index], loss.detach())
        expected = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
        torch.testing.assert_close(gradients[index], expected, rtol=1e-4, atol=1e-6)
    loss, accuracy = problem.measure(flat, "val")
    logits = module(digits.pixels["val"])
    torch.testing.assert_close(loss[3], nn.functional.cross_entropy(logits, digits.labels["val"]).detach())
    assert float(accuracy[3]) == pytest.approx(float((logits.argmax(1) == digits.labels["val"]).float().mean()))


@needs_compiler
def test_compiled_losses_do_not_depend_on_other_networks_or_on_threads(digits, num_compiled, monkeypatch):
    """To the bit; the same losses and gradients are finite as without compiled code."""
    problem = InnerProblem.draw(ProblemConfig(batch_size=8), digits, 5, torch.Generator().manual_seed(0))
    flat, (images, labels), threads = problem.params.flatten(), problem.batch(0), torch.get_num_threads()
    losses, gradients = problem.losses_and_gradients(flat, (images, labels))
    try:
        torch.set_num_threads(3)
        again = problem.losses_and_gradients(flat, (images, labels))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again[0], losses)
    assert torch.equal(again[1], gradients)
    flat[:3, 40] = torch.tensor([torch.nan, torch.inf, 1e38])
    others = problem.losses_and_gradients(flat, (images, labels))
    assert torch.equal(others[0][3:], losses[3:])
    assert torch.equal(others[1][3:], gradients[3:])
    assert num_compiled() == 3
    monkeypatch.setattr(native, "library", lambda: None)
    plain = problem.losses_and_gradients(flat, (images, labels))
    assert torch.equal(others[0].isfinite(), plain[0].isfinite())
    assert torch.equal(others[1].isfinite(), plain[1].isfinite())
    assert not others[0][0].isfinite()


@needs_compiler
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("parameters", lambda flat, images, labels: (flat[:, 1:], images, labels)),
        ("images", lambda flat, images, labels: (flat, images[:1], labels)),
        ("images", lambda flat, images, labels: (flat, images[..., 1:], labels)),
        ("labels", lambda flat, images, labels: (flat, images, labels.int())),
        ("labels", lambda flat, images, labels: (flat, images, labels + 10)),
        ("labels", lambda flat, images, labels: (flat, images, labels - 100)),
    ],
)
def test_compiled_losses_refuse_what_does_not_fit(name, change, digits):
    problem = InnerProblem.draw(ProblemConfig(batch_size=8), digits, 3, torch.Generator().manual_seed(0))
    flat, images, labels = change(problem.params.flatten(), *problem.batch(0))
    with pytest.raises(ValueError, match=f"^{name}: found"):
        problem.losses_and_gradients(flat, (images, labels))


@pytest.mark.parametrize("options", [{"activations": ("tanh",)}, {"kind": "cnn"}])
def test_other_networks_have_plain_losses(options, num_compiled):
    config = ProblemConfig(hidden_dims=((4, 4),), batch_size=8, **options)
    problem = InnerProblem.draw(config, ImageData(config), 2, torch.Generator().manual_seed(0))
    _, gradients = problem.losses_and_gradients(problem.params.flatten(), problem.batch(0))
    assert num_compiled() == 0
    assert gradients.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("row", [-1, 10**6])
def test_images_that_do_not_exist_are_refused(row, digits):
    problem = InnerProblem.draw(ProblemConfig(batch_size=8), digits, 3, torch.Generator().manual_seed(0))
    classifiers = problem.classifiers(range(2), copies=1)
    with pytest.raises(ValueError, match=r"^rows: found"):
        replace(classifiers, rows=classifiers.rows.index_fill(2, torch.tensor([4]), row))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("images", lambda images: images[:, :-1]),
        ("labels", lambda labels: labels[:-1]),
        ("labels", lambda labels: labels[:, None].expand(-1, 2)),
        ("rows", lambda rows: rows[0]),
        ("rows", lambda rows: rows[None]),
    ],
)
def test_images_of_other_shapes_are_refused(name, change, digits):
    problem = InnerProblem.draw(ProblemConfig(batch_size=8), digits, 3, torch.Generator().manual_seed(0))
    classifiers = problem.classifiers(range(2), copies=1)
    with pytest.raises(ValueError, match=rf"^{name}: found shape"):
        replace(classifiers, **{name: change(getattr(classifiers, name))})


def test_slices_draw_what_the_whole_draws(digits):
    problem = InnerProblem.draw(ProblemConfig(batch_size=5), digits, 6, torch.Generator().manual_seed(0))
    whole, part = problem.batch(2), problem[2:4].batch(2)
    assert torch.equal(whole[0][2:4], part[0])
    assert torch.equal(whole[1][2:4], part[1])
    assert not torch.equal(whole[1][0], whole[1][1])
    assert not torch.equal(problem.batch(3)[1], whole[1])


def test_draws_choose_among_architectures_activations_and_initialisations(digits):
    config = ProblemConfig(
        hidden_dims=((4,), (6, 5)), activations=("relu", "tanh"), initializations=("uniform", "he", "xavier")
    )
    generator = torch.Generator().manual_seed(0)
    drawn = [InnerProblem.draw(config, digits, 2, generator) for _ in range(60)]
    assert len({problem.params.spec for problem in drawn}) == 4
    assert {bool((problem.params.biases[0] == 0).all()) for problem in drawn} == {True, False}
    spec = drawn[0].params.spec
    he = initialized(spec, 500, "he", generator).weights[0]
    assert float(he.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.02)


def test_cnns_have_their_own_images_and_strides(generator, random_params):
    layers = (LayerSpec(2, 4, (3, 3), "relu"), LayerSpec(4, 3, (3, 3), "relu"), LayerSpec(3, 2))
    params = random_params(NetSpec(layers), 3)
    images = torch.randn(3, 5, 2, 7, 7, generator=generator, dtype=torch.float64)
    outputs = evaluate_cnn(params, images, (2, 1))
    for index in range(3):
        alone = evaluate_cnn(params[index : index + 1], images[index], (2, 1))
        torch.testing.assert_close(outputs[index : index + 1], alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs, evaluate_cnn(params, images, 2))


def test_a_small_cnn_learns():
    config = ProblemConfig(kind="cnn", hidden_dims=((8, 8),), batch_size=64)
    problem = InnerProblem.draw(config, ImageData(config), 2, torch.Generator().manual_seed(0))
    curves = hand_designed_curves(HandDesigned("adam"), problem, 60, torch.full((2,), 0.03))
    assert curves.losses[:, -5:].mean() < 0.9 * curves.losses[:, :5].mean()


def test_tuning_takes_the_best_rate_and_survives_divergence(digits):
    config = ProblemConfig(hidden_dims=((8,),), batch_size=16)
    problem = InnerProblem.draw(config, digits, 2, torch.Generator().manual_seed(0))
    found = tuned(HandDesigned("sgd"), problem, 20, 5)
    assert 0.01 < found.rate < 1
    assert 0.01 < tuned(HandDesigned("adam"), problem, 20, 5).rate < 0.5
    huge = hand_designed_curves(HandDesigned("sgd"), problem, 60, torch.tensor([1e38, 0.05]))
    assert huge.num_diverged == 1
    assert huge.losses[1].isfinite().all()


def test_steps_to():
    curves = Curves(torch.tensor([[4.0, 3, 2, 1, 0], [4.0, 3, 2, 1, 0]]), torch.zeros(2, 1), 0.0)
    assert curves.smoothed(2).tolist()[0] == [4.0, 3.5, 2.5, 1.5, 0.5]
    assert [steps_to(curves, loss, 2) for loss in (3.5, 1.5, 1.4, 0.1)] == [2, 4, 5, None]


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"problem.images: found 'x', expected one of digits"):
        ProblemConfig(images="x")
    with pytest.raises(ValueError, match=r"problem.initializations: found \['y'\]"):
        ProblemConfig(initializations=("y",))


def test_inner_networks_are_those_of_modules():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    params = from_module(module, torch.randn(1, 3))
    expected = torch.cat([parameter.flatten() for parameter in module.parameters()])
    assert torch.equal(params.flatten()[0], expected.detach())
