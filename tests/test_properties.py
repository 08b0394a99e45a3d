"""Random architectures and configurations: exactly symmetric."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.nets.functional import evaluate
from scalegmn.spec import ACTIVATIONS, LayerSpec, NetParams, NetSpec
from scalegmn.symmetry.groups import GroupElement

NAMES = {"sign": ("sine", "tanh"), "scale": ("relu", "leaky_relu"), "hetero": ("hetero",), "permutation": ("gelu",)}
NETWORKS = 4


@st.composite
def networks(draw, symmetry, convolutions):
    """Random float64 networks: 1 to 5 hidden layers of 1 to 9 neurons, several inputs and outputs, kernels 1 to 5."""
    layout = draw(st.lists(st.integers(1, 9), min_size=3, max_size=7))
    name = draw(st.sampled_from(NAMES[symmetry]))
    layers = []
    for index in range(len(layout) - 1):
        last = index == len(layout) - 2
        kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) if convolutions and not last else None
        layers.append(LayerSpec(layout[index], layout[index + 1], kernel, "identity" if last else name))
    spec = NetSpec(tuple(layers))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = [(NETWORKS, *layer.weight_shape) for layer in spec.layers]
    weights, biases = (
        tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in found)
        for found in (shapes, [shape[:2] for shape in shapes])
    )
    own = torch.tensor([ACTIVATIONS.index(n) for n in ("relu", "tanh", "leaky_relu", "sine")])
    return NetParams(spec, weights, biases, own if name == "hetero" else None), generator


nets = st.builds(
    EquivariantNetConfig,
    io=st.sampled_from(["same", "factor", "mlp", "layer"]),
    io_branches=st.sampled_from([1, 2]),
    num_layers=st.sampled_from([1, 2]),
    skip_connections=st.booleans(),
    positions=st.booleans(),
)
position_nets = st.builds(
    EquivariantNetConfig,
    io=st.sampled_from(["same", "layer"]),
    io_branches=st.sampled_from([1, 2]),
    num_layers=st.sampled_from([1, 2]),
    positions=st.just(True),
)


def configs(symmetry):
    return st.builds(
        ScaleGMNConfig,
        symmetry=st.just(symmetry),
        direction=st.sampled_from(["forward", "bidirectional"]),
        readout=st.sampled_from(["last_layer", "full_graph"]),
        readout_projection=st.sampled_from(["linear", "mlp"]),
        num_layers=st.integers(1, 4),
        hidden_dim=st.just(4),
        mlp_layer_norm=st.booleans(),
        node_positions=st.sampled_from(
            ["product", "product_sum", *(["net", "net_sum"] if symmetry != "hetero" else [])]
        ),
        edge_positions=st.booleans(),
        position_net=position_nets,
        position_map=st.sampled_from(["none", "shared", "per_type"]),
        update_rule=st.sampled_from(["net", "sine_sum", "sine_cat"] if symmetry == "sign" else ["net"]),
        skip_connections=st.booleans(),
        sign_map=st.sampled_from(["symmetrized", "absolute"]),
        aggregator=st.sampled_from(["add", "mean"]),
        update_edges=st.booleans(),
        normalize=st.booleans(),
        message=nets,
        update=nets,
    )


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_models_are_invariant(data):
    symmetry = data.draw(st.sampled_from(list(NAMES)))
    params, generator = data.draw(networks(symmetry, convolutions=data.draw(st.booleans())))
    config = data.draw(configs(symmetry))
    torch.manual_seed(0)
    model = config.build(params.spec).double().eval()
    outputs = model(params)
    g = GroupElement.sample(params, generator, scale=symmetry != "permutation")
    change = (model(g.act(params)) - outputs).abs().max()
    assert change <= 1e-9 * outputs.abs().max()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_group_actions_leave_functions_unchanged(data):
    params, generator = data.draw(networks(data.draw(st.sampled_from(list(NAMES))), convolutions=False))
    points = torch.randn(5, params.spec.layout[0], generator=generator, dtype=torch.float64)
    before = evaluate(params, points)
    after = evaluate(GroupElement.sample(params, generator).act(params), points)
    assert (after - before).abs().max() <= 1e-10 * (1 + before.abs().max())
