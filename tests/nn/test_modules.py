"""Each module against its equation: exact symmetry in float64, and a slow twin that follows the formula literally."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from scalegmn.engine import messages as fast
from scalegmn.engine.edges import DenseEdges, EdgeUpdate
from scalegmn.engine.model import LayerTypes
from scalegmn.engine.modules import invariant_then_linear, run, run_mlp
from scalegmn.engine.pna import Reduced, aggregate_blocks, graph_norm
from scalegmn.engine.readouts import read as fast_read
from scalegmn.engine.rows import Rows, ScaledRows
from scalegmn.networks.scalar_groups import SCALES, SIGNS
from scalegmn.nn.context import ROLES, EdgeContext, NodeContext
from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, MLPLayer
from scalegmn.nn.invariant import (
    AbsoluteValue,
    ByScalarGroup,
    InvariantLayer,
    ScaleInvariant,
    SignInvariant,
)
from scalegmn.nn.messages import (
    ConcatEdgeUpdate,
    ConcatMessage,
    ScaleEdgeUpdate,
    ScaleMessage,
    reciprocal,
)
from scalegmn.nn.mlp import MLP, Dropout
from scalegmn.nn.normalization import InputNormalization, StatisticsNormalization
from scalegmn.nn.pna import Aggregate, GraphNorm
from scalegmn.nn.positional import PositionalEmbedding, TypedLinear, embed_positions
from scalegmn.nn.readout import DeepSetReadout, EndsReadout, EqualOutputs, GraphReadout, OutputReadout

D = 6
GROUPS = (SIGNS, SCALES)


def rows(role, sizes=None):
    """What rows of features belong to, for the engine."""
    return Rows(role, GROUPS, sizes)


def context(role, num, group=0):
    """What `num` rows of features belong to."""
    role = torch.full((num,), ROLES.index(role))
    return NodeContext(role, torch.zeros_like(role) + group, torch.zeros_like(role), GROUPS)


def plain(module, role, x, *extras, group=0):
    """The module's plain form, on features of any shape."""
    lead = x.shape[:-1]
    inputs = [y.expand(*lead, y.shape[-1]).reshape(-1, y.shape[-1]) for y in (x, *extras)]
    return module(context(role, len(inputs[0]), group), *inputs).reshape(*lead, -1)


def both(module, role, x, *extras):
    """The plain form; the engine gives the same."""
    expected = plain(module, role, x, *extras)
    close(run(module, rows(role), x, *extras), expected)
    return expected


def mlp(in_dim, out_dim):
    return MLP(in_dim, (7, 5), out_dim)


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def inv(module, x):
    """inv(x); the engine gives the same, with the identity after it."""
    x = x if x.ndim > 1 else x[None]
    expected = plain(module, "hidden", x)
    close(invariant_then_linear(module, rows("hidden"), x, torch.eye(x.shape[-1]), torch.zeros(x.shape[-1])), expected)
    return expected


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
    close(run_mlp(module, a, b, c), module(whole))
    close(module(*whole.split([2, 3, 4], -1)), module(whole))


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
    close(inv(ScaleInvariant(), torch.tensor([3.0, 4.0])), torch.tensor([[0.6, 0.8]]))
    close(inv(ScaleInvariant(5.0), torch.tensor([3.0, 4.0])), torch.tensor([[0.3, 0.4]]))
    assert torch.equal(inv(ScaleInvariant(), torch.zeros(2)), torch.zeros(1, 2))


@pytest.mark.parametrize(
    "module", [SignInvariant(D, mlp), AbsoluteValue(), ScaleInvariant(), ScaleInvariant(0.5)], ids=str
)
def test_invariant_maps_join_the_linear_that_follows(module):
    module = module.double()
    x, after = torch.randn(3, 4, D), nn.Linear(D, 5)
    extra = torch.randn(4, 5)
    fast = partial(invariant_then_linear, module, rows("hidden"))
    close(fast(x, after.weight, after.bias + extra), after(inv(module, x)) + extra)
    factors = ScaledRows(torch.randn(3, 1, 4, D), torch.randn(3, 2, 4, 1))
    whole = factors.values * factors.scale
    close(fast(factors, after.weight, after.bias), after(plain(module, "hidden", whole)))
    close(fast(factors.split([2, 1])[0], after.weight, after.bias), after(plain(module, "hidden", whole))[:2])


def test_by_scalar_group_splits_the_batch():
    module = ByScalarGroup(GROUPS, {"sign": AbsoluteValue(), "scale": ScaleInvariant()})
    x = torch.randn(5, 4, D)
    for num_odd in (0, 2, 5):
        group = torch.arange(5).ge(num_odd).long().repeat_interleave(4)
        found = plain(module, "hidden", x, group=group)
        close(found[:num_odd], x[:num_odd].abs())
        close(found[num_odd:], x[num_odd:] / x[num_odd:].norm(dim=-1, keepdim=True))
        identity = torch.eye(D), torch.zeros(D)
        close(invariant_then_linear(module, rows("hidden", (num_odd, 5 - num_odd)), x, *identity), found)


def build_sign(dim):
    return SignInvariant(dim, mlp)


def equivariant_layer(extra_dim=0, in_dim=D):
    hidden = InvariantLayer(in_dim, extra_dim, D, build_sign, mlp)
    io = MLPLayer(in_dim + extra_dim, D, mlp)
    factor = ByRole({"input": io, "hidden": hidden, "output": io}, ("input", "hidden", "output"))
    return EquivariantLayer(in_dim, D, factor)


@pytest.mark.parametrize("extra_dim", [0, 3])
def test_equivariant_layer(extra_dim):
    layer = equivariant_layer(extra_dim)
    x, q = torch.randn(3, 4, D), signs(3, 4, 1)
    extras = [torch.randn(4, extra_dim)] if extra_dim else []
    close(both(layer, "hidden", q * x, *extras), q * both(layer, "hidden", x, *extras))
    p = extras[0].expand(3, 4, extra_dim) if extra_dim else torch.empty(3, 4, 0)
    hidden = layer.factor.branches[layer.factor.index["hidden"]]
    invariant = torch.cat([inv(hidden.invariant, x), p], -1)
    close(both(layer, "hidden", x, *extras), layer.linear(x) * sequential(hidden.phi)(invariant))
    io = sequential(layer.factor.branches[layer.factor.index["input"]].mlp)
    close(both(layer, "output", x, *extras), layer.linear(x) * io(torch.cat([x, p], -1)))
    assert (both(layer, "input", q * x, *extras) - q * both(layer, "input", x, *extras)).abs().max() > 1e-3


def test_equivariant_net_with_residuals():
    layers = [equivariant_layer(in_dim=4), equivariant_layer()]
    skips = [nn.Linear(4, D, bias=False), nn.Linear(D, D, bias=False)]
    x, q = torch.randn(3, 5, 4), signs(3, 5, 1)
    middle = both(layers[0], "hidden", x) + skips[0](x)
    net = EquivariantNet(layers, skips)
    close(both(net, "hidden", x), both(layers[1], "hidden", middle) + skips[1](middle))
    close(both(net, "hidden", q * x), q * both(net, "hidden", x))
    close(both(EquivariantNet(layers), "hidden", x), both(layers[1], "hidden", both(layers[0], "hidden", x)))


def test_by_role_keeps_only_what_occurs():
    shared, own = MLPLayer(2, 2, mlp), MLPLayer(2, 2, mlp)
    module = ByRole({"input": shared, "hidden": own, "output": shared}, ("output", "input"))
    assert len(module.branches) == 1
    assert len(list(module.parameters())) == len(list(shared.parameters()))
    x = torch.randn(3, 2)
    assert torch.equal(both(module, "output", x), both(shared, "output", x))
    mixed = torch.tensor([0, 1, 2])  # no branch for hidden nodes
    found = module(NodeContext(mixed, 0 * mixed, 0 * mixed, GROUPS), x)
    close(found[[0, 2]], both(shared, "input", x)[[0, 2]])
    assert not found[1].any()


def dense(e):
    """A block of edges between hidden layers."""
    return DenseEdges(e, receivers=rows("hidden"), senders=rows("hidden"))


def edge_context(num):
    return EdgeContext(context("hidden", num), context("hidden", num))


@pytest.mark.parametrize("aggregator", ["add", "mean"])
def test_messages(aggregator):
    layer, x, e, p = (
        ScaleMessage(D, equivariant_layer(3)),
        torch.randn(2, 5, D),
        torch.randn(2, 4, 5, D),
        torch.randn(5, 3),
    )
    found = fast.receive(layer, aggregator, dense(e), fast.send(layer, x), None, p[None])
    products = [layer.node_linear(x[:, j]) * layer.edge_linear(e[:, 2, j]) for j in range(5)]
    sent = [both(layer.net, "hidden", product, p[j]) for j, product in enumerate(products)]
    close(found[:, 2], sum(sent) / (5 if aggregator == "mean" else 1))
    sent = [layer(edge_context(2), x[:, 0], x[:, j], e[:, 2, j], p[j].expand(2, 3)) for j in range(5)]
    close(found[:, 2], sum(sent) / (5 if aggregator == "mean" else 1))
    concat = ConcatMessage(D, mlp)
    sent = [sequential(concat.mlp)(torch.cat([e[:, 2, j], x[:, j]], -1)) for j in range(5)]
    found = fast.receive(concat, aggregator, dense(e), fast.send(concat, x), None, None)
    close(found[:, 2], sum(sent) / (5 if aggregator == "mean" else 1))
    sent = [concat(edge_context(2), x[:, 0], x[:, j], e[:, 2, j]) for j in range(5)]
    close(found[:, 2], sum(sent) / (5 if aggregator == "mean" else 1))


def test_messages_are_equivariant():
    layer = ScaleMessage(D, equivariant_layer())
    x, e = torch.randn(2, 5, D), torch.randn(2, 4, 5, D)
    q_j, q_i = signs(2, 5, 1), signs(2, 4, 1)

    def apply(x, e):
        return fast.receive(layer, "add", dense(e), fast.send(layer, x), None, None)

    close(apply(q_j * x, e * q_i[:, :, None] / q_j[:, None]), q_i * apply(x, e))
    senders, receivers = torch.randperm(5), torch.randperm(4)
    close(apply(x[:, senders], e[:, receivers][:, :, senders]), apply(x, e)[:, receivers])


@pytest.mark.parametrize("kind", [ScaleEdgeUpdate(D, 4, build_sign, mlp), ConcatEdgeUpdate(D, 4, mlp)], ids=str)
def test_edge_updates(kind):
    layer = kind.double()
    x_j, x_i, e = torch.randn(2, 5, D), torch.randn(2, 4, D), torch.randn(2, 4, 5, D)

    def apply(e, x_j, x_i):
        ends = (fast.edge_ends(layer, rows("hidden"), x)[k] for k, x in enumerate((x_j, x_i)))
        return fast.updated_edges(layer, dense(e), *ends)

    found = apply(e, x_j, x_i)
    sender, receiver = x_j[:, None].expand_as(e), x_i[:, :, None].expand_as(e)
    expected = layer(edge_context(40), *(x.flatten(0, 2) for x in (receiver, sender, e)))
    close(found, expected.reshape(found.shape))
    if isinstance(layer, ScaleEdgeUpdate):
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
    ends = {"receivers": rows("hidden"), "senders": rows("hidden")}
    block = DenseEdges(values, matrix, shift if shifted else None, **ends)
    weight, bias = torch.randn(2, D), torch.randn(3, 1, 5, 2)

    def multiplied(x):
        return x.values * x.scale if isinstance(x, ScaledRows) else x

    close(multiplied(block.linear(weight)), e @ weight.T)
    close(block.linear(weight, bias), e @ weight.T + bias)
    assert isinstance(block.linear(weight), ScaledRows) == (kernel == 1 and not shifted)
    update = ScaleEdgeUpdate(D, D, build_sign, mlp)
    pending = EdgeUpdate(update, fast.updated_edges, torch.randn(3, 5, 7), torch.randn(3, 4, 7))
    new = DenseEdges(values, matrix, block.shift, (pending, pending), **ends)
    once = fast.updated_edges(update, dense(e), pending.senders, pending.receivers)
    close(new.features(), fast.updated_edges(update, dense(once), pending.senders, pending.receivers))
    close(block.multiplied_out(), e)
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
    module = PositionalEmbedding(5, D)
    blocks = LayerTypes(types).rows(module.table)
    assert [tuple(block.shape) for block in blocks] == [(1, 2, D), (1, 1, D), (2, 1, D)]
    assert torch.equal(blocks[2][1, 0], module.table[4])
    assert torch.equal(module(torch.tensor([4, 4, 0])), module.table[[4, 4, 0]])
    assert 0.8 < PositionalEmbedding(100, 100).table.std() < 1.2


def test_typed_linear_has_a_matrix_per_type():
    x, types = torch.randn(4, D), torch.tensor([1, 0, 1, 2])
    module = TypedLinear(3, D)
    close(module(x, types), torch.stack([module.table[t] @ row for t, row in zip(types, x, strict=True)]))
    shared = TypedLinear(1, D)
    close(shared(x, types), x @ shared.table[0].T)
    assert shared.table.abs().max() <= D**-0.5


def test_positions_are_added_where_nothing_is_rescaled():
    x, p, role = torch.randn(3, D), torch.randn(3, D), torch.tensor([0, 1, 2])
    where = NodeContext(role, 0 * role, 0 * role, GROUPS)
    found = embed_positions(where, x, p, ("input", "output"), None)
    close(found, torch.stack([x[0] + p[0], x[1] * p[1], x[2] + p[2]]))
    net = equivariant_layer(D)
    q = torch.tensor([[1.0], [-1.0], [1.0]])
    close(embed_positions(where, q * x, p, ("input", "output"), net)[1], -embed_positions(where, x, p, (), net)[1])


READOUTS = [
    OutputReadout(D, 3, 4, mlp),
    EndsReadout(D, 2, 3, 4, nn.Linear, mlp),
    EndsReadout(D, 2, 3, 4, mlp, mlp),
    GraphReadout(D, 5, InvariantLayer(D, 0, 7, lambda dim: SignInvariant(dim, mlp), mlp), 7, 4, mlp),
    DeepSetReadout(D, 7, 4, mlp),
    EqualOutputs(OutputReadout(D, 1, 4, mlp), D, mlp),
]
READOUTS_OF_STATISTICS = [
    OutputReadout(D, 3, 4, mlp, 2),
    EndsReadout(D, 2, 3, 4, nn.Linear, mlp, 2),
    GraphReadout(D, 5, InvariantLayer(D, 0, 7, lambda dim: SignInvariant(dim, mlp), mlp), 7, 4, mlp, 2),
    DeepSetReadout(D, 7, 4, mlp, 2),
    EqualOutputs(EndsReadout(D, 2, 1, 4, nn.Linear, mlp, 2), D, mlp),
]


@pytest.mark.parametrize("kind", READOUTS, ids=lambda readout: type(readout).__name__)
def test_readouts(kind):
    """Of two networks with 5 hidden nodes each: one by one as together, in both forms, whatever their order."""
    readout = kind.double()
    inputs, hidden, outputs = torch.randn(2, 2, D), torch.randn(2, 5, D), torch.randn(2, 3, D)

    def read(inputs, hidden, outputs):
        network = torch.arange(len(hidden)).repeat_interleave(5)
        where = NodeContext(0 * network + 1, 0 * network, network, GROUPS)
        return readout(where, inputs, hidden.flatten(0, 1), outputs)

    found = read(inputs, hidden, outputs)
    assert found.shape == (2, 4)
    close(found, torch.cat([read(inputs[k : k + 1], hidden[k : k + 1], outputs[k : k + 1]) for k in range(2)]))
    close(fast_read(readout, rows("hidden"), inputs, hidden, outputs, lambda x: x.sum(1)), found)
    close(read(inputs, hidden[:, torch.randperm(5)], outputs), found)
    if isinstance(readout, GraphReadout):
        close(read(inputs, signs(2, 5, 1) * hidden, outputs), found)
    changes = (read(inputs + 1, hidden, outputs), read(inputs, hidden + 1, outputs), read(inputs, hidden, outputs + 1))
    moved = [bool((changed - found).abs().max() > 1e-6) for changed in changes]
    reads_all = isinstance(readout, GraphReadout | DeepSetReadout)
    assert moved == [not isinstance(readout, OutputReadout | EqualOutputs), reads_all, True]
    reordered = (read(inputs, hidden, outputs.flip(1)) - found).abs().max()
    assert (reordered < 1e-9) == isinstance(readout, DeepSetReadout | EqualOutputs)


@pytest.mark.parametrize("kind", READOUTS_OF_STATISTICS, ids=lambda readout: type(readout).__name__)
def test_readouts_read_statistics(kind):
    """Both forms, network by network."""
    readout = kind.double()
    nodes, statistics = [torch.randn(3, size, D) for size in (2, 5, 3)], torch.randn(3, 2)
    network = torch.arange(3).repeat_interleave(5)
    where = NodeContext(0 * network + 1, 0 * network, network, GROUPS)
    found = readout(where, nodes[0], nodes[1].flatten(0, 1), nodes[2], statistics)
    close(fast_read(readout, rows("hidden"), *nodes, lambda x: x.sum(1), statistics), found)
    changed = readout(where, nodes[0], nodes[1].flatten(0, 1), nodes[2], statistics * torch.tensor([[1], [2], [1]]))
    assert [bool(row.abs().max() > 1e-6) for row in changed - found] == [False, True, False]


def test_statistics_are_standardised_and_clipped():
    module = StatisticsNormalization(4)
    training = torch.tensor([[1.0, 5, torch.nan, 2], [3.0, 5.00001, 7, torch.nan]])
    module.fit(training)
    torch.testing.assert_close(module(training), torch.tensor([[-1.0, 0, 0, 0], [1, 0, 0, 0]]), rtol=0, atol=1e-5)
    assert module(torch.tensor([[100.0, 5, 7, -100]]))[0, [0, 3]].tolist() == [5, -5]
    never = StatisticsNormalization(1)
    never.fit(torch.full((2, 1), torch.nan))
    assert never(torch.full((1, 1), torch.nan)).tolist() == [[0]]


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
    found = aggregate_blocks(module, messages, torch.ones(1, 1, 1))[0, 0]
    close(found, torch.cat([expected, expected * 2 / math.log(4)]))
    alone = aggregate_blocks(module, messages[1:], torch.ones(1, 1, 1))[0, 0]
    assert alone[3] == 0  # no deviation of one message
    assert torch.equal(aggregate_blocks(module, [], torch.ones(1, 1, 1)), torch.zeros(1, 1, 8))
    rows = Reduced.of_block(torch.cat([pair, single.expand(1, 1, 2, 1)], 1))
    both = aggregate_blocks(module, [rows, messages[1]], torch.ones(1, 2, 1))[0]
    close(both[0], found)  # of two nodes, the first has one message more
    close(
        both[1],
        torch.tensor([3.0, 3.0, 3.0, 0.0]).repeat(2) * torch.tensor([1.0, 2 / math.log(3)]).repeat_interleave(4),
    )
    row = torch.tensor([1.0, 5.0, 3.0, 3.0]).reshape(1, 4, 1)
    by_row = aggregate_blocks(module, [Reduced.of_rows(row, torch.tensor([3, 0, 1]))], torch.ones(1, 3, 1))[0]
    close(by_row[[0, 2]], torch.stack([found, alone]))
    assert not by_row[1].any()
    plain = module(row[0, [3, 0, 2, 1]], torch.tensor([2, 0, 0, 0]), 3)
    close(plain[[0, 2]], torch.stack([found, alone]))
    assert not plain[1].any()


def test_graph_norm_is_of_one_network():
    x = 3 * torch.randn(4, 5, D) + 1
    module = GraphNorm(D)
    found = graph_norm(module, x, None, 4)
    for one, own in zip(x, found, strict=True):
        close(own, (one - one.mean()) / (one.std(correction=0) + 1e-5))
    network = torch.tensor([2, 0, 1, 1, 0, 0])
    rows = x[:1, [0, 1, 2, 3, 4, 0]]
    parts = graph_norm(module, rows, network, 3)[0]
    for index in range(3):
        close(parts[network == index], graph_norm(module, rows[:, network == index], None, 1)[0])
    close(module(rows[0], network, 3), parts)
