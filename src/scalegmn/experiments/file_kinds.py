"""Which command a YAML file is for, so that a file that is given to another one is sent there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from scalegmn.configuration.parsing import IMPORTS, Translate


def only_for(command: str, config_class: Any) -> Translate:
    """What understands the files of a command as settings of its dataclass, and refuses those of other commands."""

    def translate(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        refuse_other_kinds(content, command, {item.name for item in fields(config_class)})
        return content, []

    return translate


def refuse_other_kinds(content: Mapping[str, Any], command: str, known: Collection[str]) -> None:
    """Raises ValueError if another command knows more of a file's keys; names that command.

    Args:
        content: of the file.
        command: that it is given to: `scalegmn train`.
        known: its keys.
    """
    keys = {str(key).partition(".")[0] for key in content}
    if keys <= {*known, IMPORTS}:
        return
    # imported here: only for files that are refused anyway
    from scalegmn.experiments.compare import CompareConfig
    from scalegmn.experiments.config import Config, with_sections
    from scalegmn.experiments.optimizer_run import OptimizerRunConfig
    from scalegmn.experiments.sweep import SweepConfig
    from scalegmn.zoos.fit.cnn_zoo import CnnRecipe
    from scalegmn.zoos.fit.inr_zoo import InrRecipe

    kinds = {
        "scalegmn zoo inr": ("the recipe of a zoo of INRs", InrRecipe),
        "scalegmn zoo cnn": ("the recipe of a zoo of CNNs", CnnRecipe),
        "scalegmn sweep": ("a sweep", SweepConfig),
        "scalegmn compare": ("a comparison", CompareConfig),
        "scalegmn train optimizer": ("the meta-training of an optimiser", OptimizerRunConfig),
        "scalegmn train TASK": ("the configuration of a run", with_sections(Config)),
    }
    fitting = {name: len(keys & {item.name for item in fields(kind)}) for name, (_, kind) in kinds.items()}
    best = max(fitting, key=fitting.__getitem__)
    if fitting[best] > len(keys & {*known}) and not best.startswith(command):
        tasks = ", TASK being classification, editing or generalization" if best.endswith("TASK") else ""
        raise ValueError(f"this is {kinds[best][0]}, give it to `{best} --conf`{tasks}")
