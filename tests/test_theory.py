"""Hand-set weights with which ScaleGMN computes what its input networks compute, compared with autograd."""

from itertools import pairwise

import pytest
import torch

from scalegmn.models import ScaleGMNConfig
from scalegmn.models.scalegmn.streams import StreamWidths
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.networks.evaluate import activations, pre_activations
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.measure import relative_change
from scalegmn.theory import BIAS, POST, PRE, backward_scalegmn, forward_scalegmn, gradients, node_states, raw_streams

LAYOUTS = [(3, 5, 2), (2, 7, 4, 3), (4, 3, 8, 6, 1), (1, 9, 5, 7, 4, 2)]


def chain(layout, activation, w0=1.0):
    last = len(layout) - 2
    return NetSpec(
        tuple(
            LayerSpec(i, o, None, activation if n < last else "identity", w0 if n < last else 1.0)
            for n, (i, o) in enumerate(pairwise(layout))
        )
    )


def point(size, generator):
    return torch.randn(size, generator=generator, dtype=torch.float64)


def autograd_gradients(params, x, target):
    leaves = params.map(lambda tensor: tensor.clone().requires_grad_())
    error = activations(leaves, x[None])[-1][:, 0] - target
    tensors = [*leaves.weights, *leaves.biases]
    found = torch.autograd.grad(error.square().sum() / 2, tensors)
    return params.replace(weights=found[: len(params.weights)], biases=found[len(params.weights) :])


def largest_difference(first, second):
    return max(
        float((a - b).abs().max())
        for a, b in zip([*first.weights, *first.biases], [*second.weights, *second.biases], strict=True)
    )


def states_error(model, params, x):
    """How far z and a of all nodes but the inputs are from those of the networks."""
    states = node_states(model, params)
    layers = zip(states[1:], pre_activations(params, x[None]), activations(params, x[None]), strict=True)
    return max(
        max(float((s[..., PRE] - z[:, 0]).abs().max()), float((s[..., POST] - a[:, 0]).abs().max()))
        for s, z, a in layers
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_forward_scalegmn_computes_activations(activation, layout, random_params, generator):
    params, x = random_params(chain(layout, activation), 6), point(layout[0], generator)
    model = forward_scalegmn(params.spec, x)
    assert states_error(model, params, x) < 1e-9
    torch.testing.assert_close(node_states(model, params)[1][..., BIAS], params.biases[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("w0", [1.0, 1.5])
def test_forward_scalegmn_computes_sines(w0, random_params, generator):
    """Exactly with the exact quotient, within 1e-5 with an MLP fitted to sin(w0 z) / z for |z| up to 12."""
    params, x = random_params(chain((3, 6, 5, 2), "sine", w0), 6), point(3, generator)
    assert states_error(forward_scalegmn(params.spec, x), params, x) < 1e-9
    largest = max(float(z.abs().max()) for z in pre_activations(params, x[None])[:-1])
    assert largest < 12
    assert states_error(forward_scalegmn(params.spec, x, fitted_range=12.0), params, x) < 1e-5


def test_one_layer_too_few_is_not_enough(random_params, generator):
    params, x = random_params(chain((3, 5, 4, 2), "relu"), 4), point(3, generator)
    model = forward_scalegmn(params.spec, x)
    model.layers = model.layers[:-1]
    assert states_error(model, params, x) > 1e-3


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_states_transform_as_the_theory_says(activation, random_params, generator):
    params, x = random_params(chain((3, 6, 5, 2), activation), 6), point(3, generator)
    element, model = GroupElement.sample(params, generator), forward_scalegmn(params.spec, x)
    moved = element.act_on_nodes(node_states(model, params), params.spec)
    for one, other in zip(node_states(model, element.act(params)), moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_contravariant_stream_computes_all_gradients(activation, layout, random_params, generator):
    params, x, target = random_params(chain(layout, activation), 6), *(point(layout[i], generator) for i in (0, -1))
    model = backward_scalegmn(params.spec)
    expected = autograd_gradients(params, x, target)
    size = max(float(tensor.abs().max()) for tensor in (*expected.weights, *expected.biases))
    assert largest_difference(gradients(model, params, x, target), expected) < 1e-9 * max(1, size)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_gradients_are_contravariant(activation, random_params, generator):
    """Those of rescaled networks are the rescaled ones, by 1 / q; by q they are others."""
    params, x, target = random_params(chain((3, 6, 5, 2), activation), 6), point(3, generator), point(2, generator)
    model, element = backward_scalegmn(params.spec), GroupElement.sample(params, generator)
    found = gradients(model, element.act(params), x, target)
    expected = element.contravariant().act_on_changes(gradients(model, params, x, target))
    assert largest_difference(found, expected) < 1e-9
    if activation == "relu":
        covariant = element.act_on_changes(gradients(model, params, x, target))
        assert largest_difference(found, covariant) > 1e-2


def random_weights(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_both_streams_are_exact_for_any_weights(activation, random_params, generator):
    """Where the published plain reversed edge, w against w, is not."""
    params, x, target = random_params(chain((3, 6, 5, 2), activation), 6), point(3, generator), point(2, generator)
    spec, element = params.spec, GroupElement.sample(params, generator)
    two_streams = backward_scalegmn(spec)
    if activation == "tanh":
        widths = StreamWidths((1, 1, 1), (1, 1, 1))
        two_streams = type(two_streams)(two_streams.group, widths, 3, 4, True, (4,)).double()
    random_weights(two_streams)
    graph, moved = two_streams(raw_streams(params, x, target)), two_streams(raw_streams(element.act(params), x, target))
    back = element.contravariant()
    pairs = [
        *zip(
            element.act_on_nodes(graph.nodes.covariant.split(spec.layout, 1), spec),
            moved.nodes.covariant.split(spec.layout, 1),
            strict=True,
        ),
        *zip(
            back.act_on_nodes(graph.nodes.contravariant.split(spec.layout, 1), spec),
            moved.nodes.contravariant.split(spec.layout, 1),
            strict=True,
        ),
        *zip(
            element.act_on_edges([e.covariant for e in graph.edges], spec),
            [e.covariant for e in moved.edges],
            strict=True,
        ),
        *zip(
            back.act_on_edges([e.contravariant for e in graph.edges], spec),
            [e.contravariant for e in moved.edges],
            strict=True,
        ),
    ]
    for expected, found in pairs:
        scale = max(1.0, float(expected.abs().max()))
        assert float((expected - found).abs().max()) < 1e-9 * scale
        assert float(found.abs().max()) > 0


def test_the_published_reversed_edge_is_not_exact(random_params, generator):
    params = random_params(chain((3, 6, 5, 2), "relu"), 6)
    moved = GroupElement.sample(params, generator).act(params)
    changes = {}
    for reciprocal in (False, True):
        config = ScaleGMNConfig(
            symmetry="scale", direction="bidirectional", hidden_dim=8, num_layers=3, reciprocal=reciprocal, out_dim=4
        )
        torch.manual_seed(0)
        model = config.build(params.spec).double().eval()
        with torch.no_grad():
            changes[reciprocal] = relative_change(model(moved), model(params))
    assert changes[False] > 1e-3
    assert changes[True] < 1e-9
