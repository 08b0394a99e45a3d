"""Meta-training of learned optimisers: configuration, runs, and the optimisers of finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from scalegmn.configuration.parsing import NO_OPTION, parse, split_arguments
from scalegmn.experiments.config import RunConfig, plain
from scalegmn.experiments.file_kinds import only_for
from scalegmn.experiments.run import train_runs
from scalegmn.networks import NetSpec
from scalegmn.optimizers.learned import LearnedOptimizer, LearnedOptimizerConfig
from scalegmn.optimizers.problems import ProblemConfig
from scalegmn.reporting.tracking import WandbConfig
from scalegmn.tasks.learned_optimization import LearnedOptimization, MetaConfig
from scalegmn.training.checkpoint import load_checkpoint
from scalegmn.training.config import TrainConfig
from scalegmn.training.optimization import OptimizationConfig

COMMAND = "scalegmn train optimizer"


@dataclass(frozen=True)
class OptimizerRunConfig(RunConfig):
    """Meta-train a learned optimiser."""

    optimizer: LearnedOptimizerConfig = field(default_factory=LearnedOptimizerConfig)
    """The learned optimiser."""

    problem: ProblemConfig = field(default_factory=ProblemConfig)
    """The inner problems."""

    meta: MetaConfig = field(default_factory=MetaConfig)
    """How the optimiser is trained."""

    train_args: TrainConfig = field(default_factory=TrainConfig)
    """How long to train, and from which seed. Numbers are fp32."""

    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    """How the optimiser's own parameters are fitted."""

    wandb_args: WandbConfig = field(default_factory=WandbConfig)
    """Where the run goes in Weights & Biases."""

    wandb: bool = False
    """Log to Weights & Biases as well."""

    tensorboard: bool = False
    """Write TensorBoard event files as well."""

    run_dir: str | None = None
    """Folder for results; null: runs/<config name>/<time>."""

    resume: str | None = None
    """Go on with an unfinished run, as if it had never stopped: its folder; or auto: run_dir, or else the newest in
    runs/<config name> that has this configuration, if there is one, and a new run if there is none."""

    seeds: str | None = None
    """Numbers such as 0,1,2: a run for each seed, in sub-folders of run_dir, then mean and standard deviation of their
    test metrics. Runs that are finished are not repeated."""

    dry_run: bool = False
    """Only say what would be trained; write nothing."""

    imports: tuple[str, ...] = field(default=(), metadata=NO_OPTION)
    """Modules of the user that are imported first."""

    def __post_init__(self) -> None:
        if self.train_args.precision not in ("auto", "fp32"):
            found = f"train_args.precision: found {self.train_args.precision}, expected auto or fp32"
            raise ValueError(f"{found} for learned optimisers")
        if self.train_args.compile:
            raise ValueError("train_args.compile: found True, expected False for learned optimisers")
        self.check_seeds()

    def content(self) -> dict[str, Any]:
        """As in `RunConfig`."""
        content: dict[str, Any] = plain({item.name: getattr(self, item.name) for item in fields(self)})
        for name in ("seeds", "dry_run", *([] if self.imports else ["imports"])):
            del content[name]
        return content | {"run_dir": None, "resume": None}

    def defaults(self) -> dict[str, Any]:
        """As in `RunConfig`."""
        return OptimizerRunConfig().content()


def read_optimizer_config(arguments: Sequence[str]) -> OptimizerRunConfig:
    """The configuration from command line words; that of a run to go on with (`resume`) comes first.

    Raises:
        ValueError: as `configuration.parsing.parse`; or the run has no configuration.
    """
    files, words = split_arguments(arguments)
    for key, _, run in (word.partition("=") for word in words):
        if key == "--resume" and run != "auto":
            file = Path(run, "config.yml")
            if not file.is_file():
                raise ValueError(f"--resume: {run} is not the folder of a run ({file}: no such file)")
            files = [str(file), *files]
    words = [*(f"--conf={file}" for file in files), *words]
    return parse(OptimizerRunConfig, words, COMMAND, only_for(COMMAND, OptimizerRunConfig))


def train_optimizer(config: OptimizerRunConfig) -> None:
    """Meta-trains an optimiser, as `scalegmn.experiments.run.train_runs` does.

    Raises:
        ValueError: the configuration and the images do not fit, or a run cannot go on; nothing is written then.
    """

    def build(config: OptimizerRunConfig) -> tuple[LearnedOptimization, LearnedOptimizer]:
        task = LearnedOptimization(config.problem, config.meta)
        torch.manual_seed(config.train_args.seed)
        return task, config.optimizer.build(task.spec)

    def dry_run(fabric: Any) -> None:
        task, model = build(config)
        meta, count = config.meta, sum(parameter.numel() for parameter in model.parameters())
        print(f"optimiser: {config.optimizer.network}, {count:,} parameters, commutes with", end=" ")
        print(", ".join(sorted(model.exact_symmetries)))
        print(f"inner networks: {meta.networks} at once, of {', '.join(map(str, task.specs))}")
        steps = meta.window if meta.method == "evolution" else meta.horizon
        print(f"steps: {config.train_args.num_epochs * meta.outer_steps:,} outer ones of {steps:,} inner ones each")
        print(f"results would go to {config.run_dir}; nothing was written")

    train_runs(config, build, dry_run)


def load_trained_optimizer(run: str | Path) -> tuple[LearnedOptimizer, OptimizerRunConfig]:
    """The optimiser of a finished run, in its best epoch, and the run's configuration.

    Raises:
        ValueError: the folder is none of a finished run of `scalegmn train optimizer`.
    """
    run = Path(run)
    try:
        data = json.loads((run / "summary.json").read_text())["data"]
        spec = NetSpec.from_dict(data["spec"])
        if data["task"] != "learned_optimization":
            raise ValueError(f"its task is {data['task']}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"{error.filename}: no such file" if isinstance(error, FileNotFoundError) else str(error)
        reason = "it is a file" if isinstance(error, NotADirectoryError) else reason
        raise ValueError(f"{run} is not the folder of a finished run of `{COMMAND}` ({reason})") from None
    config = read_optimizer_config(["--conf", str(run / "config.yml")])
    model = config.optimizer.build(spec)
    load_checkpoint(run / "checkpoints" / "best.safetensors", model)
    return model.eval(), config
