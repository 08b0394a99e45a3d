"""The metanetworks, one file or folder each."""

# ScaleGMN is registered first, so that lists of models start with it.
from scalegmn.models.scalegmn import ScaleGMNConfig

# isort: split
from scalegmn.models.dng import DNGConfig
from scalegmn.models.dwsnet import DWSNetConfig
from scalegmn.models.flat_mlp import FlatMLPConfig
from scalegmn.models.gradmetanet import GradMetaNetConfig
from scalegmn.models.hidden_probe import HiddenProbeConfig
from scalegmn.models.inr2jls import INR2JLSConfig
from scalegmn.models.monomial_nfn import MonomialNFNConfig
from scalegmn.models.mvprobe import MVProbeConfig
from scalegmn.models.nfn import NFNConfig
from scalegmn.models.nft import NFTConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.phasor import PhasorConfig
from scalegmn.models.probegen import ProbeGenConfig
from scalegmn.models.quasi_nfn import QuasiNFNConfig
from scalegmn.models.quasi_scalegmn import QuasiScaleGMNConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.models.statnn import StatNNConfig
from scalegmn.models.unf import UNFConfig

__all__ = [
    "METANETWORKS",
    "DNGConfig",
    "DWSNetConfig",
    "FlatMLPConfig",
    "GradMetaNetConfig",
    "HiddenProbeConfig",
    "INR2JLSConfig",
    "MVProbeConfig",
    "MonomialNFNConfig",
    "NFNConfig",
    "NFTConfig",
    "NGGNNConfig",
    "NGTConfig",
    "PhasorConfig",
    "ProbeGenConfig",
    "QuasiNFNConfig",
    "QuasiScaleGMNConfig",
    "ScaleGMNConfig",
    "StatNNConfig",
    "UNFConfig",
]
