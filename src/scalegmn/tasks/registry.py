"""The tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from scalegmn.models.base import ModelConfig
from scalegmn.registry import Registry
from scalegmn.zoos.loader import DataConfig

if TYPE_CHECKING:
    from scalegmn.tasks.zoo_task import ZooTask

TASKS: Registry[type[ZooTask]] = Registry("task")
"""Name -> class. `scalegmn train NAME` trains a model on the task; a run's summary names it."""

TaskClass = TypeVar("TaskClass", bound="type[ZooTask]")


def register_task(task: TaskClass) -> TaskClass:
    """Class decorator: makes a task usable everywhere by its `name`.

    Raises:
        ValueError: another task has this name.
    """
    TASKS.register(task.name, task)
    return task


class _TrainSettings(Protocol):
    """The settings of training that a task reads."""

    @property
    def loss(self) -> str:
        """Predicting generalisation: `MSE` or `BCE`."""
        ...


class RunSettings(Protocol):
    """The settings of a run that a task reads (`scalegmn.experiments.config.Config` has them)."""

    @property
    def data(self) -> DataConfig:
        """The networks to learn from."""
        ...

    @property
    def model_config(self) -> ModelConfig:
        """The metanetwork."""
        ...

    @property
    def train_args(self) -> _TrainSettings:
        """How it is trained."""
        ...

    @property
    def task_args(self) -> Mapping[str, Any]:
        """Task -> its options, an instance of the task's `options`; a task that is missing has its defaults."""
        ...

    @property
    def batch_size(self) -> int:
        """Networks per batch."""
        ...

    @property
    def debug(self) -> bool:
        """Whether only a few networks per split are used."""
        ...
