"""The input network: what it is (`NetSpec`), a batch of its parameters (`NetParams`), and what it computes."""

from scalegmn.networks.activations import ACTIVATION_SYMMETRY, ACTIVATIONS, HETERO
from scalegmn.networks.layers import NORMS, LayerSpec
from scalegmn.networks.params import MultiArchBatch, NetParams
from scalegmn.networks.spec import CoupledChannels, NetSpec, Residual

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_SYMMETRY",
    "HETERO",
    "NORMS",
    "CoupledChannels",
    "LayerSpec",
    "MultiArchBatch",
    "NetParams",
    "NetSpec",
    "Residual",
]
