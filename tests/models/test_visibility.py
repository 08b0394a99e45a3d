"""Which parameters a model says that it sees, against the gradients of its output."""

import itertools
from dataclasses import replace

import pytest
import torch
from architectures import traced
from contract import build, flat

from scalegmn.models.nfn import NFNConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.models.visibility import Visibility
from scalegmn.networks import LayerSpec, NetSpec

DEEP = NetSpec.mlp([2, 3, 3, 3, 3, 3, 2], "sine")
SKIPS = NetSpec(
    (
        *(LayerSpec(2, 3, None, "tanh"), LayerSpec(3, 3, None, "tanh", residual=0), LayerSpec(3, 3, None, "tanh")),
        *(LayerSpec(3, 3, None, "tanh"), LayerSpec(3, 3, None, "tanh", residual=1), LayerSpec(3, 2)),
    )
)
T = {"node_dim": 4, "edge_dim": 4, "attention_dim": 4, "num_heads": 2, "readout_dim": 4}
CONFIGS = [
    *(
        ScaleGMNConfig(hidden_dim=4, num_layers=layers, direction=direction, readout=readout, symmetry=symmetry)
        for layers, direction, readout, symmetry in itertools.product(
            (1, 2, 4), ("forward", "bidirectional"), ("last_layer", "full_graph"), ("sign", "permutation")
        )
    ),
    *(ScaleGMNConfig(hidden_dim=4, num_layers=n, direction="bidirectional", output="parameters") for n in (1, 3)),
    ScaleGMNConfig(hidden_dim=4, num_layers=1, num_probes=2),
    *(NGGNNConfig(hidden_dim=4, num_layers=n, reverse_edges=r) for n in (1, 2) for r in (True, False)),
    *(
        NGTConfig(**T, num_layers=n, pooling=p, update_edges=u)
        for n in (1, 2)
        for p in ("outputs", "mean", "token")
        for u in (True, False)
    ),
    NFNConfig(hidden_dims=(4,), num_frequencies=2),
    StatNNConfig(hidden_dim=4),
]


def changes_output(model, params):
    """(weights, biases): per layer, whether the output has a gradient for any of them."""
    leaves = params.map(lambda tensor: tensor.detach().requires_grad_())
    output = flat(model(leaves))
    numbers = (torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output) * output).sum()
    gradients = torch.autograd.grad(numbers, [*leaves.weights, *leaves.biases], materialize_grads=True)
    nonzero = [bool((gradient != 0).any()) for gradient in gradients]
    places = [
        frozenset(k for k, given in enumerate(part) if given)
        for part in (nonzero[: params.spec.num_layers], nonzero[params.spec.num_layers :])
    ]
    return Visibility(params.spec, *places)


@pytest.mark.filterwarnings("ignore:the model sees")
@pytest.mark.parametrize("spec", [DEEP, SKIPS], ids=["deep", "skips"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_gradients_agree(config, spec, random_params):
    if config.name == "nfn" and spec is SKIPS:
        pytest.skip("nfn reads no residual connections")
    model = build(config, spec)
    assert changes_output(model, random_params(spec, 2)) == model.visibility(spec)


@pytest.mark.filterwarnings("ignore:the model sees")
@pytest.mark.parametrize("name", ["gpt", "side by side"])
@pytest.mark.parametrize("readout", ["last_layer", "full_graph"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_gradients_agree_on_graphs_of_layers(name, readout, direction):
    params = traced(name)[1].with_batch_norm_folded()  # into biases, which then depend on weights
    config = ScaleGMNConfig(
        symmetry="permutation", normalize=False, hidden_dim=4, num_layers=3, readout=readout, direction=direction
    )
    model = build(config, params.spec)
    assert changes_output(model, params) == model.visibility(params.spec)


def test_deep_networks_are_warned_of_and_the_remedy_helps():
    config = ScaleGMNConfig(hidden_dim=4, num_layers=2)
    with pytest.warns(
        UserWarning, match=r"the model sees 35% of the parameters, the weights of 2 of 6 layers.*readout"
    ):
        config.build(DEEP)
    for remedy in ({"readout": "full_graph"}, {"num_layers": 6}):
        assert replace(config, **remedy).build(DEEP).visibility(DEEP).share == 1


@pytest.mark.filterwarnings("error")
def test_graphs_of_layers_are_seen_as_a_whole_by_default():
    _, params, _ = traced("vit")
    model = ScaleGMNConfig(symmetry="hetero", hidden_dim=4).build(params.spec)
    assert (model.config.readout, model.visibility(params.spec).is_whole) == ("full_graph", True)
