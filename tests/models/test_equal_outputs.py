"""ScaleGMN with `equal_outputs`: renumbering a network's outputs changes nothing."""

from dataclasses import replace

import pytest
import torch
from contract import EngineContract, build

from scalegmn.models.scalegmn import BranchConfig, ScaleGMNConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.nn.probes import ProbeImages
from scalegmn.zoos.augment import relabel

SMALL = ScaleGMNConfig(hidden_dim=6, num_layers=3, out_dim=3, equal_outputs=True)
RELU = NetSpec.mlp([2, 5, 4, 3], "relu")
HETERO = NetSpec((LayerSpec(1, 3, (3, 3), "hetero"), LayerSpec(3, 4, (3, 1), "hetero"), LayerSpec(4, 3)))
PROBES = {"num_probes": 4, "probe_images": ProbeImages(image_size=7)}
CASES = [
    ("scale", RELU, {}),
    ("scale", RELU, {"direction": "bidirectional", "max_hidden_layers": 3, "position_map": "per_type"}),
    ("permutation", RELU, {"direction": "bidirectional"}),
    ("hetero", HETERO, {"direction": "bidirectional", "sizes": True, "readout": "full_graph"}),
    ("hetero", HETERO, {**PROBES, "branch": BranchConfig(statistics=True, answers=True, hidden_dims=(8,))}),
]


class TestEqualOutputs(EngineContract):
    @pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], str(case[1]), *case[2]]))
    def case(self, request):
        symmetry, spec, options = request.param
        return replace(SMALL, symmetry=symmetry, **options), spec

    def test_the_order_of_outputs_changes_nothing(self, case, nets, generator):
        params = nets(3)
        renumbered = relabel(params, generator)
        changes = []
        for config in (case[0], replace(case[0], equal_outputs=False)):
            model = build(config, case[1])
            changes.append((model(renumbered) - model(params)).abs().max().item())
        assert changes[0] <= 1e-9
        assert changes[1] > 1e-4


def test_it_is_for_vectors():
    with pytest.raises(ValueError, match=r"equal_outputs: found True, but .*; use vector output or False"):
        ScaleGMNConfig(output="parameters", equal_outputs=True)


def test_several_depths_share_the_type_of_outputs(random_params):
    """Networks of two, one and no hidden layers, in one pass as alone."""
    model = build(replace(SMALL, symmetry="scale", max_hidden_layers=2, readout="full_graph"), RELU)
    nets = [random_params(spec, 2) for spec in (RELU, NetSpec.mlp([2, 4, 3], "relu"), NetSpec.mlp([2, 3], "relu"))]
    torch.testing.assert_close(model(nets), torch.cat([model(params) for params in nets]))
