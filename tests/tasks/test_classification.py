import pytest
import torch

from scalegmn.data.loader import DataConfig
from scalegmn.data.zoo_format import Networks, write_zoo
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.spec import NetSpec
from scalegmn.tasks.classification import Classification


@pytest.fixture
def data(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "sine"), 50).to(torch.float32)
    splits = {"train": torch.arange(30), "val": torch.arange(30, 40), "test": torch.arange(40, 50)}
    write_zoo(tmp_path / "zoo", [Networks((params,), {"label": torch.arange(50) % 5})], splits, {})
    return DataConfig(str(tmp_path / "zoo"))


def test_metrics_are_over_the_whole_split(data):
    task = Classification(data, 4, 5)
    assert task.steps_per_epoch == 8
    model = ScaleGMNConfig(hidden_dim=4, out_dim=5).build(task.spec)
    found = task.evaluate(model, "val", torch.device("cpu"))
    with torch.no_grad():
        logits = model(task.splits["val"].read(slice(None)))
    labels = torch.arange(30, 40) % 5
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_prepare_normalizes_by_the_training_split(data):
    task = Classification(data, 4, 5)
    model = ScaleGMNConfig(hidden_dim=4, out_dim=5, normalize=True).build(task.spec)
    task.prepare(model)
    expected = task.splits["train"].read(slice(None)).weights[0].square().mean().sqrt()
    torch.testing.assert_close(model.normalization.weight_scales[0], expected)


def test_debug_and_labels(data):
    assert len(Classification(data, 4, 5, debug=True).splits["train"]) == 16
    with pytest.raises(ValueError, match=r"out_dim: 4 classes, but the labels .* reach from 0 to 4"):
        Classification(data, 4, 4)


def test_confusion_matrix_is_drawn(data, tmp_path):
    task = Classification(data, 4, 5)
    model = ScaleGMNConfig(hidden_dim=4, out_dim=5).build(task.spec)
    task.evaluate(model, "test", torch.device("cpu"), tmp_path)
    assert (tmp_path / "confusion_matrix.png").stat().st_size > 1000
