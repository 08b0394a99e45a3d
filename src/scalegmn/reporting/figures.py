"""Figures of runs, tasks and zoos."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def _figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    from matplotlib.figure import Figure  # takes a second to import, which notebooks need not wait for

    return Figure(figsize=(width, height), layout="constrained")


COSTS = {
    "networks_per_second": "networks/s",
    "memory_gb": "peak memory [GB]",
    "data_wait": "share of time waiting for data",
}
"""Columns of metrics.jsonl with the costs of an epoch -> labels of their axes."""


def learning_curves(path: Path, rows: Sequence[Mapping[str, Any]], best_epoch: int) -> None:
    """Metrics, gradient norms and costs over epochs, a panel each; the best epoch is marked.

    Args:
        path: of the PNG.
        rows: lines of metrics.jsonl, with `epoch`, `train_<metric>` and `val_<metric>`; `grad_norm`, `grad_norm_max`
            and the columns of `COSTS` are optional.
        best_epoch: the epoch whose checkpoint was kept.
    """
    panels = _panels(rows[0])
    num_columns = min(3, len(panels))
    num_lines = -(-len(panels) // 3)
    figure = _figure(5 * num_columns, 3.6 * num_lines)
    for number, (name, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_lines, num_columns, number)
        for label, key in curves.items():
            _curve(axes, rows, key, label=label)
        axes.axvline(best_epoch, color="grey", lw=0.8, ls=":", label="best")
        axes.set(xlabel="epoch", ylabel=name)
        if name == "gradient norm":
            axes.set_yscale("log")
        if name in COSTS.values():
            axes.set_ylim(bottom=0)
        else:
            axes.legend()
    figure.savefig(path, dpi=120)


def optimizer_curves(path: Path, losses: Mapping[str, Any]) -> None:
    """Losses of networks under training, on a logarithmic axis: the mean over networks or runs, and a band between the
    smallest and the largest.

    Args:
        path: of the PNG.
        losses: optimiser -> [networks or runs, T].
    """
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    for label, values in losses.items():
        array = np.asarray(values)
        steps = np.arange(1, array.shape[1] + 1)
        (line,) = axes.plot(steps, array.mean(0), label=label)
        axes.fill_between(steps, array.min(0), array.max(0), color=line.get_color(), alpha=0.15)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def _panels(columns: Collection[str]) -> dict[str, dict[str, str]]:
    """Name of a panel -> label of a curve -> its column, for the columns that exist."""
    metrics = [key.removeprefix("val_") for key in columns if key.startswith("val_")]
    panels = {name: {"train": f"train_{name}", "val": f"val_{name}"} for name in metrics}
    panels |= {"gradient norm": {"mean": "grad_norm", "largest": "grad_norm_max"}}
    panels |= {name: {name: key} for key, name in COSTS.items()}
    panels = {name: {label: key for label, key in curves.items() if key in columns} for name, curves in panels.items()}
    return {name: curves for name, curves in panels.items() if curves}


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, label: str | None = None, **style: Any) -> None:
    """Plots a column over epochs, without the rows that have no value."""
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=label, **style)


def compared_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Training loss and validation metrics of several runs over epochs, a panel each, a colour per run.

    Args:
        runs: name -> lines of metrics.jsonl, at least one per run.

    Returns:
        A PNG.
    """
    columns = dict.fromkeys(key for rows in runs.values() for row in rows for key in row)
    keys = [key for key in columns if key == "train_loss" or key.startswith("val_")]
    num_beside = max(1, int(1.8 * len(keys)))  # names in a line of the legend
    figure = _figure(4.4 * len(keys), 3.5 + 0.25 * -(-len(runs) // num_beside))
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for number, (name, rows) in enumerate(runs.items()):
            style = {"color": f"C{number % 10}", "ls": ("-", "--", ":", "-.")[number // 10 % 4]}
            if any(row.get(key) is not None for row in rows):
                _curve(axes, rows, key, label=name.replace("$", r"\$"), **style)
        axes.set(xlabel="epoch", title=key)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=num_beside, frameon=False)
    content = BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return content.getvalue()


def results_and_costs(path: Path, points: Mapping[str, tuple[float, float, float]], name: str) -> None:
    """A metric against the seconds of training, a labelled point per model.

    Args:
        path: of the PNG.
        points: model -> seconds, mean and standard deviation of the metric.
        name: of the metric.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    order = sorted(points.items(), key=lambda point: point[1][1])
    for number, (model, (seconds, mean, std)) in enumerate(order):
        axes.errorbar(seconds, mean, yerr=std, fmt="o", capsize=3, color=f"C{number}")
        axes.annotate(  # beside the axes: points may be close to each other
            model.replace("$", r"\$"),
            (seconds, mean),
            xytext=(1.04, (number + 0.5) / len(order)),
            textcoords="axes fraction",
            va="center",
            color=f"C{number}",
            arrowprops={"arrowstyle": "-", "color": f"C{number}", "lw": 0.6, "relpos": (0, 0.5)},
        )
    axes.set(xscale="log", xlabel="seconds of one run", ylabel=name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def networks_and_results(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> None:
    """A metric against the number of training networks, a curve per model.

    Args:
        path: of the PNG.
        curves: model -> rows with `train_networks`, the metric's mean and, as `<metric>_std`, its standard deviation
            or None.
        metric: the column of the metric.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for model, rows in curves.items():
        numbers, means = [row["train_networks"] for row in rows], [row[metric] for row in rows]
        spreads = [row[f"{metric}_std"] or 0.0 for row in rows]
        axes.errorbar(numbers, means, yerr=spreads, fmt="o-", capsize=3, label=model.replace("$", r"\$"))
    axes.set(xscale="log", xlabel="training networks", ylabel=metric.replace("_", " ", 1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=120)


def confusion_matrix(path: Path, counts: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Counts [true class, predicted class] as an image with numbers; colours are shares of the true class.

    Args:
        path: of the PNG.
        counts: [classes, classes].
        names: of the classes; None: they have only numbers.
    """
    size = 2 + 0.45 * len(counts)
    figure = _figure(size, size)
    axes = figure.subplots()
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(rates, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if rates[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(count)), ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="predicted", ylabel="true", xticks=range(len(counts)), yticks=range(len(counts)))
    if names is not None:
        texts = [name.replace("$", r"\$") for name in names[: len(counts)]]
        axes.set_xticklabels(texts, rotation=90)
        axes.set_yticklabels(texts)
    axes.set_title(f"accuracy {np.trace(counts) / max(counts.sum(), 1):.3f}")
    figure.savefig(path, dpi=120)


def reconstructions(path: Path, originals: np.ndarray, fits: np.ndarray, psnr: np.ndarray) -> None:
    """Images [n, height, width, channels] above their fits, and a histogram of all networks' PSNR."""
    figure = _figure(max(4.0, len(originals)), 4.5)
    top, bottom = cast("Sequence[SubFigure]", figure.subfigures(2, 1, height_ratios=[2, 2.2]))
    for row, images in zip(top.subplots(2, len(originals), squeeze=False), (originals, fits), strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.clip(0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.axis("off")
    axes = bottom.subplots()
    axes.hist(psnr, bins=60)
    axes.set(xlabel="PSNR [dB]", ylabel="networks", title=f"median {np.median(psnr):.1f} dB")
    figure.savefig(path, dpi=120)


def edits(path: Path, inputs: np.ndarray, targets: np.ndarray, outputs: np.ndarray, errors: np.ndarray) -> None:
    """Columns of images [n, height, width, channels]: the INR's image, the target, the edited INR's image, the error.

    Args:
        path: of the PNG.
        inputs: images of the INRs.
        targets: images that the edited INRs should have.
        outputs: images of the edited INRs.
        errors: [n] mean squared errors, in the titles.
    """
    rows = {"input": inputs, "target": targets, "edited": outputs, "error": np.abs(outputs - targets)}
    figure = _figure(1.2 * len(inputs) + 0.6, 5.2)
    for line, (name, images) in zip(figure.subplots(4, len(inputs), squeeze=False), rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.clip(0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
        if name == "input":
            for axes, error in zip(line, errors, strict=True):
                axes.set_title(f"{error:.4f}", fontsize=8)
    figure.savefig(path, dpi=120)


def accuracies(path: Path, groups: Mapping[str, np.ndarray]) -> None:
    """Histograms of test accuracies, a line per named group of networks."""
    figure = _figure(6, 4)
    axes = figure.subplots()
    for name, values in groups.items():
        axes.hist(values, bins=50, range=(0, 1), histtype="step", label=name)
    axes.set(xlabel="test accuracy", ylabel="networks")
    axes.legend()
    figure.savefig(path, dpi=120)


def predictions(
    path: Path, true: np.ndarray, predicted: np.ndarray, kinds: Mapping[str, np.ndarray], title: str
) -> None:
    """Predicted against true test accuracy, and the means of both by decile of the prediction.

    Args:
        path: of the PNG.
        true: [n] in [0, 1].
        predicted: [n] in [0, 1].
        kinds: name -> [n] bool, the networks of one colour.
        title: of the scatter plot.
    """
    figure = _figure(10, 5)
    scatter, calibration = figure.subplots(1, 2)
    for name, members in kinds.items():
        scatter.scatter(true[members], predicted[members], s=6, alpha=0.5, label=name)
    if len(kinds) > 1:
        scatter.legend()
    scatter.set(xlabel="true test accuracy", ylabel="predicted", title=title, aspect="equal")
    deciles = np.array_split(predicted.argsort(kind="stable"), min(10, len(predicted)))
    means = [[values[rows].mean() for rows in deciles] for values in (predicted, true)]
    spread = [true[rows].std() for rows in deciles]
    calibration.errorbar(*means, yerr=spread, fmt="o-", capsize=3)
    calibration.set(xlabel="mean predicted, by decile", ylabel="mean true (bars: standard deviation)", aspect="equal")
    for axes in (scatter, calibration):
        axes.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
        axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.savefig(path, dpi=120)


def explanation(
    path: Path, neurons: Sequence[np.ndarray], ranked: np.ndarray, random: np.ndarray, meaning: str
) -> None:
    """Contributions of hidden neurons, and the score while neurons are removed.

    Args:
        path: of the PNG.
        neurons: per hidden layer, [n_l] contributions.
        ranked: the score without the first 0, 1, ... neurons by contribution, [k + 1].
        random: the same for random orders, [draws, k + 1].
        meaning: what the score is.
    """
    figure = _figure(10, 3.6)
    left, right = figure.subplots(1, 2)
    meaning, start = meaning.replace("$", r"\$"), 0
    for number, values in enumerate(neurons):
        left.bar(start + np.arange(len(values)), values, label=f"layer {number}")
        start += len(values) + 1
    left.axhline(0, color="grey", lw=0.8)
    left.set(xlabel="hidden neuron", ylabel=f"contribution to the {meaning}", xticks=[])
    left.legend()
    removed = np.arange(len(ranked))
    low, high = np.quantile(random, (0.1, 0.9), axis=0)
    right.fill_between(removed, low, high, alpha=0.25, color="grey", lw=0, label="random, 10 to 90 %")
    right.plot(removed, random.mean(0), color="grey", label="random, mean")
    right.plot(removed, ranked, marker="o", ms=3, label="largest contribution first")
    right.set(xlabel="neurons removed", ylabel=meaning)
    right.legend()
    figure.savefig(path, dpi=120)
