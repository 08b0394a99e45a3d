import pytest
import torch

from scalegmn.engine.native import has_library_for
from scalegmn.networks import NetSpec
from scalegmn.networks.evaluate import evaluate
from scalegmn.networks.siren import init_siren, pixel_grid
from scalegmn.zoos.fit import sirens
from scalegmn.zoos.fit.sirens import CompiledSirenFit, Descent, SirenFit, fit_sirens


def problem(layout, generator, num_networks=5):
    spec = NetSpec.mlp(layout, "sine", 3.0)
    params = init_siren(spec, num_networks, generator).to(torch.float64)
    points = pixel_grid(4, 3).double()
    return params, points, torch.rand(num_networks, 12, layout[-1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("layout", [[2, 7, 1], [2, 5, 6, 3], [2, 4, 5, 6, 2]])
def test_gradients_equal_autograd(layout, generator):
    params, points, targets = problem(layout, generator)
    fit = SirenFit(params, points, targets)
    residual = fit.evaluate().mT
    leaves = params.map(lambda tensor: tensor.clone().requires_grad_())
    expected = evaluate(leaves, points) - targets
    expected.square().mean((1, 2)).sum().backward()
    torch.testing.assert_close(residual, expected.detach(), rtol=1e-12, atol=1e-12)
    for grad, weight, bias in zip(fit.grads, leaves.weights, leaves.biases, strict=True):
        torch.testing.assert_close(grad[:, :, :-1], weight.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grad[:, :, -1], bias.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not has_library_for(torch.zeros(1)), reason="needs a C++ compiler")
@pytest.mark.parametrize("w0", [3.0, 300.0])
@pytest.mark.parametrize("layout", [[2, 7, 1], [2, 5, 6, 3], [2, 33, 18, 6, 2], [1, 2]])
def test_compiled_form_equals_double_precision(layout, w0, generator):
    """Residuals and gradients to single precision, also of phases up to hundreds of turns, for 35 points."""
    spec = NetSpec.mlp(layout, "sine", w0)
    params = init_siren(spec, 5, generator)
    points, targets = 4 * torch.rand(35, layout[0]) - 2, torch.rand(5, 35, layout[-1])
    compiled, exact = CompiledSirenFit(params, points, targets), SirenFit(params, points, targets)
    double = SirenFit(params.to(torch.float64), points.double(), targets.double())
    errors = []
    for fit in (compiled, exact):
        found = [fit.evaluate(), *fit.grads]
        expected = [double.evaluate(), *double.grads]
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)))
    assert errors[0] < max(2e-6, 3 * errors[1])


@pytest.mark.parametrize(
    ("optimizer", "lr", "base_width"), [("adamw", 1e-2, None), ("adamw", 1e-2, 3), ("sgd", 0.3, None)]
)
def test_run_equals_one_by_one_with_torch(optimizer, lr, base_width, generator):
    """All networks at once give what autograd and torch's optimizer give for each alone."""
    params, points, targets = problem([2, 6, 5, 1], generator)
    before = params.weights[0].clone()
    weight_decay = 0.1 if optimizer == "adamw" and base_width is None else 0.0
    fitted = SirenFit(params, points, targets).run(Descent(20, lr, optimizer, weight_decay, base_width=base_width))
    assert torch.equal(params.weights[0], before)
    assert fitted.steps.tolist() == [20] * len(params)
    for index in range(len(params)):
        own = params[index : index + 1].map(lambda tensor: tensor.clone().requires_grad_())
        torch_class = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        groups = [{"params": [own.weights[0], *own.biases]}]
        groups += [{"params": [w], "lr": lr * (base_width or w.shape[2]) / w.shape[2]} for w in own.weights[1:]]
        descent = torch_class(groups, lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, 20)
        for _ in range(20):
            descent.zero_grad()
            (evaluate(own, points) - targets[[index]]).square().mean().backward()
            descent.step()
            schedule.step()
        for a, b in zip(own.weights, fitted.params[index : index + 1].weights, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-8, atol=1e-9)
        loss = (evaluate(own, points) - targets[[index]]).square().mean()
        torch.testing.assert_close(loss.detach(), fitted.mse[index], rtol=1e-7, atol=1e-9)


def test_each_network_stops_where_it_reaches_the_target(generator):
    """A network that stops has the parameters of that very step, and the others go on as if it were not there."""
    params, points, targets = problem([2, 8, 6, 1], generator, num_networks=6)
    early = SirenFit(params, points, targets).run(Descent(60, 2e-2, target_psnr=14.0))
    assert early.steps.min() > 0
    assert len(early.steps.unique()) > 3
    whole = SirenFit(params, points, targets)
    reached = {}
    for step in range(61):
        errors = whole.evaluate().square().mean((1, 2))
        for index in range(6):
            if index not in reached and (step == 60 or errors[index] <= 10**-1.4):
                reached[index] = step
                for fitted, matrix in zip(early.params.weights, whole.matrices, strict=True):
                    torch.testing.assert_close(fitted[index], matrix[index, :, :-1], rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(early.mse[index], errors[index], rtol=1e-9, atol=0)
        whole.update(step, Descent(60, 2e-2))
    assert early.steps.tolist() == [reached[index] for index in range(6)]


def test_result_does_not_depend_on_cores(generator, monkeypatch):
    monkeypatch.setattr(sirens, "CACHE_BYTES", 20_000)
    params, points, targets = problem([2, 6, 5, 1], generator, num_networks=23)
    assert sirens.networks_per_core(params.spec, len(points)) < 12
    threads, found, done = torch.get_num_threads(), [], []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(fit_sirens(params, points, targets, Descent(10, 1e-2), on_done=done.append))
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)
    assert sum(done) == 2 * 23
    for a, b in zip(found[0].params.weights, found[1].params.weights, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[0].mse, SirenFit(params, points, targets).run(Descent(10, 1e-2)).mse)


def test_starts_of_mup():
    """As they are at the base width; at four times the width outputs are half as large and biases as large."""
    size = {}
    for width in (8, 32):
        spec = NetSpec.mlp([2, width, width, 1], "sine", 3.0)
        seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
        published, mup = init_siren(spec, 200, seeds[0]), init_siren(spec, 200, seeds[1], base_width=8)
        pairs = zip((*mup.weights, *mup.biases), (*published.weights, *published.biases), strict=True)
        size[width] = [round(float((x.square().mean() / y.square().mean()).sqrt()), 5) for x, y in pairs]
    assert size == {8: [1.0] * 6, 32: [1, 1, 0.5, 1, 2, 2]}
