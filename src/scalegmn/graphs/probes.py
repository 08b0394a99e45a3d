"""What input networks compute at given points, neuron by neuron."""

from __future__ import annotations

from torch import Tensor

from scalegmn.networks import NetParams
from scalegmn.networks.evaluate import activations
from scalegmn.networks.siren import OUTPUT_OFFSET


def probe_features(params: NetParams, points: Tensor) -> list[Tensor]:
    """The activations of each neuron of B INRs at Q points, per node layer 0..L: [B, n_l, Q] (Neural Graphs, sec. 4).

    Input neurons have the points' coordinates, output neurons pixel values (outputs + 0.5).

    Args:
        params: B networks of linear layers.
        points: [Q, n_0].
    """
    of_layers = [x.transpose(1, 2) for x in activations(params, points)]
    return [points.mT.expand(len(params), -1, -1), *of_layers[:-1], of_layers[-1] + OUTPUT_OFFSET]
