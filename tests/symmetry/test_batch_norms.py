"""Statistics of batch norms move with the networks, and stay variances through everything that changes networks."""

import pytest
import torch
from torch import nn

from scalegmn.interop.torch_modules import from_module, to_module
from scalegmn.networks import NetParams
from scalegmn.symmetry.canonicalize import canonicalize, canonicalize_scale
from scalegmn.symmetry.groups import GroupElement, PhaseShift
from scalegmn.zoos.augment import AugmentConfig, augment, check_augment, transform

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(6.0 * x)


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sine": Sine, "gelu": nn.GELU}


def network(activation, seed=0):
    """Batch norms before and after an activation, which do not start as ones and zeros."""
    torch.manual_seed(seed)
    kind = ACTIVATIONS[activation]
    layers = nn.Linear(2, 6), nn.BatchNorm1d(6), kind(), nn.Linear(6, 5), kind(), nn.BatchNorm1d(5), nn.Linear(5, 3)
    module = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "num_batches" not in name:
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_()
    return module


def networks(activation, num=3):
    """Some modules, and their parameters in one batch."""
    modules = [network(activation, seed) for seed in range(num)]
    return modules, NetParams.cat([from_module(module, X[:2]) for module in modules])


def outputs(modules, params):
    """[B, P, 3], of modules with these parameters."""
    with torch.no_grad():
        return torch.stack([to_module(params[k : k + 1], module, X[:2])(X) for k, module in enumerate(modules)])


def statistics(params):
    """[B, 2, n] of each batch norm."""
    return [item for item in params.statistics if item is not None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_they_move_with_the_networks(activation, generator):
    modules, params = networks(activation)
    for element in (GroupElement.sample(params, generator), PhaseShift.sample(params, generator)):
        moved = element.act(params)
        torch.testing.assert_close(outputs(modules, moved), outputs(modules, params), rtol=1e-9, atol=1e-9)
        back = element.inverse().act(moved)
        for found, expected in zip(statistics(back), statistics(params), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    sampled = GroupElement.sample(params, generator).act(params)
    assert all((moved != item).any() for moved, item in zip(statistics(sampled), statistics(params), strict=True))


@pytest.mark.parametrize("activation", ["relu", "sine"])
def test_canonical_networks(activation):
    modules, params = networks(activation)
    names = ["phase", "scale"]
    canonical = canonicalize(params, names)
    torch.testing.assert_close(outputs(modules, canonical), outputs(modules, params), rtol=1e-9, atol=1e-9)
    again = canonicalize(canonical, names)
    for found, expected in zip(again.tensors(), canonical.tensors(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_canonical_networks_of_an_orbit_are_equal(generator):
    _, params = networks("relu")
    moved = GroupElement.sample(params, generator, permute=False).act(params)
    for found, expected in zip(canonicalize_scale(moved).tensors(), canonicalize_scale(params).tensors(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_action_on_changes_is_its_derivative(generator):
    """Epsilon, which is added to the variance of the networks, is no part of their changes."""
    _, params = networks("relu")
    changes = params.map(torch.randn_like)
    element, pairs = GroupElement.sample(params, generator), zip(params.tensors(), changes.tensors(), strict=True)
    summed = [tensor + change for tensor, change in pairs]
    num = params.spec.num_layers
    rest = iter(summed[2 * num :])
    changed = params.replace(
        weights=tuple(summed[:num]),
        biases=tuple(summed[num : 2 * num]),
        statistics=tuple(item if item is None else next(rest) for item in params.statistics),
    )
    found = element.act_on_changes(changes).tensors()
    expected = (a - b for a, b in zip(element.act(changed).tensors(), element.act(params).tensors(), strict=True))
    for change, difference in zip(found, expected, strict=True):
        torch.testing.assert_close(change, difference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(translate=0.1),
        AugmentConfig(rotate=10.0),
        AugmentConfig(relabel=True),
        AugmentConfig(dropout=0.3),
        AugmentConfig(noise=5.0),  # variances, if they had noise, would be negative
    ],
)
def test_augmentations_keep_them(config, generator):
    modules, params = networks("relu", 8)
    check_augment(config, params.spec)
    moved, _ = augment(config, params, torch.zeros(8), generator)
    assert all(map(torch.equal, statistics(moved), statistics(params)))
    assert (outputs(modules, moved) - outputs(modules, params)).abs().max() > 1e-3


def test_relabelled_outputs(generator):
    modules, params = networks("relu")
    moved, _ = augment(AugmentConfig(relabel=True), params, torch.zeros(3), generator)
    torch.testing.assert_close(outputs(modules, moved).sort(2)[0], outputs(modules, params).sort(2)[0])


@pytest.mark.parametrize(("activation", "group"), [("relu", "scale"), ("tanh", "sign"), ("gelu", "permutation")])
def test_random_symmetries(activation, group, generator):
    modules, params = networks(activation)
    moved = transform(params, [group], generator)
    torch.testing.assert_close(outputs(modules, moved), outputs(modules, params), rtol=1e-9, atol=1e-9)
    assert all((item[:, 1] > 0).all() for item in statistics(moved))
    assert (moved.flatten() - params.flatten()).abs().max() > 0.1


def test_mixup_is_for_chains():
    _, params = networks("relu")
    with pytest.raises(ValueError, match=r"data.augment.mixup: found 0.5, expected 0 for network of 5 layers, norm"):
        check_augment(AugmentConfig(mixup=0.5), params.spec)


def test_what_is_no_plain_layer_is_refused():
    """Outputs that a batch norm makes; an input that a batch norm reads."""
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    spec = from_module(module.double().eval(), X[:2]).spec
    with pytest.raises(ValueError, match=r"translate: found 0.1, expected 0 for .*; data.augment.relabel: found True"):
        check_augment(AugmentConfig(translate=0.1, relabel=True), spec)
