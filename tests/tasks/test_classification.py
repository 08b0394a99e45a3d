import math
from dataclasses import replace

import pytest
import torch

from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import NetSpec
from scalegmn.tasks.classification import Classification, ClassificationConfig
from scalegmn.zoos.augment import AugmentConfig
from scalegmn.zoos.loader import DataConfig
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo

FIVE = ScaleGMNConfig(hidden_dim=4, out_dim=5)
"""A model for five classes."""


@pytest.fixture
def data(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "sine"), 50).to(torch.float32)
    splits = {"train": torch.arange(30), "val": torch.arange(30, 40), "test": torch.arange(40, 50)}
    write_zoo(tmp_path / "zoo", [Networks((params,), {"label": torch.arange(50) % 5})], splits, {})
    return DataConfig(str(tmp_path / "zoo"))


def test_metrics_are_over_the_whole_split(data):
    task = Classification(data, 4, FIVE)
    assert task.steps_per_epoch == 8
    model = FIVE.build(task.spec)
    found = task.evaluate(model, "val", torch.device("cpu"))
    with torch.no_grad():
        logits = model(task.splits["val"].read(slice(None)))
    labels = torch.arange(30, 40) % 5
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_label_smoothing_is_for_training_alone(data):
    plain, smooth = (Classification(data, 4, FIVE, options=ClassificationConfig(share)) for share in (0.0, 0.2))
    model, (params, labels) = FIVE.build(plain.spec), next(iter(plain.splits["train"].batches()))
    logits = model(params).log_softmax(1)
    expected = -0.8 * logits.gather(1, labels[:, None])[:, 0] - 0.2 * logits.mean(1)
    torch.testing.assert_close(smooth.loss(model, params, labels), expected.mean())
    assert smooth.evaluate(model, "val", torch.device("cpu")) == plain.evaluate(model, "val", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"label_smoothing: found 1, expected a share in \[0, 1\)"):
        ClassificationConfig(1)


def test_prepare_normalizes_by_the_training_split(data):
    task = Classification(data, 4, FIVE)
    model = replace(FIVE, normalize=True).build(task.spec)
    task.prepare(model)
    expected = task.splits["train"].read(slice(None)).weights[0].square().mean().sqrt()
    torch.testing.assert_close(model.normalization.weight_scales[0], expected)


def test_debug_and_labels(data):
    assert len(Classification(data, 4, FIVE, debug=True).splits["train"]) == 16
    with pytest.raises(ValueError, match=r"out_dim: 4 classes, but the labels .* reach from 0 to 4"):
        Classification(data, 4, replace(FIVE, out_dim=4))
    with pytest.raises(ValueError, match=r"scalegmn_args.output: found parameters, but classification needs vector"):
        Classification(data, 4, replace(FIVE, output="parameters"))


def test_confusion_matrix_is_drawn(data, tmp_path, drawn):
    task = Classification(data, 4, FIVE)
    model = FIVE.build(task.spec)
    accuracy = task.evaluate(model, "test", torch.device("cpu"), tmp_path)["accuracy"]
    (axes,) = drawn["confusion_matrix.png"].axes
    assert axes.get_title() == f"accuracy {accuracy:.3f}"
    assert sum(int(text.get_text()) for text in axes.texts) == len(task.splits["test"])


def test_augmented_training_batches(data):
    """Changed, canonical, with mixed labels where they are mixed; the same for the same seed; others as stored."""
    changed = replace(data, augment=AugmentConfig(noise=0.1, mixup=1.0, translate=0.5))
    task = Classification(changed, 10, FIVE)
    epochs = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        epochs.append(list(task.train_batches(task.shuffle(generator), generator, torch.device("cpu"))))
    for (first, labels), (again, _) in zip(*epochs[:2], strict=True):
        assert torch.equal(first.flatten(), again.flatten())
        assert (30 * first.biases[0]).abs().max() <= math.pi / 2 + 1e-4
        torch.testing.assert_close(labels.sum(1), torch.ones(10))
        assert ((labels > 0).sum(1) == 2).any()
    assert not torch.equal(epochs[0][0][0].flatten(), epochs[2][0][0].flatten())
    plain = Classification(data, 10, FIVE)
    assert torch.equal(task.splits["val"].read(slice(None)).flatten(), plain.splits["val"].read(slice(None)).flatten())
    model = FIVE.build(task.spec)
    params, labels = next(plain.train_batches([torch.arange(10)], torch.Generator(), torch.device("cpu")))
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(task.loss(model, params, labels), task.loss(model, params, one_hot))
    with pytest.raises(ValueError, match=r"data.augment.group: phase is removed again .*switch_to_canon False"):
        Classification(replace(data, augment=AugmentConfig(group=("phase",))), 10, FIVE)
    with pytest.raises(ValueError, match=r"data.augment.group: found scale"):
        Classification(replace(data, augment=AugmentConfig(group=("scale",))), 10, FIVE)


def test_class_names(data, tmp_path, drawn):
    """Of the zoo, in the run's summary, the figure and the answers; a name for each output, or none."""
    zoo = open_zoo(tmp_path / "zoo")
    parts = [Networks(zoo.nets, zoo.columns)]
    names = ["a", "b", "c$", "d", "e"]
    write_zoo(tmp_path / "named", parts, zoo.splits, {"classes": names})
    task = Classification(DataConfig(str(tmp_path / "named")), 4, FIVE)
    assert task.identity()["classes"] == names
    assert "classes" not in Classification(data, 4, FIVE).identity()
    task.evaluate(FIVE.build(task.spec), "test", torch.device("cpu"), tmp_path)
    (axes,) = drawn["confusion_matrix.png"].axes
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in axis] == ["a", "b", r"c\$", "d", "e"]
    answers = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]])
    assert Classification.answer_of(answers, 0, task.identity())["class_name"] == "c$"
    assert Classification.answer_of(answers, 0, task.identity())["class"] == 2
    assert "class_name" not in Classification.answer_of(answers, 0, {})
    assert "class_name" not in Classification.answer_of(torch.eye(6), 0, task.identity())
    write_zoo(tmp_path / "short", parts, zoo.splits, {"classes": names[:4]})
    assert open_zoo(tmp_path / "short").classes is None
