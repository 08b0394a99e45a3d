"""`scalegmn train TASK --conf FILE`: train and test a metanetwork."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalegmn.cli.dispatch import HELP
from scalegmn.configuration.names import nearest
from scalegmn.experiments.config import ScriptConfig, import_modules, read_config, with_run_dir
from scalegmn.experiments.edited_zoo import EditConfig, export_zoo
from scalegmn.experiments.optimizer_run import read_optimizer_config, train_optimizer
from scalegmn.experiments.run import train
from scalegmn.experiments.trained import load_model
from scalegmn.models.base import Metanetwork
from scalegmn.tasks import TASKS, ZooTask
from scalegmn.zoos.loader import open_data

OPTIMIZER = "optimizer"
"""The task that trains no metanetwork on a zoo, but an optimiser on networks under training."""


def _tasks() -> dict[str, str]:
    """What can be trained, and what it is."""
    return {**{name: task.description for name, task in TASKS.items()}, OPTIMIZER: "learn to train networks"}


def finished(config: ScriptConfig, task: ZooTask, model: Metanetwork, summary: dict[str, Any]) -> None:
    """Prints what the task has to add to a finished run, and writes the edited zoo if one is wanted."""
    text = task.result_text(summary)
    if text is not None:
        print(text)
    if isinstance(config, EditConfig) and config.export_edited is not None:
        export_zoo(config, type(task), model, task.zoo)


def run(words: Sequence[str]) -> None:
    """Trains on the task that the first word names."""
    if words and words[0] in HELP:
        print("usage: scalegmn train TASK --conf FILE ...\n\nTrain and test a metanetwork.\n")
        width = max(map(len, _tasks()))
        print("\n".join(f"  {name:<{width}}  {description}" for name, description in _tasks().items()))
        print("\nscalegmn train TASK --help explains all settings.")
        sys.exit(0)
    if words and words[0] == OPTIMIZER:
        train_optimizer(with_run_dir(read_optimizer_config(words[1:]), words[1:]))
        return
    if words and words[0] not in TASKS and not words[0].startswith("-"):
        import_modules(words[1:])  # one of which may register it
    if not words or words[0] not in TASKS:
        known = ", ".join(_tasks())
        advice = (
            f"unknown task {words[0]}{nearest(words[0], _tasks()) or f', expected one of {known}'}" if words else ""
        )
        raise ValueError(f"scalegmn train: {advice or f'a task is missing, expected one of {known}'}")
    name, *words = words
    task = TASKS[name]
    config_class = EditConfig if task.output == "parameters" else ScriptConfig
    config = with_run_dir(read_config(words, config_class, f"scalegmn train {name}"), words)
    if isinstance(config, EditConfig) and config.checkpoint is not None:
        task.check_model(config.model_config)
        zoo = open_data(config.data)
        export_zoo(config, task, load_model(config.model_config, Path(config.checkpoint), zoo.spec), zoo)
    else:
        train(config, task.from_settings, finished)
