"""The training loop. It knows neither models nor tasks, only the `Task` protocol."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from scalegmn.reporting.figures import learning_curves
from scalegmn.reporting.run_folder import Run
from scalegmn.training.checkpoint import read_state, state_files, write_state, write_tensors
from scalegmn.training.config import TrainConfig
from scalegmn.training.flat import FlatParameters
from scalegmn.training.gradients import backward_in_micro_batches, sum_over_processes
from scalegmn.training.launch import StopSignals, ending_together, precision_of
from scalegmn.training.memory import keep_freed_memory, peak_memory, present_objects_frozen
from scalegmn.training.optimization import OptimizationConfig, build_optimizer
from scalegmn.training.precision import InPrecision
from scalegmn.training.state import Progress, RunState
from scalegmn.training.task import Task

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.wrappers import _FabricOptimizer

SHOW_EVERY = 10
"""Number of steps between two updates of the progress bar's text."""


class Stopped(Exception):
    """A signal ended the run, which can go on later."""


class Trainer:
    """One run: trains a model, validates it after every epoch, keeps the best parameters and tests them at the end.

    Args:
        fabric: the processes; each computes on its share of every batch.
        task: batches, loss and metrics.
        model: `networks_at_once(device)` is the number of networks of a batch that it takes at a time.
        config: how long to train, and on what.
        optimization: optimiser and learning rate.
        run: the run folder, in the first process, which alone writes; None: nothing is written.
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
        keep_freed_memory()
        self.fabric, self.task, self.model, self.config, self.run = fabric, task, model, config, run
        self.signals = StopSignals()
        self._saved = time.perf_counter()
        self._max_norm = optimization.clip_grad_max_norm or math.inf
        task.prepare(model)
        model.to(fabric.device)
        for tensor in model.state_dict().values():  # in case machines round differently
            if fabric.world_size > 1:
                torch.distributed.broadcast(tensor, 0)
        if fabric.global_rank:
            torch.manual_seed(config.seed + fabric.global_rank)  # each process draws its own dropout masks
        average = None
        if optimization.ema_decay is not None:
            update = get_ema_multi_avg_fn(optimization.ema_decay)
            average = AveragedModel(model, multi_avg_fn=update)
        num_steps = config.num_epochs * task.steps_per_epoch
        fused = config.precision != "fp16-mixed"
        self._parameters = FlatParameters(model.parameters())
        optimizer, self.schedule = build_optimizer(optimization, [self._parameters.tensor], num_steps, fused)
        self.optimizer = cast("_FabricOptimizer", fabric.setup_optimizers(optimizer))
        self.state = RunState(fabric, model, average, self._parameters, optimizer, self.schedule, config.seed, task)
        evaluated = self.state.evaluated
        if config.compile:
            for module in {model, evaluated}:
                module.compile(fullgraph=True)
        self._max_micro_batch = cast(Callable[[torch.device], int], model.networks_at_once)(fabric.device)
        self._called = InPrecision(model, fabric, config.compile)
        self._called_evaluated = InPrecision(evaluated, fabric, config.compile)

    @property
    def progress(self) -> Progress:
        """Position of the run."""
        return self.state.progress

    def fit(self) -> dict[str, Any] | None:
        """Trains from the run's position to its end, and tests the epoch with the best validation result, once.

        Every epoch appends a line to metrics.jsonl and writes `checkpoints/last.safetensors`; a better validation
        result also writes `checkpoints/best.safetensors`. The end writes figures and summary.json.

        Returns:
            The summary, in the process that has the run folder.

        Raises:
            Stopped: a signal arrived; the step was finished and the state saved.
            FloatingPointError: loss or gradient of a step is not finite; the state that reproduces it was saved.
            ValueError: the state in the run folder is damaged, or of other data, another model or another number of
                processes.
        """
        with ending_together(self.fabric):
            saved = self._read_state()
        saved = self.fabric.broadcast(saved)
        if saved is not None:
            with ending_together(self.fabric):
                self._restore(*saved)
        with self.signals, present_objects_frozen():
            while self.progress.epoch < self.config.num_epochs and self._epochs_since_best() < self.config.patience:
                self.train_epoch()
                self._end_epoch()
            if self.progress.epoch < self.config.num_epochs:
                print(f"no better validation {self.task.monitor} for {self.config.patience} epochs: stopped")
            return self._test()  # a signal does not stop it: little remains to be done

    # Training

    def train_epoch(self) -> None:
        """Takes the remaining steps of an epoch."""
        progress, fabric = self.progress, self.fabric
        self.model.train()
        batches = self._shuffled()[progress.step :]
        stream = self.task.train_batches(batches, self.state.batch_generator, fabric.device)
        with tqdm(
            total=self.task.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch}",
            leave=False,
            disable=None if fabric.is_global_zero else True,
        ) as bar:
            began = time.perf_counter()
            for rows in batches:
                random_states = self.state.random_states()
                inputs, target = next(stream)
                progress.wait_seconds += time.perf_counter() - began
                loss, norm, stop, save = self.step(inputs, target)
                if not math.isfinite(loss) or not (math.isfinite(norm) or self._loss_scale_overflowed()):
                    raise FloatingPointError(self._keep_evidence(rows, random_states, loss, norm))
                self._update_parameters()
                self._count_step(len(target), loss, norm)
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
                    raise Stopped(self._reason_and_remedy())

    def step(self, inputs: Any, target: Tensor) -> tuple[float, float, bool, bool]:
        """Computes the gradient of a batch over all processes, and clips it.

        Returns:
            Loss and gradient norm of the batch; whether to stop; whether to save the state.
        """
        fabric = self.fabric
        first, last = (len(target) * rank // fabric.world_size for rank in (fabric.global_rank, fabric.global_rank + 1))
        share = slice(first, last)
        self.optimizer.zero_grad(set_to_none=False)
        loss = backward_in_micro_batches(
            self._loss,
            inputs[share],
            target[share],
            self._max_micro_batch,
            fabric.backward,
            len(target),
        )
        save = time.perf_counter() - self._saved >= 60 * self.config.checkpoint_minutes
        stop = self.signals.received is not None
        if fabric.world_size > 1:
            loss, (stop, save) = sum_over_processes(fabric, self._parameters.tensor, loss, (stop, save))
        norm = fabric.clip_gradients(self.model, self.optimizer, max_norm=self._max_norm, error_if_nonfinite=False)
        loss_value, norm_value = torch.stack([loss, cast(Tensor, norm)]).tolist()
        return loss_value, norm_value, stop, save

    def _loss(self, inputs: Any, target: Tensor) -> Tensor:
        """The task's loss, and what the model itself adds to it."""
        loss: Tensor = self.task.loss(self._called, inputs, target)
        auxiliary: Tensor | None = getattr(self.model, "auxiliary_loss", None)
        return loss if auxiliary is None else loss + auxiliary

    def _update_parameters(self) -> None:
        """Applies the gradient, and moves learning rate and moving average on."""
        self.optimizer.step()
        self.progress.lr = self.schedule.lr
        self.schedule.step()
        if self.state.average is not None:
            self.state.average.update_parameters(self.model)

    def _count_step(self, num_networks: int, loss: float, norm: float) -> None:
        """Adds a step to the sums of the epoch."""
        progress = self.progress
        progress.step += 1
        progress.count += num_networks
        progress.loss += loss * num_networks
        if math.isfinite(norm):  # otherwise the scaler of fp16-mixed skipped the step
            progress.grad_norm += norm
            progress.grad_norm_max = max(norm, progress.grad_norm_max)

    def _loss_scale_overflowed(self) -> bool:
        """Whether a gradient may be infinite because fp16-mixed scaled the loss too much; such a step is skipped."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        return scaler is not None and scaler.get_scale() > 1

    def _shuffled(self) -> list[Tensor]:
        """Rows of all batches of this epoch. A resumed epoch has the order that it began with."""
        generator = self.state.batch_generator
        if self.progress.step == 0:
            self.state.epoch_start = generator.get_state()
            return list(self.task.shuffle(generator))
        now = generator.get_state()
        generator.set_state(self.state.epoch_start)
        batches = list(self.task.shuffle(generator))
        generator.set_state(now)
        return batches

    def _reason_and_remedy(self) -> str:
        """Why and where the run stopped, and how to go on."""
        at = f"{self.signals.received or 'a signal'} after step {self.progress.step} of epoch {self.progress.epoch}"
        return at if self.run is None else f"{at}; go on with --resume {self.run.folder}"

    # Validation and test

    def _end_epoch(self) -> None:
        """Validates, logs, and keeps the parameters."""
        progress, fabric, monitor = self.progress, self.fabric, self.task.monitor
        val = fabric.broadcast(self.task.evaluate(self._called_evaluated, "val", fabric.device))
        metadata = {"epoch": progress.epoch, **{f"val_{name}": value for name, value in val.items()}}
        better = self._value(metadata) > self._value(progress.best)
        if better:
            progress.best, self.state.best = metadata, self.state.evaluated_parameters()
        if self.run is not None:
            self.run.log(self._row(metadata))
            checkpoints = self.run.folder / "checkpoints"
            if better:
                write_tensors(checkpoints / "best.safetensors", self.state.best, metadata)
            write_tensors(checkpoints / "last.safetensors", self.state.evaluated_parameters(), metadata)
        self.schedule.end_epoch(val[monitor] if self.task.maximize else -val[monitor])
        self.state.progress = Progress(epoch=progress.epoch + 1, best=progress.best)
        self.save_state()

    def _row(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """The line of metrics.jsonl of an epoch with these validation metrics."""
        progress = self.progress
        return {
            "epoch": progress.epoch,
            "step": (progress.epoch + 1) * self.task.steps_per_epoch,
            "lr": progress.lr,
            "train_loss": progress.loss / progress.count,
            **{name: value for name, value in metadata.items() if name != "epoch"},
            "grad_norm": progress.grad_norm / progress.step,
            "grad_norm_max": progress.grad_norm_max,
            "networks_per_second": progress.count / progress.train_seconds,
            "data_wait": progress.wait_seconds / progress.train_seconds,
            "memory_gb": peak_memory(self.fabric.device) / 1e9,
            "seconds": self.state.seconds(),
        }

    def _test(self) -> dict[str, Any] | None:
        """Tests the best epoch, draws figures, and finishes the run; the summary, in the first process."""
        progress, fabric, run = self.progress, self.fabric, self.run
        self.model.load_state_dict(self.state.best)
        if run is None:
            self.task.evaluate(self._called, "test", fabric.device)
            return None
        figures: Path = run.folder / "figures"
        test = self.task.evaluate(self._called, "test", fabric.device, figures)
        best_epoch = int(progress.best["epoch"])
        learning_curves(figures / "learning_curves.png", run.metrics(), best_epoch)
        summary = {
            **{f"test_{name}": value for name, value in test.items()},
            **{key: value for key, value in progress.best.items() if key != "epoch"},
            "monitor": {"name": self.task.monitor, "maximize": self.task.maximize},
            "best_epoch": best_epoch,
            "epochs": progress.epoch,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "seconds": self.state.seconds(),
            "processor_seconds": self.state.processor_seconds(),
            "device": str(fabric.device),
            "precision": precision_of(fabric),
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
        """The monitored metric, with its sign such that larger is better."""
        value = metadata.get(f"val_{self.task.monitor}")
        return -math.inf if value is None else value if self.task.maximize else -value

    def _epochs_since_best(self) -> int:
        """Number of epochs since the best one."""
        return self.progress.epoch - 1 - int(self.progress.best["epoch"])

    # States

    def save_state(self) -> None:
        """Saves everything that the run needs to go on as if it had never stopped."""
        tensors, metadata = self.state.capture(self.state.random_states())
        if self.run is not None:
            step = self.progress.epoch * self.task.steps_per_epoch + self.progress.step
            write_state(self.run.folder, step, tensors, metadata)
        self._saved = time.perf_counter()

    def _keep_evidence(self, rows: Tensor, random_states: dict[str, Tensor], loss: float, norm: float) -> str:
        """Saves the state before a step and the rows of its batch in the training split; the error's text."""
        tensors, metadata = self.state.capture(random_states)
        what = f"epoch {self.progress.epoch}, step {self.progress.step}: loss {loss}, norm of the gradient {norm}"
        if self.run is None:
            return what
        path = self.run.folder / "not_finite.safetensors"
        write_tensors(path, tensors | {"rows": rows}, metadata | {"loss": loss, "grad_norm": norm})
        return f"{what}; {path} has the state before it and the batch's rows; try a smaller learning rate"

    def _read_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state in the run folder, if there is one and the run can go on from it."""
        saved = None if self.run is None else read_state(self.run.folder)
        if self.run is not None and saved is not None:
            self.state.check(saved[1], str(self.run.folder))
        return saved

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Goes on from a state, and removes from the run folder what came after it."""
        self.state.restore(tensors, metadata)
        if self.run is None:
            return
        self.run.rewind(self.progress.epoch)
        if self.progress.best["epoch"] >= 0:
            path = self.run.folder / "checkpoints" / "best.safetensors"
            write_tensors(path, self.state.best, self.progress.best)
        print(f"{self.run.folder}: going on after step {self.progress.step} of epoch {self.progress.epoch}")
