import torch

from scalegmn.graphs.probes import probe_features
from scalegmn.networks import NetParams, NetSpec


def test_activations_by_hand():
    """sin(2 (3 u + 1)), then 5 times that - 1, + 0.5: of one network of one neuron per layer, at two points."""
    weights = (torch.tensor([[[3.0]]]), torch.tensor([[[5.0]]]))
    biases = (torch.tensor([[1.0]]), torch.tensor([[-1.0]]))
    points = torch.tensor([[0.25], [-0.5]])
    inputs, hidden, output = probe_features(NetParams(NetSpec.mlp([1, 1, 1], "sine", 2.0), weights, biases), points)
    expected = torch.sin(2 * (3 * points.T + 1))
    torch.testing.assert_close(inputs, points.T[None])
    torch.testing.assert_close(hidden, expected[None])
    torch.testing.assert_close(output, (5 * expected - 0.5)[None])
