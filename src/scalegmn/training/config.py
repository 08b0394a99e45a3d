"""Settings of the training loop.

They have a file to themselves: jsonargparse, when it reads a configuration, imports everything that the files of its
classes import for type checkers; lightning would take seconds.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

from scalegmn.training.launch import Device, Precision, accelerator


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, on what, and from which seed."""

    num_epochs: int = 200
    """Epochs at most."""

    patience: int = 50
    """Epochs without a better validation result before training stops."""

    seed: int = 0
    """Seed of initial parameters, order of batches and dropout."""

    loss: Literal["MSE", "BCE"] = "MSE"
    """Predicting generalisation: squared error or binary cross-entropy of the predicted accuracy."""

    device: Device = "auto"
    """Where to train; auto: a GPU if there is one."""

    devices: int = 1
    """GPUs of this machine, or processes on its CPU, that share each batch; torchrun and srun say it themselves."""

    precision: Precision = "auto"
    """Numbers inside the model, not parameters and losses. On GPUs, tf32: products in TensorFloat-32; fp16-mixed: half
    precision, the loss scaled. bf16-mixed: bfloat16. auto: bf16-mixed on CPUs with AMX or AMD's AVX-512 BF16, for
    ScaleGMN with sign symmetry, no mlp_dropout and a hidden_dim that is a multiple of 32; else fp32."""

    compile: bool = False
    """Compile the model (torch.compile, as one graph; on CPUs with a C++ compiler), which takes minutes at the start.
    hetero then computes both branches for all networks, and gains nothing on CPUs."""

    checkpoint_minutes: float = 10.0
    """Minutes between two states that --resume goes on from; one is also saved after every epoch and when stopped."""

    def __post_init__(self) -> None:
        problems = [
            f"train_args.{name}: found {getattr(self, name)}, expected at least 1"
            for name in ("num_epochs", "patience", "devices")
            if getattr(self, name) < 1
        ]
        if not self.checkpoint_minutes >= 0:
            value = self.checkpoint_minutes
            problems.append(f"train_args.checkpoint_minutes: found {value}, expected 0 (after every step) or more")
        if problems:
            raise ValueError("; ".join(problems))

    def check_device(self) -> None:
        """Checks that this machine can train as configured.

        Raises:
            ValueError: it has no such device, the device lacks the precision, or there is no compiler.
        """
        kind = accelerator(self.device, self.precision)
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if self.compile and kind == "cpu" and not shutil.which(compiler):
            raise ValueError(f"train_args.compile: needs a C++ compiler, found no {compiler}; install it or set CXX")
