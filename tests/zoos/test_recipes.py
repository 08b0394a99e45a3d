import json
from dataclasses import replace

import pytest
import torch

import scalegmn.zoos.recipes as recipes
from scalegmn.data.zoo_format import open_zoo
from scalegmn.nets.siren import render
from scalegmn.zoos.recipes import InrRecipe, load_digits_images, make_zoo


@pytest.fixture
def recipe(tmp_path):
    return InrRecipe(out=str(tmp_path / "zoo"), num_images=30, views=2, width=6, steps=30)


def test_zoo_of_digits(recipe, tmp_path):
    zoo = open_zoo(make_zoo(recipe))
    images = load_digits_images()
    assert zoo.spec.layout == (2, 6, 6, 1)
    assert zoo.columns["image"].tolist() == [k // 2 for k in range(60)]
    assert torch.equal(zoo.columns["label"], images.labels[zoo.columns["image"]])
    mse = (render(zoo.params, 8, 8) - images.pixels[zoo.columns["image"]]).square().flatten(1).mean(1)
    torch.testing.assert_close(zoo.columns["psnr"], -10 * mse.log10(), rtol=1e-3, atol=1e-3)
    assert zoo.provenance["recipe"]["steps"] == 30
    assert (tmp_path / "zoo" / "fits.png").stat().st_size > 1000
    assert not (tmp_path / "zoo.partial").exists()


def test_no_image_is_in_two_splits(recipe):
    zoo = open_zoo(make_zoo(recipe))
    images = {name: set(zoo.columns["image"][rows].tolist()) for name, rows in zoo.splits.items()}
    assert {name: len(found) for name, found in images.items()} == {"train": 21, "val": 3, "test": 6}
    assert len(set.union(*images.values())) == 30
    assert sum(len(rows) for rows in zoo.splits.values()) == 60


def test_same_seed_same_zoo_other_seed_other_zoo(recipe, tmp_path):
    first = open_zoo(make_zoo(recipe))
    again = open_zoo(make_zoo(replace(recipe, out=str(tmp_path / "again"))))
    other = open_zoo(make_zoo(replace(recipe, out=str(tmp_path / "other"), seed=1)))
    assert first.sha256 == again.sha256
    assert not torch.equal(first.params.weights[0], other.params.weights[0])
    assert first.splits["test"].tolist() != other.splits["test"].tolist()


def test_interrupted_zoo_keeps_finished_blocks(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "BLOCK", 25)  # three blocks
    whole = open_zoo(make_zoo(replace(recipe, out=str(tmp_path / "whole"))))
    run, calls = recipes.SirenFit.run, []

    def interrupted(self, *arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(self.targets))
        return run(self, *arguments)

    monkeypatch.setattr(recipes.SirenFit, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_zoo(recipe)
    assert len(list((tmp_path / "zoo.partial").glob("block-*.safetensors"))) == 2
    assert not (tmp_path / "zoo").exists()
    with pytest.raises(ValueError, match=r"made by another recipe \(steps 30\)"):
        make_zoo(replace(recipe, steps=31))
    calls[:] = [None]  # one block is left
    assert open_zoo(make_zoo(recipe)).sha256 == whole.sha256
    assert calls == [None, 10]


def test_existing_zoo_is_kept_or_refused(recipe, tmp_path, capsys):
    make_zoo(recipe)
    before = (tmp_path / "zoo" / "zoo.json").stat().st_mtime_ns
    make_zoo(recipe)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made by another recipe"):
        make_zoo(replace(recipe, w0=9.0))
    assert (tmp_path / "zoo" / "zoo.json").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="not a zoo of this recipe"):
        make_zoo(replace(recipe, out=str(tmp_path / "mine")))


def test_shared_initialisation(recipe, tmp_path):
    shared = open_zoo(make_zoo(replace(recipe, init="shared", steps=1, lr=1e-9)))
    first, second = shared.params.weights[0][0], shared.params.weights[0][1]
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(shared.params.weights[0][0::2], first.expand(30, 6, 2), rtol=1e-5, atol=1e-6)
    independent = open_zoo(make_zoo(replace(recipe, out=str(tmp_path / "own"), steps=1, lr=1e-9)))
    assert (independent.params.weights[0][0] - independent.params.weights[0][2]).abs().max() > 0.01


def test_problems_are_named_together():
    with pytest.raises(ValueError, match=r"width: found 0.*lr: found -1.*val_fraction, test_fraction"):
        InrRecipe(width=0, lr=-1.0, val_fraction=0.5, test_fraction=0.6)


def test_recipe_is_stored_as_plain_json(recipe):
    content = json.loads((make_zoo(recipe) / "zoo.json").read_text())
    assert content["provenance"]["images"] == "scikit-learn digits"
    assert content["splits"] == {"train": 42, "val": 6, "test": 12}
    assert content["version"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 3}, "leave none for val"),
        ({"num_images": 5000}, "found 5000, expected at most 1797"),
        ({"lr": 1e38}, "networks diverged"),
    ],
)
def test_recipes_that_cannot_work_leave_nothing(recipe, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_zoo(replace(recipe, **change))
    assert list(tmp_path.iterdir()) == []


def test_zoo_is_complete_or_not_there(recipe, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipes, "reconstructions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_zoo(recipe)
    assert not (tmp_path / "zoo").exists()
    assert (make_zoo(recipe) / "fits.png").exists()
