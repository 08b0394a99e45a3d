"""Networks with residual connections: which models read them, and which refuse them."""

import pytest
import torch
from contract import assert_ties_are_seen, build, without_residuals

from scalegmn.models.dwsnet import DWSNetConfig
from scalegmn.models.nfn import NFNConfig
from scalegmn.models.probegen import ProbeGenConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.symmetry.measure import assert_invariant

MLP = NetSpec(
    (*NetSpec.mlp([2, 5, 4, 1], "relu").layers[:2], LayerSpec(4, 6, None, "relu", residual=0), LayerSpec(6, 2))
)
CNN = NetSpec(
    (
        LayerSpec(1, 4, (3, 3), "relu"),
        LayerSpec(4, 3, (5, 5), "gelu"),
        LayerSpec(3, 6, (3, 3), "identity", residual=0),
        LayerSpec(6, 2),
    )
)


@pytest.mark.parametrize(
    "config",
    [
        DWSNetConfig(),
        NFNConfig(hidden_dims=(4,)),
    ],
    ids=lambda config: config.name,
)
def test_models_that_know_of_none_refuse_them(config, random_params):
    """When they are built, and when they have been built for the same layers without."""
    params = random_params(MLP, 2)
    expected = rf"model: {config.name} knows of no residual connections, found MLP .*0 -> 2\); use scalegmn, ng_gnn"
    with pytest.raises(ValueError, match=expected):
        config.build(MLP)
    model = config.build(without_residuals(params).spec).double()
    with pytest.raises(ValueError, match=expected):
        model(params)


@pytest.mark.parametrize("spec", [MLP, CNN], ids=str)
def test_probes_go_through_them(spec, random_params, generator):
    config = ProbeGenConfig(num_probes=6, hidden_dim=32, num_linears=3, image_size=8, stride=1)
    model, params = build(config, spec), random_params(spec, 6)
    assert_invariant(model, params, generator)
    assert_ties_are_seen(model, params, generator)


def test_probes_need_images_of_one_size():
    with pytest.raises(ValueError, match=r"probegen_args.stride: found stride 2 and padding same, expected 1 and same"):
        ProbeGenConfig().build(CNN)


@pytest.mark.parametrize("spec", [MLP, CNN], ids=str)
def test_statistics_do_not_see_them(spec, random_params, generator):
    model, params = build(StatNNConfig(hidden_dim=20), spec), random_params(spec, 6)
    assert_invariant(model, params, generator, scale=False)
    assert torch.equal(model(params), model(without_residuals(params)))
