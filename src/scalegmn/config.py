"""The configuration of a run, and models from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from scalegmn.cli import parse, split_arguments
from scalegmn.data.loader import DataConfig, open_data
from scalegmn.log import Run, WandbConfig
from scalegmn.models import (
    MODELS,
    DWSNetConfig,
    FlatMLPConfig,
    NFNConfig,
    NGGNNConfig,
    NGTConfig,
    ProbeGenConfig,
    ScaleGMNConfig,
    StatNNConfig,
)
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.official import translate_file
from scalegmn.spec import NetSpec
from scalegmn.train.optim import OptimizationConfig
from scalegmn.train.trainer import TrainConfig


@dataclass(frozen=True)
class Config:
    """A run: data, model, training."""

    data: DataConfig = field(default_factory=DataConfig)
    """The networks to learn from."""

    model: Literal["scalegmn", "ng_gnn", "ng_t", "dwsnet", "nfn", "probegen", "statnn", "mlp"] = "scalegmn"
    """Which metanetwork; its section `<model>_args` counts, the others stay as they are."""

    scalegmn_args: ScaleGMNConfig = field(default_factory=ScaleGMNConfig)
    """ScaleGMN."""

    ng_gnn_args: NGGNNConfig = field(default_factory=NGGNNConfig)
    """NG-GNN, the graph network of Neural Graphs."""

    ng_t_args: NGTConfig = field(default_factory=NGTConfig)
    """NG-T, the transformer of Neural Graphs."""

    dwsnet_args: DWSNetConfig = field(default_factory=DWSNetConfig)
    """DWSNet."""

    nfn_args: NFNConfig = field(default_factory=NFNConfig)
    """Neural functional network."""

    probegen_args: ProbeGenConfig = field(default_factory=ProbeGenConfig)
    """ProbeGen."""

    statnn_args: StatNNConfig = field(default_factory=StatNNConfig)
    """An MLP of statistics of the weights."""

    mlp_args: FlatMLPConfig = field(default_factory=FlatMLPConfig)
    """An MLP of all parameters."""

    train_args: TrainConfig = field(default_factory=TrainConfig)
    """How long to train, and from which seed."""

    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    """How the model is fitted."""

    wandb_args: WandbConfig = field(default_factory=WandbConfig)
    """Where the run goes in Weights & Biases."""

    batch_size: int = 128
    """Networks per batch."""

    wandb: bool = False
    """Log to Weights & Biases as well."""

    debug: bool = False
    """Try the code out: 16 networks per split."""

    run_dir: str | None = None
    """Folder for results; null: runs/<config name>/<time>."""

    def __post_init__(self) -> None:
        problems = [] if self.batch_size >= 1 else [f"batch_size: found {self.batch_size}, expected at least 1"]
        if self.model not in MODELS:
            raise ValueError(f"model: found {self.model!r}, expected one of {', '.join(MODELS)}")
        for name, model in MODELS.items():
            if name != self.model and getattr(self, f"{name}_args") != model():
                problems.append(f"{name}_args: the model is {self.model}; set model: {name}, or remove this section")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def model_config(self) -> ModelConfig:
        """The section of the chosen model."""
        return getattr(self, f"{self.model}_args")

    def content(self) -> dict[str, Any]:
        """All fields of a run but `run_dir`, of models only the chosen one, as lists, dictionaries and plain values."""
        others = {f"{name}_args" for name in MODELS if name != self.model}
        content = _plain(asdict(self))
        return {item.name: content[item.name] for item in fields(Config) if item.name not in others} | {"run_dir": None}

    def to_yaml(self) -> str:
        """`content`, such that `--conf` reads it back to an equal configuration."""
        return yaml.safe_dump(self.content(), sort_keys=False)


def _plain(value: object) -> object:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


AnyConfig = TypeVar("AnyConfig", bound=Config)


def read_config(
    arguments: Sequence[str] | None = None, config_class: type[AnyConfig] = Config, prog: str | None = None
) -> AnyConfig:
    """The configuration from command line words (None: the process's own); see `cli.parse`.

    Published files are translated (`official.translate_file`). Where the class has a field `checkpoint`, a run folder,
    that run's config.yml comes before all `--conf` files.
    """
    files, words = split_arguments(arguments)
    if "checkpoint" in {item.name for item in fields(config_class)}:
        runs = [word.partition("=")[2] for word in words if word.startswith("--checkpoint=")]
        files = [str(Path(run) / "config.yml") for run in runs] + files
    return parse(config_class, [*(f"--conf={file}" for file in files), *words], prog, translate_file)


def with_run_dir(config: AnyConfig, arguments: Sequence[str] | None = None) -> AnyConfig:
    """The configuration with `run_dir` filled in: `runs/<folder>-<file>/<time>`, named after the last `--conf`."""
    if config.run_dir is not None:
        return config
    files, _ = split_arguments(arguments)
    path = Path(files[-1]).resolve() if files else None
    name = f"{path.parent.name}-{path.stem}" if path else "default"
    folder = Path("runs") / name / datetime.now().strftime("%Y%m%d-%H%M%S")
    while folder.exists():
        folder = folder.with_name(f"{folder.name}-again")
    return replace(config, run_dir=str(folder))


def start_run(config: Config) -> Run:
    """The run folder of a configuration."""
    wandb = config.wandb_args if config.wandb else None
    return Run(Path(config.run_dir), config.to_yaml(), config.content(), wandb)


def build_model(conf: str | Path | Config, overrides: Sequence[str] = (), spec: NetSpec | None = None) -> Metanetwork:
    """A model from a configuration, in a notebook as on the command line.

    Args:
        conf: a YAML file or a `Config`.
        overrides: settings in place of the file's, as `"scalegmn_args.symmetry=permutation"`.
        spec: the input networks; None: those of the configuration's zoo.

    Raises:
        ValueError: the configuration is wrong, its zoo is missing, or the networks don't fit the model.
    """
    if isinstance(conf, Config):
        if overrides:
            raise ValueError("overrides: only with a YAML file; use dataclasses.replace on a Config")
        config = conf
    else:
        words = ["--conf", str(conf), *(f"--{word.removeprefix('--')}" for word in overrides)]
        config = parse(Config, words, translate=translate_file)
    if spec is None:
        spec = open_data(config.data).spec
    return config.model_config.build(spec)
