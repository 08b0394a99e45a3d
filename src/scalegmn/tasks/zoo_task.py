"""The base class of tasks on the networks of a zoo."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.networks import MultiArchBatch, NetParams, NetSpec
from scalegmn.reporting.rows import write_csv
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.tasks.registry import RunSettings
from scalegmn.zoos.loader import DataConfig, augmented, load_splits, reading, symmetries_to_remove

DEBUG_NETWORKS = 16
"""Networks per split in a debug run."""


class ZooTask(ABC):
    """A task: the networks of a zoo with one of its columns as labels, in batches.

    A task of one's own derives from this class, sets the class attributes, and defines `from_settings`, `loss` and
    `evaluate`; `register_task` makes it usable by name. An instance has opened its zoo. The class methods need none:
    they say what the task needs of a model, and what a trained model answers.

    Args:
        data: the zoo, and how its networks are read.
        column: the zoo's column that holds the labels.
        batch_size: networks per batch.
        debug: use only a few networks per split.

    Raises:
        ValueError: the zoo cannot be read.
    """

    name: ClassVar[str]
    """`scalegmn train NAME`, and `task` in a run's summary."""

    description: ClassVar[str]
    """What it is, in one line, for `--help`."""

    answers: ClassVar[str]
    """What a trained model answers, in a sentence of its model card; `{data.KEY}` stands for a setting."""

    limits: ClassVar[Sequence[str]] = ()
    """What users of a trained model must know, sentences of its model card."""

    options: ClassVar[type | None] = None
    """A frozen dataclass of the task's own options, all with defaults: the section `<name>_args` of configurations."""

    output: ClassVar[Literal["vector", "parameters"]] = "vector"
    """The output that a model must have: a vector per network, or changes of parameters, which give edited networks."""

    out_dim: ClassVar[int | None] = None
    """The size of a vector; None: the task accepts several."""

    monitor: ClassVar[str]
    """The metric of the validation split that selects the model."""

    maximize: ClassVar[bool]
    """Whether larger is better."""

    def __init__(self, data: DataConfig, column: str, batch_size: int, debug: bool) -> None:
        self.zoo, self.splits = load_splits(data, column, DEBUG_NETWORKS if debug else None)
        self.data, self.batch_size = data, batch_size
        self.steps_per_epoch = math.ceil(len(self.splits["train"]) / batch_size)

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: RunSettings) -> ZooTask:
        """The task with the settings of a run.

        Raises:
            ValueError: the settings, the model or the zoo do not fit the task.
        """

    @classmethod
    def options_of(cls, settings: RunSettings) -> Any:
        """The task's own options in the settings of a run, an instance of `options`."""
        if cls.options is None:
            raise TypeError(f"{cls.__name__} has no options")
        return settings.task_args.get(cls.name) or cls.options()

    @classmethod
    def check_model(cls, model: ModelConfig) -> None:
        """Raises ValueError unless the model has the output that the task needs."""
        model.check_output(cls.output, cls.name, out_dim=cls.out_dim)

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Any, target: Tensor) -> Tensor:
        """The mean loss of a batch's networks, a scalar.

        Args:
            model: the metanetwork.
            inputs: B networks, `NetParams`, or `MultiArchBatch` for several architectures.
            target: [B, ...], what `target` returned.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, split: str, device: torch.device, figures: Path | None = None
    ) -> dict[str, float]:
        """Metrics over a whole split, `loss` and `monitor` among them.

        Args:
            model: the metanetwork.
            split: `train`, `val` or `test`.
            device: where the model is.
            figures: a folder to draw figures into; None: draw none.
        """

    def target(self, labels: Tensor) -> Tensor:
        """The targets [B, ...] of a batch's labels [B], on their device."""
        return labels

    @classmethod
    @torch.no_grad()
    def answer(cls, model: nn.Module, params: NetParams, removed: Sequence[str]) -> Tensor | NetParams:
        """What a trained model answers about networks as they are stored.

        Args:
            model: the metanetwork, in evaluation mode.
            params: B networks.
            removed: the symmetries that canonical networks, which the model reads, have removed.

        Returns:
            [B, ...]; or, where `output` is `parameters`, the edited networks, B k of models with k heads.
        """
        return model(canonicalize(params, removed))

    @classmethod
    def answer_of(cls, answers: Tensor, row: int, data: Mapping[str, Any]) -> dict[str, Any]:
        """The answer about one network, in plain types, by the names that `scalegmn predict` prints.

        Args:
            answers: what `answer` returned, [B, ...].
            row: which of the B networks.
            data: `data` of the run's summary: what `identity` returned when the model was trained.
        """
        return {cls.name: answers[row].tolist()}

    @classmethod
    def warnings(cls, params: NetParams, data: Mapping[str, Any]) -> list[list[str]]:
        """In which respects each of B networks differs from those that a model was trained on, in words.

        Args:
            params: B networks of an architecture that the model reads.
            data: `data` of the run's summary.
        """
        return [[] for _ in range(len(params))]

    @classmethod
    def result_text(cls, summary: Mapping[str, Any]) -> str | None:
        """What to print of a finished run's summary besides its metrics; None: nothing."""
        return None

    def announce(self) -> None:
        """Prints what is read, and how."""
        sizes = ", ".join(f"{len(nets):,} {name}" for name, nets in self.splits.items())
        num_architectures, envelope = len(self.architectures), NetSpec.envelope(self.architectures)
        text = str(envelope) if num_architectures == 1 else f"{num_architectures:,} architectures within {envelope}"
        print(f"{self.zoo.path}: {sizes} networks, {text}, {reading(self.data, self.zoo)}")

    @property
    def spec(self) -> NetSpec:
        """The architecture of the zoo's networks; raises ValueError when there are several."""
        return self.zoo.spec

    @property
    def architectures(self) -> dict[NetSpec, int]:
        """The zoo's architectures, and how many training networks have them."""
        return self.zoo.architectures

    def prepare(self, model: Metanetwork) -> None:
        """Fits the model's input normalisation, if it has one, to the training split."""
        model.fit_normalization(part for params, _ in self.splits["train"].batches() for part in params.parts)

    @property
    def data_id(self) -> str:
        """The zoo's checksum."""
        return self.zoo.sha256

    def shuffle(self, generator: torch.Generator) -> Sequence[Tensor]:
        """One epoch: the rows of the training split in each batch, [B]; the last batch may be smaller."""
        nets = self.splits["train"]
        return [nets.grouped(rows) for rows in torch.randperm(len(nets), generator=generator).split(self.batch_size)]

    def train_batches(
        self, batches: Sequence[Tensor], generator: torch.Generator, device: torch.device
    ) -> Iterator[tuple[NetParams | MultiArchBatch, Tensor]]:
        """Training batches (networks, targets) of these rows on a device, augmented."""
        for params, labels in self.splits["train"].batches(batches, device):
            yield augmented(self.data, params, self.target(labels), generator)

    @torch.no_grad()
    def per_network(
        self,
        model: nn.Module,
        split: str,
        device: torch.device,
        measure: Callable[[NetParams | MultiArchBatch, Tensor], Tensor],
    ) -> Tensor:
        """A measurement of each network of a split, [M, ...] on the CPU, with the model in evaluation mode.

        Processes that train together share the batches and get the same result, that of a single process.

        Args:
            model: the metanetwork.
            split: `train`, `val` or `test`.
            device: where the model is.
            measure: networks and labels of a batch -> [B, ...].
        """
        model.eval()
        batches, rank, world_size = torch.arange(len(self.splits[split])).split(self.batch_size), 0, 1
        is_distributed = torch.distributed.is_initialized()
        if is_distributed:
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        first, last = (len(batches) * end // world_size for end in (rank, rank + 1))
        measured = [measure(*batch).cpu() for batch in self.splits[split].batches(batches[first:last], device)]
        if not is_distributed:
            return torch.cat(measured)
        of_all: list[list[Tensor]] = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(of_all, measured)
        return torch.cat([tensor for of_rank in of_all for tensor in of_rank])

    def write_predictions(self, path: Path, split: str, **columns: Tensor) -> None:
        """Writes a line for each network of a split: its number in the zoo, its label as `true`, these columns [M]."""
        nets = self.splits[split]
        values = {"network": nets.rows, "true": nets.labels, **columns}
        lists = zip(*(column.tolist() for column in values.values()), strict=True)
        write_csv(path, [dict(zip(values, row, strict=True)) for row in lists])

    def state(self) -> dict[str, Tensor]:
        """Nothing is carried from step to step."""
        return {}

    def set_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027  # tasks that carry something have their own
        """Nothing is carried from step to step."""

    def identity(self) -> dict[str, Any]:
        """The data of a run, for its summary: the task, the zoo, and how it was read. `canonical` lists the symmetries
        that its networks have removed; `spec` covers all its architectures."""
        return {
            "task": self.name,
            "zoo": str(self.zoo.path),
            "sha256": self.zoo.sha256,
            "read": reading(self.data, self.zoo),
            "canonical": [*self.zoo.canonical, *symmetries_to_remove(self.data, self.zoo)],
            "networks": {name: len(nets) for name, nets in self.splits.items()},
            "architectures": len(self.architectures),
            "spec": NetSpec.envelope(self.architectures).to_dict(),
        }
