"""The metanetworks, one file each."""

from scalegmn.models.base import ModelConfig
from scalegmn.models.dwsnet import DWSNetConfig
from scalegmn.models.flat_mlp import FlatMLPConfig
from scalegmn.models.nfn import NFNConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.probegen import ProbeGenConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig

_CONFIGS = (
    ScaleGMNConfig,
    NGGNNConfig,
    NGTConfig,
    DWSNetConfig,
    NFNConfig,
    ProbeGenConfig,
    StatNNConfig,
    FlatMLPConfig,
)

MODELS: dict[str, type[ModelConfig]] = {model.name: model for model in _CONFIGS}
"""Name -> configuration; each has a section of this name in a run's configuration."""

__all__ = [
    "MODELS",
    "DWSNetConfig",
    "FlatMLPConfig",
    "NFNConfig",
    "NGGNNConfig",
    "NGTConfig",
    "ProbeGenConfig",
    "ScaleGMNConfig",
    "StatNNConfig",
]
