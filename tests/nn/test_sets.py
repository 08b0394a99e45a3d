import pytest
import torch
from torch import nn

from scalegmn.nn.sets import DeepSet, SetAttention, affine, reduced


def build(kind, in_dim=3, out_dim=4):
    torch.manual_seed(0)
    layer = SetAttention(in_dim, out_dim, 2) if kind == "attention" else DeepSet(in_dim, out_dim, 2, kind)
    return layer.double()


@pytest.mark.parametrize("kind", ["max", "mean", "attention"])
def test_layers_are_equivariant_to_the_order_of_elements(kind):
    layer, x, order = build(kind), torch.randn(2, 5, 3, dtype=torch.float64), torch.randperm(5)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=1e-12, atol=1e-12)
    assert layer(x).shape == (2, 5, 4)


@pytest.mark.parametrize("kind", ["max", "mean", "attention"])
def test_elements_see_each_other_but_not_other_sets(kind):
    layer, x = build(kind), torch.randn(2, 5, 3, dtype=torch.float64)
    changed = x.clone()
    changed[0, 0] += 10
    difference = (layer(changed) - layer(x)).abs().amax(-1)
    assert (difference[0] > 1e-6).all()
    assert (difference[1] == 0).all()


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_deep_set_by_hand(reduction):
    """gamma(x_i) - lambda(max or mean of all x)."""
    layer, x = build(reduction), torch.randn(2, 5, 3, dtype=torch.float64)
    pooled = x.max(1).values if reduction == "max" else x.mean(1)
    for element in range(5):
        expected = layer.own(x[:, element]) - layer.all(pooled)
        torch.testing.assert_close(layer(x)[:, element], expected, rtol=1e-12, atol=1e-12)


def test_attention_by_hand():
    """O = Q + softmax(Q K^T / sqrt(b)) V per head, Y = O + ReLU(W O + c); sqrt(b) of all heads together."""
    layer, x = build("attention"), torch.randn(5, 3, dtype=torch.float64)
    q, k, v = layer.query_key_value(x).chunk(3, dim=-1)
    heads = []
    for head in (slice(0, 2), slice(2, 4)):
        weights = torch.softmax(q[:, head] @ k[:, head].T / 4**0.5, dim=-1)
        heads.append(q[:, head] + weights @ v[:, head])
    joined = torch.cat(heads, dim=-1)
    expected = joined + torch.relu(joined @ layer.last.weight.T + layer.last.bias)
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=1e-12, atol=1e-12)


def test_reduced():
    x = torch.arange(24.0).view(2, 3, 4)
    assert reduced(x, (), "max") is x
    assert reduced(x, (1,), "max").tolist() == [[8, 9, 10, 11], [20, 21, 22, 23]]
    assert reduced(x, (1, 2), "mean").tolist() == [5.5, 17.5]


def test_affine():
    maps = affine(3, 4, num_linears=3, bias=False)
    assert [type(module) for module in maps] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(module.weight.shape) for module in maps[::2]] == [(4, 3), (4, 4), (4, 4)]
    assert all(module.bias is None for module in maps[::2])
