"""`scalegmn train TASK --conf FILE`: train and test a metanetwork."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalegmn.cli.dispatch import HELP
from scalegmn.configuration.names import nearest
from scalegmn.experiments.config import ScriptConfig, read_config, with_run_dir
from scalegmn.experiments.edited_zoo import EditConfig, export_zoo
from scalegmn.experiments.run import train
from scalegmn.experiments.trained import load_model
from scalegmn.models.base import Metanetwork
from scalegmn.tasks.classification import Classification
from scalegmn.tasks.editing import Editing, table
from scalegmn.tasks.generalization import Generalization
from scalegmn.zoos.loader import open_data


def classification(config: ScriptConfig) -> Classification:
    """The task of predicting a network's class."""
    return Classification(config.data, config.batch_size, config.model_config, config.debug)


def generalization(config: ScriptConfig) -> Generalization:
    """The task of predicting a network's test accuracy."""
    config.model_config.check_output("vector", "predicting generalisation", out_dim=1)
    return Generalization(config.data, config.batch_size, config.train_args.loss, config.debug)


def editing(config: EditConfig) -> Editing:
    """The task of editing the image that a network stores."""
    return Editing(config.data, config.batch_size, config.debug)


def edited(config: EditConfig, task: Editing, model: Metanetwork, summary: dict[str, Any]) -> None:
    """Prints the errors beside those of trivial answers, and writes the edited zoo if one is wanted."""
    print(table(summary))
    if config.export_edited is not None:
        export_zoo(config, model, task.zoo)


@dataclass(frozen=True)
class TrainedTask:
    """A task as the command trains it.

    Attributes:
        description: what it is, for `--help`.
        config_class: its configuration.
        build: the task of a configuration.
        finished: called after each run.
    """

    description: str
    config_class: type[Any]
    build: Callable[[Any], Any]
    finished: Callable[..., None] | None = None


TASKS = {
    "classification": TrainedTask("the class of a network's content", ScriptConfig, classification),
    "editing": TrainedTask("edits of the images that INRs store", EditConfig, editing, edited),
    "generalization": TrainedTask("the test accuracy of a CNN", ScriptConfig, generalization),
}
"""Name -> task."""


def run(words: Sequence[str]) -> None:
    """Trains on the task that the first word names."""
    if words and words[0] in HELP:
        print("usage: scalegmn train TASK --conf FILE ...\n\nTrain and test a metanetwork.\n")
        print("\n".join(f"  {name:<{max(map(len, TASKS))}}  {task.description}" for name, task in TASKS.items()))
        print("\nscalegmn train TASK --help explains all settings.")
        sys.exit(0)
    if not words or words[0].startswith("-") or words[0] not in TASKS:
        known = ", ".join(TASKS)
        advice = f"unknown task {words[0]}{nearest(words[0], TASKS) or f', expected one of {known}'}" if words else ""
        raise ValueError(f"scalegmn train: {advice or f'a task is missing, expected one of {known}'}")
    name, *words = words
    task = TASKS[name]
    config = with_run_dir(read_config(words, task.config_class, f"scalegmn train {name}"), words)
    if name == "editing" and config.checkpoint is not None:
        zoo = open_data(config.data)
        export_zoo(config, load_model(config.model_config, Path(config.checkpoint), zoo.spec), zoo)
    else:
        train(config, task.build, task.finished)
