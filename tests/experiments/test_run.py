"""Several seeds and dry runs, as a user starts them."""

import json
import shutil
import statistics

import pytest
from commands import run_here

from scalegmn.experiments.config import ScriptConfig
from scalegmn.experiments.run import each_seed, over_seeds


def classify(home, *words):
    return run_here("inr_classification.py", "--conf=conf.yml", *words, cwd=home)


@pytest.fixture
def home(small_home, tmp_path):
    """A folder of its own for each test."""
    return shutil.copytree(small_home, tmp_path / "home", symlinks=True)


@pytest.mark.slow
def test_seeds(home):
    """Two runs; then a third, while the finished ones are left alone; the summary is theirs."""
    result = classify(home, "--seeds=0,1", "--run_dir=runs/seeds")
    assert result.returncode == 0, result.stderr
    folder = home / "runs/seeds"
    files = {path: path.stat().st_mtime_ns for path in folder.glob("seed_*/*.*")}
    result = classify(home, "--seeds=0,1,4", "--run_dir=runs/seeds")
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert result.stdout.count("finished already") == 2
    runs = [json.loads((folder / f"seed_{seed}/summary.json").read_text()) for seed in (0, 1, 4)]
    assert len({run["test_loss"] for run in runs}) == 3
    summary = json.loads((folder / "summary.json").read_text())
    losses = [run["test_loss"] for run in runs]
    assert summary["seeds"] == [0, 1, 4]
    assert summary["test_loss"] == {"mean": sum(losses) / 3, "std": statistics.stdev(losses), "values": losses}
    assert f"test loss {sum(losses) / 3:.4f} +- {statistics.stdev(losses):.4f} (standard deviation), 3 seeds" in (
        result.stdout
    )
    for words, message in (
        (["--seeds=0,1", "--batch_size=12"], "runs/seeds/seed_0 was trained with another configuration"),
        ([], "runs/seeds holds a finished run"),
    ):
        refused = classify(home, *words, "--run_dir=runs/seeds")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert message in refused.stderr
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_over_seeds():
    found = over_seeds([{"test_a": 1.0, "val_a": 9}, {"test_a": 3.0, "val_a": 9}])
    assert found == {"test_a": {"mean": 2.0, "std": 2**0.5, "values": [1.0, 3.0]}}
    assert over_seeds([{"test_a": 1.0}]) == {"test_a": {"mean": 1.0, "std": None, "values": [1.0]}}


def test_each_seed_differs_in_seed_and_folder():
    first, second = each_seed(ScriptConfig(seeds="3,5", run_dir="runs/x"))
    assert (first.train_args.seed, first.run_dir, first.seeds) == (3, "runs/x/seed_3", None)
    assert (second.train_args.seed, second.run_dir) == (5, "runs/x/seed_5")


@pytest.mark.parametrize("seeds", ["0,", "a", "0 1", "-1", "0;1"])
def test_wrong_seeds(seeds):
    with pytest.raises(ValueError, match=r"seeds: found .*, expected numbers separated by commas, such as 0,1,2"):
        ScriptConfig(seeds=seeds)


@pytest.mark.slow
def test_dry_run_writes_nothing(home):
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    result = classify(home, "--dry_run=True", "--seeds=0,1", "--train_args.num_epochs=7")
    assert result.returncode == 0, result.stderr
    assert "data/zoo: 24 train, 12 val, 12 test networks" in result.stdout
    assert "3 per epoch of 8 networks each, 7 epochs at most: 21 steps, for each of 2 seeds" in result.stdout
    trained = classify(home, "--run_dir=runs/one")
    assert trained.returncode == 0, trained.stderr
    parameters = json.loads((home / "runs/one/summary.json").read_text())["parameters"]
    assert f"ScaleGMN, {parameters:,} parameters" in result.stdout
    assert "sees: all parameters" in result.stdout
    (memory,) = (line.split()[1] for line in result.stdout.splitlines() if line.startswith("memory: "))
    assert 0.1 < float(memory) < 5
    shutil.rmtree(home / "runs")
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
