"""Large networks run in chunks of edges whose features are computed again: the same outputs and gradients."""

import pytest
import torch
from architectures import networks, skips, transformer
from contract import assert_engine_computes_the_plain_form, build, flat

from scalegmn.engine import neural_graphs
from scalegmn.engine.chunks import ChunkPlan
from scalegmn.engine.large_weight_spaces import held, run_nfn_layers
from scalegmn.models.dwsnet import DWSNetConfig
from scalegmn.models.nfn import NFNConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.networks import NetSpec
from scalegmn.nn.weight_space import ActivationDropout

MLP = NetSpec.mlp([2, 6, 9, 3], "sine")
WAYS = [ChunkPlan(11), ChunkPlan(11, materialize=False)]

NG_GNN = [
    {},
    {"modulation": "gate", "reverse_edges": False, "encoder_layers": 2, "pooling": "max"},
    {"modulation": "concat", "num_frequencies": 0, "num_probes": 3, "output": "parameters", "heads": 2},
    {"num_frequencies": 0, "encoder_layers": 2, "pooling": "outputs_mean", "num_layers": 1},
]


def assert_chunks_agree(config, params, chunks, monkeypatch):
    """The chunked form and the plain one."""
    model = build(config, params.spec)
    monkeypatch.setattr(model, "chunks", lambda *args: chunks)
    assert_engine_computes_the_plain_form(model, [params])


@pytest.mark.parametrize("options", NG_GNN)
@pytest.mark.parametrize("chunks", WAYS)
def test_ng_gnn(chunks, options, random_params, monkeypatch):
    config = NGGNNConfig(**{"hidden_dim": 4, "num_layers": 3, "num_frequencies": 3} | options)
    assert_chunks_agree(config, random_params(MLP, 2), chunks, monkeypatch)


@pytest.mark.parametrize("make", [transformer, skips])
def test_ng_gnn_of_modules(make, monkeypatch):
    options = {"reverse_edges": False, "activation_embedding": True, "linear_encoder": make is skips}
    params = networks(make).map(lambda x: x + 0.1 * torch.rand_like(x))  # no two messages are equal
    for more in ({}, options):
        config = NGGNNConfig(hidden_dim=3, num_layers=2, num_frequencies=2, pooling="mean", **more)
        assert_chunks_agree(config, params, ChunkPlan(23, materialize=False), monkeypatch)


@pytest.mark.parametrize("options", [{}, {"pooling": "token", "modulate_values": False}, {"output": "parameters"}])
def test_ng_t(options, random_params, monkeypatch):
    config = NGTConfig(node_dim=4, edge_dim=3, attention_dim=4, num_heads=2, num_frequencies=2, num_layers=3, **options)
    assert_chunks_agree(config, random_params(MLP, 2), ChunkPlan(50), monkeypatch)


def test_encoders(random_params, monkeypatch):
    """In chunks, where what they keep does not fit."""
    model = build(NGTConfig(num_layers=1, num_frequencies=2), MLP)
    monkeypatch.setattr(neural_graphs, "kept_bytes", lambda device: 0)
    monkeypatch.setattr(neural_graphs, "tensor_bytes", lambda device: 300)
    assert_engine_computes_the_plain_form(model, [random_params(MLP, 2)])


MLP4 = NetSpec.mlp([2, 5, 4, 6, 3], "relu")
NFN = [
    {"norm": "channels", "num_bands": 2, "layer_positions": True},
    {"layer": "NP", "io_embed": True, "norm": "neurons", "dropout": 0.5, "append_statistics": True},
    {"layer": "pointwise", "num_frequencies": 0, "output": "parameters", "heads": 2},
    {"pool": "NP"},
    {"hidden_dims": (4, 6), "products": True, "dropout": 0.5},
    {"layer": "NP", "products": True, "output": "parameters"},
]
DWSNET = [
    {},
    {"set_layer": "deep_set", "reduction": "mean", "num_linears": 2, "batch_norm": False},
    {"output": "parameters", "heads": 2, "full": True},
    {"set_layer": "deep_set", "reduction": "mean", "products": True},
]


def outputs_and_gradients(model, params, buffers):
    """In training; the buffers are set to these before."""
    model.load_state_dict(buffers, strict=False)
    torch.manual_seed(2)
    output = flat(model.train()(params))
    weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)
    leaves = [*model.parameters(), *params.weights, *params.biases]
    gradients = torch.autograd.grad((weights * output).sum(), leaves, materialize_grads=True)
    return [output, *gradients, *(buffer.clone() for buffer in model.buffers())]


@pytest.mark.parametrize("chunks", WAYS)
@pytest.mark.parametrize(
    "config",
    [
        *(NFNConfig(**{"hidden_dims": (4, 3), "num_frequencies": 2, "readout_dim": 5} | options) for options in NFN),
        *(DWSNetConfig(**{"hidden_dim": 4, "num_hidden": 2, "num_heads": 2} | options) for options in DWSNET),
    ],
)
def test_weight_spaces(config, chunks, random_params, monkeypatch):
    """Also statistics of batch norms, and dropout of channels, whose random numbers are the same."""
    num_networks = 2 if isinstance(config, DWSNetConfig) else 1  # NFN runs one by one
    model, params = build(config, MLP4), random_params(MLP4, num_networks)
    params = params.map(lambda tensor: tensor.requires_grad_())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    whole = outputs_and_gradients(model, params, buffers)
    monkeypatch.setattr(model, "chunks", lambda *args: chunks)
    in_chunks = outputs_and_gradients(model, params, buffers)
    for found, expected in zip(in_chunks, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    model.eval()
    several = random_params(MLP4, 3)
    found = flat(model(several))
    monkeypatch.undo()
    torch.testing.assert_close(found, flat(model(several)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunks", WAYS)
def test_dropout_after_tanh_in_low_precision(chunks):
    """Its factors are those of the plain form to the bit: none is tanh of 1, rounded, divided out again."""
    for p in (0.1, 0.2, 0.3):
        layer = ActivationDropout(torch.tanh, p)
        weights = [torch.randn(1, n, m, 64, dtype=torch.bfloat16) for n, m in ((5, 2), (4, 5), (3, 4))]
        biases = [torch.randn(1, n, 64, dtype=torch.bfloat16) for n in (5, 4, 3)]
        torch.manual_seed(0)
        plain = layer(weights, biases)
        torch.manual_seed(0)
        large = held(*run_nfn_layers([layer], weights, biases, chunks))
        assert all(map(torch.equal, [*plain[0], *plain[1]], [*large[0], *large[1]]))


def test_chunks_draw_as_many_numbers_for_dropout(random_params, monkeypatch):
    """DWSNet's, which are drawn for each weight."""
    options = {"set_layer": "deep_set", "hidden_dim": 8, "num_hidden": 2, "dropout": 0.3}
    model, params = DWSNetConfig(**options).build(MLP4).double().train(), random_params(MLP4, 2)
    states = []
    for chunks in (ChunkPlan(None), ChunkPlan(11)):
        monkeypatch.setattr(model, "chunks", lambda *args, chunks=chunks: chunks)
        torch.manual_seed(0)
        model(params)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
