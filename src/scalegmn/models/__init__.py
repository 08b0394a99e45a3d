"""The metanetworks, one file each."""

from scalegmn.models.scalegmn import ScaleGMNConfig

__all__ = ["ScaleGMNConfig"]
