"""The training loop. It knows only the `Task` protocol."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from scalegmn.log import Run
from scalegmn.plot import learning_curves
from scalegmn.train.checkpoint import load_checkpoint, save_checkpoint
from scalegmn.train.optim import OptimizationConfig, build_optimizer
from scalegmn.train.task import Task

LOG_EVERY = 10
"""Steps between two readings of the loss for the progress bar; each waits for the device."""


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and from which seed."""

    num_epochs: int = 200
    """Epochs at most."""

    patience: int = 50
    """Epochs without a better validation result before training stops."""

    seed: int = 0
    """Seed of initial parameters, order of batches and dropout."""

    loss: Literal["MSE", "BCE"] = "MSE"
    """Predicting generalisation: squared error or binary cross-entropy of the predicted accuracy."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        problems = [
            f"train_args.{name}: found {getattr(self, name)}, expected at least 1"
            for name in ("num_epochs", "patience")
            if getattr(self, name) < 1
        ]
        if problems:
            raise ValueError("; ".join(problems))

    def check_device(self) -> None:
        """Raises ValueError when this machine lacks the device."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("train_args.device: cuda, but torch finds no GPU here; use auto or cpu")


def keep_freed_memory() -> None:
    """Tells the C library (glibc) to keep freed memory for the next step.

    By default it goes back to the system at the end of each backward pass, and every page of it must be mapped and
    cleared again: a third of the time of a step on a CPU. Blocks above 8 MB still go back, for they would leave holes
    that nothing fits: a part of a batch has smaller tensors, the pieces of a large network larger ones
    (`nn/edges.py`). Other C libraries are left alone.
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
) -> Tensor:
    """The gradient of a batch's mean loss, part by part: memory does not grow with the batch.

    Args:
        loss: (inputs, target) -> the mean over them.
        inputs: a batch that can be sliced.
        target: [B, ...].
        at_once: networks in a part.
        backward: adds the gradient of a scalar to the parameters'.

    Returns:
        The mean loss, detached.
    """
    shares = []
    for start in range(0, len(target), at_once):
        part = slice(start, start + at_once)
        share = loss(inputs[part], target[part]) * (len(target[part]) / len(target))
        backward(share)
        shares.append(share.detach())
    return torch.stack(shares).sum()


def fit(
    task: Task, model: nn.Module, config: TrainConfig, optimization: OptimizationConfig, run: Run
) -> dict[str, Any]:
    """Trains, keeps the checkpoint that is best on the validation split, and tests that one, once.

    The model says how much of a batch it takes at a time (`networks_at_once(device)`).

    Every epoch appends a line to metrics.jsonl and writes `checkpoints/last.safetensors`; a better validation result
    also writes `checkpoints/best.safetensors`. At the end: figures and summary.json.

    Returns:
        The summary.

    Raises:
        FloatingPointError: the training loss of an epoch is not finite.
    """
    from lightning.fabric import Fabric  # takes seconds to import, which wrong input and notebooks need not wait for

    started = time.perf_counter()
    keep_freed_memory()
    fabric = Fabric(accelerator=config.device, devices=1)
    task.prepare(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer, schedule = build_optimizer(optimization, model.parameters(), config.num_epochs * task.steps_per_epoch)
    at_once = model.networks_at_once(fabric.device)
    model, optimizer = fabric.setup(model, optimizer)
    shuffle = torch.Generator().manual_seed(config.seed)
    best_value, best_epoch = -math.inf, -1
    for epoch in range(config.num_epochs):
        epoch_started = time.perf_counter()
        model.train()
        total, count = torch.zeros((), device=fabric.device), 0
        bar = tqdm(total=task.steps_per_epoch, desc=f"epoch {epoch}", leave=False, disable=None)
        for step, (inputs, target) in enumerate(task.train_batches(shuffle, fabric.device)):
            optimizer.zero_grad()
            loss = backward_in_parts(partial(task.loss, model), inputs, target, at_once, fabric.backward)
            if optimization.clip_grad_max_norm is not None:
                max_norm = optimization.clip_grad_max_norm
                fabric.clip_gradients(model, optimizer, max_norm=max_norm, error_if_nonfinite=False)
            optimizer.step()
            lr = schedule.get_last_lr()[0]
            schedule.step()
            total += loss * len(target)
            count += len(target)
            if step % LOG_EVERY == 0:
                rate = count / (time.perf_counter() - epoch_started)
                bar.set_postfix_str(f"loss {loss.item():.3f}, {rate:,.0f} networks/s", refresh=False)
            bar.update()
        bar.close()
        train_loss, train_seconds = total.item() / count, time.perf_counter() - epoch_started
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"epoch {epoch}: the training loss is {train_loss}; try a smaller learning rate")
        val = task.evaluate(model, "val", fabric.device)
        row = {
            "epoch": epoch,
            "step": (epoch + 1) * task.steps_per_epoch,
            "lr": lr,
            "train_loss": train_loss,
            **{f"val_{name}": value for name, value in val.items()},
            "networks_per_second": count / train_seconds,
            "seconds": time.perf_counter() - started,
        }
        run.log(row)
        value = val[task.monitor] if task.maximize else -val[task.monitor]
        facts = {"epoch": epoch, **{f"val_{name}": number for name, number in val.items()}}
        if value > best_value:
            best_value, best_epoch = value, epoch
            save_checkpoint(run.folder / "checkpoints" / "best.safetensors", model, facts)
        save_checkpoint(run.folder / "checkpoints" / "last.safetensors", model, facts)
        if epoch - best_epoch >= config.patience:
            print(f"no better validation {task.monitor} for {config.patience} epochs: stopped")
            break
    facts = load_checkpoint(run.folder / "checkpoints" / "best.safetensors", model)
    figures = run.folder / "figures"
    test = task.evaluate(model, "test", fabric.device, figures)
    learning_curves(figures / "learning_curves.png", run.metrics(), best_epoch)
    summary = {
        **{f"test_{name}": value for name, value in test.items()},
        **{key: value for key, value in facts.items() if key != "epoch"},
        "best_epoch": best_epoch,
        "epochs": epoch + 1,
        "parameters": num_parameters,
        "seconds": time.perf_counter() - started,
        "device": str(fabric.device),
        "data": task.identity(),
    }
    run.finish(summary)
    print(", ".join(f"test {name} {value:.4f}" for name, value in test.items()) + f" (best epoch {best_epoch})")
    print(f"results: {run.folder}")
    return summary
