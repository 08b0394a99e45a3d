"""Random modules are read exactly; a strict reading refuses in one line what it does not read."""

import pytest
import torch
from drawn_modules import drawn_module

from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.groups import GroupElement


def is_free(seed):
    """Whether a strict reading reads a module; asserts that it is read exactly, and else refused in one line."""
    module, x = drawn_module(seed)
    is_free, params = True, from_module(module, x)
    try:
        assert from_module(module, x, strict=True).spec == params.spec, (seed, module.steps)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message, message
        assert "report" not in message, (seed, module.steps, message)
        is_free = False
    with torch.no_grad():
        y = module(x)
        assert torch.equal(to_module(params, module, x)(x), y), (seed, module.steps)
        element = GroupElement.sample(params, torch.Generator().manual_seed(seed))
        change = (to_module(element.act(params), module, x)(x) - y).abs().max() / y.abs().max()
        assert change < 1e-9, (seed, module.steps, change)
        if params.spec.is_chain and not params.spec.is_cnn:
            difference = (evaluate(params, x)[0] - y).abs().max() / y.abs().max()
            assert difference < 1e-6, (seed, module.steps, difference)
    return is_free


def test_drawn_modules():
    assert sum(map(is_free, range(40))) >= 8


@pytest.mark.slow
def test_many_drawn_modules():
    assert sum(map(is_free, range(1000, 1500))) >= 100
