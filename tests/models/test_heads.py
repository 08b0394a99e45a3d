"""Models that give k changes for each network, whose edited image is the mean of k images."""

from itertools import pairwise

import pytest
import torch
from contract import Contract, build, flat

from scalegmn.models import METANETWORKS
from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.networks.siren import render
from scalegmn.symmetry.groups import GroupElement
from scalegmn.tasks.editing import edit_stored, edited

INR = NetSpec.mlp([2, 5, 4, 1], "sine", 6.0)
CNN = NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4, (3, 1), "relu"), LayerSpec(4, 2)))
SMALL = {
    "scalegmn": {"hidden_dim": 6, "num_layers": 3, "direction": "bidirectional", "num_probes": 4},
    "ng_gnn": {"hidden_dim": 6, "num_layers": 2, "num_frequencies": 3},
    "ng_t": {"node_dim": 8, "edge_dim": 4, "attention_dim": 8, "num_heads": 2, "num_layers": 2, "num_frequencies": 3},
    "nfn": {"hidden_dims": (6,), "num_frequencies": 3},
    "dwsnet": {"hidden_dim": 6, "num_hidden": 1, "num_heads": 2},
    "mlp": {"hidden_dim": 16, "num_hidden": 1},
}
EDITORS = {name: METANETWORKS[name](output="parameters", heads=3, **options) for name, options in SMALL.items()}
CASES = [
    *((config, INR) for name, config in EDITORS.items() if name != "dwsnet"),  # see test_dwsnet.py
    *((METANETWORKS[name](output="parameters", heads=2, **SMALL[name]), CNN) for name in ("nfn", "mlp")),
    (METANETWORKS["scalegmn"](output="parameters", heads=2, symmetry="scale", hidden_dim=6, num_layers=2), CNN),
]


class TestHeads(Contract):
    @pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
    def case(self, request):
        return request.param


@pytest.mark.parametrize("config", EDITORS.values(), ids=EDITORS)
def test_each_head_has_its_own_changes(config, random_params):
    """All k networks of a network differ, in each of its tensors, and have its architecture."""
    model, params = build(config, INR), random_params(INR, 4)
    changes = model(params)
    assert changes.spec == params.spec
    assert len(changes) == 4 * config.heads
    of_heads = changes.of_heads(4)
    assert torch.equal(NetParams.interleave(of_heads).flatten(), changes.flatten())
    for first, second in pairwise(of_heads):
        pairs = zip((*first.weights, *first.biases), (*second.weights, *second.biases), strict=True)
        assert all((own - other).flatten(1).abs().amax(1).min() > 1e-6 for own, other in pairs)


@pytest.mark.parametrize(
    "config", [config for config in EDITORS.values() if config.exact_symmetries], ids=lambda c: c.name
)
def test_the_mean_image_does_not_depend_on_how_a_network_is_stored(config, random_params, generator):
    """Of networks moved along their orbit; a network outside its orbit has another, and so has a broken model."""
    model, params = build(config, INR), random_params(INR, 5)
    symmetric = GroupElement.sample(params, generator, scale="sign" in config.exact_symmetries)
    assert (symmetric.act(params).flatten() - params.flatten()).abs().max() > 0.1
    outside = GroupElement(symmetric.permutations, tuple(torch.full_like(q, 1.7) for q in symmetric.scales))

    def images(model, nets):
        drawn = render(edit_stored(model, nets, []), 6, 6)
        return drawn.unflatten(0, (len(nets), config.heads)).mean(1)

    def broken(nets):  # the last head sorts the changes of the first biases
        *others, last = model(nets).of_heads(len(nets))
        fixed = NetParams(last.spec, last.weights, (last.biases[0].sort(1).values, *last.biases[1:]))
        return NetParams.interleave([*others, fixed])

    expected = images(model, params)
    assert (expected - render(params, 6, 6)).abs().amax((1, 2, 3)).min() > 1e-3
    assert (images(model, symmetric.act(params)) - expected).abs().max() < 1e-9
    assert (images(model, outside.act(params)) - expected).abs().max() > 1e-6
    assert (images(broken, symmetric.act(params)) - images(broken, params)).abs().max() > 1e-6


def test_heads_of_edited_networks_stand_side_by_side(random_params):
    """Head i of network b is b changed by head i, also where canonical networks are read."""
    model, params = build(EDITORS["scalegmn"], INR), random_params(INR, 4)
    together, changes = edited(model, params), model(params)
    for head, nets in enumerate(together.of_heads(4)):
        torch.testing.assert_close(nets.flatten(), params.flatten() + changes.of_heads(4)[head].flatten())
    alone = [flat(edit_stored(model, params[row : row + 1], ["phase"])) for row in range(4)]
    torch.testing.assert_close(flat(edit_stored(model, params, ["phase"])), torch.cat(alone))


@pytest.mark.parametrize("name", METANETWORKS)
def test_wrong_heads_are_named(name):
    config = METANETWORKS[name]
    with pytest.raises(ValueError, match=rf"{name}_args.heads: found 0, expected at least 1"):
        config(heads=0)
    with pytest.raises(ValueError, match=rf"{name}_args.heads: found 2, but a vector has one; use 1, or output param"):
        config(heads=2)
