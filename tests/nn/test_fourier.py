import math

import pytest
import torch
from torch import nn

from scalegmn.engine.neural_graphs import encode_then_linear
from scalegmn.nn.fourier import Encoder, FourierFeatures


def test_features_by_hand():
    """[cos(2 pi B v), sin(2 pi B v)] for B = [[1], [1/4]]."""
    features = FourierFeatures(1, 2, 1.0)
    features.frequencies.copy_(torch.tensor([[1.0], [0.25]]))
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0], [-1.0, math.sqrt(0.5), 0.0, math.sqrt(0.5)]])
    torch.testing.assert_close(features(torch.tensor([[0.0], [1.0], [0.5]])), expected, rtol=0, atol=1e-6)


def test_frequencies_are_drawn_once_and_not_trained():
    """Entries N(0, scale^2), stored with the model."""
    torch.manual_seed(0)
    features = FourierFeatures(3, 5000, 4.0)
    assert list(features.parameters()) == []
    assert features.state_dict()["frequencies"].shape == (5000, 3)
    assert features.frequencies.mean().item() == pytest.approx(0, abs=0.2)
    assert features.frequencies.std().item() == pytest.approx(4, rel=0.05)


def test_features_have_period_one_along_whole_frequencies():
    features = FourierFeatures(2, 3, 1.0).double()
    features.frequencies.copy_(torch.tensor([[1, 0], [2, -1], [0, 3]], dtype=torch.float64))
    v = torch.randn(7, 2, dtype=torch.float64)
    torch.testing.assert_close(features(v + torch.tensor([1.0, -2.0])), features(v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("num_frequencies", [0, 4])
def test_encoder_is_its_layers_one_after_the_other(num_layers, num_frequencies):
    """The engine joins its last Linear to the one that follows; outputs and gradients are those of the plain form."""
    torch.manual_seed(0)
    encoder = Encoder(3, 6, num_frequencies, 0.5, num_layers).double()
    after = nn.Linear(6, 5).double()
    v = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    modules = [encoder.fourier, encoder.linears[0]]
    for linear in encoder.linears[1:]:
        modules += [nn.SiLU(), linear]
    plain = nn.Sequential(*modules, after)
    assert encoder.linears[0].in_features == (2 * num_frequencies or 3)
    results = []
    for output in (encode_then_linear(encoder, after, v), after(encoder(v)), plain(v)):
        gradients = torch.autograd.grad(output.square().sum(), [v, *encoder.parameters(), *after.parameters()])
        results.append([output, *gradients])
    for joined, encoded, one_by_one in zip(*results, strict=True):
        torch.testing.assert_close(joined, one_by_one, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(encoded, one_by_one, rtol=1e-10, atol=1e-10)
