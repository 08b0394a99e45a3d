"""The configuration of a run, and models from it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from scalegmn.configuration.files import leaves, read_yaml
from scalegmn.configuration.parsing import NO_OPTION, parse, read, split_arguments
from scalegmn.experiments.file_kinds import refuse_other_kinds
from scalegmn.interop.published_configs import translate_file
from scalegmn.models import METANETWORKS, ScaleGMNConfig
from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.networks import NetSpec
from scalegmn.reporting.loggers import Logger
from scalegmn.reporting.run_folder import Run
from scalegmn.reporting.tracking import TensorBoard, Wandb, WandbConfig
from scalegmn.tasks import TASKS
from scalegmn.training.config import TrainConfig
from scalegmn.training.launch import Precision, accelerator
from scalegmn.training.optimization import OptimizationConfig
from scalegmn.zoos.loader import DataConfig, open_data

AnyRun = TypeVar("AnyRun", bound="RunConfig")


class RunConfig:
    """What the configurations of all runs have."""

    train_args: TrainConfig
    optimization: OptimizationConfig
    wandb_args: WandbConfig
    wandb: bool
    tensorboard: bool
    run_dir: str | None
    resume: str | None
    seeds: str | None
    dry_run: bool

    @property
    def precision(self) -> Precision:
        """`train_args.precision`; for `auto` bf16-mixed on CPUs for models that gain from it, else fp32.

        Raises:
            ValueError: as `accelerator`.
        """
        device, precision = self.train_args.device, self.train_args.precision
        if precision != "auto":
            return precision
        if self.train_args.compile:  # which takes the place of the operations that gain
            return "fp32"
        return "bf16-mixed" if accelerator(device, precision) == "cpu" and self.gains_from_bfloat16 else "fp32"

    @property
    def gains_from_bfloat16(self) -> bool:
        """As of `ModelConfig`."""
        return False

    @property
    def folder(self) -> Path:
        """`run_dir`, once it is known (`with_run_dir`)."""
        assert self.run_dir is not None
        return Path(self.run_dir)

    def content(self) -> dict[str, Any]:
        """All settings of a run but `run_dir` and `resume`, as lists, dictionaries and plain values."""
        raise NotImplementedError

    def defaults(self) -> dict[str, Any]:
        """The `content` of a run of this kind with defaults."""
        raise NotImplementedError

    def changed(self: AnyRun, **changes: Any) -> AnyRun:
        """The configuration with other values of some settings."""
        return replace(self, **changes)  # type: ignore[type-var]  # derived classes are dataclasses

    def check_seeds(self) -> None:
        """Raises ValueError where `seeds` are no different numbers, or come with `resume` and without `run_dir`."""
        if self.seeds is not None and not re.fullmatch(r"\d+(,\d+)*", self.seeds):
            raise ValueError(f"seeds: found {self.seeds}, expected numbers separated by commas, such as 0,1,2")
        seeds = [] if self.seeds is None else [*map(int, self.seeds.split(","))]
        if len({*seeds}) < len(seeds):
            raise ValueError(
                f"seeds: found {self.seeds}, expected different numbers; a seed twice is the same run twice"
            )
        if self.seeds is not None and self.resume is not None and self.run_dir is None:
            raise ValueError("resume: seeds go on where they stopped without it; give their --run_dir instead")

    def to_yaml(self) -> str:
        """`content`, such that `--conf` reads it back to an equal configuration."""
        return yaml.safe_dump(self.content(), sort_keys=False)


@dataclass(frozen=True)
class Config(RunConfig):
    """A run: data, model, training."""

    data: DataConfig = field(default_factory=DataConfig)
    """The networks to learn from."""

    model_config: ModelConfig = field(default_factory=ScaleGMNConfig, metadata=NO_OPTION)
    """The metanetwork. Files and the command line have a key `model` and a section `<model>_args` instead."""

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

    tensorboard: bool = False
    """Write TensorBoard event files as well."""

    debug: bool = False
    """Try the code out: 16 networks per split."""

    run_dir: str | None = None
    """Folder for results; null: runs/<config name>/<time>."""

    resume: str | None = None
    """Go on with an unfinished run, as if it had never stopped: its folder; or auto: run_dir, or else the newest in
    runs/<config name> that has this configuration, if there is one, and a new run if there is none."""

    task_args: dict[str, Any] = field(default_factory=dict, metadata=NO_OPTION)
    """Task -> its options where they are not its defaults. Files and the command line have a section `<task>_args` for
    each task with options instead."""

    imports: tuple[str, ...] = field(default=(), metadata=NO_OPTION)
    """Modules of the user that are imported first: those of `--import`, and of the key `imports` in files."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: found {self.batch_size}, expected at least 1")

    @property
    def gains_from_bfloat16(self) -> bool:
        """As of the metanetwork."""
        return self.model_config.gains_from_bfloat16

    @property
    def model(self) -> str:
        """The name of the metanetwork."""
        return self.model_config.name

    def content(self) -> dict[str, Any]:
        """All settings of a run but `run_dir` and `resume`, as lists, dictionaries and plain values."""
        content = plain({item.name: getattr(self, item.name) for item in fields(Config)})
        data, model_config, task_args = (content.pop(name) for name in ("data", "model_config", "task_args"))
        content |= {"run_dir": None, "resume": None}
        if not self.imports:  # as in files of runs before there were any
            del content["imports"]
        content |= {f"{name}_args": options for name, options in task_args.items()}
        return {"data": data, "model": self.model, self.model_config.section: model_config, **content}

    def defaults(self) -> dict[str, Any]:
        """As in `RunConfig`."""
        return Config(model_config=type(self.model_config)()).content()


@dataclass(frozen=True)
class ScriptConfig(Config):
    """A run, or several that differ in their seed."""

    seeds: str | None = None
    """Numbers such as 0,1,2: a run for each seed, in sub-folders of run_dir, then mean and standard deviation of their
    test metrics. Runs that are finished are not repeated."""

    dry_run: bool = False
    """Only say what would be read and trained, with how many parameters, steps and how much memory; write nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_seeds()


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries and tuples as lists, all the way down."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


AnyConfig = TypeVar("AnyConfig", bound=Config)


def with_sections(config_class: type[AnyConfig], given: Mapping[str, Any] | None = None) -> type[AnyConfig]:
    """The subclass of a configuration whose fields are the keys of files: `model`, and a section `<name>_args` for each
    registered metanetwork and for each task with options, instead of `model_config` and `task_args`.

    Args:
        config_class: the configuration.
        given: settings by dotted key; sections of models that neither these nor their model need are left out, which
            makes reading several times as fast, unless a key is unknown. None: all sections.
    """
    models = {f"{name}_args": (name, model) for name, model in METANETWORKS.items()}
    tasks = {f"{name}_args": (name, task.options) for name, task in TASKS.items() if task.options is not None}
    needed = {*models, *tasks}
    if given is not None:
        keys = {key.partition(".")[0] for key in given}
        if keys <= {"model", *needed, *(item.name for item in fields(config_class))}:
            needed = {f"{given.get('model', ScaleGMNConfig.name)}_args", *tasks, *keys}
    own: type = config_class  # classes can be hashed, whatever mypy says of type[AnyConfig]
    parts = (tuple(part for key, part in of.items() if key in needed) for of in (models, tasks))
    made: type[AnyConfig] = _make_sections(own, *parts)
    return made


@lru_cache(maxsize=64)
def _make_sections(
    config_class: Any, models: tuple[tuple[str, type], ...], tasks: tuple[tuple[str, type], ...]
) -> type[Any]:
    """The subclass with these metanetworks' configurations and these tasks' options."""
    sections, options = dict(models + tasks), dict(tasks)

    def choose(self: Any) -> None:
        METANETWORKS.require(self.model, "model")
        object.__setattr__(self, "model_config", getattr(self, f"{self.model}_args"))
        given = {name: getattr(self, f"{name}_args") for name in options}
        object.__setattr__(self, "task_args", {name: args for name, args in given.items() if args != options[name]()})
        problems = []
        for name, model in models:
            if name != self.model and getattr(self, f"{name}_args") != model():
                problems.append(f"{name}_args: the model is {self.model}; set model: {name}, or remove this section")
        try:
            config_class.__post_init__(self)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    texts = {"model": f"Which metanetwork: {', '.join(METANETWORKS)}; its section <model>_args counts."}
    texts |= {f"{name}_args": (model.__doc__ or name).split("\n\n")[0] for name, model in models}
    texts |= {f"{name}_args": f"Options of the task {name}." for name in options}
    lines = "\n".join(f"    {name}: {' '.join(text.split())}" for name, text in texts.items())
    made = make_dataclass(
        config_class.__name__,
        [
            ("model", str, field(default=ScaleGMNConfig.name)),
            *((f"{name}_args", part, field(default_factory=part)) for name, part in sections.items()),
        ],
        bases=(config_class,),
        namespace={"__doc__": f"{config_class.__doc__}\n\nAttributes:\n{lines}\n", "__post_init__": choose},
        frozen=True,
    )
    return made


def read_config(
    arguments: Sequence[str] | None = None,
    config_class: type[AnyConfig] = Config,  # type: ignore[assignment]  # a default of a type variable
    prog: str | None = None,
) -> AnyConfig:
    """The configuration from command line words (None: the process's own); see `configuration.parsing.parse`.

    Published files and bundles are understood (`_settings`). The configuration of a run to go on with (`resume`) and,
    where the class has a field `checkpoint`, of that run or bundle, come before all `--conf` files.
    """
    arguments = _with_files_of_runs(arguments, {item.name for item in fields(config_class)})
    settings = parse(config_class, arguments, prog, _settings, with_sections)
    return config_class(**{item.name: getattr(settings, item.name) for item in fields(config_class)})


def import_modules(arguments: Sequence[str]) -> None:
    """Imports the modules that command line words name, or the files and runs that they name."""
    read(_with_files_of_runs(arguments, {"resume", "checkpoint"}), _settings)


def _with_files_of_runs(arguments: Sequence[str] | None, keys: Collection[str]) -> list[str]:
    """Command line words with the configurations of the runs that they name, by `resume` or `checkpoint`, first.

    Raises:
        ValueError: a folder is none of a run.
    """
    files, words = split_arguments(arguments)
    for key, _, run in (word.partition("=") for word in words):
        name = key.removeprefix("--")
        if name in ("resume", "checkpoint") and name in keys and (name, run) != ("resume", "auto"):
            file = config_file(Path(run)) if name == "checkpoint" else Path(run, "config.yml")
            if not file.is_file():
                raise ValueError(f"{key}: {run} is not the folder of a run ({file}: no such file)")
            files = [str(file), *files]
    return [*(f"--conf={file}" for file in files), *words]


def config_file(run: Path) -> Path:
    """Where the configuration of a bundle or of a run is."""
    return run / ("config.json" if (run / "config.json").is_file() else "config.yml")


def read_config_file(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a file, but for `overrides` such as `"batch_size=64"`; raises ValueError."""
    words = (f"--{word.removeprefix('--')}" for word in overrides)
    return read_config(["--conf", str(file), *words])


def _settings(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings and remarks from a file's content: that of a bundle, or a published or own configuration file."""
    is_bundle = "model_sha256" in content and isinstance(content.get("config"), dict)
    if is_bundle:
        return content["config"], []
    settings, remarks = translate_file(content)
    refuse_other_kinds(settings, "scalegmn train", {item.name for item in fields(with_sections(ScriptConfig))})
    return settings, remarks


def with_run_dir(config: AnyRun, arguments: Sequence[str] | None = None) -> AnyRun:
    """The configuration with `run_dir` filled in: `runs/<folder>-<file>/<time>`, named after the last `--conf`; or the
    run to go on with.

    Raises:
        ValueError: `run_dir` and `resume` name different folders.
    """
    if config.resume not in (None, "auto"):
        if config.run_dir not in (None, config.resume):
            raise ValueError(f"--run_dir {config.run_dir}, but --resume {config.resume}: leave out --run_dir")
        return config.changed(run_dir=config.resume)
    if config.run_dir is not None:
        return config
    files, _ = split_arguments(arguments)
    path = Path(files[-1]).resolve() if files else None
    name = f"{path.parent.name}-{path.stem}" if path else "default"
    for run in sorted(Path("runs", name).glob("*/config.yml"), reverse=True) if config.resume == "auto" else ():
        if not (run.parent / "summary.json").exists() and not changed_keys(config, run):
            return config.changed(run_dir=str(run.parent))
    folder = Path("runs") / name / datetime.now().strftime("%Y%m%d-%H%M%S")
    while folder.exists():
        folder = folder.with_name(f"{folder.name}-again")
    return config.changed(run_dir=str(folder))


def start_run(config: RunConfig) -> Run:
    """The run folder of a configuration.

    Raises:
        ValueError: it cannot be begun there (`Run`), or the run to go on with has another configuration.
    """
    folder = config.folder
    if config.resume is not None and (folder / "config.yml").exists():
        changed = changed_keys(config, folder / "config.yml")
        if changed:
            raise ValueError(
                f"--resume: {folder} was started with {', '.join(changed)}; leave it so, or start a new run"
            )
    loggers: list[Logger] = [TensorBoard()] if config.tensorboard else []
    loggers += [Wandb(config.wandb_args)] if config.wandb else []
    return Run(folder, config.to_yaml(), config.content(), loggers, config.resume is not None)


def changed_keys(config: RunConfig, file: Path) -> list[str]:
    """`key value (found other value)` for each setting in which a configuration differs from a run's config.yml; on
    which devices a run trains, and where its own modules are, does not count. A setting that is newer than the run, and
    missing in its file, has its default."""
    default = dict(leaves(config.defaults()))
    stored, given = dict(leaves(read_yaml(file))), dict(leaves(config.content()))
    before = {key: stored.get(key, default.get(key)) for key in {**stored, **given}}
    return [
        f"{key} {value} (found {given.get(key)})"
        for key, value in before.items()
        if key not in ("train_args.device", "train_args.devices", "imports") and value != given.get(key)
    ]


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
        config = read_config_file(conf, overrides)
    if spec is None:
        return config.model_config.build_for(open_data(config.data).architectures)
    return config.model_config.build(spec)
