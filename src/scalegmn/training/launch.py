"""Processes that train together, and the signals that stop them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "tf32", "bf16-mixed", "fp16-mixed"]

STOPPED = 75
"""Exit code of a run that a signal stopped and `--resume` goes on with (EX_TEMPFAIL: try again later)."""

NOT_FINITE = 3
"""Exit code of a run whose loss or gradient was not finite."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def accelerator(device: Device, precision: Precision) -> Literal["cpu", "cuda"]:
    """What `device` is on this machine.

    Raises:
        ValueError: the machine lacks it, or it does not have the precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train_args.device: cuda, but torch finds no GPU here; use auto or cpu")
    found = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if found == "cpu" and precision in ("tf32", "fp16-mixed"):
        raise ValueError(f"train_args.precision: {precision} needs a GPU; use fp32 or bf16-mixed")
    return found


def launch(device: Device, devices: int, precision: Precision) -> Fabric:
    """The processes that train together, with gloo on CPUs and NCCL on GPUs; starts the missing ones.

    Under torchrun and srun these are the processes that they started, else `devices` on this machine, each of which
    runs the same command. Only the first one prints.

    Raises:
        ValueError: as `accelerator`; there are fewer GPUs than devices, or srun was not told enough.
    """
    from lightning.fabric import Fabric  # takes seconds to import, which wrong input and notebooks need not wait for
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    kind = accelerator(device, precision)
    environment, num_nodes, here = LightningEnvironment(), 1, None
    if torch.distributed.is_torchelastic_launched():
        environment, here = TorchElasticEnvironment(), int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // here
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        num_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
        here = int(os.environ["SLURM_STEP_NUM_TASKS"]) // num_nodes
        try:
            environment = SLURMEnvironment()
        except RuntimeError as error:
            raise ValueError(f"srun: {error}") from None
    if here is not None and devices not in (1, here):
        raise ValueError(f"train_args.devices: found {devices}, but {here} processes were started here; leave it out")
    devices = here or devices
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"train_args.devices: found {devices}, expected at most {torch.cuda.device_count()}, the GPUs")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    fabric = Fabric(
        accelerator=kind,
        strategy="ddp" if devices * num_nodes > 1 else "auto",
        devices=devices,
        num_nodes=num_nodes,
        precision={"bf16-mixed": "bf16-mixed", "fp16-mixed": "16-mixed"}.get(precision, "32-true"),
        plugins=[environment],
    )
    fabric.launch()
    if not fabric.is_global_zero:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return fabric


@contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """A ValueError or OSError of any process in this block ends all of them; the first one raises it."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = error
    problems = [problem]
    if fabric.world_size > 1:
        problems = [None] * fabric.world_size
        torch.distributed.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise found if fabric.is_global_zero else SystemExit(0)


class StopSignals:
    """Within this context SIGINT, SIGTERM and SIGUSR1 (which `sbatch --signal` sends before the time is up) are only
    noted; a second SIGINT ends the process at once.

    Attributes:
        received: the name of the last signal; None: there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
