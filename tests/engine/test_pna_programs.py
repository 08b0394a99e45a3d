"""NG-GNN's row programs compute what its modules compute operation by operation."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from scalegmn.engine import native, pna_programs, tables
from scalegmn.engine.graph_norms import NormProgram
from scalegmn.engine.plans import Plan
from scalegmn.engine.row_programs import Nodes, RowProgram
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.nn.fourier import Encoder
from scalegmn.nn.pna import Aggregate, GraphNorm

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C++ compiler")

NUM_NETWORKS, NUM_NODES, NUM_EDGES, DIM = 3, 9, 130, 32


def run(program, inputs, given=(), nodes=None):
    """The result of a program, run by a plan: inputs are rows [B, R, D], or these and the row of each receiver."""
    pairs = [x if isinstance(x, tuple) else (x, None) for x in inputs]
    plan, tensors = Plan(pairs[0][0].dtype, False), [*(x[:, :, None] for x, _ in pairs), *given]
    regions = [plan.given(x.shape) for x in tensors]
    rows = [x if index is None else x.at(index) for x, (_, index) in zip(regions, pairs, strict=False)]
    shape = tuple(max(sizes) for sizes in zip(*(x.block for x in rows), strict=True))
    result = plan.run(program, shape, rows, given=regions[len(rows) :], nodes=nodes)
    if nodes is not None:  # which plans read, and do not return
        copies = RowProgram()
        result = plan.run(copies.store(copies.load(result.width)), result.shape, [result])
    plan.outputs = [result]
    (result,) = plan(tensors)
    return result.squeeze(2)


def gradients(output, learned):
    """In a direction."""
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad((output * direction).sum(), learned)


def assert_same(found, expected, learned):
    """Outputs and the gradients of what is learned."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    of_found, of_expected = gradients(found, learned), gradients(expected, learned)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in of_found)


def edges_and_nodes(ties=False):
    """Edges, two kinds of node features, senders and receivers; the last node gets no edge."""
    edges = torch.randn(NUM_NETWORKS, NUM_EDGES, DIM, dtype=torch.float64)
    nodes = torch.randn(2, NUM_NETWORKS, NUM_NODES, DIM, dtype=torch.float64)
    if ties:
        edges, nodes = edges.round(), nodes.round()
    index = torch.randint(0, NUM_NODES - 1, (2, NUM_EDGES))
    return [x.requires_grad_() for x in (edges, *nodes)], index


def statistics_of(messages, receiver):
    """Sum, sum of squares, minimum and maximum per node, [B, N, 4, D]; zeros where there are no messages."""
    rows = [messages[:, receiver == node] for node in range(NUM_NODES)]
    none = torch.zeros(NUM_NETWORKS, 4, DIM, dtype=messages.dtype)
    parts = [
        torch.stack([x.sum(1), x.square().sum(1), x.amin(1), x.amax(1)], dim=1) if x.shape[1] else none for x in rows
    ]
    return torch.stack(parts, dim=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(("modulation", "ties"), [("film", False), ("film", True), ("gate", False)])
def test_statistics_of_modulated_edges(modulation, keeps, ties, threads):
    """Minima and maxima that several messages share, too."""
    (edges, to, sent), (sender, receiver) = edges_and_nodes(ties)
    outer = nn.Linear(DIM, 2 * DIM if modulation == "film" else DIM, dtype=torch.float64)
    if ties:
        outer.weight.data.mul_(8).round_()
        outer.bias.data.round_()
    program = RowProgram(keeps)
    weight, bias = (program.parameter(outer, name) for name in ("weight", "bias"))
    x, ends = program.linear(program.load(DIM), weight, bias), program.load_sum(DIM)
    program.statistics(program.modulate(x, ends) if modulation == "film" else program.gate(x, ends))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(program, [edges, (to, receiver), (sent, sender)], nodes=Nodes(receiver, NUM_NODES))
        found = found.unflatten(2, (6, DIM))
        z, ends = outer(edges), to[:, receiver] + sent[:, sender]
        messages = z[..., :DIM] * ends + z[..., DIM:] if modulation == "film" else z.sigmoid() * ends
        assert_same(
            found[:, :, [0, 1, 2, 4]], statistics_of(messages, receiver), [edges, to, sent, *outer.parameters()]
        )
        assert (found[:, :, 3].max() > 1) == ties
        assert found[:, -1].abs().max() == 0
    finally:
        torch.set_num_threads(before)


def test_aggregates():
    """As `Aggregate`, deviations that are 0 included."""
    messages = torch.randn(1, 6, DIM, dtype=torch.float64)
    messages[:, 3:] = messages[:, 3:4]
    messages, receiver = messages.requires_grad_(), torch.tensor([0, 0, 0, 1, 1, 1])
    program = RowProgram()
    module = nn.Linear(4 * DIM, 4 * DIM, dtype=torch.float64)
    joint = program.aggregate(program.load(6 * DIM), program.load(1), 1e-5)
    program.store(program.linear(joint, *(program.parameter(module, name) for name in ("weight", "bias"))))
    rows = RowProgram()
    rows.statistics(rows.add(rows.load(DIM), rows.interpolate(rows.load(2), rows.given((16, DIM)))))
    places, zeros = torch.zeros(1, 6, 2, dtype=torch.float64), torch.zeros(16, DIM, dtype=torch.float64)
    statistics = run(rows, [messages, places], [zeros], nodes=Nodes(receiver, 2))
    share = torch.full((1, 1, 1, 1), 1 / 3, dtype=torch.float64)
    found = program((1, 2, 1), [statistics[:, :, None], share])[0, :, 0]
    expected = module(Aggregate(["identity"], 1.0)(messages[0], receiver, 2))
    assert_same(found, expected, [messages, *module.parameters()])


@pytest.mark.parametrize(
    ("change", "index"), [({}, -1), ({}, NUM_NODES), ({"width": 16}, 0), ({"rows": 3}, 0), ({"node": NUM_NODES}, 0)]
)
def test_inputs_that_do_not_fit_are_refused(change, index):
    """By the library: rows that are not there, other widths, tables without enough rows."""
    width, rows = change.get("width", DIM), change.get("rows", 16)
    program = RowProgram()
    table = program.given((rows, DIM))
    program.statistics(program.add(program.load(DIM), program.interpolate(program.load(2), table)))
    nodes, places = torch.randn(1, NUM_NODES, width, dtype=torch.float64), torch.zeros(1, 2, 2, dtype=torch.float64)
    receivers = Nodes(torch.tensor([0, change.get("node", 0)]), NUM_NODES)
    tables_given = [torch.zeros(rows, DIM, dtype=torch.float64)]
    with pytest.raises(ValueError, match="inputs, or what they are indexed by, do not fit their program"):
        run(program, [(nodes, torch.tensor([0, index])), places], tables_given, receivers)


WRONG_SHAPES = {
    "networks": {"nodes": torch.zeros(2, NUM_NODES, DIM)},
    "receivers": {"edges": torch.zeros(3, 6, DIM)},
    "fewer rows": {"index": torch.zeros(6, dtype=torch.long)},
    "small integers": {"index": torch.zeros(7, dtype=torch.int32)},
    "rows that stand apart": {"index": torch.zeros(14, dtype=torch.long)[::2]},
    "nodes": {"receivers": torch.zeros(6, dtype=torch.long)},
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_other_shapes_are_refused(name):
    """Before the library reads memory that is not theirs."""
    right = {
        "nodes": torch.zeros(3, NUM_NODES, DIM),
        "edges": torch.zeros(3, 7, DIM),
        "index": torch.zeros(7, dtype=torch.long),
        "receivers": torch.zeros(7, dtype=torch.long),
    }
    program, module = RowProgram(), nn.LayerNorm(DIM)
    program.statistics(program.norm_silu(program.add(program.load(DIM), program.load(DIM)), module))

    def run_with(nodes, edges, index, receivers):
        return run(program, [edges, (nodes, index)], nodes=Nodes(receivers, NUM_NODES))

    assert run_with(**right).shape == (3, NUM_NODES, 6 * DIM)
    with pytest.raises(ValueError, match=r"do not fit a block \[3, 7, 1\]|found an index of type and shape"):
        run_with(**{**right, **WRONG_SHAPES[name]})


# Tables


def encoder_and_numbers(dtype, scale=3.0):
    """An encoder of three numbers, the Linear after it, and many numbers w."""
    encoder, after = Encoder(3, DIM, 64, scale, 1).to(dtype), nn.Linear(DIM, DIM).to(dtype)
    return encoder, after, torch.randn(32, 500, dtype=dtype)


DIRECTIONS = torch.tensor([[1.0, 0, 1], [0, 1, 1]])


def looked_up(encoder, after, values):
    """The features of all edges, from the table."""
    found = tables.lookup(encoder, after, values, DIRECTIONS)
    assert found is not None
    program = RowProgram()
    program.store(program.interpolate(program.load(2), program.given(found.table.shape)))
    return run(program, [found.places], [found.table])


def encoded(encoder, after, values):
    """The same, each by itself."""
    raw = values[:, None, :, None] * DIRECTIONS[:, None].to(values)
    return after(encoder(raw)).flatten(1, 2)


def test_tables_are_exact():
    """In double precision up to 1e-11, with the gradients of the encoder and of the Linear."""
    encoder, after, values = encoder_and_numbers(torch.float64)
    learned = [*encoder.parameters(), *after.parameters()]
    found, expected = looked_up(encoder, after, values), encoded(encoder, after, values)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert_same(found, expected, learned)


def test_tables_in_single_precision():
    """Errors are below those of cosines whose angles are rounded."""
    encoder, after, values = encoder_and_numbers(torch.float32)
    found, directly = looked_up(encoder, after, values), encoded(encoder, after, values)
    expected = encoded(encoder.double(), after.double(), values.double())
    error, other = ((x.double() - expected).abs().max() for x in (found, directly))
    assert error < other < 1e-4


def test_tables_follow_their_frequencies():
    """Also where they change in place, and where numbers are larger than before."""
    encoder, after, values = encoder_and_numbers(torch.float64)
    first = looked_up(encoder, after, values)
    encoder.fourier.frequencies.mul_(0.5)
    found = looked_up(encoder, after, 1.7 * values)
    torch.testing.assert_close(found, encoded(encoder, after, 1.7 * values), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, first)


def test_no_tables_where_they_are_not_exact_or_do_not_pay():
    """Several layers, numbers of which gradients are taken, numbers that are not finite, few numbers, wide ranges."""
    encoder, after, values = encoder_and_numbers(torch.float32)
    assert tables.lookup(encoder, after, values, DIRECTIONS) is not None
    others = [values.clone().requires_grad_(), values[:1, :20], 1e6 * values, values.clone()]
    others[-1][0, 0] = torch.nan
    others += [torch.where(values == values[0, 0], x, values) for x in (torch.inf, 60.0)]
    assert tables.lookup(encoder, after, others[-1].repeat(20, 1), DIRECTIONS) is not None  # of as many numbers
    others.append(torch.where(values == values[0, 0], 3e3, values).repeat(200, 1))  # in too much memory
    assert all(tables.lookup(encoder, after, x, DIRECTIONS) is None for x in others)
    for other in (Encoder(3, DIM, 64, 3.0, 2), Encoder(3, DIM, 0, 3.0, 1)):
        assert tables.lookup(other, after, values, DIRECTIONS) is None


def test_tables_of_inference_mode_serve_training():
    """What is kept of it may be saved for a backward pass."""
    encoder, after, values = encoder_and_numbers(torch.float64)
    learned = [*encoder.parameters(), *after.parameters()]
    with torch.inference_mode():
        looked_up(encoder, after, values)
    assert_same(looked_up(encoder, after, values), encoded(encoder, after, values), learned)


# Norms


def silu_of_norm(norm, x):
    """By a plan of one program."""
    plan, shape = Plan(x.dtype, False), (*x.shape[:2], 1)
    plan.outputs = [plan.run(NormProgram(norm), shape, [plan.given([*shape, x.shape[2]])])]
    return plan([x])[0].squeeze(2)


@pytest.mark.parametrize("threads", [1, 2])
def test_silu_of_norms(threads):
    """As `GraphNorm` and SiLU; in single precision, too."""
    norm, x = GraphNorm(DIM).double(), (3 + torch.randn(5, 7, DIM, dtype=torch.float64)).requires_grad_()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    network = torch.arange(5).repeat_interleave(7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = silu(norm(x.flatten(0, 1), network, 5)).view_as(x)
        assert_same(silu_of_norm(norm, x), expected, [x, norm.weight, norm.bias])
        norm.weight = nn.Parameter(norm.weight.detach().repeat_interleave(2)[::2])  # its numbers stand apart
        torch.testing.assert_close(silu_of_norm(norm, x), expected)
        found = silu_of_norm(norm.float(), x.float())
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("learned", ["x", "weight", "bias"])
def test_gradients_of_norms_that_are_frozen_in_part(learned):
    """Each alone is what it is beside the others."""
    norm, x = GraphNorm(DIM).double(), torch.randn(5, 7, DIM, dtype=torch.float64, requires_grad=True)
    tensors = {"x": x, "weight": norm.weight, "bias": norm.bias}
    expected = gradients(silu_of_norm(norm, x), tensors[learned])
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == learned)
    torch.testing.assert_close(gradients(silu_of_norm(norm, x), tensors[learned]), expected)


# Models

MLP = NetSpec.mlp([2, 6, 5, 3], "sine")
SKIPS = NetSpec(
    (LayerSpec(2, 6, activation="sine"), LayerSpec(6, 6, activation="sine", residual=0), LayerSpec(6, 3)),
)
CNN = NetSpec((LayerSpec(1, 4, (3, 3), "relu"), LayerSpec(4, 5, (1, 1), "relu"), LayerSpec(5, 3)))

CASES = {
    "film": (MLP, {}),
    "gate": (MLP, {"modulation": "gate"}),
    "concat": (MLP, {"modulation": "concat"}),
    "one way": (MLP, {"reverse_edges": False}),
    "one layer": (MLP, {"num_layers": 1, "pooling": "mean"}),
    "two layers": (MLP, {"num_layers": 2}),
    "all nodes": (MLP, {"pooling": "max"}),
    "parameters": (MLP, {"output": "parameters"}),
    "parameters, one layer": (MLP, {"output": "parameters", "num_layers": 1}),
    "deep encoder": (MLP, {"encoder_layers": 2}),
    "no frequencies": (MLP, {"num_frequencies": 0}),
    "probes": (MLP, {"num_probes": 5, "positions": False}),
    "three scalers": (MLP, {"scalers": ("attenuation", "identity", "amplification")}),
    "residual": (SKIPS, {}),
    "residual, parameters": (SKIPS, {"output": "parameters"}),
    "kernels": (CNN, {"pooling": "mean"}),
}

WITHOUT_TABLE = {"one layer", "parameters, one layer", "deep encoder", "no frequencies", "kernels"}


@pytest.mark.parametrize("name", CASES)
def test_models_with_and_without_programs(name, random_params, monkeypatch):
    """Outputs and all gradients, with and without a table, are those of the plain form and of operations one by one."""
    spec, options = CASES[name]
    options = {"out_dim": 4, **options} if options.get("output") != "parameters" else options
    options = {
        "hidden_dim": 16,
        "dropout": 0.0,
        "num_frequencies": 4,
        "frequency_scale": 0.5,
        "num_layers": 3,
        **options,
    }
    model = NGGNNConfig(**options).build(spec).double()
    params, tabled = random_params(spec, 12), []
    original = tables.lookup
    monkeypatch.setattr(pna_programs, "lookup", lambda *inputs: tabled.append(original(*inputs)) or tabled[-1])
    assert pna_programs.run_chains(model, params) is not None
    tabled.clear()

    def outputs():
        out = model(params)
        out = torch.cat([x.flatten() for x in (*out.weights, *out.biases)]) if isinstance(out, NetParams) else out
        return out, torch.autograd.grad(
            out.square().sum(), list(model.parameters()), materialize_grads=True, allow_unused=True
        )

    found = outputs()
    assert bool(tabled and tabled[0]) == (name not in WITHOUT_TABLE)
    model.engine = "plain"
    torch.testing.assert_close(found, outputs(), rtol=1e-9, atol=1e-9)
    model.engine = "fast"
    monkeypatch.setattr(pna_programs, "available", lambda x: False)
    torch.testing.assert_close(found, outputs(), rtol=1e-9, atol=1e-9)
    assert sum(gradient.abs().max() > 0 for gradient in found[1]) > len(found[1]) / 2


def test_dropout_draws_as_layers_do(random_params, monkeypatch):
    """Outputs and gradients are those of operations one by one with the same seed."""
    model = NGGNNConfig(hidden_dim=16, out_dim=4, dropout=0.4, num_frequencies=4, num_layers=3).build(MLP).double()
    params = random_params(MLP, 12)

    def outputs():
        torch.manual_seed(5)
        out = model(params)
        return out, torch.autograd.grad(out.square().sum(), list(model.parameters()))

    found, without = outputs(), model.eval()(params)
    model.train()
    monkeypatch.setattr(pna_programs, "available", lambda x: False)
    torch.testing.assert_close(found, outputs(), rtol=1e-9, atol=1e-9)
    assert (found[0] - without).abs().max() > 1e-3


def test_models_with_hooks_run_one_by_one(random_params):
    """Plans do not call hooks."""
    model, params = NGGNNConfig(hidden_dim=16, out_dim=4).build(MLP).double().eval(), random_params(MLP, 3)
    found = model(params)
    model.layers[0].message.linear.register_forward_hook(lambda *_: None)
    assert pna_programs.run_chains(model, params) is None
    torch.testing.assert_close(model(params), found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("modulation", ["film", "gate", "concat"])
def test_models_in_mixed_precision(modulation, random_params):
    """Tables stay in single precision; outputs and gradients are as near as bfloat16 is."""
    torch.manual_seed(4)
    model = NGGNNConfig(hidden_dim=16, out_dim=4, dropout=0.0, modulation=modulation, frequency_scale=0.5).build(MLP)
    params = random_params(MLP, 12).map(lambda tensor: tensor.float())
    expected = model(params)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(params).float()
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
    of_found, of_expected = (
        gradients(found, model.layers[0].last.weight),
        gradients(expected, model.layers[0].last.weight),
    )
    assert (of_found[0] - of_expected[0]).norm() < 0.2 * of_expected[0].norm()


def test_models_under_autocast_to_float16(random_params):
    """Programs do not know such numbers: operations run one by one."""
    model = NGGNNConfig(hidden_dim=16, out_dim=4, dropout=0.0, frequency_scale=0.5).build(MLP)
    params = random_params(MLP, 12).map(lambda tensor: tensor.float())
    expected = model(params)
    with torch.autocast("cpu", torch.float16):
        found = model(params).float()
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


def test_second_derivatives_are_refused(random_params):
    """Also of parameters alone, whose gradients would lack what goes through programs."""
    model = NGGNNConfig(hidden_dim=16, out_dim=4, dropout=0.0).build(MLP)
    params = random_params(MLP, 12).map(lambda tensor: tensor.float().requires_grad_())
    weight = model.layers[0].message.linear.weight
    (gradient,) = torch.autograd.grad(model(params).sum(), params.weights[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; build the model with engine: plain"):
        torch.autograd.grad(gradient.square().sum(), weight)
    model.engine = "plain"
    (gradient,) = torch.autograd.grad(model(params).sum(), params.weights[0], create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), weight)[0].abs().max() > 0
