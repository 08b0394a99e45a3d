"""Bundles: a trained model as one folder to pass on.

`model.safetensors` (parameters, and the normalisation of inputs), `config.json` (complete configuration, the run's
summary: task, data, networks, metrics, versions) and `README.md`, a model card. Whatever takes `--checkpoint RUN` takes
a bundle too, as does `scalegmn.load` in Python.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from scalegmn.experiments.trained import BUNDLE, TrainedModel, description_sha256, load, load_model, weights_file
from scalegmn.reporting.files import removed_on_failure, write_atomic, write_json


def write_bundle(run: Path, out: Path, page: str | None = None) -> None:
    """Writes the model of a finished run as a bundle, whole or not at all.

    Args:
        run: its folder.
        out: the bundle's.
        page: HTML that shows the model at work, for the file `page.html`.

    Raises:
        ValueError: the run is not finished or damaged, or `out` exists.
    """
    if out.exists():
        raise ValueError(f"--out: {out} exists already; choose another")
    model, weights = load(run), weights_file(run).read_bytes()
    content: dict[str, Any] = {
        "format": BUNDLE,
        "config": model.config.content(),
        "normalization": [name for name in model.metanetwork(model.spec).state_dict() if "normalization." in name],
        "summary": model.summary,
        "model_sha256": hashlib.sha256(weights).hexdigest(),
    }
    content["sha256"] = description_sha256(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f"{out.name}.{uuid4().hex}.tmp")
    with removed_on_failure(staging):
        staging.mkdir()
        write_atomic(staging / "model.safetensors", weights)
        write_json(staging / "config.json", content)
        if page is not None:
            write_atomic(staging / "page.html", page)
        write_atomic(staging / "README.md", model_card(model, out.name, page is not None))
        os.rename(staging, out)


def model_card(model: TrainedModel, name: str, has_page: bool = False) -> str:
    """What people should know of a model, as Markdown.

    Args:
        model: the model.
        name: of the bundle.
        has_page: whether `page.html` lies beside it.
    """
    config, summary, data = model.config, model.summary, model.summary["data"]
    sizes = ", ".join(f"{number:,} {split}" for split, number in data["networks"].items())
    kinds, reads = str(model.spec), f"networks such as {model.spec}, some models also with wider hidden layers"
    if model.num_architectures > 1:
        kinds = f"{model.num_architectures:,} architectures within {model.spec}"
        reads = f"networks of any architecture within {model.spec}, some models also with wider hidden layers"
    metrics = [f"| {key} | {value:.4f} |" for key, value in summary.items() if key.startswith(("test_", "val_"))]
    claims = sorted({*config.model_config.exact_symmetries, *model.canonical})
    edits = " --out EDITED" if model.task_class.output == "parameters" else ""
    versions = ", ".join(f"{package} {number}" for package, number in summary["versions"].items())
    limits = [
        f"It reads {reads}; others are refused.",
        "The figures hold for networks made as those above. Others may get answers that are far off, without warning.",
    ]
    visibility = load_model(config.model_config, model.run, model.spec).visibility(model.spec)
    if not visibility.is_whole:
        limits.append(f"It sees {visibility} of such networks; no other parameter changes an answer.")
    limits += model.task_class.limits
    return "\n".join(
        [
            f"# {name}",
            "",
            model.task_class.answers.format(data=config.data),
            f"A `{config.model}` metanetwork, {summary['parameters']:,} parameters, made with scalegmn.",
            "",
            "```",
            f"scalegmn predict --checkpoint {name} NET...{edits}",
            "```",
            "",
            f"or `model = scalegmn.load({name!r})`, `model(params)`.",
            "",
            *(["[page.html](page.html) shows test networks, answers, and what they rest on.", ""] if has_page else []),
            "## Data",
            "",
            f"- Zoo `{data['zoo']}`, sha256 {data['sha256']}, read {data['read']}.",
            f"- Networks: {sizes}; {kinds}.",
            *([f"- Classes, from 0: {', '.join(data['classes'])}."] if "classes" in data else []),
            "",
            "## Metrics",
            "",
            f"Of the epoch that was best on the validation split ({summary['best_epoch']}), by",
            f"`scalegmn train {model.task} --conf {name}/config.json`.",
            "",
            "| metric | value |",
            "| --- | ---: |",
            *metrics,
            "",
            "## Symmetries",
            "",
            f"Keeps exactly: {', '.join(claims) or 'none'}.",
            f"Measured by `scalegmn symmetry --checkpoint {name}`, which reads the zoo.",
            "",
            "## Limits",
            "",
            *(f"- {limit}" for limit in limits),
            "",
            f"Versions: {versions}; git commit {summary['git_commit']}.",
            "",
        ]
    )
