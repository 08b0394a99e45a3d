"""Sweeps, as a user runs them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scalegmn.cli import parse
from scalegmn.sweep import SweepConfig, wandb_sweep

ROOT = Path(__file__).parents[1]
SWEEPS = sorted(ROOT.glob("configs/sweeps/*.yml"))


@pytest.fixture
def home(small_home, tmp_path):
    """A folder of its own for each test."""
    return shutil.copytree(small_home, tmp_path / "home", symlinks=True)


def sweep(home, content, *words):
    (home / "sweep.yml").write_text(yaml.safe_dump({"base": ["conf.yml"], "folder": "sweep", **content}))
    command = [sys.executable, "-m", "scalegmn.sweep", "--conf=sweep.yml", *words]
    return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)


def tables(home):
    """The rows of both tables, which agree."""
    rows = [json.loads(line) for line in (home / "sweep/results.jsonl").read_text().splitlines()]
    with open(home / "sweep/results.csv", newline="") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [row["trial"] for row in rows]
    return rows


def test_random_sweep_goes_on(home):
    content = {
        "method": "random",
        "parameters": {
            "optimization.optimizer_args.lr": {"log_uniform": ["1e-4", 0.01]},
            "scalegmn_args.dropout": {"uniform": [0, 0.5]},
            "scalegmn_args.hidden_dim": {"int": [4, 9]},
            "data.canonicalize": [["phase"], []],
        },
    }
    result = sweep(home, content, "--num_trials=1")
    assert result.returncode == 0, result.stderr
    result = sweep(home, content, "--num_trials=2")
    assert result.returncode == 0, result.stderr
    first, second = rows = tables(home)
    assert [row["state"] for row in rows] == ["finished", "finished"]
    assert first["optimization.optimizer_args.lr"] != second["optimization.optimizer_args.lr"]
    for row in rows:
        summary = json.loads((home / "sweep" / row["trial"] / "summary.json").read_text())
        config = yaml.safe_load((home / "sweep" / row["trial"] / "config.yml").read_text())
        assert row["val_accuracy"] == summary["val_accuracy"]
        assert row["test_accuracy"] == summary["test_accuracy"]
        assert config["optimization"]["optimizer_args"]["lr"] == row["optimization.optimizer_args.lr"]
        assert config["scalegmn_args"]["hidden_dim"] == row["scalegmn_args.hidden_dim"]
        assert config["data"]["canonicalize"] == json.loads(row["data.canonicalize"])
        assert 1e-4 <= row["optimization.optimizer_args.lr"] <= 1e-2
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert f"best: {best['trial']}" in result.stdout
    for changed, message in (
        ({"seed": 1}, "holds another sweep"),
        ({"parameters": {"batch_sise": [1]}, "folder": "new"}, "unknown key batch_sise, did you mean batch_size?"),
        ({"script": "none.py"}, "script: none.py: no such file"),
    ):
        refused = sweep(home, {**content, **changed})
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert message in refused.stderr


def test_killed_sweep_goes_on(home):
    """Killed in its first trial, which dies with it; the same command runs that trial, and the rest of the grid."""
    content = {"method": "grid", "settings": {"train_args.num_epochs": 3}, "parameters": {"batch_size": [1, 2]}}
    (home / "sweep.yml").write_text(yaml.safe_dump({"base": ["conf.yml"], "folder": "sweep", **content}))
    process = subprocess.Popen([sys.executable, "-m", "scalegmn.sweep", "--conf=sweep.yml"], cwd=home)
    while not list(home.glob("sweep/trial-*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    busy = sweep(home, content)
    assert (busy.returncode, busy.stderr) == (2, "error: sweep: another process runs this sweep\n")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (killed,) = home.glob("sweep/trial-*/metrics.jsonl")
    time.sleep(0.5)
    before = killed.read_text()
    time.sleep(1)
    assert killed.read_text() == before
    result = sweep(home, content)
    assert result.returncode == 0, result.stderr
    rows = tables(home)
    assert sorted(row["batch_size"] for row in rows) == [1, 2]
    assert {row["state"] for row in rows} == {"finished"}
    assert killed.parent.name in {row["trial"] for row in rows}
    again = sweep(home, content)
    assert again.stdout.splitlines()[0].startswith("best: ")


def test_failed_and_pruned_trials(home):
    """A script that is no run of ours, but writes what a sweep reads: bad trials are pruned, failures are told."""
    (home / "script.py").write_text(
        "import json, pathlib, sys, time\n"
        "options = dict(word.lstrip('-').split('=') for word in sys.argv[1:] if '=' in word)\n"
        "if '--print_config' in sys.argv: sys.exit()\n"
        "value, run = float(options['x']), pathlib.Path(options['run_dir'])\n"
        "if value == 7: sys.exit('error: seven')\n"
        "run.mkdir()\n"
        "for epoch in range(3 if value else 1000):\n"
        "    with open(run / 'metrics.jsonl', 'a') as file: file.write(json.dumps({'val_x': value}) + '\\n')\n"
        "    time.sleep(0.01 if value else 0.1)\n"
        "(run / 'summary.json').write_text(json.dumps({'val_x': value, 'test_x': 2 * value}))\n"
    )
    content = {"script": "script.py", "base": [], "metric": "val_x", "method": "grid"}
    result = sweep(home, {**content, "parameters": {"x": [1, 2, 3, 4, 5, 7, 0]}})
    assert result.returncode == 0, result.stderr
    rows = {row["x"]: row for row in tables(home)}
    assert {x: row["state"] for x, row in rows.items()} == {
        **dict.fromkeys(range(1, 6), "finished"),
        **{7: "failed", 0: "pruned"},
    }
    assert rows[7]["error"] == "seven"
    assert rows[5]["test_x"] == 10
    assert "best: trial-" in result.stdout.splitlines()[-2]
    assert "--x=5" in result.stdout.splitlines()[-2]
    failed = sweep(home, {**content, "parameters": {"x": [7]}, "folder": "failed"})
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "failed: seven; the same command goes on" in failed.stderr
    other = sweep(home, {**content, "parameters": {"x": [1]}, "folder": "other", "metric": "val_y"})
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "no val_y in other/trial-000/metrics.jsonl, found val_x" in other.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {}}, "parameters: found none"),
        ({"parameters": {"a": []}}, "parameters.a: found an empty list"),
        ({"parameters": {"a": {"normal": [0, 1]}}}, "expected a list, or one of uniform, log_uniform, int"),
        ({"parameters": {"a": {"uniform": [1, 0]}}}, "parameters.a: found [1, 0], expected the lower first"),
        ({"parameters": {"a": {"log_uniform": [0, 1]}}}, "expected the lower above 0 and first"),
        ({"parameters": {"a": {"int": [0.5, 2]}}}, "expected two whole numbers"),
        ({"parameters": {"run_dir": ["a"]}}, "run_dir: not in a sweep"),
        ({"settings": {"a": 1}}, "a: found in settings and in parameters"),
        ({"method": "grid", "parameters": {"a": {"int": [0, 2]}}}, "a grid needs a list"),
        ({"metric": "test_accuracy"}, "metric: found test_accuracy, expected one of the validation split"),
        ({"num_trials": 0}, "num_trials: found 0"),
    ],
)
def test_wrong_sweeps(change, message):
    with pytest.raises(ValueError, match=r"found|not in a sweep") as caught:
        SweepConfig(**{"parameters": {"a": [1]}, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps(path, home):
    """Each parses, is made of settings that its script takes, and runs."""
    assert path.read_text().startswith("#")
    content = yaml.safe_load(path.read_text())
    content["settings"] |= {"train_args.num_epochs": 1, "data.dataset_path": "data/zoo", "debug": True}
    content["base"] = [str(ROOT / file) for file in content["base"]]
    result = sweep(home, {**content, "folder": "sweep"}, "--num_trials=1")
    assert result.returncode == 0, result.stderr
    (row,) = tables(home)
    assert set(content["parameters"]) <= set(row)


def test_wandb(home):
    content = yaml.safe_load(SWEEPS[0].read_text())
    result = sweep(home, content, "--export=wandb", "--folder=exported")
    assert result.returncode == 0, result.stderr
    found = yaml.safe_load((home / "exported/wandb.yml").read_text())
    assert found == wandb_sweep(parse(SweepConfig, ["--conf", str(SWEEPS[0])]))
    assert found["program"] == content["script"]
    assert found["metric"] == {"name": "val_accuracy", "goal": "maximize"}
    lr = found["parameters"]["optimization.optimizer_args.lr"]
    assert lr == {"distribution": "log_uniform_values", "min": 3e-4, "max": 1e-2}
    assert found["parameters"]["scalegmn_args.hidden_dim"] == {"values": [16, 32, 64]}
    assert found["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    assert found["command"][-2:] == ["--wandb=True", "${args}"]
