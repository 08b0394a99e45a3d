"""ScaleGMN (Kalogeropoulos et al., NeurIPS 2024) and its permutation-only relative GMN."""

from scalegmn.models.scalegmn.config import BranchConfig, EquivariantNetConfig, ScaleGMNConfig
from scalegmn.models.scalegmn.model import ScaleGMN

__all__ = ["BranchConfig", "EquivariantNetConfig", "ScaleGMN", "ScaleGMNConfig"]
