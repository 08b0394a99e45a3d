import json
import signal
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import Fork, largest_file, run_fork, run_here, run_process

import scalegmn.zoos.fit.inr_zoo as recipes
from scalegmn.networks.siren import render
from scalegmn.zoos.fit.inr_zoo import InrRecipe, make_zoo
from scalegmn.zoos.images import load_images
from scalegmn.zoos.zoo_format import open_zoo, verify_zoo


@pytest.fixture
def recipe(tmp_path):
    return InrRecipe(out=str(tmp_path / "zoo"), num_images=30, views=2, hidden=(6, 6), steps=30)


@pytest.fixture
def mnist_folder(tmp_path):
    """Twenty training and ten test images in MNIST's files."""
    folder, generator = tmp_path / "mnist", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 20), ("t10k", 10)):
        for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
            values = generator.integers(0, 10, shape).astype(np.uint8)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())
    return folder


SMALL = InrRecipe(views=1, hidden=(6,), steps=5)


def command(folder, *words):
    """The words of the command with the recipe `SMALL`: 1,797 digits in four shards."""
    small = ["--out", folder / "zoo", "--views", "1", "--hidden", "[6]", "--steps", "5"]
    return ["-m", "scalegmn", "zoo", "inr", *small, *words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The identity of the zoo that `command` makes in one go."""
    folder = tmp_path_factory.mktemp("whole") / "zoo"
    return open_zoo(make_zoo(replace(SMALL, out=str(folder)))).sha256


def test_zoo_of_digits(recipe, tmp_path, drawn):
    zoo = verify_zoo(make_zoo(recipe))
    images = load_images("digits")
    assert zoo.spec.layout == (2, 6, 6, 1)
    assert zoo.columns["image"].tolist() == [k // 2 * 1797 // 30 for k in range(60)]
    assert torch.equal(zoo.columns["label"], images.labels[zoo.columns["image"]])
    assert zoo.columns["steps"].tolist() == [30] * 60
    mse = (render(zoo.params, 8, 8) - images.take(zoo.columns["image"])).square().flatten(1).mean(1)
    torch.testing.assert_close(zoo.columns["psnr"], -10 * mse.log10(), rtol=1e-3, atol=1e-3)
    assert zoo.provenance["recipe"]["steps"] == 30
    assert zoo.provenance["recipe"]["image_source"] == images.source
    histogram = drawn["fits.png"].axes[-1]
    assert histogram.get_title() == f"median {zoo.columns['psnr'].median():.1f} dB"
    assert sum(bar.get_height() for bar in histogram.patches) == 60
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_no_image_is_in_two_splits(recipe):
    zoo = open_zoo(make_zoo(recipe))
    images = {name: set(zoo.columns["image"][rows].tolist()) for name, rows in zoo.splits.items()}
    assert {name: len(found) for name, found in images.items()} == {"train": 21, "val": 3, "test": 6}
    assert len(set.union(*images.values())) == 30
    assert sum(len(rows) for rows in zoo.splits.values()) == 60


def test_own_test_set(recipe, mnist_folder):
    """The source's test images are the test split; of an image's three views all are in one split."""
    change = {"images": "mnist", "images_path": str(mnist_folder), "test_fraction": None, "num_images": 15, "views": 3}
    zoo = open_zoo(make_zoo(replace(recipe, **change, val_fraction=0.2, steps=2)))
    assert zoo.spec.layout == (2, 6, 6, 1)
    images = {name: sorted(set(zoo.columns["image"][rows].tolist())) for name, rows in zoo.splits.items()}
    assert images["test"] == [20, 22, 24, 26, 28]
    assert sorted(images["train"] + images["val"]) == list(range(0, 20, 2))
    assert {name: len(rows) for name, rows in zoo.splits.items()} == {"train": 24, "val": 6, "test": 15}


def test_same_seed_same_zoo_other_seed_other_zoo(recipe, tmp_path):
    first = open_zoo(make_zoo(recipe))
    again = open_zoo(make_zoo(replace(recipe, out=str(tmp_path / "again"))))
    other = open_zoo(make_zoo(replace(recipe, out=str(tmp_path / "other"), seed=1)))
    assert first.sha256 == again.sha256
    assert not torch.equal(first.params.weights[0], other.params.weights[0])
    assert first.splits["test"].tolist() != other.splits["test"].tolist()


def test_parts_in_turn_make_the_same_zoo(tmp_path, whole):
    for part in ("1/3", "0/3"):
        done = run_fork(*command(tmp_path, "--shard", part))
        assert done.returncode == 0, done.stderr
    assert "part 0/3 is done; 1 of 4 shards are still to come, from part 2" in done.stdout
    assert not (tmp_path / "zoo").exists()
    done = run_fork(*command(tmp_path, "--shard", "2/3"))
    assert done.returncode == 0, done.stderr
    assert verify_zoo(tmp_path / "zoo").sha256 == whole
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_launchers_say_which_part(monkeypatch):
    assert InrRecipe().part == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    assert InrRecipe().part == (2, 3)
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert InrRecipe().part == (4, 5)
    assert InrRecipe(shard="0/2").part == (0, 2)


@pytest.mark.parametrize("parts", [("0/2", "1/2"), pytest.param(("0/1", "0/1"), marks=pytest.mark.slow)])
def test_processes_at_once_make_the_same_zoo(tmp_path, parts, whole):
    """Also when both are asked for the same."""
    processes = [Fork(*command(tmp_path, "--shard", part)) for part in parts]
    assert [process.finish().returncode for process in processes] == [0, 0]
    assert open_zoo(tmp_path / "zoo").sha256 == whole


@pytest.mark.slow
def test_torchrun_makes_the_same_zoo(tmp_path, whole):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_process(*launcher, *command(tmp_path), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert open_zoo(tmp_path / "zoo").sha256 == whole


def test_killed_and_restarted(tmp_path):
    """kill -9 in the middle: finished shards are kept as they are, and the zoo is the same."""
    slow = ["--steps", "400"]
    process = Fork(*command(tmp_path, *slow))
    partial = tmp_path / "zoo.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("shard-*.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.finish()
    assert not (tmp_path / "zoo").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("shard-*.safetensors")}
    assert len(kept) < 4
    done = run_fork(*command(tmp_path, *slow, "--shard", "3/4"))
    assert done.returncode == 0, done.stderr
    for name, written in kept.items():
        assert (partial / name).stat().st_mtime_ns == written
    done = run_fork(*command(tmp_path, *slow))
    assert done.returncode == 0, done.stderr
    whole = make_zoo(replace(SMALL, out=str(tmp_path / "whole"), steps=400))
    assert verify_zoo(tmp_path / "zoo").sha256 == open_zoo(whole).sha256


@pytest.mark.parametrize("size", [4_000, 60_000])
def test_full_disk(tmp_path, size, whole):
    """While a shard is written, and while the zoo is: one line, nothing half-written, and the same command goes on."""
    with largest_file(size):
        done = run_here(*command(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "File too large" in last
    assert "free space" in last
    assert not (tmp_path / "zoo").exists()
    assert not list(tmp_path.glob("**/*.tmp")) + list(tmp_path.glob("*.writing"))
    assert run_here(*command(tmp_path), cwd=tmp_path).returncode == 0
    assert verify_zoo(tmp_path / "zoo").sha256 == whole


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


def test_other_images_are_another_recipe(recipe, mnist_folder):
    recipe = replace(recipe, images="mnist", images_path=str(mnist_folder), steps=1)
    make_zoo(recipe)
    labels = mnist_folder / "t10k-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[-1] = 9 - content[-1]
    labels.write_bytes(content)
    with pytest.raises(ValueError, match=r"made by another recipe .image_source IDX files, 30 of 28x28x1"):
        make_zoo(recipe)


def test_shared_initialisation(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "BLOCK", 25)
    shared = open_zoo(make_zoo(replace(recipe, init="shared", steps=1, lr=1e-9)))
    first, second = shared.params.weights[0][0], shared.params.weights[0][1]
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(shared.params.weights[0][0::2], first.expand(30, 6, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared.params.weights[0][1::2], second.expand(30, 6, 2), rtol=1e-5, atol=1e-6)
    independent = open_zoo(make_zoo(replace(recipe, out=str(tmp_path / "own"), steps=1, lr=1e-9)))
    assert (independent.params.weights[0][0] - independent.params.weights[0][2]).abs().max() > 0.01


def test_target_psnr_stops_early(recipe):
    zoo = open_zoo(make_zoo(replace(recipe, target_psnr=15.0, steps=300)))
    stopped = zoo.columns["steps"] < 300
    assert stopped.float().mean() > 0.5
    assert len(zoo.columns["steps"].unique()) > 5
    assert zoo.columns["psnr"][stopped].min() >= 15
    assert zoo.columns["psnr"][stopped].median() < 16.5


def test_half_precision(recipe, tmp_path):
    """Stored as float16, with the PSNR of what is stored."""
    whole = open_zoo(make_zoo(replace(recipe, out=str(tmp_path / "whole"), steps=200)))
    zoo = open_zoo(make_zoo(replace(recipe, dtype="float16", steps=200)))
    for stored, exact in zip(zoo.params.weights, whole.params.weights, strict=True):
        assert stored.dtype == torch.float16
        assert torch.equal(stored, exact.half())
    pixels = load_images("digits").take(zoo.columns["image"])
    mse = (render(zoo.params.map(torch.Tensor.float), 8, 8) - pixels).square().flatten(1).mean(1)
    torch.testing.assert_close(zoo.columns["psnr"], -10 * mse.log10())
    assert not torch.equal(zoo.columns["psnr"], whole.columns["psnr"])


def test_problems_are_named_together():
    match = r"views: found 0.*shard: found 2/2.*lr: found -1.*hidden: found \[\].*val_fraction, test_fraction"
    with pytest.raises(ValueError, match=match):
        InrRecipe(views=0, hidden=(), lr=-1.0, val_fraction=0.5, test_fraction=0.6, shard="2/2")


def test_recipe_is_stored_as_plain_json(recipe):
    content = json.loads((make_zoo(recipe) / "zoo.json").read_text())
    assert content["provenance"]["recipe"]["hidden"] == [6, 6]
    assert content["provenance"]["image_shape"] == [8, 8, 1]
    assert content["splits"] == {"train": 42, "val": 6, "test": 12}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 3}, "leave none for val"),
        ({"num_images": 5000}, "found 5000, expected at most 1797"),
        ({"lr": 1e38}, "networks diverged"),
        ({"test_fraction": None}, "digits has no test set of its own"),
        ({"images": "mnist"}, "images_path: found null"),
        pytest.param(
            {"device": "cuda"},
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
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
