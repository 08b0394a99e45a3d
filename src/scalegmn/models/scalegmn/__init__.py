"""ScaleGMN (Kalogeropoulos et al., NeurIPS 2024) and its permutation-only relative GMN."""

from scalegmn.models.scalegmn.config import EquivariantNetConfig, ScaleGMNConfig
from scalegmn.models.scalegmn.model import ScaleGMN

__all__ = ["EquivariantNetConfig", "ScaleGMN", "ScaleGMNConfig"]
