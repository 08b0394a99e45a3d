"""Improvement of trained CNNs, on a tiny zoo, and as a user runs it."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run_here

from scalegmn.models.flat_mlp import FlatMLPConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.nn.probes import ProbeImages
from scalegmn.symmetry.groups import GroupElement
from scalegmn.tasks.editing import edited
from scalegmn.tasks.improvement import Improvement, ImprovementConfig
from scalegmn.zoos.augment import AugmentConfig
from scalegmn.zoos.fit.cnn_zoo import CnnRecipe, make_cnn_zoo
from scalegmn.zoos.loader import DataConfig

ROOT = Path(__file__).parents[2]
MODEL = ScaleGMNConfig(
    symmetry="scale",
    direction="bidirectional",
    output="parameters",
    hidden_dim=8,
    num_layers=2,
    num_probes=4,
    probe_images=ProbeImages(image_size=8),
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a zoo of 60 networks on 300 images in data/digits_cnn."""
    folder = tmp_path_factory.mktemp("home")
    recipe = CnnRecipe(
        out=str(folder / "data/digits_cnn"),
        networks=40,
        checkpoints=(10,),
        channels=(4, 4),
        padding="same",
        batch_size=16,
        activations=("relu",),
        num_images=300,
        optimizers=("adam",),
        lr=(0.01, 0.03),
        init_std=(0.2, 0.5),
        val_fraction=0.2,
        test_fraction=0.3,
    )
    make_cnn_zoo(recipe)
    return folder


@pytest.fixture
def task(home):
    return Improvement(DataConfig(dataset_path=str(home / "data/digits_cnn")), 8, options=ImprovementConfig(images=5))


def test_accuracies_are_those_of_the_zoo(task):
    """What the zoo says of each network is the mean over both halves of its held-out images."""
    nets = task.splits["test"]
    halves = [task.measure(nets.read(torch.arange(len(nets))), task.held_out[split])[1] for split in ("val", "test")]
    sizes = torch.tensor([len(task.held_out[split]) for split in ("val", "test")])
    assert sizes.tolist() == [30, 30]
    assert not set(torch.cat([task.images.test]).tolist()) & set(task.images.train.tolist())
    torch.testing.assert_close(sum(halves) / 2, nets.labels, rtol=0, atol=1e-5)


def test_loss_by_hand(task):
    l1 = Improvement(task.data, 8, options=ImprovementConfig(l1=0.5, images=5))
    model = MODEL.build(task.spec)
    ((params, rows),) = list(l1.train_batches([torch.arange(4)], torch.Generator().manual_seed(0), CPU))
    assert rows.shape == (4, 5)
    assert set(rows.flatten().tolist()) <= set(l1.images.train.tolist())
    improved = edited(model, params)
    absolute = torch.cat([x.flatten(1) for x in (*improved.weights, *improved.biases)], 1).abs().mean(1)
    without = task.loss(model, params, rows)
    torch.testing.assert_close(l1.loss(model, params, rows), without + 0.5 * absolute.mean())
    alone = [task.measure(improved[k : k + 1], rows[k])[0] for k in range(4)]
    torch.testing.assert_close(torch.cat(alone).mean(), without)
    without.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "model", [MODEL, FlatMLPConfig(output="parameters", hidden_dim=16)], ids=lambda model: model.name
)
def test_moved_networks_are_improved_alike(model, task, generator):
    """The improvement of a moved network is the moved improvement; that of an MLP of all weights is another one."""
    torch.manual_seed(0)
    metanetwork = replace(model, out_scale=1.0).build(task.spec).double()
    params = task.splits["test"].read(torch.arange(4)).to(torch.float64)
    element = GroupElement.sample(params, generator)
    moved, expected = edited(metanetwork, element.act(params)), element.act(edited(metanetwork, params))
    error = (moved.flatten() - expected.flatten()).abs().max() / expected.flatten().abs().max()
    losses = [task.measure(nets.to(torch.float32), task.held_out["test"])[0] for nets in (moved, expected)]
    if model is MODEL:
        assert error <= 1e-9
        torch.testing.assert_close(*losses)
    else:
        assert error > 1e-3
        assert (losses[0] - losses[1]).abs().max() > 1e-3


def test_what_does_not_fit_is_refused(task, home, tmp_path):
    with pytest.raises(ValueError, match=r"scalegmn_args.heads: found 2, but improvement returns one network; use 1"):
        Improvement.check_model(replace(MODEL, heads=2))
    with pytest.raises(ValueError, match=r"output: found vector, but improvement needs parameters"):
        Improvement.check_model(ScaleGMNConfig())
    with pytest.raises(ValueError, match=r"improvement_args.l1: found -1, expected 0 or more"):
        ImprovementConfig(l1=-1)
    with pytest.raises(ValueError, match=r"data.augment.mixup: it changes what networks classify; leave it out here"):
        Improvement(replace(task.data, augment=AugmentConfig(mixup=1.0)), 8)


def test_script(home):
    """Training lowers the loss; the benchmark measures the same, and the same for moved test networks."""
    words = ["--scalegmn_args.hidden_dim=8", "--scalegmn_args.num_layers=2", "--scalegmn_args.num_probes=4"]
    words += [
        "--train_args.num_epochs=16",
        "--optimization.scheduler_args.warmup_steps=0",
        "--optimization.optimizer_args.lr=0.005",
        "--batch_size=16",
    ]
    conf = ROOT / "configs/digits_improvement/scalegmn.yml"
    result = run_here(
        "-m", "scalegmn", "train", "improvement", "--conf", conf, *words, "--run_dir=runs/first", cwd=home
    )
    assert result.returncode == 0, result.stderr
    assert "after one pass" in result.stdout
    summary = json.loads((home / "runs/first/summary.json").read_text())
    before = summary["data"]["before"]["test"]
    epochs = list(csv.DictReader((home / "runs/first/metrics.csv").open()))
    assert float(epochs[-1]["train_loss"]) < float(epochs[0]["train_loss"]) - 0.03
    rows = list(csv.DictReader((home / "runs/first/figures/improvements.csv").open()))
    for column, value in (("before", before["accuracy"]), ("after", summary["test_accuracy"])):
        assert sum(float(row[column]) for row in rows) / len(rows) == pytest.approx(value, abs=1e-6)
    shown = run_here(ROOT / "benchmarks/improvement.py", "runs/first", "--epochs=0,2", "--rates=0.1", cwd=home)
    assert shown.returncode == 0, shown.stderr
    figures = json.loads(shown.stdout.splitlines()[-1])
    assert figures["one pass"] == pytest.approx(summary["test_accuracy"], abs=1e-6)
    assert figures["one pass, moved"] == pytest.approx(summary["test_accuracy"], abs=0.01)
    assert figures["descent, networks"] == len(rows)
    assert figures["descent"]["0"] == pytest.approx(before["accuracy"], abs=1e-6)
    assert figures["pruned"]["one pass"]["0"] == pytest.approx(summary["test_accuracy"], abs=1e-6)
