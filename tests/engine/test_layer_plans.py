"""Plans compute what their layers compute one by one, and are refused where they cannot."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalegmn.engine import layer_plans, native, programs
from scalegmn.engine.plans import Plan
from scalegmn.engine.row_programs import RowProgram
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.networks import NetSpec
from scalegmn.nn.invariant import AbsoluteValue
from scalegmn.nn.mlp import MLP
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


def built(spec=SPEC, **options):
    """A model in training, in float64."""
    return ScaleGMNConfig(**{"hidden_dim": 16, "num_layers": 3, **options}).build(spec).double().train()


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


class WithInput(nn.Linear):
    """W x + b + x."""

    def forward(self, x):
        return super().forward(x) + x


def relu(model):
    for mlp in [module for module in model.layers.modules() if isinstance(module, MLP)]:
        mlp.activation = nn.ReLU()


def other_linear(model):
    model.layers[0].update.layers[0].linear = nn.Linear(32, 16, bias=False).double()


def other_norm(model):
    model.layers[1].update.layers[0].factor.branches[0].phi.norms[0] = nn.Identity()


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.layers[2].skip)
    model.layers[2].skip.parametrizations.weight.original0.data.mul_(2)


def other_forward(model):
    model.layers[0].skip = WithInput(16, 16, bias=False).double()


def absolute(model):
    for layer in model.layers:
        layer.update.layers[0].factor.branches[0].invariant = AbsoluteValue()


@pytest.mark.parametrize("change", [relu, other_linear, other_norm, weight_norm, other_forward, absolute])
def test_changed_modules_are_seen(change, random_params):
    """At any depth, after plans and programs were written with what was there before."""
    model, params = built().eval(), random_params(SPEC, 4).to(torch.float64)
    before = model(params)
    change(model)
    gc.collect()
    model.engine = "plain"
    expected = model(params)
    model.engine = "fast"
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(model(params), expected, rtol=1e-9, atol=1e-9)


def test_dropout_that_starts_later_is_seen(random_params):
    """Within MLPs, where programs have none."""
    model, params = built(), random_params(SPEC, 4).to(torch.float64)
    assert planned(model(params))
    model.layers[1].forward_message.net.layers[0].factor.branches[0].phi.dropout.p = 0.5
    assert not planned(model(params))
    assert planned(model.eval()(params))


def test_hooks_are_called(random_params):
    """Of modules inside layers, which plans do not call; without them there is a plan again."""
    model, params = built(), random_params(SPEC, 4)
    expected = model(params)
    called, inside = [], model.layers[0].forward_message.node_linear
    hook = inside.register_forward_hook(lambda module, inputs, output: called.append(output.shape))
    found = model(params)
    assert called
    assert not planned(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    hook.remove()
    assert planned(model(params))


def test_checkpoints(random_params):
    """What is kept may be computed again."""
    model, params = built(), random_params(SPEC, 4).to(torch.float64)
    found, expected = (
        torch.autograd.grad(output.square().sum(), list(model.parameters()))
        for output in (checkpoint(model, params, use_reentrant=False), model(params))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_threads(random_params, monkeypatch):
    """That run one model at once, and forget each other's plans."""
    monkeypatch.setattr("scalegmn.engine.plans.MOST_PLANS", 2)
    model, params = built().eval(), random_params(SPEC, 12).to(torch.float64)
    batches = [params[:size] for size in range(1, 13)] * 3
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(model, batches * 3))
    for batch, result in zip(batches * 3, results, strict=True):
        torch.testing.assert_close(result, results[11][: len(batch)], rtol=1e-9, atol=1e-9)


def test_nothing_is_kept_without_gradients(random_params, monkeypatch):
    """Where they are disabled as a whole, too."""
    kept = []
    forward = Plan.forward
    monkeypatch.setattr(Plan, "forward", lambda plan, keeps, *more: kept.append(keeps) or forward(plan, keeps, *more))
    model, params = built(), random_params(SPEC, 4).to(torch.float64)
    with torch.no_grad():
        model(params)
    assert kept == [False]


def test_one_type_of_edges(random_params):
    """Bidirectional models of networks of one input and no hidden layer."""
    spec = NetSpec.mlp([1, 4], "sine")
    model, params = built(spec, direction="bidirectional"), random_params(spec, 3).to(torch.float64)
    found = model(params)
    assert planned(found)
    model.engine = "plain"
    torch.testing.assert_close(found, model(params), rtol=1e-9, atol=1e-9)


def test_rows_that_a_program_reads_twice():
    """Their gradients add up."""
    module = nn.Linear(16, 16, bias=False)
    plan, program = Plan(torch.float32, halves=False), RowProgram()
    x = torch.randn(2, 3, 1, 16, requires_grad=True)
    first = program.linear(program.load(16), program.parameter(module, "weight"))
    program.store(program.add(first, program.load(16)))
    given = plan.given(x.shape)
    plan.outputs = [plan.run(program, (2, 3, 1), [given, given])]
    (found,) = plan([x])
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    (expected,) = torch.autograd.grad((module(x) + x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


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
