"""Plans compute what their layers compute one by one, and are refused where they cannot."""

import pytest
import torch
from torch import nn

from scalegmn.engine import layer_plans, native, programs
from scalegmn.engine.plans import Plan
from scalegmn.engine.row_programs import RowProgram
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.networks import NetSpec
from scalegmn.symmetry.measure import invariance_error

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")

SPEC = NetSpec.mlp([2, 6, 5, 3], "sine")
TWO = EquivariantNetConfig(io="factor", io_branches=2, positions=True, num_layers=2, skip_connections=True)
OPTIONS = {
    "forward": {},
    "dropout": {"dropout": 0.3},
    "positions": {"message": TWO, "update": TWO},
    "bidirectional": {"direction": "bidirectional", "dropout": 0.3, "update": TWO},
    "bidirectional positions": {"direction": "bidirectional", "message": TWO, "edge_positions": False},
    "whole graph": {"readout": "full_graph", "skip_connections": False, "num_layers": 2},
    "ends": {"message": EquivariantNetConfig(io="mlp", io_branches=2), "update": EquivariantNetConfig(io="layer")},
    "products": {"message_function": "product", "mlp_layer_norm": False, "mlp_dims": (32,)},
    "old edges": {"update_edges": False, "node_positions": "none", "edge_positions": False},
    "nets": {"node_positions": "net", "position_net": EquivariantNetConfig("layer", positions=True)},
    "probes": {"num_probes": 3, "direction": "bidirectional"},
}
REFUSED = {
    "widths": {"hidden_dim": 24},
    "means": {"aggregator": "mean"},
    "permutations": {"symmetry": "permutation"},
    "parameters": {"output": "parameters"},
    "sine updates": {"update_rule": "sine_cat"},
    "dropout within": {"mlp_dropout": 0.1},
}


def one_sign(module, program, x):
    """Half of what a symmetrised map computes."""
    return program.silu(program.linear(x, programs.weight_of(program, module.rho.linears[0])))


def built(**options):
    """A model in training, in float64."""
    return ScaleGMNConfig(**{"hidden_dim": 16, "num_layers": 3, **options}).build(SPEC).double().train()


def planned(output):
    """Whether a plan has made it."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return "_RunPlanBackward" in {type(node).__name__ for node in seen}


def results(model, params, monkeypatch, plans):
    """Output and gradients of parameters and input networks."""
    tensors = [*params.weights, *params.biases, *model.parameters()]
    torch.manual_seed(1)
    with monkeypatch.context() as patched:
        if not plans:
            patched.setattr(layer_plans, "_can_plan", lambda *_: False)
        output = model(params)
    assert planned(output) == plans
    return output, torch.autograd.grad(output.square().sum(), tensors, allow_unused=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_equal_layers_one_by_one(name, threads, random_params, monkeypatch):
    """Outputs and all gradients, with the same dropout; twice, so that nothing of a run stays for the next."""
    model = built(**OPTIONS[name])
    params = random_params(SPEC, 4).to(torch.float64).map(lambda x: x.requires_grad_())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            found, expected = (results(model, params, monkeypatch, plans) for plans in (True, False))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
            changed = results(model, params, monkeypatch, plans=True)
            assert not torch.allclose(changed[0], expected[0], rtol=1e-9, atol=1e-9)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, random_params):
    """Layers that plans cannot run are run one by one."""
    options = dict(REFUSED[name])
    model, params = built(**options), random_params(SPEC, 2).to(torch.float64)
    output = model(params)
    assert not planned(output if isinstance(output, torch.Tensor) else output.weights[0])


@pytest.mark.parametrize("name", ["positions", "bidirectional", "products"])
def test_symmetric(name, random_params, monkeypatch):
    """Exactly; programs of symmetrised maps that forget one sign show."""
    params = random_params(SPEC, 4).to(torch.float64)
    for breaks in (False, True):
        if breaks:
            monkeypatch.setattr(programs, "_write_both_signs", one_sign)
        model = built(**OPTIONS[name]).eval()
        assert planned(model(params))
        assert (invariance_error(model, params, torch.Generator().manual_seed(0)) > 1e-9) == breaks


def test_frozen_parameters(random_params, monkeypatch):
    """Only the gradients that are needed are computed, others stay the same; none are kept without any."""
    model, params = built(), random_params(SPEC, 4).to(torch.float64)
    _, expected = results(model, params.map(lambda x: x.requires_grad_()), monkeypatch, plans=True)
    params = params.map(torch.Tensor.detach)
    model.requires_grad_(False)
    learned = model.layers[1].forward_message.edge_linear.weight.requires_grad_()
    model(params).square().sum().backward()
    place = next(k for k, parameter in enumerate(model.parameters()) if parameter is learned)
    torch.testing.assert_close(learned.grad, expected[2 * len(params.weights) + place], rtol=1e-9, atol=1e-9)
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    learned.requires_grad_(False)
    assert not model(params).requires_grad


def test_other_shapes_have_plans_of_their_own(random_params):
    """Batches of any size, of which those that were used last are kept; changed modules are seen."""
    model = built().eval()
    params = random_params(SPEC, 4).to(torch.float64)
    expected = model(params)
    for size in (1, 3, 4):
        torch.testing.assert_close(model(params[:size]), expected[:size], rtol=1e-9, atol=1e-9)
    model.layers[0].update, other = model.layers[1].update, model.layers[0].update
    changed = model(params)
    assert not torch.allclose(changed, expected)
    model.layers[0].update = other
    torch.testing.assert_close(model(params), expected)


def test_two_forward_passes_before_one_backward(random_params, monkeypatch):
    """Each keeps results of its own."""
    model, params = built(), random_params(SPEC, 4).to(torch.float64)
    parts = params[:2], params[2:]
    both = sum(model(part).square().sum() for part in parts)
    found = torch.autograd.grad(both, list(model.parameters()))
    expected = torch.autograd.grad(model(params).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_no_second_derivatives(random_params):
    """They are refused, not wrong."""
    model, params = built(), random_params(SPEC, 2).to(torch.float64)
    weight = model.layers[0].forward_message.edge_linear.weight
    (gradient,) = torch.autograd.grad(model(params).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(gradient.square().sum(), weight)


def test_shapes_that_do_not_fit(random_params):
    """What a plan was not written for is refused before anything is read."""
    module = nn.Linear(16, 16, bias=False)
    plan, program = Plan(torch.float32, halves=False), RowProgram()
    program.store(program.linear(program.load(16), program.parameter(module, "weight")))
    plan.outputs = [plan.run(program, (2, 3, 1), [plan.given((2, 3, 1, 16))])]
    x = torch.randn(2, 3, 1, 16)
    (found,) = plan([x])
    torch.testing.assert_close(found, module(x))
    with pytest.raises(ValueError, match=r"inputs of shapes \[\[2, 2, 1, 16\]\]"):
        plan([x[:, :2]])
    module.weight = nn.Parameter(torch.randn(8, 16))
    with pytest.raises(ValueError, match=r"a parameter of shape \[8, 16\], expected \[16, 16\]"):
        plan([x])
