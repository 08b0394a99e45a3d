"""What the scripts have in common: from a configuration to a trained and tested model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from scalegmn.config import AnyConfig, start_run, with_run_dir
from scalegmn.models.base import Metanetwork
from scalegmn.train.task import Task
from scalegmn.train.trainer import fit


def train(
    config: AnyConfig,
    build_task: Callable[[AnyConfig], Task],
    finished: Callable[[AnyConfig, Task, Metanetwork, dict[str, Any]], None] | None = None,
) -> None:
    """Builds the task and the model, trains, tests; results in the run folder.

    Args:
        config: a configuration; without `run_dir` it gets one by name and time.
        build_task: the task of a configuration; may raise ValueError.
        finished: called with configuration, task, trained model and summary.

    Raises:
        ValueError: the configuration and the data do not fit; nothing is written then.
    """
    config = with_run_dir(config)
    config.train_args.check_device()
    task = build_task(config)
    torch.manual_seed(config.train_args.seed)
    model = config.model_config.build(task.spec)
    run = start_run(config)
    try:
        summary = fit(task, model, config.train_args, config.optimization, run)
    except FloatingPointError as error:
        raise SystemExit(f"error: {error}") from None
    if finished is not None:
        finished(config, task, model, summary)
