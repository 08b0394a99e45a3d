"""Statistics of messages and their derivatives."""

import pytest
import torch

from scalegmn.engine.pna import Reduced


def one_by_one(messages):
    """Sum, sum of squares, minimum and maximum, as PyTorch differentiates them."""
    return messages.sum(2), messages.square().sum(2), messages.amin(2), messages.amax(2)


def gradients(statistics, messages, directions):
    """First derivatives in some directions, and second derivatives of their squares' sum."""
    outputs = statistics(messages)
    (first,) = torch.autograd.grad(outputs, messages, directions, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), messages)
    return outputs, first, second


@pytest.mark.parametrize("ties", [True, False])
def test_statistics_have_the_derivatives_of_operations_one_by_one(ties):
    """Also where several messages are the least, which share the gradient; other messages have other gradients."""
    messages = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    messages = (messages.round() if ties else messages).requires_grad_()
    assert (messages == messages.amin(2, keepdim=True)).sum().item() > 30 or not ties
    directions = [torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(4)]
    found = gradients(lambda x: Reduced.of_block(x)[1:], messages, directions)
    torch.testing.assert_close(found, gradients(one_by_one, messages, directions), rtol=1e-9, atol=1e-9)
    other = gradients(one_by_one, messages.detach().clamp(-0.4, 0.4).requires_grad_(), directions)
    assert not torch.allclose(found[1], other[1], rtol=1e-9, atol=1e-9)


def test_statistics_under_vmap():
    """Per network, as of all together."""
    messages = torch.randn(4, 5, 7, 3, dtype=torch.float64)

    def gradient(x):
        return torch.func.grad(lambda x: sum(part.sin().sum() for part in Reduced.of_block(x[None])[1:]))(x)

    expected = torch.func.grad(lambda x: sum(part.sin().sum() for part in one_by_one(x)))(messages)
    torch.testing.assert_close(torch.func.vmap(gradient)(messages), expected, rtol=1e-9, atol=1e-9)
