"""Row programs compute what modules compute operation by operation, and their gradients."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from scalegmn.engine import native
from scalegmn.engine.row_programs import RowProgram
from scalegmn.models.scalegmn.config import ScaleGMNConfig
from scalegmn.networks import NetSpec

SHAPE = (3, 5, 7)

needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")


class Modules(nn.Module):
    """What a program of every operation reads."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64, dtype=dtype), nn.Linear(64, 48, dtype=dtype)
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.vector, self.bias = (nn.Parameter(torch.randn(size, dtype=dtype)) for size in (64, 48))
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def program(self):
        """Ends with `store` or `sum`."""
        program = RowProgram()
        e, senders, receivers, scale = (program.load(width) for width in (32, 32, 32, 1))
        x = program.scale(program.add(program.multiply(e, senders), receivers), scale)
        z = program.linear(x, *(program.parameter(self.first, name) for name in ("weight", "bias")))
        vector = program.parameter(self, "vector")
        h = program.silu_of_both_signs(vector, program.silu_of_both_signs(vector, z, self.norm), None)
        h = program.multiply(program.norm_silu(h, self.norm), z)
        weight, left = program.parameter(self.second, "weight"), program.parameter(self.first, "weight", 0, 32)
        h = program.linear(h, weight, program.shifted(program.parameter(self, "bias"), weight, vector, 2))
        return program, program.add(
            program.silu(h), program.linear(x, program.product(weight, left), program.shifted(None, weight, vector, 3))
        )

    def forward(self, e, senders, receivers, scale):
        """The same in PyTorch."""
        x = (e * senders + receivers) * scale
        z = self.first(x)
        both = silu(self.norm(self.vector + z)) + silu(self.norm(self.vector - z))
        h = silu(self.norm(silu(self.vector + both) + silu(self.vector - both))) * z
        weight = self.second.weight
        h = h @ weight.T + self.bias + 2 * weight @ self.vector
        return silu(h) + x @ (weight @ self.first.weight).T + 3 * weight @ self.vector


def rows(dtype=torch.float64):
    """e, senders, receivers that all networks share, and one number per edge."""
    shapes = (*SHAPE, 32), (3, 1, 7, 32), (1, 5, 1, 32), (*SHAPE, 1)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sums", [True, False])
def test_equal_operations_one_by_one(sums, threads):
    """Results and the gradients of all inputs and parameters."""
    modules, inputs = Modules(), rows()
    program, value = modules.program()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = (program.sum(value) if sums else program.store(value))(SHAPE, inputs)
        expected = modules(*inputs)
        expected = expected.sum(2) if sums else expected
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        learned = [*inputs, *(p for name, p in modules.named_parameters() if name != "second.bias")]
        direction = torch.randn_like(found)
        of_program, of_modules = (torch.autograd.grad((x * direction).sum(), learned) for x in (found, expected))
        torch.testing.assert_close(of_program, of_modules, rtol=1e-9, atol=1e-9)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_rows_in_bfloat16(dtype):
    """They are rounded to the nearest, whether or not the processor multiplies such numbers."""
    modules, inputs = Modules(dtype), rows(dtype)
    halves = [inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:]]
    program, value = modules.program()
    loss = program.store(value)(SHAPE, halves).square().mean()
    (found,) = torch.autograd.grad(loss, halves[0])
    (expected,) = torch.autograd.grad(modules(halves[0].to(dtype), *inputs[1:]).square().mean(), halves[0])
    assert found.dtype == torch.bfloat16
    assert (found.to(dtype) - expected.to(dtype)).norm() < 4e-3 * expected.to(dtype).norm()


@needs_compiler
def test_single_precision_and_halves():
    """Single precision to its rounding; under autocast to bfloat16's, and to single precision where there is none."""
    modules, inputs = Modules(torch.float32), rows(torch.float32)
    program, value = modules.program()
    program.store(value)
    expected = modules(*inputs)
    torch.testing.assert_close(program(SHAPE, inputs), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = program(SHAPE, inputs)
    learned = [*inputs, *(p for name, p in modules.named_parameters() if name != "second.bias")]
    pairs = [(rounded, expected)]
    pairs += zip(*(torch.autograd.grad(x.square().mean(), learned) for x in (rounded, expected)), strict=True)
    errors = [(found - exact).norm() / exact.norm() for found, exact in pairs]
    assert max(errors) < 0.02
    assert (errors[0] > 1e-4) == native.multiplies_halves()


@pytest.mark.skipif(not native.multiplies_halves(), reason="others differ by the rounding of one sum")
@pytest.mark.parametrize("halves", [True, False])
def test_both_signs_are_told_apart_by_nothing(halves):
    """SiLU(LN(v + x)) + SiLU(LN(v - x)) is the same number, to the bit, for -x."""
    modules = Modules(torch.float32)
    program = RowProgram()
    z = program.linear(program.load(32), program.parameter(modules.first, "weight"))
    vector = program.parameter(modules, "vector")
    h = program.silu_of_both_signs(vector, z, modules.norm)
    program.store(program.linear(h, program.parameter(modules.second, "weight")))
    x = torch.randn(*SHAPE, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=halves):
        assert torch.equal(program(SHAPE, [x]), program(SHAPE, [-x]))
        assert not torch.equal(program(SHAPE, [x]), program(SHAPE, [x + 1]))


MODELS = {
    "forward": {},
    "bidirectional": {"direction": "bidirectional"},
    "positions": {"message": {"positions": True}},
    "product": {"message_function": "product"},
    "no norms": {"mlp_layer_norm": False},
    "permutations": {"symmetry": "permutation", "direction": "bidirectional"},
    "permutations, no norms": {"symmetry": "permutation", "mlp_layer_norm": False},
    "permutations, means": {"symmetry": "permutation", "aggregator": "mean"},
    "widths without programs": {"hidden_dim": 24},
}


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_models_with_and_without_programs(name, random_params, monkeypatch):
    """Outputs and gradients, in float64; a parameter that one of them has changed shows."""
    spec = NetSpec.mlp([2, 6, 5, 3], "sine")
    options = {"hidden_dim": 32, **MODELS[name]}
    if "message" in options:
        options["message"] = type(ScaleGMNConfig().message)(**options["message"])
    model, params = ScaleGMNConfig(**options).build(spec).double().eval(), random_params(spec, 4).to(torch.float64)
    learned = list(model.parameters())

    def results():
        output = model(params)
        return output, torch.autograd.grad(output.square().sum(), learned, allow_unused=True)

    with_programs = results()
    with monkeypatch.context() as operation_by_operation:
        operation_by_operation.setattr(native, "library", lambda: None)
        without = results()
        with torch.no_grad():
            learned[0].mul_(1.01)
        changed = results()
    torch.testing.assert_close(with_programs, without, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(changed[0], without[0], rtol=1e-9, atol=1e-9)
    functions = _functions(with_programs[0].grad_fn)
    has_programs = bool({"_RunBackward", "_RunPlanBackward"} & functions)
    assert has_programs == (name != "widths without programs")


def _functions(node):
    """Names of all nodes of the graph of a result."""
    names, waiting, seen = set(), [node], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(type(node).__name__)
        waiting += [following for following, _ in node.next_functions]
    return names


def test_without_a_compiler_it_says_so_once(monkeypatch, capsys):
    """Models then compute operation by operation."""
    native.library.cache_clear()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    try:
        assert native.library() is None
        assert native.library() is None
        error = capsys.readouterr().err
        assert error.count("slower without compiled operations") == 1
        assert "/no/such/compiler" in error
    finally:
        native.library.cache_clear()
