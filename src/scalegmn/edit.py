"""Edited networks as files: a user's own, or a whole zoo's (`inr_editing.py --edit`, `--export_edited`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from scalegmn.config import ScriptConfig
from scalegmn.data.inr_zoos import layer_names, read_state_dict, state_dict_of, write_state_dict
from scalegmn.data.shards import Shards
from scalegmn.data.zoo_format import Zoo, in_single
from scalegmn.log import versions
from scalegmn.models.base import Metanetwork
from scalegmn.spec import NetParams, NetSpec
from scalegmn.symmetry.canonicalize import TO_CANONICAL
from scalegmn.tasks.editing import edited
from scalegmn.trained import load_model, run_data


@dataclass(frozen=True)
class EditConfig(ScriptConfig):
    """Train a model that edits INRs, or edit INRs with one that has been trained."""

    checkpoint: str | None = None
    """Run folder of a trained model, which edits files (--edit) or its zoo (--export_edited) instead of training."""

    edit: str | None = None
    """An INR as a .pth or .safetensors state dict, or a folder of them: edit these instead of training."""

    out: str | None = None
    """Where the edited file, or the folder of edited files, goes."""

    export_edited: str | None = None
    """Write all networks of the zoo, edited by the trained model, to this folder."""

    export_format: Literal["zoo", "pth"] = "zoo"
    """As a zoo, or as one file net<number>.pth per network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.edit is None) != (self.out is None) or (self.edit is not None and self.checkpoint is None):
            raise ValueError("--checkpoint RUN, --edit FILE and --out FILE belong together: give all or none")
        if self.checkpoint is not None and self.edit is None and self.export_edited is None:
            raise ValueError("--checkpoint: a trained model edits files (--edit, --out) or its zoo (--export_edited)")
        if self.export_edited is not None and Path(self.export_edited).exists():
            raise ValueError(f"--export_edited: {self.export_edited} exists already")
        if self.export_edited is not None and self.seeds is not None:
            raise ValueError("--export_edited: a zoo is edited by one model; leave --seeds out")
        self.model_config.check_output("parameters", "editing")

    @property
    def removed(self) -> tuple[str, ...]:
        """The symmetries that the networks which the model reads have removed."""
        return self.data.canonicalize if self.data.switch_to_canon else ()


@torch.no_grad()
def edit_stored(model: Metanetwork, params: NetParams, removed: Sequence[str]) -> NetParams:
    """Edits networks as they are stored: c^-1 (c theta + delta(c theta)), c what leads to canonical networks."""
    passed = []
    for name in removed:
        passed.append(TO_CANONICAL[name](params))
        params = passed[-1].act(params)
    params = edited(model, params)
    for element in reversed(passed):
        params = element.inverse().act(params)
    return params


def edit_files(config: EditConfig) -> None:
    """Edits the files of `config.edit`, each into one of the same name, keys and type.

    Raises:
        ValueError: a file is missing, refused, not a network that the model was trained for, or exists in `out`.
    """
    run, source, out = Path(config.checkpoint), Path(config.edit), Path(config.out)
    model = load_model(config.model_config, run, NetSpec.from_dict(run_data(run)["spec"]))
    files = [(source, out)]
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix in (".pth", ".safetensors"))
        files = [(path, out / path.relative_to(source)) for path in found]
    if not files or not source.exists():
        raise ValueError(f"--edit: {source}: no .pth or .safetensors file there")
    for path, target in files:
        if target.exists():
            raise ValueError(f"--out: {target} exists already")
        if target.suffix != path.suffix:
            raise ValueError(f"--out: found {target}, expected a name that ends in {path.suffix} as that of {path}")
    for path, _ in files:  # before anything is written
        state = read_state_dict(path)
        _as_network(path, [state[name] for name in layer_names(path, state)], model.spec)
    for path, target in tqdm(files, unit=" networks", desc="editing", disable=None):
        state = read_state_dict(path)
        names = layer_names(path, state)
        params = _as_network(path, [state[name] for name in names], model.spec)
        changed = edit_stored(model, params, config.removed)
        tensors = [tensor for pair in zip(changed.weights, changed.biases, strict=True) for tensor in pair]
        state |= {name: new[0].to(state[name].dtype) for name, new in zip(names, tensors, strict=True)}
        target.parent.mkdir(parents=True, exist_ok=True)
        write_state_dict(target, state)
    print(f"{out}: {len(files):,} networks edited")


def export_zoo(config: EditConfig, model: Metanetwork, zoo: Zoo) -> None:
    """Writes a zoo's networks, edited, as a zoo (whose provenance names model and source) or as `.pth` files."""
    out, params, block = Path(config.export_edited), zoo.params, config.batch_size
    removed = [name for name in config.removed if name not in zoo.canonical]
    model = model.eval()
    parts = [slice(start, start + block) for start in range(0, len(params), block)]
    device = next(model.parameters()).device
    if config.export_format == "pth":
        out.mkdir(parents=True)
        for part in tqdm(parts, desc="exporting", disable=None):
            changed = edit_stored(model, in_single(params[part].to(device)), removed).to("cpu")
            for row in range(len(changed)):
                write_state_dict(out / f"net{part.start + row}.pth", state_dict_of(changed, row))
        return
    state = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()))
    plan = {"edited_copy_of": zoo.sha256, "style": config.data.style_function, "model": state.hexdigest()}
    shards = Shards(out, plan, len(parts))
    for number in tqdm(shards.missing(), desc="exporting", disable=None):
        changed = edit_stored(model, in_single(params[parts[number]].to(device)), removed)
        shards.write(number, changed, **{name: column[parts[number]] for name, column in zoo.columns.items()})
    source = {"path": str(zoo.path), "sha256": zoo.sha256, "provenance": zoo.provenance}
    shards.merge(zoo.splits, {"source": source, "versions": versions()})
    print(f"{out}: {len(zoo):,} edited networks")


def _as_network(path: Path, tensors: Sequence[Tensor], spec: NetSpec) -> NetParams:
    """A batch of one network of the spec; raises ValueError when the tensors are another's."""
    found = [tuple(tensor.shape) for tensor in tensors]
    expected = [shape for layer in spec.layers for shape in (layer.weight_shape, layer.weight_shape[:1])]
    if found != expected:
        raise ValueError(f"{path}: shapes {found}, but the model was trained for {spec}, {expected}")
    batch = [tensor[None].float() for tensor in tensors]
    if not all(tensor.isfinite().all() for tensor in batch):
        raise ValueError(f"{path}: a weight or bias is NaN or infinite")
    return NetParams(spec, tuple(batch[::2]), tuple(batch[1::2]))
