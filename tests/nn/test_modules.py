"""Each module against its equation: exact symmetry in float64, and a slow twin that follows the formula literally."""

import math

import pytest
import reference
import torch
from torch import nn

from scalegmn.engine.edges import DenseEdges, EdgeUpdate, ScaledRows
from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, PlainLayer
from scalegmn.nn.invariant import (
    AbsoluteValue,
    ByActivation,
    InvariantLayer,
    NodeContext,
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
from scalegmn.nn.mlp import MLP, Dropout
from scalegmn.nn.normalization import InputNormalization
from scalegmn.nn.pna import Aggregate, GraphNorm, Reduced
from scalegmn.nn.positional import PositionalEmbedding

D = 6
HIDDEN, INPUT, OUTPUT = NodeContext("hidden"), NodeContext("input"), NodeContext("output")


def mlp(in_dim, out_dim):
    return MLP(in_dim, (7, 5), out_dim)


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inv(module, x, rows=HIDDEN):
    """inv(x) alone: with the identity after it."""
    return module(rows, x, torch.eye(x.shape[-1]), torch.zeros(x.shape[-1]))


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


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout(p, dtype):
    x = torch.ones(500, 401, dtype=dtype, requires_grad=True)  # not a multiple of 8 elements
    module = Dropout(p)
    y = module(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    zero = (y == 0).double()
    assert abs(zero.mean() - p) < 0.01
    assert abs(y.mean() - 1) < 0.03
    assert len(y.unique()) == 2
    for shift in (1, 2, 8):  # neighbours are independent
        assert abs(torch.corrcoef(torch.stack([zero[:, shift:].flatten(), zero[:, :-shift].flatten()]))[0, 1]) < 0.02
    assert not torch.equal(module(x), y)
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    assert module.eval()(x) is x or torch.equal(module(x), x)


def test_sign_invariant_is_rho_of_both_signs():
    module = SignInvariant(D, mlp)
    x = torch.randn(3, 4, D)
    close(inv(module, x), module.rho(x) + module.rho(-x))
    close(inv(module, signs(3, 4, 1) * x), inv(module, x))


def test_parameter_free_invariants():
    x, q = torch.randn(3, 4, D), torch.rand(3, 4, 1) * 100 + 0.01
    close(inv(AbsoluteValue(), signs(3, 4, 1) * x), x.abs())
    close(inv(ScaleInvariant(), q * x), inv(ScaleInvariant(), x))
    close(inv(ScaleInvariant(), torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))
    close(inv(ScaleInvariant(5.0), torch.tensor([3.0, 4.0])), torch.tensor([0.3, 0.4]))
    assert torch.equal(inv(ScaleInvariant(), torch.zeros(2)), torch.zeros(2))


@pytest.mark.parametrize(
    "module", [SignInvariant(D, mlp), AbsoluteValue(), ScaleInvariant(), ScaleInvariant(0.5)], ids=str
)
def test_invariant_maps_join_the_linear_that_follows(module):
    module = module.double()
    x, after = torch.randn(3, 4, D), nn.Linear(D, 5)
    extra = torch.randn(4, 5)
    close(module(HIDDEN, x, after.weight, after.bias + extra), after(reference.inv(module, x)) + extra)
    factors = ScaledRows(torch.randn(3, 1, 4, D), torch.randn(3, 2, 4, 1))
    whole = factors.values * factors.scale
    close(module(HIDDEN, factors, after.weight, after.bias), after(reference.inv(module, whole)))
    close(module(HIDDEN, factors.split([2, 1])[0], after.weight, after.bias), after(reference.inv(module, whole))[:2])


def test_by_activation_splits_the_batch():
    module = ByActivation(AbsoluteValue(), ScaleInvariant())
    x = torch.randn(5, 4, D)
    found = inv(module, x, NodeContext("hidden", 2))
    close(found[:2], x[:2].abs())
    close(found[2:], inv(ScaleInvariant(), x[2:]))
    for num_odd in (0, 5):
        assert inv(module, x, NodeContext("hidden", num_odd)).shape == x.shape


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
    invariant = torch.cat([inv(hidden.invariant, x), p], -1)
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


@pytest.mark.parametrize("aggregator", ["add", "mean"])
def test_messages(aggregator):
    layer = EquivariantMessage(D, equivariant_layer(3), aggregator)
    x, e, p = torch.randn(2, 5, D), torch.randn(2, 4, 5, D), torch.randn(5, 3)
    found = layer(HIDDEN, DenseEdges(e), layer.send(x), p[None])
    sent = [layer.net(HIDDEN, layer.node_linear(x[:, j]) * layer.edge_linear(e[:, 2, j]), p[j]) for j in range(5)]
    close(found[:, 2], sum(sent) / (5 if aggregator == "mean" else 1))
    plain = ConcatMessage(D, mlp, aggregator)
    sent = [sequential(plain.mlp)(torch.cat([e[:, 2, j], x[:, j]], -1)) for j in range(5)]
    close(plain(HIDDEN, DenseEdges(e), plain.send(x))[:, 2], sum(sent) / (5 if aggregator == "mean" else 1))


def test_messages_are_equivariant():
    layer = EquivariantMessage(D, equivariant_layer(), "add")
    x, e = torch.randn(2, 5, D), torch.randn(2, 4, 5, D)
    q_j, q_i = signs(2, 5, 1), signs(2, 4, 1)

    def apply(x, e):
        return layer(HIDDEN, DenseEdges(e), layer.send(x))

    close(apply(q_j * x, e * q_i[:, :, None] / q_j[:, None]), q_i * apply(x, e))
    senders, receivers = torch.randperm(5), torch.randperm(4)
    close(apply(x[:, senders], e[:, receivers][:, :, senders]), apply(x, e)[:, receivers])


@pytest.mark.parametrize("kind", [EquivariantEdgeUpdate(D, 4, build_sign, mlp), ConcatEdgeUpdate(D, 4, mlp)], ids=str)
def test_edge_updates(kind):
    layer = kind.double()
    x_j, x_i, e = torch.randn(2, 5, D), torch.randn(2, 4, D), torch.randn(2, 4, 5, D)

    def apply(e, x_j, x_i):
        return layer(DenseEdges(e), layer.ends(HIDDEN, x_j)[0], layer.ends(HIDDEN, x_i)[1])

    found = apply(e, x_j, x_i)
    close(found, reference.edge_update(layer, 0, e, x_j, x_i))
    if isinstance(layer, EquivariantEdgeUpdate):
        q_j, q_i = signs(2, 5, 1), signs(2, 4, 1)
        ratio = q_i[:, :, None] / q_j[:, None]
        close(apply(e * ratio, q_j * x_j, q_i * x_i), ratio * found)


@pytest.mark.parametrize(
    ("kernel", "types"), [(1, (1, 1)), (1, (1, 5)), (1, (4, 1)), (9, (1, 1)), (9, (1, 5)), (9, (4, 1))]
)
@pytest.mark.parametrize("shifted", [False, True])
def test_edge_blocks(kernel, types, shifted):
    """Blocks that are not multiplied out, whole and in parts, against their definition."""
    values, matrix = torch.randn(3, 4, 5, kernel), torch.randn(*types, D, kernel)
    shift = torch.randn(*types, D) if shifted else torch.zeros(*types, D)
    e = (matrix @ values[..., None])[..., 0] + shift
    block = DenseEdges(values, matrix, shift if shifted else None)
    weight, bias = torch.randn(2, D), torch.randn(3, 1, 5, 2)

    def multiplied(x):
        return x.values * x.scale if isinstance(x, ScaledRows) else x

    close(multiplied(block.linear(weight)), e @ weight.T)
    close(block.linear(weight, bias), e @ weight.T + bias)
    assert isinstance(block.linear(weight), ScaledRows) == (kernel == 1 and not shifted)
    update = EquivariantEdgeUpdate(D, D, build_sign, mlp)
    ends = EdgeUpdate(update, torch.randn(3, 5, 7), torch.randn(3, 4, 7))
    new = DenseEdges(values, matrix, block.shift, (ends, ends))
    once = update(DenseEdges(e), ends.senders, ends.receivers)
    close(new.features(), update(DenseEdges(once), ends.senders, ends.receivers))
    for whole in (block, new):
        parts = [[multiplied(part.linear(weight)) for part in row] for row in whole.split(2, 3)]
        assert [[tuple(part.shape[:2]) for part in row] for row in parts] == [[(2, 3), (2, 1)], [(1, 3), (1, 1)]]
        close(torch.cat([torch.cat(row, 1) for row in parts]), multiplied(whole.linear(weight)))


def test_reciprocal():
    w = torch.tensor([[2.0], [-4.0], [0.0], [0.05]])
    close(reciprocal(w, torch.tensor(0.1)), torch.tensor([[0.5], [-0.25], [0.0], [5.0]]))
    kernels = torch.randn(3, 4, 9)
    kernels[..., :2] = 0  # padding
    floor = torch.full((3, 4, 1), 1e-3)
    close(reciprocal(kernels, floor), kernels / kernels.square().sum(-1, keepdim=True))
    q = torch.rand(3, 4, 1) * 10
    close(reciprocal(q * kernels, q * floor), reciprocal(kernels, floor) / q)
    tiny = torch.tensor([[1e-22]], dtype=torch.float32)  # whose square underflows
    close(reciprocal(tiny, 1e-3 * tiny) * 1e-22, torch.ones(1, 1, dtype=torch.float32))
    assert torch.equal(reciprocal(torch.zeros(1, 9), torch.zeros(1, 1)), torch.zeros(1, 9))


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
    module.fit([(weights, biases)])
    new_weights, new_biases = module(weights, biases)
    close(new_weights[0].square().mean(), torch.tensor(1.0))
    assert torch.equal(new_biases[1], biases[1])
    assert "weight_scales" in module.state_dict()


def test_centred_normalization_and_back():
    module = InputNormalization(1, centred=True)
    weights, biases = [3 + 2 * torch.randn(50, 4, 2)], [torch.ones(50, 4)]
    module.fit([(weights[0][None, :20], biases[0][None, :20]), (weights[0][None, 20:], biases[0][None, 20:])])
    new_weights, new_biases = module(weights, biases)
    close(new_weights[0].mean(), torch.tensor(0.0))
    close(new_weights[0].square().mean(), torch.tensor(1.0))
    assert torch.equal(new_biases[0], torch.zeros(50, 4))  # nothing is divided by zero
    back = module.inverse(new_weights, new_biases)
    close(back[0][0], weights[0])
    close(back[1][0], biases[0])


def test_aggregates_by_hand():
    """One node with messages 1, 5 and 3 in two blocks, and one with none."""
    module = Aggregate(("identity", "attenuation"), 2.0)
    pair, single = torch.tensor([1.0, 5.0]).reshape(1, 1, 2, 1), torch.tensor([3.0]).reshape(1, 1, 1, 1)
    messages = [Reduced.of_block(pair), Reduced.of_block(single)]
    expected = torch.tensor([3.0, 1.0, 5.0, (8 / 3) ** 0.5])
    found = module(messages, torch.ones(1, 1, 1))[0, 0]
    close(found, torch.cat([expected, expected * 2 / math.log(4)]))
    alone = module(messages[1:], torch.ones(1, 1, 1))[0, 0]
    assert alone[3] == 0  # no deviation of one message
    assert torch.equal(module([], torch.ones(1, 1, 1)), torch.zeros(1, 1, 8))
    rows = Reduced.of_block(torch.cat([pair, single.expand(1, 1, 2, 1)], 1))
    both = module([rows, messages[1]], torch.ones(1, 2, 1))[0]
    close(both[0], found)  # of two nodes, the first has one message more
    close(
        both[1],
        torch.tensor([3.0, 3.0, 3.0, 0.0]).repeat(2) * torch.tensor([1.0, 2 / math.log(3)]).repeat_interleave(4),
    )
    row = torch.tensor([1.0, 5.0, 3.0, 3.0]).reshape(1, 4, 1)
    by_row = module([Reduced.of_rows(row, torch.tensor([3, 0, 1]))], torch.ones(1, 3, 1))[0]
    close(by_row[[0, 2]], torch.stack([found, alone]))
    assert not by_row[1].any()


def test_graph_norm_is_of_one_network():
    x = 3 * torch.randn(4, 5, D) + 1
    module = GraphNorm(D)
    found = module(x)
    for one, own in zip(x, found, strict=True):
        close(own, (one - one.mean()) / (one.std(correction=0) + 1e-5))
    network = torch.tensor([2, 0, 1, 1, 0, 0])
    parts = module(x[:1, [0, 1, 2, 3, 4, 0]], network, 3)[0]
    for index in range(3):
        close(parts[network == index], module(x[:1, [0, 1, 2, 3, 4, 0]][:, network == index])[0])
