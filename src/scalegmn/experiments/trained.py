"""Models that have been trained, from the folder of a finished run or from a bundle (`scalegmn export`)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalegmn.experiments.config import Config, config_file, read_config_file
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.visibility import PartlySeen
from scalegmn.networks import NetParams, NetSpec
from scalegmn.reporting.words import counted
from scalegmn.symmetry.canonicalize import TO_CANONICAL
from scalegmn.tasks import TASKS, ZooTask
from scalegmn.training.checkpoint import load_checkpoint
from scalegmn.zoos.zoo_format import is_zoo

BUNDLE = "scalegmn bundle 1"
"""The `format` of a bundle's `config.json`, which holds checksums of itself and of `model.safetensors`."""


def read_summary(run: Path) -> dict[str, Any]:
    """The summary of a finished run, which a bundle holds too.

    Raises:
        ValueError: the folder is neither, or the bundle is damaged.
    """
    try:
        if not (run / "config.json").is_file():
            summary = json.loads((run / "summary.json").read_text())
        else:
            content = json.loads((run / "config.json").read_text())
            checksums = [content["sha256"], content["model_sha256"]]
            if content["format"] != BUNDLE:
                raise ValueError(f"format {content['format']!r}, expected {BUNDLE!r}")
            if checksums != [description_sha256(content), hashlib.sha256(weights_file(run).read_bytes()).hexdigest()]:
                raise ValueError("damaged: its checksums differ; copy it again")
            summary = content["summary"]
        data = summary["data"]
        _ = NetSpec.from_dict(data["spec"]), int(data["architectures"])
        TASKS.require(data["task"])
        if not set(data["canonical"]) <= set(TO_CANONICAL):
            raise ValueError(f"canonical: found {data['canonical']!r}, expected some of {', '.join(TO_CANONICAL)}")
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        if isinstance(error, FileNotFoundError):
            reason = f"{error.filename}: no such file"
        elif isinstance(error, NotADirectoryError):
            reason = "it is a file"
        runs = sorted(str(summary.parent) for summary in run.glob("*/summary.json"))
        if is_zoo(run):
            reason = "it is a zoo; train a model on it first"
        elif runs:
            reason = f"it holds {counted(len(runs), 'run')}; choose one, such as {runs[0]}"
        elif (run / "config.yml").is_file() and isinstance(error, FileNotFoundError):
            reason = f"its training is not finished; go on with `scalegmn train TASK --resume {run}`"
        raise ValueError(f"{run} is not the folder of a finished run, nor a bundle ({reason})") from None
    return summary


def description_sha256(content: Mapping[str, Any]) -> str:
    """The checksum of all else in a bundle's config.json."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def weights_file(run: Path) -> Path:
    """The parameters of a bundle's model, or those of a run's best epoch."""
    return run / ("model.safetensors" if (run / "config.json").is_file() else "checkpoints/best.safetensors")


def load_model(config: ModelConfig, run: Path, spec: NetSpec) -> Metanetwork:
    """The model of a run or bundle, for networks of `spec`, in evaluation mode; one for all of several architectures.

    Raises:
        ValueError: it was trained with another configuration, or on networks with other layers.
    """
    data = read_summary(run)["data"]
    expected = NetSpec.from_dict(data["spec"])
    trained, given = (
        (each.num_layers, each.layout[0], each.layout[-1], each.kernel) for each in (expected, spec)
    )  # hidden layers may be wider
    if data["architectures"] == 1 and given != trained:
        raise ValueError(f"{run} was trained on {expected}, and cannot read {spec}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartlySeen)  # training has warned, and the model card says it
        model = config.build_within(expected) if data["architectures"] > 1 else config.build(spec)
    load_checkpoint(weights_file(run), model)
    return model.eval()


class TrainedModel:
    """A trained metanetwork as it is used: `model(params)` gives the answer of its task (`ZooTask.answer`) about B
    networks as they are stored.

    - classification: the probabilities of the classes, [B, num_classes];
    - generalization: the predicted test accuracies, [B];
    - editing: the edited networks, `NetParams`; of a model with k heads B k, those of one network side by side
      (`NetParams.of_heads`), whose mean image is the edit.

    Args:
        run: folder of a finished run, or bundle.
        config: its configuration.
        summary: its summary.

    Attributes:
        task: the name of its task.
        task_class: the task, one of `TASKS`.
        num_architectures: how many the networks have that it was trained on.
        spec: what covers them (`NetSpec.envelope`). It reads networks within, or, of one architecture, also with wider
            hidden layers.
        canonical: the symmetries that are removed from networks before the metanetwork reads them.
    """

    def __init__(self, run: Path, config: Config, summary: Mapping[str, Any]) -> None:
        self.run, self.config, self.summary = run, config, summary
        self.task: str = summary["data"]["task"]
        self.task_class: type[ZooTask] = TASKS[self.task]
        self.num_architectures: int = summary["data"]["architectures"]
        self.spec = NetSpec.from_dict(summary["data"]["spec"])
        self.canonical = tuple(summary["data"]["canonical"])
        self._load = lru_cache(8)(lambda spec: load_model(config.model_config, run, spec))
        self.metanetwork(self.spec)

    def metanetwork(self, spec: NetSpec) -> Metanetwork:
        """The bare model for networks of `spec`, in evaluation mode: it reads canonical networks, and gives logits or
        changes of parameters.

        Raises:
            ValueError: it cannot read such networks.
        """
        if self.num_architectures == 1:
            return self._load(spec)
        model = self._load(self.spec)
        try:
            model.validate_spec(spec)
        except ValueError as error:
            raise ValueError(f"{self.run}: {error}") from None
        return model

    @torch.no_grad()
    def __call__(self, params: NetParams) -> Tensor | NetParams:
        """See the class; in the model's precision, on its device.

        Raises:
            ValueError: it cannot read such networks.
        """
        model = self.metanetwork(params.spec)
        params = params.to(next(model.parameters()))
        return self.task_class.answer(model, params, self.canonical)


def load(run: str | Path) -> TrainedModel:
    """The model of a finished run or of a bundle; see `TrainedModel`.

    Raises:
        ValueError: the folder is neither, or damaged.
    """
    run = Path(run)
    summary = read_summary(run)
    return TrainedModel(run, read_config_file(config_file(run)), summary)
