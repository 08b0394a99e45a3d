"""The metanetworks, one file each."""

from scalegmn.models.base import ModelConfig
from scalegmn.models.flat_mlp import FlatMLPConfig
from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.scalegmn import ScaleGMNConfig

MODELS: dict[str, type[ModelConfig]] = {
    model.name: model for model in (ScaleGMNConfig, NGGNNConfig, NGTConfig, FlatMLPConfig)
}
"""Name -> configuration; each has a section of this name in a run's configuration."""

__all__ = ["MODELS", "FlatMLPConfig", "NGGNNConfig", "NGTConfig", "ScaleGMNConfig"]
