"""The metanetworks, one file each."""

from scalegmn.models.base import ModelConfig
from scalegmn.models.flat_mlp import FlatMLPConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.scalegmn import ScaleGMNConfig

MODELS: dict[str, type[ModelConfig]] = {model.name: model for model in (ScaleGMNConfig, NGGNNConfig, FlatMLPConfig)}
"""Name -> configuration; each has a section of this name in a run's configuration."""

__all__ = ["MODELS", "FlatMLPConfig", "NGGNNConfig", "ScaleGMNConfig"]
