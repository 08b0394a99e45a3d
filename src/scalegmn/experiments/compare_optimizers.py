"""Learned optimisers beside tuned hand-designed ones, on the problems that they were trained on and on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from scalegmn.experiments.optimizer_run import OptimizerRunConfig, load_trained_optimizer
from scalegmn.optimizers.evaluation import Curves, learned_curves, steps_to, tuned
from scalegmn.optimizers.hand_designed import HandDesigned
from scalegmn.optimizers.problems import ImageData, InnerProblem, ProblemConfig
from scalegmn.reporting.figures import optimizer_curves
from scalegmn.reporting.files import write_json
from scalegmn.reporting.words import counted

HAND_DESIGNED = {
    "SGD with momentum": HandDesigned("sgd"),
    "SGD with momentum, cosine": HandDesigned("sgd", cosine=True),
    "Adam": HandDesigned("adam"),
    "Adam, cosine": HandDesigned("adam", cosine=True),
}
"""Baselines, each with the best of 20 learning rates."""

REFERENCE = "Adam"
"""Steps are counted to its last loss."""

SETTINGS = ("unseen", "wider", "deeper", "longer")
"""unseen: new networks of the family; wider: hidden layers twice as wide; deeper: the last hidden layer twice; longer:
five times the steps."""


@dataclass(frozen=True)
class Row:
    """An optimiser on one setting.

    Attributes:
        name: the optimiser.
        loss: mean over networks of the last losses on batches.
        test_loss, accuracy: means on the test images.
        steps: to the last loss of tuned Adam; None: it never gets there.
        seconds: processor time of a step of all networks.
        num_diverged: networks whose loss was not finite.
    """

    name: str
    loss: float
    test_loss: float
    accuracy: float
    steps: int | None
    seconds: float
    num_diverged: int


def setting(problem: ProblemConfig, name: str) -> ProblemConfig:
    """The problem of a setting (`SETTINGS`)."""
    if name == "wider":
        return replace(problem, hidden_dims=tuple(tuple(2 * n for n in dims) for dims in problem.hidden_dims))
    if name == "deeper":
        return replace(problem, hidden_dims=tuple((*dims, dims[-1]) for dims in problem.hidden_dims))
    return problem


def compared(
    learned: Mapping[str, Path], config: OptimizerRunConfig, name: str, num_steps: int, num_networks: int, seed: int = 0
) -> tuple[list[Row], dict[str, Curves]]:
    """Rows and curves of the hand-designed optimisers and of learned ones on one setting. All train the same networks
    on the same images.

    Args:
        learned: name -> run folder.
        config: names the problem.
        name: of `SETTINGS`.
        num_steps: of the inner networks.
        num_networks: of them.
        seed: of the networks and of the images that they see.
    """
    problem_config = setting(config.problem, name)
    data = ImageData(problem_config)
    problem = InnerProblem.draw(problem_config, data, num_networks, torch.Generator().manual_seed(1000 + seed))
    width, names, curves = max(1, num_steps // 20), {}, {}
    for label, optimizer in HAND_DESIGNED.items():
        best = tuned(optimizer, problem, num_steps, width)
        names[label], curves[label] = f"{label}, rate {best.rate:.4g}", best.curves
    for label, run in learned.items():
        names[label], curves[label] = label, learned_curves(load_trained_optimizer(run)[0], problem, num_steps)
    target = float(curves[REFERENCE].losses[:, -width:].mean())
    rows = []
    for label, own in curves.items():
        loss, accuracy = problem.measure(own.parameters, "test")
        rows.append(
            Row(
                names[label],
                float(own.losses[:, -width:].mean()),
                float(loss.mean()),
                float(accuracy.mean()),
                steps_to(own, target, width),
                own.seconds / num_steps,
                own.num_diverged,
            )
        )
    return rows, curves


def table(rows: Sequence[Row]) -> str:
    """Rows as text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'optimiser':<{width}}  last loss  test loss  accuracy  steps to Adam's  ms/step  diverged"]
    for row in rows:
        steps = "never" if row.steps is None else str(row.steps)
        lines.append(
            f"{row.name:<{width}}  {row.loss:9.4f}  {row.test_loss:9.4f}  {row.accuracy:8.1%}  {steps:>15}  "
            f"{1e3 * row.seconds:7.1f}  {row.num_diverged:8}"
        )
    return "\n".join(lines)


def compare_optimizers(
    runs: Sequence[Path], num_steps: int, num_networks: int, settings: Sequence[str], out: Path | None = None
) -> str:
    """The tables of all settings, as text; with `out`, also `optimizers.json` and a figure per setting there.

    Raises:
        ValueError: a folder is none of a finished run, or the runs' problems differ.
    """
    learned: dict[str, Path] = {}
    configs = []
    for run in runs:
        config = load_trained_optimizer(run)[1]
        configs.append(config)
        name = config.optimizer.network
        learned[name if name not in learned else f"{name} ({run})"] = run
    for run, config in zip(runs, configs, strict=True):
        if config.problem != configs[0].problem:
            raise ValueError(f"{run}: its inner problems differ from those of {runs[0]}; compare runs of one problem")
    texts, content = [], {}
    for name in settings:
        steps = 5 * num_steps if name == "longer" else num_steps
        rows, curves = compared(learned, configs[0], name, steps, num_networks)
        texts.append(f"{name}: {counted(num_networks, 'network')}, {steps} steps\n\n{table(rows)}")
        content[name] = [vars(row) for row in rows]
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            optimizer_curves(out / f"{name}.png", {label: own.smoothed(10) for label, own in curves.items()})
    if out is not None:
        write_json(out / "optimizers.json", content)
    return "\n\n".join(texts)
