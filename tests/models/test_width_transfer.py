"""`width_transfer`: what a model makes of a function does not depend on how often its neurons are copied."""

import re
from dataclasses import replace

import pytest
import torch
from contract import EngineContract, build

from scalegmn.models.scalegmn import BranchConfig, ScaleGMNConfig
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.siren import render
from scalegmn.symmetry.groups import GroupElement
from scalegmn.tasks.editing import edited

SINE, RELU = NetSpec.mlp([2, 5, 4, 1], "sine", 6.0), NetSpec.mlp([2, 5, 4, 3], "relu")
CNN = NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2)))
SMALL = ScaleGMNConfig(hidden_dim=6, out_dim=4, num_layers=3, aggregator="mean", width_transfer=True)
PRODUCT = replace(SMALL, message_function="product", update_edges=False)
CASES = [
    (SMALL, SINE),
    (PRODUCT, SINE),
    (replace(PRODUCT, direction="bidirectional", num_probes=3, normalize=True), SINE),
    (replace(SMALL, symmetry="permutation"), SINE),
    (replace(PRODUCT, symmetry="scale"), RELU),
    (replace(SMALL, symmetry="scale", normalize=True), CNN),
]
EDITORS = [
    replace(PRODUCT, output="parameters"),
    replace(SMALL, output="parameters", direction="bidirectional", heads=2),
]


def name(value):
    if not isinstance(value, ScaleGMNConfig):
        return str(value)
    return f"{value.symmetry}-{value.direction}-{value.message_function}-{value.output}"


def widened(params, copies, outgoing=None):
    """Each hidden neuron `copies` times; outgoing weights divided by `outgoing` (None: by as many)."""
    layers, weights, biases = [], [], []
    for index, (layer, weight, bias) in enumerate(zip(params.spec.layers, params.weights, params.biases, strict=True)):
        is_hidden = index < params.spec.num_layers - 1
        if index:
            weight = weight.repeat_interleave(copies, 2) / (outgoing or copies)
        if is_hidden:
            weight, bias = (x.repeat_interleave(copies, 1) for x in (weight, bias))
        layers.append(replace(layer, in_dim=weight.shape[2], out_dim=weight.shape[1]))
        weights.append(weight)
        biases.append(bias)
    return NetParams(NetSpec(tuple(layers)), tuple(weights), tuple(biases))


class TestWidthTransfer(EngineContract):
    @pytest.fixture(params=CASES, ids=lambda case: f"{name(case[0])}-{case[1]}")
    def case(self, request):
        return request.param

    def test_a_widened_network_has_the_same_result(self, config, spec, nets, generator):
        """In any order of its neurons; not without the option, nor where another function is computed."""
        params = nets(4)
        wide = widened(params, 32)
        moved = GroupElement.sample(wide, generator, scale=config.symmetry != "permutation").act(wide)
        for options, same in (({}, True), ({"width_transfer": False}, False)):
            model = build(replace(config, **options), spec)
            model.fit_normalization([params])
            with torch.no_grad():
                narrow, copied, permuted, other = map(model, (params, wide, moved, widened(params, 32, outgoing=16)))
            spread = narrow.std(0).max()
            assert ((copied - narrow).abs().max() < 1e-9 * spread) == same
            assert ((permuted - narrow).abs().max() < 1e-9 * spread) == same
            assert (copied - narrow).abs().max() < 1e-9 * spread or (copied - narrow).abs().max() > 1e-4 * spread
            assert (other - narrow).abs().max() > 1e-4 * spread


@pytest.mark.parametrize("config", EDITORS, ids=name)
def test_an_edited_network_is_widened_alike(config, random_params):
    """The edit of the wide network draws the image that the edit of the narrow one draws."""
    params = random_params(SINE, 3)
    wide = widened(params, 32)
    for options, same in (({}, True), ({"width_transfer": False}, False)):
        narrow_model, wide_model = (build(replace(config, **options), nets.spec) for nets in (params, wide))
        wide_model.load_state_dict(narrow_model.state_dict())
        expected, found = render(edited(narrow_model, params), 5, 5), render(edited(wide_model, wide), 5, 5)
        assert (expected[:: config.heads] - render(params, 5, 5)).abs().max() > 1e-3
        assert ((found - expected).abs().max() < 1e-9) == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregator": "add"}, "width_transfer: needs aggregator mean, found add"),
        ({"readout": "full_graph"}, "grows with widths, found readout full_graph; use null"),
        ({"sizes": True}, "found sizes True; use False"),
        ({"branch": BranchConfig(statistics=True)}, "found branch.statistics True; use False"),
        ({"symmetry": "scale", "direction": "bidirectional"}, "bidirectional with symmetry scale; use forward"),
    ],
)
def test_what_depends_on_widths_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(SMALL, **options)


def test_other_graphs_are_refused():
    graph = NetSpec((LayerSpec(2, 4, None, "relu"), LayerSpec(2, 4, None, "relu", reads=-1), LayerSpec(4, 2)))
    with pytest.raises(ValueError, match=r"width_transfer: found True, expected False for .*, no chain"):
        replace(SMALL, symmetry="scale").build(graph)
