"""The input network: what it is (`NetSpec`), a batch of its parameters (`NetParams`), and what it computes."""

from scalegmn.networks.activations import ACTIVATIONS, HETERO, Activation, register_activation
from scalegmn.networks.layers import NORMS, LayerSpec
from scalegmn.networks.params import MultiArchBatch, NetParams
from scalegmn.networks.scalar_groups import ScalarGroup
from scalegmn.networks.spec import CoupledChannels, NetSpec, Residual

__all__ = [
    "ACTIVATIONS",
    "HETERO",
    "NORMS",
    "Activation",
    "CoupledChannels",
    "LayerSpec",
    "MultiArchBatch",
    "NetParams",
    "NetSpec",
    "Residual",
    "ScalarGroup",
    "register_activation",
]
