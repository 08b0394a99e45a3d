"""Parameters as parts of one tensor."""

import pytest
import torch
from torch import nn

from scalegmn.training.flat import FlatParameters


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_steps_are_those_of_separate_parameters(amsgrad):
    """Clipped, decayed and with moments; a frozen parameter stays as it is."""
    one, other = model(), model()
    x = torch.randn(8, 3, dtype=torch.float64)
    for of_one in (one, other):
        of_one[2].bias.requires_grad_(False)
    flat = FlatParameters(one.parameters())
    options = {"lr": 0.1, "weight_decay": 0.3, "amsgrad": amsgrad}
    optimizers = torch.optim.AdamW([flat.tensor], **options), torch.optim.AdamW(other.parameters(), **options)
    for _ in range(5):
        for trained, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=False)
            (10 * trained(x)).square().mean().backward()
        norms = [nn.utils.clip_grad_norm_(parameters, 0.1) for parameters in ([flat.tensor], other.parameters())]
        torch.testing.assert_close(*norms)
        for optimizer in optimizers:
            optimizer.step()
    before = model()
    assert torch.equal(one[2].bias, before[2].bias)
    for p, q, start in zip(one.parameters(), other.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(p, start) == (not p.requires_grad)
    separate = optimizers[1].state_dict()["state"]
    state = flat.split_state(optimizers[0].state_dict()["state"][0])
    assert state.keys() == separate.keys() == {0, 1, 2}
    for index, of_parameter in separate.items():
        assert state[index].keys() == of_parameter.keys()
        for name, tensor in of_parameter.items():
            torch.testing.assert_close(state[index][name], tensor)
    joined = flat.join_states(separate)
    assert joined.keys() == optimizers[0].state_dict()["state"][0].keys()
    for name, tensor in optimizers[0].state_dict()["state"][0].items():
        torch.testing.assert_close(joined[name], tensor)


def test_a_parameter_without_a_state_has_zeros():
    """As in runs of earlier versions, of which one parameter was never used."""
    flat = FlatParameters(model().parameters())
    moments = {2: {"step": torch.tensor(7.0), "exp_avg": torch.ones(1, 5, dtype=torch.float64)}}
    joined = flat.join_states(moments)
    assert joined["step"] == 7
    parts = flat.split_state(joined)
    assert [parts[index]["exp_avg"].sum().item() for index in range(4)] == [0, 0, 5, 0]


def test_gradients_are_parts_of_one():
    trained = model()
    flat = FlatParameters(trained.parameters())
    assert not flat.tensor.grad.any()
    trained(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
    for parameter in trained.parameters():
        assert parameter.grad.untyped_storage().data_ptr() == flat.tensor.grad.untyped_storage().data_ptr()
    total = sum(parameter.grad.square().sum() for parameter in trained.parameters())
    torch.testing.assert_close(flat.tensor.grad.square().sum(), total)
    assert total > 0


def test_types_do_not_mix():
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    with pytest.raises(ValueError, match=r"found parameters of types and devices .*float32.*float64.*one of each"):
        FlatParameters(parameters)
