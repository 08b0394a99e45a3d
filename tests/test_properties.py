"""Random architectures and configurations: exactly symmetric."""

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_contract import build

from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.networks import BUILT_IN, LayerSpec, NetParams, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.canonicalize import canonicalize_phase, canonicalize_scale
from scalegmn.symmetry.groups import GroupElement, PhaseShift
from scalegmn.symmetry.measure import spread

NAMES = {"sign": ("sine", "tanh"), "scale": ("relu", "leaky_relu"), "hetero": ("hetero",), "permutation": ("gelu",)}
NETWORKS = 4


@st.composite
def specs(draw, symmetry, convolutions):
    """1 to 5 hidden layers of 1 to 9 neurons, several inputs and outputs; CNNs begin with one or more convolutions of
    kernels 1 to 5."""
    layout = draw(st.lists(st.integers(1, 9), min_size=3, max_size=7))
    name = draw(st.sampled_from(NAMES[symmetry]))
    w0 = draw(st.sampled_from([1.0, 6.0, 30.0])) if name in ("sine", "hetero") else 1.0
    num_layers = len(layout) - 1
    num_convolutions = draw(st.integers(1, num_layers)) if convolutions else 0
    layers = []
    for index in range(num_layers):
        kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) if index < num_convolutions else None
        activation = (name, w0) if index < num_layers - 1 else ()
        layers.append(LayerSpec(layout[index], layout[index + 1], kernel, *activation))
    return NetSpec(tuple(layers))


seeds = st.integers(0, 2**32)


def networks(spec, seed):
    """Random float64 networks, and the generator that made them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(NETWORKS, *layer.weight_shape) for layer in spec.layers]
    weights, biases = (
        tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in found)
        for found in (shapes, [shape[:2] for shape in shapes])
    )
    own = torch.tensor([BUILT_IN.index(n) for n in ("relu", "tanh", "leaky_relu", "sine")])
    return NetParams(spec, weights, biases, own if "hetero" in spec.symmetries else None), generator


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


models = st.sampled_from(list(NAMES)).flatmap(
    lambda symmetry: st.tuples(configs(symmetry), st.booleans().flatmap(lambda cnn: specs(symmetry, cnn)))
)


def explodes(config, *outputs):
    """Products of products of products, without LayerNorm: outputs overflow, or one network's make up the spread
    between networks, in which the changes of the others are lost."""
    return not config.mlp_layer_norm and not (torch.stack(outputs).abs() < 1e6).all()


@settings(max_examples=60, deadline=None)
@given(models, seeds)
@torch.no_grad()
def test_models_are_invariant(case, seed):
    config, spec = case
    params, generator = networks(spec, seed)
    model = build(config, spec)
    g = GroupElement.sample(params, generator, scale=config.symmetry != "permutation")
    outputs, moved = model(params), model(g.act(params))
    assume(not explodes(config, outputs, moved))
    assert (moved - outputs).abs().max() <= 1e-9 * outputs.abs().max()


def sees_scales(config):
    """One layer and the end nodes read: the only messages are (A x_j) * (B e_ji) from hidden nodes, in which any
    factor of j cancels; but for sign models against an edge, where a factor of -1 alone does."""
    ends_only = config.num_layers == 1 and config.readout == "last_layer" and config.symmetry != "permutation"
    return not ends_only or (config.symmetry == "sign" and config.direction == "bidirectional")


@settings(max_examples=60, deadline=None)
@given(models, seeds)
@torch.no_grad()
def test_models_are_not_invariant_to_more(case, seed):
    config, spec = case
    assume(sees_scales(config))
    params, _ = networks(spec, seed)
    model = build(config, spec)
    factor = {"scale": -1.0, "hetero": -3.0}.get(config.symmetry, 2.0)  # outside every network's group
    scales = tuple(torch.full_like(bias, factor) for bias in params.biases[:-1])
    identity = tuple(torch.arange(scale.shape[1]).expand(scale.shape) for scale in scales)
    outputs, moved = model(params), model(GroupElement(identity, scales).act(params))
    assume(not explodes(config, outputs, moved))
    assume(spread(outputs) > 0)  # a few drawn models answer all networks alike
    assert (moved - outputs).abs().max() > 1e-6 * spread(outputs)


def tame(params):
    """Weights such that a layer's sum has the size of its inputs: no sine of a huge number, whose rounding shows."""
    weights = tuple(
        weight / (layer.w0 * math.sqrt(weight[0, 0].numel()))
        for layer, weight in zip(params.spec.layers, params.weights, strict=True)
    )
    return NetParams(params.spec, weights, params.biases, params.activation)


all_specs = st.tuples(st.sampled_from(list(NAMES)), st.booleans()).flatmap(lambda choice: specs(*choice))


@settings(max_examples=100, deadline=None)
@given(all_specs, seeds)
def test_functions_stay(spec, seed):
    """Under group elements, phase shifts and canonicalisation."""
    params, generator = networks(spec, seed)
    params = tame(params)
    size = (2, spec.layout[0], 6, 7) if spec.is_cnn else (5, spec.layout[0])
    inputs = torch.randn(size, generator=generator, dtype=torch.float64)
    outputs = evaluate_cnn if spec.is_cnn else evaluate
    before = outputs(params, inputs)
    moved = {
        "group": GroupElement.sample(params, generator).act(params),
        "shift": PhaseShift.sample(params, generator).act(params),
        "phase": canonicalize_phase(params),
        "scale": canonicalize_scale(params),
    }
    for name, nets in moved.items():
        assert (outputs(nets, inputs) - before).abs().max() <= 1e-10 * (1 + before.abs().max()), name


@settings(max_examples=100, deadline=None)
@given(all_specs, seeds)
def test_canonical_networks_are_canonical(spec, seed):
    params = tame(networks(spec, seed)[0])
    for canonicalize in (canonicalize_phase, canonicalize_scale):
        once = canonicalize(params).flatten()
        again = canonicalize(canonicalize(params)).flatten()
        assert (again - once).abs().max() <= 1e-12 * (1 + once.abs().max())
    for layer, bias in zip(spec.layers[:-1], canonicalize_phase(params).biases, strict=False):
        if layer.activation in ("sine", "hetero"):
            own = bias if params.activation is None else bias[params.activation == BUILT_IN.index("sine")]
            assert (layer.w0 * own).abs().max() <= math.pi / 2 + 1e-12
