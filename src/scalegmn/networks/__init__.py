"""The input network: what it is (`NetSpec`), a batch of its parameters (`NetParams`), and what it computes."""

from scalegmn.networks.activations import ACTIVATIONS, BUILT_IN, HETERO, Activation, not_built_in, register_activation
from scalegmn.networks.coupling import CoupledChannels, Residual
from scalegmn.networks.layers import NORMS, LayerSpec
from scalegmn.networks.linear_products import linear_products
from scalegmn.networks.multi_arch import MultiArchBatch
from scalegmn.networks.params import NetParams
from scalegmn.networks.scalar_groups import ScalarGroup
from scalegmn.networks.spec import NetSpec

__all__ = [
    "ACTIVATIONS",
    "BUILT_IN",
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
    "linear_products",
    "not_built_in",
    "register_activation",
]
