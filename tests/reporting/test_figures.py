import matplotlib.image
import pytest

from scalegmn.reporting.figures import compared_curves, learning_curves

ROWS = [{"epoch": epoch, "train_loss": 1.0, "val_loss": 2.0, "val_tau": 0.1} for epoch in range(3)]
COSTS = {"grad_norm": 1.0, "grad_norm_max": 9.0, "networks_per_second": 100.0, "memory_gb": 0.5, "data_wait": 0.1}


@pytest.mark.parametrize(("columns", "size"), [(0, (432, 1200)), (1, (432, 1800)), (2, (432, 1800)), (5, (864, 1800))])
def test_a_panel_for_what_rows_have(tmp_path, columns, size):
    """120 dots per inch; loss and tau, then panels of 5 x 3.6 inches for gradient norms and each cost, 3 in a line."""
    extra = dict(list(COSTS.items())[:columns])
    learning_curves(tmp_path / "curves.png", [{**row, **extra} for row in ROWS], 1)
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[:2] == size


def test_an_epoch_may_lack_a_value(tmp_path):
    learning_curves(tmp_path / "curves.png", [{**ROWS[0], "memory_gb": 1.0}, {**ROWS[1], "memory_gb": None}], 0)


def test_compared_curves_are_a_png_of_any_names():
    content = compared_curves({"a $x_{": ROWS, "b": ROWS[:1], "c": [{"epoch": 0, "val_f1": 1.0}]})
    assert content.startswith(b"\x89PNG")
