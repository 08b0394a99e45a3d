"""Whether a module is read exactly: the checks that all readings share."""

import copy

import torch
from torch import nn

from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.networks import NetSpec
from scalegmn.symmetry.canonicalize import canonicalize_phase, canonicalize_scale
from scalegmn.symmetry.groups import GroupElement, PhaseShift


class Written(nn.Module):
    """Named layers, and what is done with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.written = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.written(self, x)


def outputs(module, x):
    """All numbers that a module returns."""
    with torch.no_grad():
        result = module(x)
    results = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else [result]
    return torch.cat([item.flatten() for item in results if isinstance(item, torch.Tensor)])


def assert_exact(module, x, params, generator):
    """Back to the bit; group elements and canonical forms leave the outputs."""
    y = outputs(module, x)
    assert torch.equal(outputs(to_module(params, module, x), x), y)
    moved = [GroupElement.sample(params, generator).act(params), PhaseShift.sample(params, generator).act(params)]
    for other in (*moved, canonicalize_phase(params), canonicalize_scale(params)):
        torch.testing.assert_close(outputs(to_module(other, module, x), x), y, rtol=1e-9, atol=1e-9)


def assert_complete(module, x, params, generator):
    """A module with all other parameters, read and written into this one, is that module."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    others = from_module(other, x)
    assert others.spec == params.spec
    written = outputs(to_module(others, module, x), x)
    torch.testing.assert_close(written, outputs(other, x), rtol=1e-11, atol=1e-11)


def assert_needs_all_of_a_move(module, x, params):
    """Rows of one layer's weights that move alone change the outputs, in each class of neurons that move together."""
    y, spec = outputs(module, x), params.spec
    shared = {index for index, layer in enumerate(spec.layers) if layer.same_neurons or layer.tied is not None}
    shared |= {first for index in shared for first in (*spec.layers[index].same_neurons, spec.layers[index].tied)}

    def change(index):
        weights = [weight.roll(1, 1) if index == i else weight for i, weight in enumerate(params.weights)]
        return (outputs(to_module(params.replace(weights=tuple(weights)), module, x), x) - y).abs().max()

    for coupled in spec.permutation_classes:
        layers = [index for index in coupled.layers if spec.layers[index].affine and index not in shared]
        assert not layers or any(change(index) > 1e-6 for index in layers), coupled


def assert_read(module, x, generator):
    """Exact, complete, with a spec that comes back from its dictionary."""
    params = from_module(module, x)
    assert_exact(module, x, params, generator)
    assert_complete(module, x, params, generator)
    assert NetSpec.from_dict(params.spec.to_dict()) == params.spec
    return params
