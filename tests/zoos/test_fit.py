import pytest
import torch

from scalegmn.nets.functional import evaluate
from scalegmn.nets.siren import init_siren, pixel_grid
from scalegmn.spec import NetSpec
from scalegmn.zoos.fit import SirenFit


def problem(layout, generator, num_networks=5):
    spec = NetSpec.mlp(layout, "sine", 3.0)
    params = init_siren(spec, num_networks, generator).to(torch.float64)
    points = pixel_grid(4, 3).double()
    return params, points, torch.rand(num_networks, 12, layout[-1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("layout", [[2, 7, 1], [2, 5, 6, 3], [2, 4, 5, 6, 2]])
def test_gradients_equal_autograd(layout, generator):
    params, points, targets = problem(layout, generator)
    fit = SirenFit(params, points, targets)
    residual = fit.forward().clone()
    fit.backward()
    leaves = params.map(lambda tensor: tensor.clone().requires_grad_())
    expected = evaluate(leaves, points) - targets
    expected.square().mean((1, 2)).sum().backward()
    torch.testing.assert_close(residual, expected.detach(), rtol=1e-12, atol=1e-12)
    for index in range(len(layout) - 1):
        torch.testing.assert_close(fit.weight_grads[index], leaves.weights[index].grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fit.bias_grads[index][:, 0], leaves.biases[index].grad, rtol=1e-10, atol=1e-12)


def test_run_equals_one_by_one_with_torch(generator):
    """All networks at once give what autograd and Adam give for each alone."""
    params, points, targets = problem([2, 6, 5, 1], generator)
    before = params.weights[0].clone()
    fitted, mse = SirenFit(params, points, targets).run(steps=20, lr=1e-2, weight_decay=0.1)
    assert torch.equal(params.weights[0], before)
    for index in range(len(params)):
        own = params[index : index + 1].map(lambda tensor: tensor.clone().requires_grad_())
        optimizer = torch.optim.AdamW([*own.weights, *own.biases], lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for _ in range(20):
            optimizer.zero_grad()
            (evaluate(own, points) - targets[[index]]).square().mean().backward()
            optimizer.step()
            schedule.step()
        for a, b in zip(own.weights, fitted[index : index + 1].weights, strict=True):
            torch.testing.assert_close(a.detach(), b, rtol=1e-8, atol=1e-9)
        loss = (evaluate(own, points) - targets[[index]]).square().mean()
        torch.testing.assert_close(loss.detach(), mse[index], rtol=1e-7, atol=1e-9)
