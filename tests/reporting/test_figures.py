"""Figures by what they show: titles, labels and plotted values."""

import numpy as np
import pytest

from scalegmn.reporting import figures
from scalegmn.reporting.figures import compared_curves, learning_curves

ROWS = [{"epoch": epoch, "train_loss": 3.0 - epoch, "val_loss": 2.0, "val_tau": epoch / 10} for epoch in range(3)]
COSTS = {"grad_norm": 1.0, "grad_norm_max": 9.0, "networks_per_second": 100.0, "memory_gb": 0.5, "data_wait": 0.1}


def curves(axes):
    """Label -> plotted points."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def images(axes):
    return [np.asarray(image.get_array()) for image in axes.get_images()]


@pytest.mark.parametrize(
    ("num_columns", "panels", "size"),
    [
        (0, ["loss", "tau"], (10, 3.6)),
        (1, ["loss", "tau", "gradient norm"], (15, 3.6)),
        (2, ["loss", "tau", "gradient norm"], (15, 3.6)),
        (
            5,
            ["loss", "tau", "gradient norm", "networks/s", "peak memory [GB]", "share of time waiting for data"],
            (15, 7.2),
        ),
    ],
)
def test_a_panel_for_what_rows_have(tmp_path, drawn, num_columns, panels, size):
    """Panels of 5 x 3.6 inches: loss and tau, then gradient norms and each cost, three in a line."""
    extra = dict(list(COSTS.items())[:num_columns])
    learning_curves(tmp_path / "curves.png", [{**row, **extra} for row in ROWS], 1)
    figure = drawn["curves.png"]
    assert [axes.get_ylabel() for axes in figure.axes] == panels
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}
    assert tuple(figure.get_size_inches()) == size
    loss, tau, *others = map(curves, figure.axes)
    assert loss["train"] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert loss["val"] == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert [x for x, _ in loss["best"]] == [1, 1]
    assert {label: points for label, points in tau.items() if label != "best"} == {
        "val": [(0, 0.0), (1, 0.1), (2, 0.2)]
    }
    if others:
        assert others[0]["mean"] == [(0, 1.0), (1, 1.0), (2, 1.0)]
        assert figure.axes[2].get_yscale() == "log"
        assert ("largest" in others[0]) == (num_columns > 1)
    for axes, value in zip(figure.axes[3:], (100.0, 0.5, 0.1), strict=False):
        assert curves(axes)[axes.get_ylabel()] == [(0, value), (1, value), (2, value)]
        assert axes.get_ylim()[0] == 0


def test_an_epoch_may_lack_a_value(tmp_path, drawn):
    learning_curves(tmp_path / "curves.png", [{**ROWS[0], "memory_gb": 1.0}, {**ROWS[1], "memory_gb": None}], 0)
    assert curves(drawn["curves.png"].axes[2])["peak memory [GB]"] == [(0, 1.0)]


def test_compared_curves(drawn):
    """A panel per metric, a curve per run that has it; names are not read as formulas."""
    content = compared_curves({"a $x_{": ROWS, "b": ROWS[:1], "c": [{"epoch": 0, "val_f1": 1.0}]})
    assert content
    panels = {axes.get_title(): curves(axes) for axes in drawn[None].axes}
    assert list(panels) == ["train_loss", "val_loss", "val_tau", "val_f1"]
    assert panels["train_loss"] == {r"a \$x_{": [(0, 3.0), (1, 2.0), (2, 1.0)], "b": [(0, 3.0)]}
    assert panels["val_f1"] == {"c": [(0, 1.0)]}
    (legend,) = drawn[None].legends
    assert [text.get_text() for text in legend.get_texts()] == [r"a \$x_{", "b", "c"]


def test_results_and_costs(tmp_path, drawn):
    points = {"best$": (100.0, 0.9, 0.01), "cheap": (10.0, 0.5, 0.1)}
    figures.results_and_costs(tmp_path / "figure.png", points, "test accuracy")
    (axes,) = drawn["figure.png"].axes
    assert (axes.get_xscale(), axes.get_ylabel()) == ("log", "test accuracy")
    assert [text.get_text() for text in axes.texts] == ["cheap", r"best\$"]
    assert [text.xy for text in axes.texts] == [(10.0, 0.5), (100.0, 0.9)]
    bars = [container.lines[2][0].get_segments()[0] for container in axes.containers]
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.4, 0.6], [0.89, 0.91]])


def test_confusion_matrix(tmp_path, drawn):
    figures.confusion_matrix(tmp_path / "figure.png", np.array([[3, 1], [0, 4]]))
    (axes,) = drawn["figure.png"].axes
    assert axes.get_title() == "accuracy 0.875"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "3", (1, 0): "1", (1, 1): "4"}
    np.testing.assert_allclose(images(axes), [[[0.75, 0.25], [0, 1]]])


def test_reconstructions(tmp_path, drawn):
    originals, fits = np.full((2, 3, 3, 1), 0.25), np.full((2, 3, 3, 1), 1.5)
    figures.reconstructions(tmp_path / "figure.png", originals, fits, np.array([10.0, 20.0, 40.0]))
    *pictures, histogram = drawn["figure.png"].axes
    assert [images(axes)[0].mean() for axes in pictures] == [0.25, 0.25, 1.0, 1.0]  # clipped to [0, 1]
    assert (histogram.get_xlabel(), histogram.get_title()) == ("PSNR [dB]", "median 20.0 dB")
    assert sum(patch.get_height() for patch in histogram.patches) == 3


def test_edits(tmp_path, drawn):
    values = {"input": 0.1, "target": 0.5, "edited": 0.75, "error": 0.25}
    inputs, targets, outputs = (np.full((2, 3, 3, 1), values[name]) for name in ("input", "target", "edited"))
    figures.edits(tmp_path / "figure.png", inputs, targets, outputs, np.array([0.5, 0.25]))
    axes = np.array(drawn["figure.png"].axes).reshape(4, 2)
    assert [first.get_ylabel() for first in axes[:, 0]] == list(values)
    np.testing.assert_allclose([images(first)[0][0, 0] for first in axes[:, 0]], list(values.values()))
    assert [top.get_title() for top in axes[0]] == ["0.5000", "0.2500"]


def test_accuracies(tmp_path, drawn):
    figures.accuracies(tmp_path / "figure.png", {"train": np.array([0.1, 0.9, 0.9]), "test": np.array([0.5])})
    (axes,) = drawn["figure.png"].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("test accuracy", "networks")
    assert {patch.get_label(): patch.get_xy()[:, 1].max() for patch in axes.patches} == {"train": 2, "test": 1}


def test_predictions(tmp_path, drawn):
    true, predicted = np.linspace(0, 1, 20), np.linspace(0.2, 0.8, 20)
    kinds = {"relu": np.arange(20) < 5, "tanh": np.arange(20) >= 5}
    figures.predictions(tmp_path / "figure.png", true, predicted, kinds, "tau 1.000")
    scatter, calibration = drawn["figure.png"].axes
    assert scatter.get_title() == "tau 1.000"
    dots = {dots.get_label(): np.asarray(dots.get_offsets()) for dots in scatter.collections}
    for name, members in kinds.items():
        np.testing.assert_allclose(dots[name], np.stack([true[members], predicted[members]], axis=1))
    x, y = np.array(calibration.containers[0].lines[0].get_data(), dtype=float)
    np.testing.assert_allclose(x, predicted.reshape(10, 2).mean(1))
    np.testing.assert_allclose(y, true.reshape(10, 2).mean(1))
