"""What the scripts have in common: from a configuration to a trained and tested model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from scalegmn.config import AnyConfig, start_run, with_run_dir
from scalegmn.models.base import Metanetwork
from scalegmn.train.launch import NOT_FINITE, STOPPED, ending_together, launch
from scalegmn.train.task import Task
from scalegmn.train.trainer import Stopped, Trainer


def train(
    config: AnyConfig,
    build_task: Callable[[AnyConfig], Task],
    finished: Callable[[AnyConfig, Task, Metanetwork, dict[str, Any]], None] | None = None,
) -> None:
    """Builds the task and the model, trains, tests; results in the run folder.

    Ends the process with exit code 75 when a signal stopped the run, 3 when a loss or gradient was not finite.

    Args:
        config: a configuration; without `run_dir` it gets one by name and time.
        build_task: the task of a configuration; may raise ValueError.
        finished: called with configuration, task, trained model and summary, in the first process.

    Raises:
        ValueError: the configuration and the data do not fit, or a run cannot go on; nothing is written then.
    """
    config = with_run_dir(config)
    options = config.train_args
    fabric = launch(options.device, options.devices, options.precision)
    with ending_together(fabric):
        task = build_task(config)
        torch.manual_seed(options.seed)
        model = config.scalegmn_args.build(task.spec)
        run = start_run(config) if fabric.is_global_zero else None
    try:
        summary = Trainer(fabric, task, model, options, config.optimization, run).fit()
    except (Stopped, FloatingPointError) as error:
        if not fabric.is_global_zero:
            raise SystemExit(0) from None  # the first process says why and how
        print(f"{'stopped' if isinstance(error, Stopped) else 'error'}: {error}", file=sys.stderr)
        raise SystemExit(STOPPED if isinstance(error, Stopped) else NOT_FINITE) from None
    if finished is not None and summary is not None:
        finished(config, task, model, summary)
