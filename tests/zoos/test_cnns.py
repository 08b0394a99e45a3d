import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import Fork, run_fork, run_here

import scalegmn.zoos.fit.cnn_zoo as cnns
from scalegmn.networks import ACTIVATIONS, BUILT_IN, Activation, register_activation
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.zoos.fit.cnn_zoo import CnnRecipe, make_cnn_zoo
from scalegmn.zoos.fit.common import seeded
from scalegmn.zoos.images import load_images
from scalegmn.zoos.loader import hidden_activation
from scalegmn.zoos.zoo_format import open_zoo, verify_zoo

SMALL = {"networks": 24, "checkpoints": (0, 2), "channels": (4, 4), "padding": "same", "batch_size": 32}
SMALL |= {"num_images": 200, "init_std": (0.1, 0.5)}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(cnns, "BLOCK", 10)
    return CnnRecipe(out=str(tmp_path / "zoo"), **SMALL)


def test_zoo_of_digits(recipe, tmp_path, drawn):
    """Columns say what each network is: its accuracy is that of the stored weights on held-out images."""
    zoo = verify_zoo(make_cnn_zoo(recipe))
    assert zoo.spec.layout == (1, 4, 4, 10)
    assert zoo.columns["network"].tolist() == [k // 2 for k in range(48)]
    assert zoo.columns["epoch"].tolist() == [0, 2] * 24
    images = load_images("digits")
    chosen = torch.arange(200) * 1797 // 200
    pixels = 2 * images.take(chosen).permute(0, 3, 1, 2) - 1
    right = (evaluate_cnn(zoo.params, pixels).argmax(2) == images.labels[chosen]).float()
    whole = zoo.columns["train_fraction"] == 1.0  # those have seen all images that are not for testing
    both = 160 * zoo.columns["train_accuracy"] + 40 * zoo.columns["test_accuracy"]
    torch.testing.assert_close(both[whole], right[whole].sum(1), rtol=0, atol=1e-3)
    assert not torch.allclose(both[~whole], right[~whole].sum(1), rtol=0, atol=1e-3)
    test = 40 * zoo.columns["test_accuracy"]
    torch.testing.assert_close(test, test.round(), rtol=0, atol=1e-4)
    assert {BUILT_IN[k] for k in zoo.params.activation.tolist()} == {"relu", "tanh"}
    histograms = {patch.get_label(): patch.get_xy()[:, 1] for patch in drawn["accuracies.png"].axes[0].patches}
    for epoch in (0, 2):
        counts, _ = np.histogram(zoo.columns["test_accuracy"][zoo.columns["epoch"] == epoch], 50, (0, 1))
        assert histograms[f"epoch {epoch}"].max() == counts.max()
    assert zoo.provenance["diverged"] == 0
    for name, (low, high) in {"lr": recipe.lr, "l2": recipe.l2, "dropout": recipe.dropout}.items():
        column = zoo.columns[name]
        assert low <= column.min() < column.max() <= high
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


HETERO = {"mixed": True, "channels": (4, 8), "activations": ("relu", "gelu", "tanh", "sigmoid", "leaky_relu")}


def test_zoo_of_mixed_architecture(recipe):
    """Each stored network has its own architecture, and the recorded accuracy on the held-out images."""
    zoo = verify_zoo(make_cnn_zoo(replace(recipe, **HETERO)))
    images = load_images("digits")
    chosen = torch.arange(200) * 1797 // 200
    held_out = chosen[torch.randperm(200, generator=seeded(0))[:40]]
    pixels = 2 * images.take(held_out).permute(0, 3, 1, 2) - 1
    logits = torch.cat([evaluate_cnn(params, pixels, stride=1) for params in zoo.nets])
    accuracy = (logits.argmax(2) == images.labels[held_out]).float().mean(1)
    torch.testing.assert_close(zoo.columns["test_accuracy"], accuracy)
    assert len(zoo) == 48
    assert len(zoo.nets) > 20
    convolutions = [layer for params in zoo.nets for layer in params.spec.layers[:-1]]
    assert {params.spec.num_layers - 1 for params in zoo.nets} == {2, 3, 4, 5}
    assert {layer.out_dim for layer in convolutions} == {4, 8}
    assert {layer.kernel for layer in convolutions} == {(3, 3), (5, 5), (7, 7)}
    assert {layer.activation for layer in convolutions} == set(HETERO["activations"])
    assert {layer.residual for layer in convolutions} >= {None, 0, 1}
    network, row = zoo.columns["network"], 0
    for params in zoo.nets:  # a network's checkpoints are its own
        assert (
            network[row : row + len(params)].tolist()
            == network[row : row + len(params) : 2].repeat_interleave(2).tolist()
        )
        row += len(params)
    parts = [set(network[rows].tolist()) for rows in zoo.splits.values()]
    assert [len(part) for part in parts] == [17, 2, 5]
    assert len(set.union(*parts)) == 24


def test_no_network_is_in_two_splits(recipe):
    zoo = open_zoo(make_cnn_zoo(recipe))
    networks = {name: set(zoo.columns["network"][rows].tolist()) for name, rows in zoo.splits.items()}
    assert {name: len(found) for name, found in networks.items()} == {"train": 17, "val": 2, "test": 5}
    assert len(set.union(*networks.values())) == 24
    assert sum(len(rows) for rows in zoo.splits.values()) == 48


def test_one_activation_and_other_widths(recipe):
    zoo = open_zoo(make_cnn_zoo(replace(recipe, activations=("tanh",), channels=(3, 5, 2), checkpoints=(1,))))
    assert zoo.spec.layout == (1, 3, 5, 2, 10)
    assert zoo.spec.symmetries == ("sign",) * 3
    assert zoo.params.activation is None


def test_activations_of_ones_own(recipe, monkeypatch):
    """Networks of one architecture learn with any registered activation, and keep its name."""
    monkeypatch.setattr(ACTIVATIONS, "_items", dict(ACTIVATIONS._items))
    register_activation(Activation("bent", lambda z, w0: z + z.square() / 4))
    zoo = open_zoo(make_cnn_zoo(replace(recipe, activations=("bent", "gelu", "tanh"), networks=12)))
    assert set(hidden_activation(zoo.params).tolist()) == {"bent", "gelu", "tanh"}
    assert zoo.spec.extra_activations == ("bent",)
    before, after = (zoo.params[zoo.columns["epoch"] == epoch].flatten() for epoch in (0, 2))
    assert ((after - before).abs().amax(1) > 1e-4).all()
    chosen = torch.arange(200) * 1797 // 200
    images = load_images("digits")
    pixels = 2 * images.take(chosen).permute(0, 3, 1, 2) - 1
    right = (evaluate_cnn(zoo.params, pixels).argmax(2) == images.labels[chosen]).float()
    whole = zoo.columns["train_fraction"] == 1.0
    both = 160 * zoo.columns["train_accuracy"] + 40 * zoo.columns["test_accuracy"]
    torch.testing.assert_close(both[whole], right[whole].sum(1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("change", [{}, HETERO], ids=["alike", "mixed"])
def test_shards_in_turn_make_the_same_zoo(recipe, tmp_path, capsys, change):
    recipe = replace(recipe, **change)
    whole = open_zoo(make_cnn_zoo(recipe)).sha256
    other = replace(recipe, out=str(tmp_path / "other"))
    make_cnn_zoo(replace(other, shard="1/2"))
    assert "part 1/2 is done; 2 of 3 shards are still to come, from part 0" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()
    assert open_zoo(make_cnn_zoo(replace(other, shard="0/2"))).sha256 == whole
    assert open_zoo(make_cnn_zoo(replace(recipe, out=str(tmp_path / "third"), seed=1))).sha256 != whole
    make_cnn_zoo(recipe)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made by another recipe"):
        make_cnn_zoo(replace(recipe, lr=(0.1, 0.2)))


@pytest.mark.slow  # test_recipes does the same with INRs
def test_killed_and_restarted(tmp_path):
    """kill -9 in the middle, then the same command: finished shards are kept, and the zoo is the same."""
    words = [f"--{key}={list(value) if isinstance(value, tuple) else value}" for key, value in SMALL.items()]
    words = [*words, "--networks=600", "--checkpoints=[8]", f"--out={tmp_path / 'zoo'}"]
    command = ["-m", "scalegmn", "zoo", "cnn", *words]
    process = Fork(*command)
    partial, deadline = tmp_path / "zoo.partial", time.monotonic() + 100
    while not list(partial.glob("shard-*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.finish()
    kept = {file: file.stat().st_mtime_ns for file in partial.glob("shard-*.safetensors")}
    assert 0 < len(kept) < 3
    again = run_fork(*command, "--shard=0/3")
    assert again.returncode == 0, again.stderr
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
    again = run_fork(*command)
    assert again.returncode == 0, again.stderr
    assert "600 checkpoints of 600 networks CNN [1, 4, 4, 10] (hetero); 0 diverged" in again.stdout
    whole = make_cnn_zoo(CnnRecipe(out=str(tmp_path / "whole"), **SMALL | {"networks": 600, "checkpoints": (8,)}))
    assert open_zoo(whole).sha256 == verify_zoo(tmp_path / "zoo").sha256


def test_diverged_networks_are_left_out_and_counted(recipe):
    zoo = verify_zoo(make_cnn_zoo(replace(recipe, optimizers=("sgd",), lr=(1e-3, 1e12), activations=("relu",))))
    left = zoo.provenance["diverged"]
    assert 3 < left < 20
    assert len(zoo) == 2 * (24 - left)
    assert len(zoo.columns["network"].unique()) == 24 - left


def test_colour_becomes_grey_and_own_test_images_test(tmp_path, recipe):
    from PIL import Image

    for part, count in (("train", 30), ("test", 7)):
        for k in range(count):
            folder = tmp_path / "pictures" / part / str(k % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (60 + k, 10, 120 * (k % 2))).save(folder / f"{k}.png")
    change = {"images": "folder", "images_path": str(tmp_path / "pictures"), "num_images": None}
    zoo = open_zoo(make_cnn_zoo(replace(recipe, **change)))
    assert zoo.spec.layout == (1, 4, 4, 2)
    test = 7 * zoo.columns["test_accuracy"]
    torch.testing.assert_close(test, test.round(), rtol=0, atol=1e-4)
    colour = open_zoo(make_cnn_zoo(replace(recipe, **change, grey=False, out=str(tmp_path / "colour"))))
    assert colour.spec.layout == (3, 4, 4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": "valid", "channels": (4, 4, 4)}, "images of 8x8 are too small for 3 convolutions; use same"),
        ({"networks": 3}, "networks: 3 networks, of which 0 diverged, leave none for val; use more"),
        ({"num_images": 4}, "num_images: 4 images are too few"),
        ({"num_images": 5000}, "num_images: found 5000, expected at most 1797"),
        ({"images": "mnist"}, "images_path: found null"),
        ({"activations": ("gelu", "swish")}, "activations: found swish, expected one of sine, tanh"),
    ],
)
def test_recipes_that_cannot_work_leave_nothing(recipe, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_cnn_zoo(replace(recipe, **change))
    assert list(tmp_path.iterdir()) == []


def test_problems_are_named_together_in_one_line():
    words = ["--networks=0", "--channels=[]", "--checkpoints=[3,1]", "--lr=[1,0.1]", "--dropout=[0,1]"]
    words += ["--train_fractions=[0,2]", "--activations=[relu,relu]", "--shard=2/2", "--val_fraction=1"]
    words += ["--depths=[0]", "--kernels=[]", "--mixed=true"]
    result = run_here("-m", "scalegmn", "zoo", "cnn", *words, cwd=".")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    more = ("depths", "kernels", "padding")
    for name in (
        "networks",
        "channels",
        "checkpoints",
        "lr",
        "dropout",
        "train_fractions",
        "activations",
        "shard",
        *more,
    ):
        assert f"{name}: found" in result.stderr
    assert "val_fraction, test_fraction: found" in result.stderr
