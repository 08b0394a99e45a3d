"""The training loop. It knows only the `Task` protocol."""

from __future__ import annotations

import ctypes
import math
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from scalegmn.reporting.figures import learning_curves
from scalegmn.reporting.run_folder import Run
from scalegmn.training.checkpoint import (
    random_state,
    read_state,
    set_random_state,
    split_names,
    state_files,
    write_state,
    write_tensors,
)
from scalegmn.training.config import TrainConfig
from scalegmn.training.launch import StopSignals, ending_together
from scalegmn.training.optimization import OptimizationConfig, build_optimizer
from scalegmn.training.task import Task

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SHOW_EVERY = 10
"""Steps between two changes of what the progress bar says."""


class Stopped(Exception):
    """A signal ended the run, which can go on later."""


def keep_freed_memory() -> None:
    """Tells the C library (glibc) to keep freed memory for the next step.

    By default it goes back to the system at the end of each backward pass, and every page of it must be mapped and
    cleared again: a third of the time of a step on a CPU. Blocks of 8 MB and more still go back, for they would leave
    holes that nothing fits: parts of a batch and the pieces of a large network have smaller tensors (`nn/memory.py`).
    Other C libraries are left alone.
    """
    settings = {-1: 2**31 - 1, -2: 2**24, -3: 2**23}  # trim threshold, top pad, mmap threshold
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        for name, value in settings.items():
            libc.mallopt(name, value)


def backward_in_parts(
    loss: Callable[[Any, Tensor], Tensor],
    inputs: Any,
    target: Tensor,
    at_once: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
    batch_size: int | None = None,
) -> Tensor:
    """The gradient of a batch's mean loss, part by part: memory does not grow with the batch.

    Args:
        loss: (inputs, target) -> the mean over them.
        inputs: a batch that can be sliced, or one process's share of it.
        target: [B, ...].
        at_once: networks in a part, at most.
        backward: adds the gradient of a scalar to the parameters'.
        batch_size: networks of the whole batch, over which the mean is taken; None: B.

    Returns:
        The mean loss, or the share's part of it, detached.
    """
    total = torch.zeros((), device=target.device)
    num_parts = max(1, math.ceil(len(target) / at_once))
    size = max(1, math.ceil(len(target) / num_parts))  # as even as can be, for the largest decides on memory
    for start in range(0, len(target), size):
        part = slice(start, start + size)
        share = loss(inputs[part], target[part]) * (len(target[part]) / (batch_size or len(target)))
        backward(share)
        total = total + share.detach()
    return total


def any_number(inputs: Any) -> None:
    """Tells `torch.compile` that the number of networks varies, so that it does not compile a model for each.

    Args:
        inputs: a batch, whose `tensors()` have a row per network.
    """
    for tensor in inputs.tensors():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


class InPrecision(nn.Module):
    """A model whose inside has the precision of a Fabric; its outputs are in single precision at least.

    Args:
        model: the model.
        fabric: says in which precision.
        compiled: whether `model` is.
    """

    def __init__(self, model: nn.Module, fabric: Fabric, compiled: bool = False) -> None:
        super().__init__()
        self.model, self.fabric, self.compiled = model, fabric, compiled

    def forward(self, inputs: Any) -> Any:
        """As the model's."""
        if self.compiled:
            any_number(inputs)
        with self.fabric.autocast():
            outputs = self.model(inputs)
        return self.fabric.strategy.precision.convert_output(outputs)


@dataclass
class Progress:
    """Where a run stands, in plain types."""

    epoch: int = 0
    """Epochs that are done."""

    step: int = 0
    """Steps that are done of the epoch after these; the fields below are sums over them."""

    count: int = 0
    """Networks."""

    loss: float = 0.0
    """Of each network."""

    lr: float = 0.0
    """The learning rate of the last step."""

    grad_norm: float = 0.0
    """Of each step, before clipping."""

    grad_norm_max: float = 0.0
    """The largest."""

    train_seconds: float = 0.0
    """Of training alone."""

    wait_seconds: float = 0.0
    """Of waiting for batches."""

    seconds: float = 0.0
    """Of the whole run, without the time between stops and resumptions."""

    best: dict[str, float] = field(default_factory=lambda: {"epoch": -1})
    """Epoch and validation metrics of the best epoch."""


class Trainer:
    """One run: a model that is trained, validated, kept and, in the end, tested.

    Args:
        fabric: the processes; each gets its share of every batch.
        task: what is learnt.
        model: says how much of a batch it takes at a time (`networks_at_once(device)`).
        config: how long, on what.
        optimization: how.
        run: the run folder, in the first process, which alone writes.
    """

    def __init__(
        self,
        fabric: Fabric,
        task: Task,
        model: nn.Module,
        config: TrainConfig,
        optimization: OptimizationConfig,
        run: Run | None,
    ) -> None:
        self._started = self._saved = time.perf_counter()
        self._seconds_before = 0.0
        keep_freed_memory()
        self.fabric, self.task, self.model, self.config, self.run = fabric, task, model, config, run
        self.signals = StopSignals()
        self.progress = Progress()
        self._max_norm = optimization.clip_grad_max_norm or math.inf
        task.prepare(model)
        model.to(fabric.device)
        for tensor in model.state_dict().values():  # should machines round differently
            if fabric.world_size > 1:
                torch.distributed.broadcast(tensor, 0)
        if fabric.global_rank:
            torch.manual_seed(config.seed + fabric.global_rank)  # dropout is each process's own
        self.average = None
        if optimization.ema_decay is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(optimization.ema_decay))
        num_steps = config.num_epochs * task.steps_per_epoch
        fused = config.precision != "fp16-mixed"
        optimizer, self.schedule = build_optimizer(optimization, model.parameters(), num_steps, fused)
        self.optimizer = fabric.setup_optimizers(optimizer)
        self.evaluated = model if self.average is None else self.average.module
        self.best = self._evaluated_state()
        if config.compile:
            for each in {model, self.evaluated}:
                each.compile(fullgraph=True)
        self._at_once = model.networks_at_once(fabric.device)
        called = partial(InPrecision, fabric=fabric, compiled=config.compile)
        self._called, self._called_evaluated = called(model), called(self.evaluated)
        self._generator = torch.Generator().manual_seed(config.seed)  # the same in all processes
        self._epoch_start = self._generator.get_state()

    def fit(self) -> dict[str, Any]:
        """Trains from where the run stands to its end, and tests the epoch that was best on the validation split, once.

        Every epoch appends a line to metrics.jsonl and writes `checkpoints/last.safetensors`; a better validation
        result also writes `checkpoints/best.safetensors`. At the end: figures and summary.json.

        Returns:
            The summary.

        Raises:
            Stopped: by a signal; the step was finished and the state saved.
            FloatingPointError: the loss or the gradient of a step is not finite; what reproduces it was saved.
            ValueError: the state in the run folder is damaged, or of other data, another model or another number of
                processes.
        """
        with ending_together(self.fabric):
            state = None if self.run is None else self._read_state()
        state = self.fabric.broadcast(state)
        if state is not None:
            with ending_together(self.fabric):
                self._restore(*state)
        with self.signals:
            while self.progress.epoch < self.config.num_epochs and self._since_best() < self.config.patience:
                self.train_epoch()
                self._end_epoch()
            if self.progress.epoch < self.config.num_epochs:
                print(f"no better validation {self.task.monitor} for {self.config.patience} epochs: stopped")
            return self._test()  # a signal does not stop it: little is left to do

    def train_epoch(self) -> None:
        """The steps of an epoch that are not done yet."""
        progress, fabric = self.progress, self.fabric
        self.model.train()
        batches = self._shuffled()[progress.step :]
        stream = self.task.train_batches(batches, self._generator, fabric.device)
        bar = tqdm(
            total=self.task.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch}",
            leave=False,
            disable=None if fabric.is_global_zero else True,
        )
        began = time.perf_counter()
        for rows in batches:
            random = self._random_state()
            inputs, target = next(stream)
            waited = time.perf_counter() - began
            loss, norm, stop, save = self.step(inputs, target)
            if not math.isfinite(loss) or not (math.isfinite(norm) or self._overflow()):
                raise FloatingPointError(self._keep_evidence(rows, random, loss, norm))
            self.optimizer.step()
            progress.lr = self.schedule.lr
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            progress.step += 1
            progress.count += len(target)
            progress.loss += loss * len(target)
            if math.isfinite(norm):  # else the step was skipped
                progress.grad_norm += norm
                progress.grad_norm_max = max(norm, progress.grad_norm_max)
            progress.wait_seconds += waited
            began, before = time.perf_counter(), began
            progress.train_seconds += began - before
            if progress.step % SHOW_EVERY == 1:
                rate = progress.count / progress.train_seconds
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} networks/s", refresh=False)
            bar.update()
            if stop or save:
                self.save_state()
                began = time.perf_counter()
            if stop:
                bar.close()
                raise Stopped(self._stopped())
        bar.close()

    def _stopped(self) -> str:
        """Why and where, and how to go on."""
        at = f"{self.signals.received or 'a signal'} after step {self.progress.step} of epoch {self.progress.epoch}"
        return at if self.run is None else f"{at}; go on with --resume {self.run.folder}"

    def step(self, inputs: Any, target: Tensor) -> tuple[float, float, bool, bool]:
        """The batch's gradient, clipped; loss and gradient norm of all processes, whether to stop, whether to save."""
        fabric = self.fabric
        bounds = [len(target) * rank // fabric.world_size for rank in (fabric.global_rank, fabric.global_rank + 1)]
        own = slice(*bounds)
        self.optimizer.zero_grad()
        loss = backward_in_parts(
            partial(self.task.loss, self._called),
            inputs[own],
            target[own],
            self._at_once,
            fabric.backward,
            len(target),
        )
        save = time.perf_counter() - self._saved >= 60 * self.config.checkpoint_minutes
        stop = self.signals.received is not None
        if fabric.world_size > 1:
            loss, stop, save = self._add_up(loss, stop, save)
        norm = fabric.clip_gradients(self.model, self.optimizer, max_norm=self._max_norm, error_if_nonfinite=False)
        return (*torch.stack([loss, norm]).tolist(), stop, save)

    def _add_up(self, loss: Tensor, stop: bool, save: bool) -> tuple[Tensor, bool, bool]:
        """Sums the processes' gradients and losses, in one message; stops and saves where any of them wants to.

        A parameter that no process used has no gradient, as in one process.
        """
        parameters = list(self.model.parameters())
        words = torch.tensor([stop, save, *(parameter.grad is not None for parameter in parameters)])
        gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        message = torch.cat([loss[None], words.to(loss), *gradients])
        message = self.fabric.all_reduce(message, reduce_op="sum")
        loss, words, gradients = message.split([1, len(words), len(message) - 1 - len(words)])
        stop, save, *used = (words > 0).tolist()
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, gradient, is_used in zip(parameters, gradients.split(sizes), used, strict=True):
            parameter.grad = gradient.view_as(parameter) if is_used else None
        return loss[0], stop, save

    def _overflow(self) -> bool:
        """Whether an infinite gradient only says that fp16-mixed scaled the loss too much; the step is then skipped."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        return scaler is not None and scaler.get_scale() > 1

    def _shuffled(self) -> list[Tensor]:
        """The batches' rows of this epoch; what is drawn later goes on where it stopped."""
        if self.progress.step == 0:
            self._epoch_start = self._generator.get_state()
            return list(self.task.shuffle(self._generator))
        now = self._generator.get_state()
        self._generator.set_state(self._epoch_start)
        batches = list(self.task.shuffle(self._generator))
        self._generator.set_state(now)
        return batches

    def _end_epoch(self) -> None:
        """Validates, logs, keeps."""
        progress, fabric, monitor = self.progress, self.fabric, self.task.monitor
        val = fabric.broadcast(self.task.evaluate(self._called_evaluated, "val", fabric.device))
        metadata = {"epoch": progress.epoch, **{f"val_{name}": value for name, value in val.items()}}
        better = self._value(metadata) > self._value(progress.best)
        if better:
            progress.best, self.best = metadata, self._evaluated_state()
        if self.run is not None:
            row = {
                "epoch": progress.epoch,
                "step": (progress.epoch + 1) * self.task.steps_per_epoch,
                "lr": progress.lr,
                "train_loss": progress.loss / progress.count,
                **{name: value for name, value in metadata.items() if name != "epoch"},
                "grad_norm": progress.grad_norm / progress.step,
                "grad_norm_max": progress.grad_norm_max,
                "networks_per_second": progress.count / progress.train_seconds,
                "data_wait": progress.wait_seconds / progress.train_seconds,
                "memory_gb": peak_memory(fabric.device) / 1e9,
                "seconds": self._seconds(),
            }
            self.run.log(row)
            if better:
                write_tensors(self.run.folder / "checkpoints" / "best.safetensors", self.best, metadata)
            write_tensors(self.run.folder / "checkpoints" / "last.safetensors", self._evaluated_state(), metadata)
        self.schedule.end_epoch(val[monitor] if self.task.maximize else -val[monitor])
        self.progress = Progress(epoch=progress.epoch + 1, best=progress.best)
        self.save_state()

    def _test(self) -> dict[str, Any] | None:
        """Tests the best epoch, draws, and finishes the run; the summary, in the first process."""
        progress, fabric, run = self.progress, self.fabric, self.run
        self.model.load_state_dict(self.best)
        figures = None if run is None else run.folder / "figures"
        test = self.task.evaluate(self._called, "test", fabric.device, figures)
        if run is None:
            return None
        best_epoch = progress.best["epoch"]
        learning_curves(figures / "learning_curves.png", run.metrics(), best_epoch)
        summary = {
            **{f"test_{name}": value for name, value in test.items()},
            **{key: value for key, value in progress.best.items() if key != "epoch"},
            "monitor": {"name": self.task.monitor, "maximize": self.task.maximize},
            "best_epoch": best_epoch,
            "epochs": progress.epoch,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "seconds": self._seconds(),
            "device": str(fabric.device),
            "processes": fabric.world_size,
            "data": self.task.identity(),
        }
        run.finish(summary)
        for path in state_files(run.folder):
            path.unlink()
        print(", ".join(f"test {name} {value:.4f}" for name, value in test.items()) + f" (best epoch {best_epoch})")
        print(f"results: {run.folder}")
        return summary

    def _value(self, metadata: dict[str, float]) -> float:
        """The monitored metric, larger being better."""
        value = metadata.get(f"val_{self.task.monitor}")
        return -math.inf if value is None else value if self.task.maximize else -value

    def _since_best(self) -> int:
        """Epochs since the best."""
        return self.progress.epoch - 1 - self.progress.best["epoch"]

    def _seconds(self) -> float:
        """Of the run so far."""
        return self._seconds_before + time.perf_counter() - self._started

    def _evaluated_state(self) -> dict[str, Tensor]:
        """A copy of what is validated and kept, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.evaluated.state_dict().items()}

    # States

    def save_state(self) -> None:
        """Saves all that the run needs to go on as if it had never stopped."""
        tensors, metadata = self._state(self._random_state())
        if self.run is not None:
            step = self.progress.epoch * self.task.steps_per_epoch + self.progress.step
            write_state(self.run.folder, step, tensors, metadata)
        self._saved = time.perf_counter()

    def _keep_evidence(self, rows: Tensor, random: dict[str, Tensor], loss: float, norm: float) -> str:
        """Saves the state before a step, and the batch's rows of the training split; says where, in one line."""
        tensors, metadata = self._state(random)
        found = f"epoch {self.progress.epoch}, step {self.progress.step}: loss {loss}, norm of the gradient {norm}"
        if self.run is None:
            return found
        path = self.run.folder / "not_finite.safetensors"
        write_tensors(path, tensors | {"rows": rows}, metadata | {"loss": loss, "grad_norm": norm})
        return f"{found}; {path} has the state before it and the batch's rows; try a smaller learning rate"

    def _random_state(self) -> dict[str, Tensor]:
        """All of this process's random number generators."""
        return {"batches": self._generator.get_state(), **random_state(self.fabric.device)}

    def _state(self, random: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata of the run as it stands, with the generators of all processes."""
        everyones = [random]
        if self.fabric.world_size > 1:
            everyones = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(everyones, random)
        self.progress.seconds = self._seconds()
        parts = {
            "model": self.model.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "best": self.best,
            **{f"optimizer.{index}": state for index, state in self.optimizer.state_dict()["state"].items()},
            **{f"random.{rank}": state for rank, state in enumerate(everyones)},
            "shuffle": {"epoch_start": self._epoch_start},
        }
        tensors = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        metadata = {
            "progress": asdict(self.progress),
            "schedule": self.schedule.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "processes": self.fabric.world_size,
            "data_id": self.task.data_id,
        }
        return tensors, metadata

    def _read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state in the run folder, if there is one and it fits."""
        folder, state = self.run.folder, read_state(self.run.folder)
        if state is None:
            return None
        found = state[1]
        if found["data_id"] != self.task.data_id:
            raise ValueError(f"{folder}: was trained on other data (found {self.task.data_id}); start a new run")
        if found["processes"] != self.fabric.world_size:
            expected = f"expected {found['processes']}, which have trained it so far"
            raise ValueError(f"{folder}: found {self.fabric.world_size} processes, {expected}")
        return state

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Goes on from a state."""
        try:
            self.progress = Progress(**metadata["progress"])
            self.model.load_state_dict(split_names(tensors, "model"))
        except (KeyError, TypeError, RuntimeError):
            raise ValueError("--resume: its state is of another model or version; start a new run") from None
        self._seconds_before = self.progress.seconds
        if self.average is not None:
            self.average.load_state_dict(split_names(tensors, "average"))
        self.best = split_names(tensors, "best")
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in split_names(tensors, "optimizer").items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
        self.schedule.load_state_dict(metadata["schedule"])
        self.fabric.strategy.precision.load_state_dict(metadata["precision"])
        random = split_names(tensors, f"random.{self.fabric.global_rank}")
        self._generator.set_state(random["batches"])
        set_random_state(random, self.fabric.device)
        self._epoch_start = tensors["shuffle.epoch_start"]
        if self.run is not None:
            self.run.rewind(self.progress.epoch)
            if self.progress.best["epoch"] >= 0:
                write_tensors(self.run.folder / "checkpoints" / "best.safetensors", self.best, self.progress.best)
            print(f"{self.run.folder}: going on after step {self.progress.step} of epoch {self.progress.epoch}")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
