import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from published import write_mnist, write_mnist_images
from scipy.ndimage import grey_dilation

from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks.siren import render
from scalegmn.tasks.editing import Editing, edited
from scalegmn.zoos.augment import AugmentConfig
from scalegmn.zoos.fit.inr_zoo import InrRecipe, make_zoo
from scalegmn.zoos.images import load_digits_images
from scalegmn.zoos.loader import DataConfig
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo

MODEL = ScaleGMNConfig(output="parameters", hidden_dim=4, num_layers=2)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    recipe = InrRecipe(str(tmp_path_factory.mktemp("zoo") / "zoo"), num_images=40, views=2, hidden=(8, 8))
    return open_zoo(make_zoo(recipe))


@pytest.fixture
def data(zoo):
    return DataConfig(str(zoo.path))


def test_targets_belong_to_the_networks(zoo, data):
    task = Editing(data, 7)
    images = load_digits_images().pixels
    generator = torch.Generator().manual_seed(0)
    for params, targets in task.train_batches(task.shuffle(generator), generator, torch.device("cpu")):
        drawn = render(params, 8, 8)
        for row, target in enumerate(targets):
            nearest = (images - drawn[row]).square().flatten(1).mean(1).argmin()
            expected = grey_dilation(images[nearest, ..., 0].numpy(), size=(3, 3))
            assert np.array_equal(target[..., 0].numpy(), expected)


def test_evaluation_is_over_the_whole_split(data, tmp_path, drawn):
    task = Editing(data, 3)
    model = MODEL.build(task.spec)
    found = task.evaluate(model, "test", torch.device("cpu"), tmp_path)
    params = task.splits["test"].read(slice(None))
    targets = task.targets[task.place[task.splits["test"].labels]]
    with torch.no_grad():
        errors = (render(edited(model, params), 8, 8) - targets).square().flatten(1).mean(1)
    assert found["loss"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert task.loss(model, params, targets).item() == pytest.approx(found["loss"], rel=1e-5)
    with open(tmp_path / "edits.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["network"]) for row in rows] == task.splits["test"].rows.tolist()
    assert [int(row["image"]) for row in rows] == task.splits["test"].labels.tolist()
    assert [float(row["mse"]) for row in rows] == pytest.approx(errors.tolist(), rel=1e-4)
    for name in ("worst_edits.png", "median_edits.png"):
        titles = [axes.get_title() for axes in drawn[name].axes if axes.get_title()]
        assert set(titles) <= {f"{error:.4f}" for error in errors.tolist()}
        assert len(drawn[name].axes) == 4 * len(titles)
    assert drawn["worst_edits.png"].axes[0].get_title() == f"{errors.max():.4f}"


def test_trivial_answers(data):
    task = Editing(data, 5)
    found = task.trivial_answers()
    targets = {name: task.targets[task.place[nets.labels]].flatten(1) for name, nets in task.splits.items()}
    weights = {name: nets.read(slice(None)).flatten() for name, nets in task.splits.items()}
    for split in ("val", "test"):
        drawn = render(task.splits[split].read(slice(None)), 8, 8).flatten(1)
        assert found[split]["no_edit"] == pytest.approx((drawn - targets[split]).square().mean().item(), rel=1e-5)
    columns = [np.concatenate([w.double().numpy(), np.ones((len(w), 1))], 1) for w in weights.values()]
    train, _, test = columns
    ridge = 1e-3 * np.square(train).sum(0).mean() * np.eye(train.shape[1])
    linear = np.linalg.solve(train.T @ train + ridge, train.T @ targets["train"].double().numpy())
    expected = np.square(test @ linear - targets["test"].numpy()).mean()
    assert found["test"]["linear_map"] == pytest.approx(expected, rel=1e-6)


def rewritten(zoo, folder, columns=(), provenance=()):
    """A copy of the zoo that says something else of itself."""
    parts = [Networks(zoo.nets, {**zoo.columns, **dict(columns)})]
    write_zoo(folder / "copy", parts, zoo.splits, {**zoo.provenance, **dict(provenance)})
    return DataConfig(str(folder / "copy"))


@pytest.mark.parametrize(
    ("columns", "provenance", "message"),
    [
        ({"image": torch.arange(80) * 17 % 1797}, {}, "its INRs do not draw these images"),
        ({"image": torch.arange(80) + 1797}, {}, "found 1797 images, but .* up to number 1876"),
        ({}, {"images": "paintings"}, "names no images .found 'paintings'"),
        ({}, {"image_source": "digits of another release"}, "was made from digits of another release"),
        ({}, {"image_shape": [28, 28, 1]}, r"found images of shape \(8, 8, 1\), but .* has those of \(28, 28, 1\)"),
        ({}, {"images": "mnist"}, "images_path: neither train-images"),
    ],
)
def test_images_that_do_not_fit_are_refused(zoo, tmp_path, columns, provenance, message):
    with pytest.raises(ValueError, match=message):
        Editing(rewritten(zoo, tmp_path, columns, provenance), 8)


def test_options_that_do_not_fit_are_refused(data):
    with pytest.raises(ValueError, match=r"increase_contrast is for images of 3 channels, but .* has INRs of 1"):
        Editing(replace(data, style_function="increase_contrast"), 8)
    with pytest.raises(ValueError, match=r"data.augment.rotate: edited originals do not follow it"):
        Editing(replace(data, augment=AugmentConfig(rotate=3.0)), 8)
    with pytest.raises(ValueError, match=r"data.augment.relabel: edited originals do not follow it"):
        Editing(replace(data, augment=AugmentConfig(relabel=True)), 8)


def test_published_layout(tmp_path, generator):
    """Each network's target is its own image, dilated: training images from one file, test images from another."""
    states = write_mnist(tmp_path, generator)
    write_mnist_images(tmp_path, states)
    root = tmp_path / "mnist-inrs"
    task = Editing(DataConfig(str(root), "mnist_inr_edit", str(tmp_path / "mnist_splits.json")), 4)
    for split, first in (("train", 0), ("val", 0), ("test", 60_000)):
        nets = task.splits[split]
        drawn = (render(nets.read(slice(None)), 28, 28).clamp(0, 1) * 255).round() / 255
        expected = grey_dilation(drawn.numpy(), size=(1, 3, 3, 1))
        found = task.targets[task.place[nets.labels]].numpy()
        assert np.abs(found - expected).max() < 1.5 / 255
        assert nets.labels.min() >= first


def test_sirens_without_output_offset(zoo, tmp_path):
    """Their last biases are 0.5 larger. The offset is named where it is the reason, and the images where these are;
    with the right one, errors are those of the same INRs with the usual offset."""
    biases = zoo.params.biases
    shifted = zoo.params.replace(biases=(*biases[:-1], biases[-1] + 0.5))

    def data(name, offset, images):
        provenance = {**zoo.provenance, "output_offset": offset}
        write_zoo(tmp_path / name, [Networks((shifted,), {"image": images})], zoo.splits, provenance)
        return DataConfig(str(tmp_path / name), switch_to_canon=False)

    images = zoo.columns["image"]
    with pytest.raises(ValueError, match=r"output_offset: found 0.5, but 0 fits; set --data.dataset_args") as caught:
        Editing(data("wrong", 0.5, images), 8)
    assert "images_path" not in str(caught.value)
    with pytest.raises(ValueError, match=r"set --data.images_path to those that they were fitted to"):
        Editing(data("others", 0.5, torch.arange(80) * 17 % 1797), 8)
    expected = Editing(DataConfig(str(zoo.path), switch_to_canon=False), 8).trivial_answers()
    found = Editing(data("right", 0.0, images), 8).trivial_answers()
    assert found["test"]["no_edit"] == pytest.approx(expected["test"]["no_edit"], rel=1e-5)
