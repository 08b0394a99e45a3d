"""Each module against its equation: exact symmetry in float64, and a slow twin that follows the formula literally."""

import pytest
import torch
from torch import nn

from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, PlainLayer
from scalegmn.nn.invariant import (
    AbsoluteValue,
    ByActivation,
    InvariantLayer,
    Rows,
    ScaleInvariant,
    SignInvariant,
)
from scalegmn.nn.messages import (
    ConcatEdgeUpdate,
    ConcatMessage,
    EquivariantEdgeUpdate,
    EquivariantMessage,
    reciprocal,
)
from scalegmn.nn.mlp import MLP
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.positional import PositionalEmbedding

D = 6
HIDDEN, INPUT, OUTPUT = Rows("hidden"), Rows("input"), Rows("output")


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
    close(module(HIDDEN, x), module.rho(x) + module.rho(-x))
    close(module(HIDDEN, signs(3, 4, 1) * x), module(HIDDEN, x))


def test_parameter_free_invariants():
    x, q = torch.randn(3, 4, D), torch.rand(3, 4, 1) * 100 + 0.01
    close(AbsoluteValue()(HIDDEN, signs(3, 4, 1) * x), x.abs())
    close(ScaleInvariant()(HIDDEN, q * x), ScaleInvariant()(HIDDEN, x))
    close(ScaleInvariant()(HIDDEN, torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
    assert torch.equal(ScaleInvariant()(HIDDEN, torch.zeros(2)), torch.zeros(2))


def test_by_activation_splits_the_batch():
    module = ByActivation(AbsoluteValue(), ScaleInvariant())
    x = torch.randn(5, 4, D)
    found = module(Rows("hidden", 2), x)
    close(found[:2], x[:2].abs())
    close(found[2:], ScaleInvariant()(HIDDEN, x[2:]))
    for num_odd in (0, 5):
        assert module(Rows("hidden", num_odd), x).shape == x.shape


def build_sign(dim):
    return SignInvariant(dim, mlp)


def equivariant_layer(extra_dim=0, in_dim=D):
    hidden = InvariantLayer(in_dim, extra_dim, D, build_sign, mlp)
    io = PlainLayer(in_dim + extra_dim, D, mlp)
    factor = ByRole({"input": io, "hidden": hidden, "output": io}, ("input", "hidden", "output"))
    return EquivariantLayer(in_dim, D, factor)


@pytest.mark.parametrize("extra_dim", [0, 3])
def test_equivariant_layer(extra_dim):
    layer = equivariant_layer(extra_dim)
    x, q = torch.randn(3, 4, D), signs(3, 4, 1)
    extras = [torch.randn(4, extra_dim)] if extra_dim else []
    close(layer(HIDDEN, q * x, *extras), q * layer(HIDDEN, x, *extras))
    p = extras[0].expand(3, 4, extra_dim) if extra_dim else torch.empty(3, 4, 0)
    hidden = layer.factor.branches[layer.factor.index["hidden"]]
    invariant = torch.cat([hidden.invariant(HIDDEN, x), p], -1)
    close(layer(HIDDEN, x, *extras), layer.linear(x) * sequential(hidden.phi)(invariant))
    io = sequential(layer.factor.branches[layer.factor.index["input"]].mlp)
    close(layer(OUTPUT, x, *extras), layer.linear(x) * io(torch.cat([x, p], -1)))
    assert (layer(INPUT, q * x, *extras) - q * layer(INPUT, x, *extras)).abs().max() > 1e-3


def test_equivariant_net_with_residuals():
    layers = [equivariant_layer(in_dim=4), equivariant_layer()]
    skips = [nn.Linear(4, D, bias=False), nn.Linear(D, D, bias=False)]
    x, q = torch.randn(3, 5, 4), signs(3, 5, 1)
    middle = layers[0](HIDDEN, x) + skips[0](x)
    net = EquivariantNet(layers, skips)
    close(net(HIDDEN, x), layers[1](HIDDEN, middle) + skips[1](middle))
    close(net(HIDDEN, q * x), q * net(HIDDEN, x))
    close(EquivariantNet(layers)(HIDDEN, x), layers[1](HIDDEN, layers[0](HIDDEN, x)))


def test_by_role_keeps_only_what_occurs():
    shared, own = PlainLayer(2, 2, mlp), PlainLayer(2, 2, mlp)
    module = ByRole({"input": shared, "hidden": own, "output": shared}, ("output", "input"))
    assert len(module.branches) == 1
    assert len(list(module.parameters())) == len(list(shared.parameters()))
    x = torch.randn(3, 2)
    assert torch.equal(module(OUTPUT, x), shared(OUTPUT, x))


def test_message_by_hand():
    layer = EquivariantMessage(D, equivariant_layer(3))
    x, e, p = torch.randn(2, 5, D), torch.randn(2, 4, 5, D), torch.randn(5, 3)
    found = layer(HIDDEN, x, e, p[None])
    for i, j in ((0, 0), (3, 1), (2, 4)):
        close(found[:, i, j], layer.net(HIDDEN, layer.node_linear(x[:, j]) * layer.edge_linear(e[:, i, j]), p[j]))


def test_message_is_equivariant():
    layer = EquivariantMessage(D, equivariant_layer())
    x, e = torch.randn(2, 5, D), torch.randn(2, 4, 5, D)
    q_j, q_i = signs(2, 5, 1), signs(2, 4, 1)
    moved = layer(HIDDEN, q_j * x, e * q_i[:, :, None] / q_j[:, None])
    close(moved, q_i[:, :, None] * layer(HIDDEN, x, e))
    senders, receivers = torch.randperm(5), torch.randperm(4)
    moved = layer(HIDDEN, x[:, senders], e[:, receivers][:, :, senders])
    close(moved, layer(HIDDEN, x, e)[:, receivers][:, :, senders])


def test_edge_update():
    layer = EquivariantEdgeUpdate(D, D, build_sign, mlp)
    x_j, x_i, e = torch.randn(2, 5, D), torch.randn(2, 4, D), torch.randn(2, 4, 5, D)

    def apply(e, x_j, x_i):
        return layer(e, layer.ends(HIDDEN, x_j), layer.ends(HIDDEN, x_i))

    found = apply(e, x_j, x_i)
    inv_j, inv_i = layer.invariant(HIDDEN, x_j[:, 3]), layer.invariant(HIDDEN, x_i[:, 1])
    close(found[:, 1, 3], layer.linear(e[:, 1, 3]) * sequential(layer.phi)(torch.cat([inv_j, inv_i], -1)))
    q_j, q_i = signs(2, 5, 1), signs(2, 4, 1)
    ratio = q_i[:, :, None] / q_j[:, None]
    close(apply(e * ratio, q_j * x_j, q_i * x_i), ratio * found)


def test_permutation_modules_follow_their_equations():
    x_j, x_i, e = torch.randn(2, 5, D), torch.randn(2, 4, D), torch.randn(2, 4, 5, D)
    message, edges, plain = ConcatMessage(D, mlp), ConcatEdgeUpdate(D, D, mlp), PlainLayer(2 * D, D, mlp)
    close(message(HIDDEN, x_j, e)[:, 2, 1], sequential(message.mlp)(torch.cat([e[:, 2, 1], x_j[:, 1]], -1)))
    close(edges(e, x_j, x_i)[:, 2, 3], sequential(edges.phi)(torch.cat([e[:, 2, 3], x_j[:, 3], x_i[:, 2]], -1)))
    both = torch.cat([x_i, x_i], -1)
    close(plain(OUTPUT, both), sequential(plain.mlp)(both))


def test_reciprocal():
    w = torch.tensor([[2.0], [-4.0], [0.0]])
    close(reciprocal(w), torch.tensor([[0.5], [-0.25], [0.0]]))
    kernels = torch.randn(3, 4, 9)
    kernels[..., :2] = 0  # padding
    close(reciprocal(kernels), kernels / kernels.square().sum(-1, keepdim=True))
    q = torch.rand(3, 4, 1) * 10
    close(reciprocal(q * kernels), reciprocal(kernels) / q)
    tiny = torch.tensor([[1e-30, 1e-30]], dtype=torch.float32)  # the square of the norm underflows
    close(reciprocal(tiny) * 1e-30, torch.full((1, 2), 0.5, dtype=torch.float32))


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
