"""Each module against its equation: exact symmetry in float64, and a slow twin that follows the formula literally."""

from functools import partial

import pytest
import torch
from torch import nn

from scalegmn.nn.equivariant import ByRole, EquivariantLayer
from scalegmn.nn.invariant import InvariantLayer, SignInvariant
from scalegmn.nn.messages import (
    ConcatEdgeUpdate,
    ConcatMessage,
    ConcatUpdate,
    EquivariantEdgeUpdate,
    EquivariantMessage,
)
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.positional import PositionalEmbedding

D = 6


def mlp(in_dim, out_dim):
    return MLP(in_dim, (7, 5), out_dim)


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def signs(*shape):
    q = torch.randint(0, 2, shape).double() * 2 - 1
    q.view(-1)[:2] = torch.tensor([1.0, -1.0])  # never all alike
    return q


def sequential(module: MLP) -> nn.Sequential:
    layers = [module.linears[0]]
    for norm, linear in zip(module.norms, module.linears[1:], strict=True):
        layers += [norm, nn.SiLU(), linear]
    return nn.Sequential(*layers)


def test_mlp_equals_sequential_and_splits_its_input():
    module = mlp(9, 4)
    x = torch.randn(2, 5, 3, 9)
    close(module(x), sequential(module)(x))
    a, b, c = torch.randn(2, 5, 1, 2), torch.randn(5, 3, 3), torch.randn(4)
    whole = torch.cat([a.expand(2, 5, 3, 2), b.expand(2, 5, 3, 3), c.expand(2, 5, 3, 4)], -1)
    close(module(a, b, c), module(whole))


def test_mlp_options():
    assert isinstance(MLP(2, (3,), 1, layer_norm=False).norms[0], nn.Identity)
    module = MLP(2, (50,), 1, activation="relu", dropout=0.5)
    x = torch.randn(4, 2)
    assert not torch.equal(module(x), module(x))
    module.eval()
    close(module(x), module(x))


def test_sign_invariant_is_rho_of_both_signs():
    module = SignInvariant(D, mlp)
    x = torch.randn(3, 4, D)
    close(module(x), module.rho(x) + module.rho(-x))
    close(module(signs(3, 4, 1) * x), module(x))


def equivariant_layer(extra_dim=0, in_dim=D):
    hidden = InvariantLayer(in_dim, extra_dim, D, partial(SignInvariant, mlp=mlp), mlp)
    io = mlp(in_dim + extra_dim, D)
    factor = ByRole({"input": io, "hidden": hidden, "output": io}, ("input", "hidden", "output"))
    return EquivariantLayer(in_dim, D, factor)


@pytest.mark.parametrize("extra_dim", [0, 3])
def test_equivariant_layer(extra_dim):
    layer = equivariant_layer(extra_dim)
    x, q = torch.randn(3, 4, D), signs(3, 4, 1)
    extras = [torch.randn(4, extra_dim)] if extra_dim else []
    close(layer("hidden", q * x, *extras), q * layer("hidden", x, *extras))
    p = extras[0].expand(3, 4, extra_dim) if extra_dim else torch.empty(3, 4, 0)
    phi = sequential(layer.factor.branches[layer.factor.index["hidden"]].phi)
    invariant = layer.factor.branches[layer.factor.index["hidden"]].invariant
    close(layer("hidden", x, *extras), layer.linear(x) * phi(torch.cat([invariant(x), p], -1)))
    io = sequential(layer.factor.branches[layer.factor.index["input"]])
    close(layer("output", x, *extras), layer.linear(x) * io(torch.cat([x, p], -1)))
    assert (layer("input", q * x, *extras) - q * layer("input", x, *extras)).abs().max() > 1e-3


def test_by_role_keeps_only_what_occurs():
    shared, own = nn.Linear(2, 2), nn.Linear(2, 2)
    module = ByRole({"input": shared, "hidden": own, "output": shared}, ("output", "input"))
    assert len(module.branches) == 1
    assert len(list(module.parameters())) == 2
    x = torch.randn(3, 2)
    assert torch.equal(module("output", x), shared(x))


def test_message_is_a_sum_over_senders():
    layer = EquivariantMessage(D, equivariant_layer(3))
    x, e, p = torch.randn(2, 5, D), torch.randn(2, 4, 5, D), torch.randn(5, 3)
    found = layer("hidden", x, e, p[None])
    for i in range(4):
        total = 0
        for j in range(5):
            total = total + layer.net("hidden", layer.node_linear(x[:, j]) * layer.edge_linear(e[:, i, j]), p[j])
        close(found[:, i], total)


def test_message_is_equivariant():
    layer = EquivariantMessage(D, equivariant_layer())
    x, e = torch.randn(2, 5, D), torch.randn(2, 4, 5, D)
    q_j, q_i = signs(2, 5, 1), signs(2, 4, 1)
    moved = layer("hidden", q_j * x, e * q_i[:, :, None] / q_j[:, None], *())
    close(moved, q_i * layer("hidden", x, e))
    senders, receivers = torch.randperm(5), torch.randperm(4)
    close(layer("hidden", x[:, senders], e[:, receivers][:, :, senders]), layer("hidden", x, e)[:, receivers])


def test_edge_update():
    layer = EquivariantEdgeUpdate(D, D, partial(SignInvariant, mlp=mlp), mlp)
    x_j, x_i, e = torch.randn(2, 5, D), torch.randn(2, 4, D), torch.randn(2, 4, 5, D)

    def apply(e, x_j, x_i):
        return layer(e, layer.ends(x_j), layer.ends(x_i))

    found = apply(e, x_j, x_i)
    inv_j, inv_i = layer.invariant(x_j[:, 3]), layer.invariant(x_i[:, 1])
    close(found[:, 1, 3], layer.linear(e[:, 1, 3]) * sequential(layer.phi)(torch.cat([inv_j, inv_i], -1)))
    q_j, q_i = signs(2, 5, 1), signs(2, 4, 1)
    ratio = q_i[:, :, None] / q_j[:, None]
    close(apply(e * ratio, q_j * x_j, q_i * x_i), ratio * found)


def test_permutation_modules_follow_their_equations():
    x_j, x_i, e = torch.randn(2, 5, D), torch.randn(2, 4, D), torch.randn(2, 4, 5, D)
    message, update, edges = ConcatMessage(D, mlp), ConcatUpdate(2 * D, D, mlp), ConcatEdgeUpdate(D, D, mlp)
    m = sum(sequential(message.mlp)(torch.cat([e[:, 2, j], x_j[:, j]], -1)) for j in range(5))
    close(message("hidden", x_j, e)[:, 2], m)
    close(edges(e, x_j, x_i)[:, 2, 3], sequential(edges.phi)(torch.cat([e[:, 2, 3], x_j[:, 3], x_i[:, 2]], -1)))
    close(update("output", torch.cat([x_i, x_i], -1)), sequential(update.mlp)(torch.cat([x_i, x_i], -1)))


def test_positional_embedding_looks_types_up():
    types = [torch.arange(2)[None], torch.full((1, 1), 2), torch.tensor([[3], [4]])]
    module = PositionalEmbedding(types, 5, D)
    blocks = module()
    assert [tuple(block.shape) for block in blocks] == [(1, 2, D), (1, 1, D), (2, 1, D)]
    assert torch.equal(blocks[2][1, 0], module.table[4])
    assert 0.8 < PositionalEmbedding([torch.zeros(1).long()], 100, 100).table.std() < 1.2


def test_input_normalization():
    module = InputNormalization(2)
    weights, biases = [3 * torch.randn(50, 4, 2), torch.randn(50, 1, 4)], [torch.randn(50, 4), torch.zeros(50, 1)]
    assert torch.equal(module(weights, biases)[0][0], weights[0])
    module.fit(weights, biases)
    new_weights, new_biases = module(weights, biases)
    close(new_weights[0].square().mean(), torch.tensor(1.0))
    assert torch.equal(new_biases[1], biases[1])
    assert "weight_scales" in module.state_dict()
