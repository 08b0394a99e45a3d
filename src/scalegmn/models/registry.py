"""The metanetworks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scalegmn.registry import Registry

if TYPE_CHECKING:
    from scalegmn.models.base import ModelConfig

METANETWORKS: Registry[type[ModelConfig]] = Registry("model")
"""Name -> configuration. Each model's file registers its configuration; a run's configuration has a section
`<name>_args` for each."""
