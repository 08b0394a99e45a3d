"""Learned optimisers beside tuned hand-designed ones, on the problems that they were trained on and on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

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

SETTINGS = ("unseen", "wider", "deeper", "longer", "digits")
"""unseen: new networks of the family; wider: hidden layers twice as wide; deeper: the last hidden layer twice; longer:
five times the steps; digits: the images of digits, resized alike."""


@dataclass(frozen=True)
class Row:
    """An optimiser on one setting. Tuples have an entry per run; a hand-designed optimiser has one.

    Attributes:
        name: the optimiser.
        losses: mean over networks of the last losses on batches.
        test_losses, accuracies: means on the test images.
        steps: to the last loss of tuned Adam; None: it never gets there.
        seconds: processor time of a step of all networks.
        num_diverged: networks whose loss was not finite.
    """

    name: str
    losses: tuple[float, ...]
    test_losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    steps: tuple[int | None, ...]
    seconds: float
    num_diverged: int


def setting(problem: ProblemConfig, name: str) -> ProblemConfig:
    """The problem of a setting (`SETTINGS`)."""
    if name == "wider":
        return replace(problem, hidden_dims=tuple(tuple(2 * n for n in dims) for dims in problem.hidden_dims))
    if name == "deeper":
        return replace(problem, hidden_dims=tuple((*dims, dims[-1]) for dims in problem.hidden_dims))
    if name == "digits":
        return replace(problem, images="digits", images_path=None)
    return problem


def compared(
    learned: Mapping[str, Sequence[Path]],
    config: OptimizerRunConfig,
    name: str,
    num_steps: int,
    num_networks: int,
    seed: int = 0,
) -> tuple[list[Row], dict[str, list[Curves]], list[str]]:
    """Rows and curves of the hand-designed optimisers and of learned ones on one setting, and why others are left out:
    `nfn` trains no other depths. All train the same networks on the same images.

    Args:
        learned: name -> run folders, one per seed of meta-training.
        config: names the problem.
        name: of `SETTINGS`.
        num_steps: of the inner networks.
        num_networks: of them.
        seed: of the networks and of the images that they see.
    """
    problem_config = setting(config.problem, name)
    data = ImageData(problem_config)
    problem = InnerProblem.draw(problem_config, data, num_networks, torch.Generator().manual_seed(1000 + seed))
    width, names = max(1, num_steps // 20), {}
    curves: dict[str, list[Curves]] = {}
    refusals = []
    for label, optimizer in HAND_DESIGNED.items():
        best = tuned(optimizer, problem, num_steps, width)
        names[label], curves[label] = f"{label}, rate {best.rate:.4g}", [best.curves]
    for label, runs in learned.items():
        optimizers = [load_trained_optimizer(run)[0] for run in runs]
        try:
            curves[label] = [learned_curves(each, problem, num_steps) for each in optimizers]
        except ValueError as error:  # networks of this setting are none that it trains
            refusals.append(f"{label} is left out: {error}")
        names[label] = label
    target = float(curves[REFERENCE][0].smoothed(width).mean(0)[-1])
    rows = []
    for label, own in curves.items():
        measured = [problem.measure(each.parameters, "test") for each in own]
        rows.append(
            Row(
                names[label],
                tuple(float(each.losses[:, -width:].mean()) for each in own),
                tuple(float(loss.mean()) for loss, _ in measured),
                tuple(float(accuracy.mean()) for _, accuracy in measured),
                tuple(steps_to(each, target, width) for each in own),
                fmean(each.seconds for each in own) / num_steps,
                sum(each.num_diverged for each in own),
            )
        )
    return rows, curves, refusals


def table(rows: Sequence[Row]) -> str:
    """Rows as text: means, and standard deviations over runs; steps of each run."""
    cells = [("optimiser", "last loss", "test loss", "accuracy %", "steps to Adam's", "ms/step", "diverged")]
    for row in rows:
        percent = [100 * accuracy for accuracy in row.accuracies]
        numbers = (_mean(row.losses, 4), _mean(row.test_losses, 4), _mean(percent, 1))
        steps = ", ".join("never" if each is None else str(each) for each in row.steps)
        cells.append((row.name, *numbers, steps, f"{1e3 * row.seconds:.1f}", str(row.num_diverged)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = ["<", *">" * (len(widths) - 1)]
    return "\n".join("  ".join(map("{:{}{}}".format, row, aligned, widths)) for row in cells)


def _mean(values: Sequence[float], digits: int) -> str:
    """The mean, and the standard deviation of several values."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {float(torch.tensor(values).std()):.{digits}f}"


def _by_seeds(runs: Sequence[Path]) -> tuple[dict[str, list[Path]], OptimizerRunConfig]:
    """Runs that differ in their seeds alone are one optimiser: name -> runs. And the configuration of the first run.

    Raises:
        ValueError: a folder is none of a finished run, or the runs' problems differ.
    """
    single = [seed for run in runs for seed in sorted(run.glob("seed_*")) or [run]]
    configs = [load_trained_optimizer(run)[1] for run in single]
    optimizers: dict[str, list[Path]] = {}
    for run, config in zip(single, configs, strict=True):
        if config.problem != configs[0].problem:
            raise ValueError(f"{run}: its inner problems differ from those of {single[0]}; compare runs of one problem")
        same = config.changed(run_dir=None, resume=None, train_args=replace(config.train_args, seed=0))
        optimizers.setdefault(same.to_yaml(), []).append(run)
    learned: dict[str, list[Path]] = {}
    for own in optimizers.values():
        name = configs[single.index(own[0])].optimizer.network
        learned[name if name not in learned else f"{name} ({own[0]})"] = own
    return learned, configs[0]


def compare_optimizers(
    runs: Sequence[Path], num_steps: int, num_networks: int, settings: Sequence[str], out: Path | None = None
) -> str:
    """The tables of all settings, as text; with `out`, also `optimizers.json` and a figure per setting there.

    Args:
        runs: folders of single runs, or of runs with several seeds.
        num_steps: of the inner networks.
        num_networks: of them.
        settings: of `SETTINGS`.
        out: a folder.

    Raises:
        ValueError: a folder is none of a finished run, or the runs' problems differ.
    """
    learned, config = _by_seeds(runs)
    texts, content = [], {}
    for name in settings:
        steps = 5 * num_steps if name == "longer" else num_steps
        rows, curves, refusals = compared(learned, config, name, steps, num_networks)
        header = f"{name}: {counted(num_networks, 'network')}, {steps} steps"
        texts.append("\n".join([header, "", table(rows), *refusals]))
        content[name] = [vars(row) for row in rows]
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            optimizer_curves(out / f"{name}.png", {label: _band(own) for label, own in curves.items()})
    if out is not None:
        write_json(out / "optimizers.json", content)
    return "\n\n".join(texts)


def _band(curves: Sequence[Curves]) -> Tensor:
    """Smoothed losses, [networks, T] of one run, or the means over networks of several, [runs, T]."""
    smoothed = [each.smoothed(10) for each in curves]
    return smoothed[0] if len(smoothed) == 1 else torch.stack([losses.mean(0) for losses in smoothed])
