"""What changes in a run while it trains, as named tensors and plain values, and back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from scalegmn.training.flat import FlatParameters
from scalegmn.training.launch import precision_of
from scalegmn.training.optimization import Schedule
from scalegmn.training.random_state import random_state, set_random_state
from scalegmn.training.task import Task

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass
class Progress:
    """Position of a run, in plain types."""

    epoch: int = 0
    """Number of finished epochs."""

    step: int = 0
    """Number of finished steps of the current epoch. The sums below are over these steps."""

    count: int = 0
    """Number of networks."""

    loss: float = 0.0
    """Sum of the networks' losses."""

    lr: float = 0.0
    """Learning rate of the last step."""

    grad_norm: float = 0.0
    """Sum of the steps' gradient norms, before clipping."""

    grad_norm_max: float = 0.0
    """Largest gradient norm."""

    train_seconds: float = 0.0
    """Seconds of training alone."""

    wait_seconds: float = 0.0
    """Seconds of waiting for batches."""

    seconds: float = 0.0
    """Seconds of the whole run, without the time between stops and resumptions."""

    processor_seconds: float = 0.0
    """Processor time of all threads of this process in the whole run."""

    best: dict[str, float] = field(default_factory=lambda: {"epoch": -1})
    """Epoch and validation metrics of the best epoch."""


class RunState:
    """Everything that a run needs to go on as if it had never stopped.

    Args:
        fabric: the processes.
        model: the model that is trained.
        average: the moving average of its parameters; None: there is none.
        parameters: its parameters, as one tensor.
        optimizer: its optimiser.
        schedule: the learning rate.
        seed: of the generator that draws the batches, equal in all processes.
        task: names the data, and may carry tensors from step to step.

    Attributes:
        progress: position of the run.
        best: parameters of the best epoch, on the CPU.
        batch_generator: draws the batches.
        epoch_start: state of `batch_generator` at the start of the current epoch.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        average: AveragedModel | None,
        parameters: FlatParameters,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        seed: int,
        task: Task,
    ) -> None:
        self.fabric, self.model, self.average = fabric, model, average
        self.parameters, self.optimizer, self.schedule, self.task = parameters, optimizer, schedule, task
        self.progress = Progress()
        self.best = self.evaluated_parameters()
        self.batch_generator = torch.Generator().manual_seed(seed)
        self.epoch_start = self.batch_generator.get_state()
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self._processor_started, self._processor_before = time.process_time(), 0.0

    @property
    def evaluated(self) -> nn.Module:
        """The model that is validated and kept: the moving average if there is one."""
        return self.model if self.average is None else self.average.module

    def evaluated_parameters(self) -> dict[str, Tensor]:
        """A copy of the state dict of `evaluated`, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.evaluated.state_dict().items()}

    def seconds(self) -> float:
        """Seconds of the run so far."""
        return self._seconds_before + time.perf_counter() - self._started

    def processor_seconds(self) -> float:
        """Processor time of the run so far, in this process."""
        return self._processor_before + time.process_time() - self._processor_started

    def random_states(self) -> dict[str, Tensor]:
        """States of all random number generators of this process."""
        return {"batches": self.batch_generator.get_state(), **random_state(self.fabric.device)}

    def capture(self, random_states: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors and plain values of the run.

        Args:
            random_states: of this process's generators; those of all processes are gathered, as is what the task
                carries.
        """
        gathered = [(random_states, self.task.state())]
        if self.fabric.world_size > 1:
            of_process = gathered[0]
            gathered = gathered * self.fabric.world_size
            torch.distributed.all_gather_object(gathered, of_process)
        self.progress.seconds, self.progress.processor_seconds = self.seconds(), self.processor_seconds()
        groups: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "best": self.best,
            **{f"optimizer.{index}": state for index, state in self._moments().items()},
            **{f"random.{rank}": state for rank, (state, _) in enumerate(gathered)},
            **{f"task.{rank}": state for rank, (_, state) in enumerate(gathered)},
            "shuffle": {"epoch_start": self.epoch_start},
        }
        tensors = {f"{group}.{name}": tensor for group, state in groups.items() for name, tensor in state.items()}
        metadata = {
            "progress": asdict(self.progress),
            "schedule": self.schedule.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "numbers": precision_of(self.fabric),
            "processes": self.fabric.world_size,
            "data_id": self.task.data_id,
        }
        return tensors, metadata

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        """The optimiser's state of each parameter, by number; nothing before the first step."""
        state: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        return self.parameters.split_state(state[0]) if state else {}

    def check(self, metadata: Mapping[str, Any], name: str) -> None:
        """Checks that this run can go on from a state with this metadata.

        Args:
            metadata: of the state.
            name: of its folder, for errors.

        Raises:
            ValueError: the state is of other data or of another number of processes.
        """
        if metadata["data_id"] != self.task.data_id:
            raise ValueError(f"{name}: was trained on other data (found {self.task.data_id}); start a new run")
        if metadata["processes"] != self.fabric.world_size:
            expected = f"expected {metadata['processes']}, which have trained it so far"
            raise ValueError(f"{name}: found {self.fabric.world_size} processes, {expected}")

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Sets what `capture` returned.

        Raises:
            ValueError: the state is of another model or of another version of this package.
        """
        try:
            self.progress = Progress(**metadata["progress"])
            self.model.load_state_dict(_group(tensors, "model"))
            self.schedule.load_state_dict(metadata["schedule"])
        except (KeyError, TypeError, RuntimeError):
            raise ValueError("--resume: its state is of another model or version; start a new run") from None
        self._seconds_before, self._processor_before = self.progress.seconds, self.progress.processor_seconds
        if self.average is not None:
            self.average.load_state_dict(_group(tensors, "average"))
        self.best = _group(tensors, "best")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _group(tensors, "optimizer").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        state = {0: self.parameters.join_states(moments)} if moments else {}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.fabric.strategy.precision.load_state_dict(metadata["precision"])
        numbers = precision_of(self.fabric)
        if metadata.get("numbers", numbers) != numbers:  # states of earlier versions do not say it
            print(f"note: goes on in {numbers}; so far it was {metadata['numbers']} (train_args.precision)")
        random_states = _group(tensors, f"random.{self.fabric.global_rank}")
        self.batch_generator.set_state(random_states["batches"])
        set_random_state(random_states, self.fabric.device)
        self.epoch_start = tensors["shuffle.epoch_start"]
        self.task.set_state(_group(tensors, f"task.{self.fabric.global_rank}"))


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors named `<group>.<name>`, by name."""
    return {name.removeprefix(f"{group}."): t for name, t in tensors.items() if name.startswith(f"{group}.")}
