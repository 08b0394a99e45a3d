"""Models from finished runs, for `edit` and `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.spec import NetSpec
from scalegmn.train.checkpoint import load_checkpoint


def run_data(run: Path) -> dict[str, Any]:
    """What the summary of a finished run says of its data.

    Raises:
        ValueError: the folder holds no finished run.
    """
    try:
        data = json.loads((run / "summary.json").read_text())["data"]
        _ = NetSpec.from_dict(data["spec"]), int(data["architectures"])
    except (OSError, KeyError, TypeError, ValueError):
        raise ValueError(f"--checkpoint: {run} is not the folder of a finished run") from None
    return data


def load_model(config: ModelConfig, run: Path, spec: NetSpec) -> Metanetwork:
    """The model of a run, for networks of `spec`, in evaluation mode.

    Raises:
        ValueError: it was trained with another configuration, or on networks with other layers.
    """
    data = run_data(run)
    expected = NetSpec.from_dict(data["spec"])
    if data["architectures"] > 1:
        model = config.build_within(expected)
        try:
            model.check(spec)
        except ValueError as error:
            raise ValueError(f"--checkpoint: {run}: {error}") from None
    else:
        fixed, found = (
            (own.num_layers, own.layout[0], own.layout[-1], own.kernel) for own in (expected, spec)
        )  # hidden layers may be wider
        if found != fixed:
            raise ValueError(f"--checkpoint: {run} was trained on {expected}, and cannot read {spec}")
        model = config.build(spec)
    load_checkpoint(run / "checkpoints" / "best.safetensors", model)
    return model.eval()
