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
    from lightning.fabric import Fabric as Fabric

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "tf32", "bf16-mixed", "fp16-mixed"]

STOPPED = 75
"""Exit code of a run that a signal stopped and `--resume` goes on with (EX_TEMPFAIL: try again later)."""

NOT_FINITE = 3
"""Exit code of a run whose loss or gradient was not finite."""

_FABRIC_PRECISION: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "tf32": "32-true",
    "bf16-mixed": "bf16-mixed",
    "fp16-mixed": "16-mixed",
}

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def accelerator(device: Device, precision: Precision) -> Literal["cpu", "cuda"]:
    """The accelerator that `device` names on this machine.

    Raises:
        ValueError: the machine has no such device, or the device lacks the precision.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train_args.device: cuda, but torch finds no GPU here; use auto or cpu")
    kind: Literal["cpu", "cuda"] = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if kind == "cpu" and precision in ("tf32", "fp16-mixed"):
        raise ValueError(f"train_args.precision: {precision} needs a GPU; use fp32 or bf16-mixed")
    return kind


def launch(device: Device, devices: int, precision: Precision) -> Fabric:
    """Joins the processes that train together, with gloo on CPUs and NCCL on GPUs, and starts missing ones.

    torchrun and srun start all processes themselves. Otherwise there are `devices` processes on this machine, each of
    which runs the same command. Only the first process prints. The precision is not `auto`.

    Raises:
        ValueError: as `accelerator`; there are fewer GPUs than devices; or srun's settings are incomplete.
    """
    from lightning.fabric import Fabric  # takes seconds to import, which wrong input and notebooks need not wait for
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    kind = accelerator(device, precision)
    environment: ClusterEnvironment = LightningEnvironment()
    num_nodes, num_local = 1, None
    if torch.distributed.is_torchelastic_launched():
        environment, num_local = TorchElasticEnvironment(), int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // num_local
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        num_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
        num_local = int(os.environ["SLURM_STEP_NUM_TASKS"]) // num_nodes
        try:
            environment = SLURMEnvironment()
        except RuntimeError as error:
            raise ValueError(f"srun: {error}") from None
    if num_local is not None and devices not in (1, num_local):
        raise ValueError(
            f"train_args.devices: found {devices}, but {num_local} processes were started here; leave it out"
        )
    devices = num_local or devices
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"train_args.devices: found {devices}, expected at most {torch.cuda.device_count()}, the GPUs")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    fabric = Fabric(
        accelerator=kind,
        strategy="ddp" if devices * num_nodes > 1 else "auto",
        devices=devices,
        num_nodes=num_nodes,
        precision=_FABRIC_PRECISION[precision],
        plugins=[environment],
    )
    fabric.launch()
    if not fabric.is_global_zero:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return fabric


def precision_of(fabric: Fabric) -> str:
    """What a Fabric computes in, as `train_args.precision` calls it."""
    names: dict[str, str] = {of_fabric: name for name, of_fabric in _FABRIC_PRECISION.items() if name != "tf32"}
    name = names[fabric.strategy.precision.precision]
    return "tf32" if name == "fp32" and torch.get_float32_matmul_precision() == "high" else name


@contextmanager
def ending_together(fabric: Fabric) -> Iterator[None]:
    """If any process raises ValueError or OSError in this block, all end, and the first one raises the error."""
    problem: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as raised:
        problem = raised
    problems = [problem]
    if fabric.world_size > 1:
        problems = [None] * fabric.world_size
        torch.distributed.all_gather_object(problems, problem)
    for error in filter(None, problems):
        raise error if fabric.is_global_zero else SystemExit(0)


class StopSignals:
    """A context that records SIGINT, SIGTERM and SIGUSR1 instead of ending the process; a second SIGINT ends it.

    `sbatch --signal` sends SIGUSR1 before the time limit.

    Attributes:
        received: the name of the last signal; None: no signal arrived.
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
