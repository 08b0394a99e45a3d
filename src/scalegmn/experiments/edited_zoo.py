"""A zoo's networks edited (`inr_editing.py --export_edited`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from scalegmn.experiments.config import ScriptConfig
from scalegmn.interop.network_files import head_files
from scalegmn.interop.state_dicts import state_dict_of
from scalegmn.interop.tensor_files import write_tensors
from scalegmn.models.base import Metanetwork
from scalegmn.networks import NetParams
from scalegmn.reporting.files import versions
from scalegmn.reporting.words import counted
from scalegmn.tasks import ZooTask
from scalegmn.zoos.shards import Shards
from scalegmn.zoos.zoo_format import Zoo, in_single


@dataclass(frozen=True)
class EditConfig(ScriptConfig):
    """Train a model that edits INRs, or edit INRs with one that has been trained."""

    checkpoint: str | None = None
    """Run folder or bundle of a trained model, which edits its zoo (--export_edited) instead of training; for files:
    scalegmn predict."""

    export_edited: str | None = None
    """Write all networks of the zoo, edited by the trained model, to this folder."""

    export_format: Literal["zoo", "pth"] = "zoo"
    """As a zoo, or as one file net<number>.pth per network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint is not None and self.export_edited is None:
            remedy = "to edit files use scalegmn predict"
            raise ValueError(f"--checkpoint: a trained model edits its zoo here (--export_edited); {remedy}")
        if self.export_edited is not None and Path(self.export_edited).exists():
            raise ValueError(f"--export_edited: {self.export_edited} exists already; choose another")
        if self.export_edited is not None and self.seeds is not None:
            raise ValueError("--export_edited: a zoo is edited by one model; leave --seeds out")

    @property
    def removed(self) -> tuple[str, ...]:
        """The symmetries that the networks which the model reads have removed."""
        return self.data.canonicalize if self.data.switch_to_canon else ()


def export_zoo(config: EditConfig, task: type[ZooTask], model: Metanetwork, zoo: Zoo) -> None:
    """Writes a zoo's networks, edited, as a zoo (whose provenance names model and source) or as `.pth` files.

    A model with k heads writes k networks for each, one after the other in a zoo, with their number in the column
    `head`; the edited image is the mean of those that they draw.
    """
    assert config.export_edited is not None
    out, params, block = Path(config.export_edited), zoo.params, config.batch_size
    heads = config.model_config.heads
    removed = [name for name in config.removed if name not in zoo.canonical]
    model = model.eval()
    parts = [slice(start, start + block) for start in range(0, len(params), block)]
    if config.export_format == "pth":
        out.mkdir(parents=True)
        for part in tqdm(parts, desc="exporting", disable=None):
            nets = params[part]
            of_heads = _edited(task, model, nets, removed).to("cpu").of_heads(len(nets))
            for row in range(len(nets)):
                for path, edited in zip(head_files(out / f"net{part.start + row}.pth", heads), of_heads, strict=True):
                    write_tensors(path, state_dict_of(edited, row))
        return
    state = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()))
    plan = {"edited_copy_of": zoo.sha256, "style": config.data.style_function, "model": state.hexdigest()}
    shards = Shards(out, plan, len(parts))
    for number in tqdm(shards.missing(), desc="exporting", disable=None):
        edited = _edited(task, model, params[parts[number]], removed)
        columns = {name: column[parts[number]].repeat_interleave(heads, 0) for name, column in zoo.columns.items()}
        if heads > 1:
            columns["head"] = torch.arange(heads).repeat(len(edited) // heads)
        shards.write(number, edited, **columns)
    source = {"path": str(zoo.path), "sha256": zoo.sha256, "provenance": zoo.provenance}
    kept: dict[str, Any] = {key: zoo.provenance[key] for key in ("classes", "output_offset") if key in zoo.provenance}
    splits = {name: (rows[:, None] * heads + torch.arange(heads)).flatten() for name, rows in zoo.splits.items()}
    shards.merge(splits, {**kept, "source": source, "versions": versions()})
    print(f"{out}: {counted(heads * len(zoo), 'edited network')}{f', {heads} for each' if heads > 1 else ''}")


def _edited(task: type[ZooTask], model: Metanetwork, params: NetParams, removed: Sequence[str]) -> NetParams:
    """The task's answer about stored networks, on the model's device: edited networks."""
    answer = task.answer(model, in_single(params.to(next(model.parameters()).device)), removed)
    assert isinstance(answer, NetParams)
    return answer
