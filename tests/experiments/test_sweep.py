"""Sweeps, as a user runs them."""

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import assert_refused, run_command

from scalegmn.configuration.parsing import parse
from scalegmn.experiments.sweep import SweepConfig, renamed_folder, wandb_sweep

ROOT = Path(__file__).parents[2]
SWEEPS = sorted(ROOT.glob("configs/sweeps/*.yml"))


@pytest.fixture
def home(small_home, tmp_path):
    """A folder of its own for each test."""
    return shutil.copytree(small_home, tmp_path / "home", symlinks=True)


def write(home, content):
    (home / "sweep.yml").write_text(yaml.safe_dump({"base": ["conf.yml"], "folder": "sweep", **content}))


@pytest.fixture
def sweep(home, monkeypatch, capsys):
    """sweep(content, *words): exit code, stdout and stderr of the command."""

    def run(content, *words):
        write(home, content)
        return run_command(["sweep", "--conf=sweep.yml", *words], home, monkeypatch, capsys)

    return run


def tables(home):
    """The rows of both tables, which agree."""
    rows = [json.loads(line) for line in (home / "sweep/results.jsonl").read_text().splitlines()]
    with open(home / "sweep/results.csv", newline="") as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [row["trial"] for row in rows]
    return rows


@pytest.mark.slow
def test_random_sweep_goes_on(home, sweep):
    content = {
        "method": "random",
        "parameters": {
            "optimization.optimizer_args.lr": {"log_uniform": ["1e-4", 0.01]},
            "scalegmn_args.dropout": {"uniform": [0, 0.5]},
            "scalegmn_args.hidden_dim": {"int": [4, 9]},
            "data.canonicalize": [["phase"], []],
        },
    }
    assert sweep(content, "--num_trials=1")[0] == 0
    code, out, error = sweep(content, "--num_trials=2")
    assert code == 0, error
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
    assert f"best: {best['trial']}" in out
    for changed, message in (
        ({"seed": 1}, "holds another sweep"),
        ({"parameters": {"batch_sise": [1]}, "folder": "new"}, "unknown key batch_sise, did you mean batch_size?"),
        ({"script": "none.py"}, "script: none.py: no such file"),
    ):
        assert_refused(sweep({**content, **changed}), message)


def alive(pid):
    """Whether a process runs; not one that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_killed_sweep_goes_on(home, sweep):
    """Killed in its first trial, which dies with it; the same command runs that trial, and the rest of the grid."""
    content = {"method": "grid", "settings": {"train_args.num_epochs": 3}, "parameters": {"batch_size": [1, 2]}}
    write(home, content)
    process = subprocess.Popen([sys.executable, "-m", "scalegmn", "sweep", "--conf=sweep.yml"], cwd=home)
    while not list(home.glob("sweep/trial-*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    assert_refused(sweep(content), "error: sweep: another process runs this sweep")
    (killed,) = home.glob("sweep/trial-???")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    trials = children.read_text().split() if sys.platform == "linux" else []
    process.kill()
    process.wait()
    while any(alive(pid) for pid in trials):  # a trial that went on would finish
        time.sleep(0.02)
    assert not (killed / "summary.json").exists()
    code, _, error = sweep(content)
    assert code == 0, error
    rows = tables(home)
    assert sorted(row["batch_size"] for row in rows) == [1, 2]
    assert {row["state"] for row in rows} == {"finished"}
    assert killed.name in {row["trial"] for row in rows}
    _, again, _ = sweep(content)
    assert again.startswith("best: ")


def test_failed_and_pruned_trials(home, sweep):
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
    code, out, error = sweep({**content, "parameters": {"x": [1, 2, 3, 4, 5, 7, 0]}})
    assert code == 0, error
    rows = {row["x"]: row for row in tables(home)}
    assert {x: row["state"] for x, row in rows.items()} == {
        **dict.fromkeys(range(1, 6), "finished"),
        **{7: "failed", 0: "pruned"},
    }
    assert rows[7]["error"] == "seven"
    assert rows[5]["test_x"] == 10
    assert re.search(r"^best: trial-\d+  finished  val_x 5.0000  --x=5$", out, re.MULTILINE), out
    failed = sweep({**content, "parameters": {"x": [7]}, "folder": "failed"})
    assert_refused(failed, "failed: seven; the same command goes on")
    again = sweep({**content, "parameters": {"x": [7]}, "folder": "failed"})
    assert_refused(again, "failed: all trials failed; failed/results.csv says why")
    other = sweep({**content, "parameters": {"x": [1]}, "folder": "other", "metric": "val_y"})
    assert_refused(other, "no val_y in other/trial-000/metrics.jsonl, found val_x")


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


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps(path, home, sweep):
    """Each parses, is made of settings that its script takes, and runs."""
    assert path.read_text().startswith("#")
    content = yaml.safe_load(path.read_text())
    content["settings"] |= {"train_args.num_epochs": 1, "data.dataset_path": "data/zoo", "debug": True}
    content["base"] = [str(ROOT / file) for file in content["base"]]
    code, _, error = sweep({**content, "folder": "sweep"}, "--num_trials=1")
    assert code == 0, error
    (row,) = tables(home)
    assert set(content["parameters"]) <= set(row)


def test_wandb(home, sweep):
    content = yaml.safe_load(SWEEPS[0].read_text())
    code, _, error = sweep(content, "--export=wandb", "--out=exported")
    assert code == 0, error
    found = yaml.safe_load((home / "exported/wandb.yml").read_text())
    assert found == wandb_sweep(parse(SweepConfig, ["--conf", str(SWEEPS[0])], translate=renamed_folder))
    assert found["program"] == content["script"]
    assert found["metric"] == {"name": "val_accuracy", "goal": "maximize"}
    lr = found["parameters"]["optimization.optimizer_args.lr"]
    assert lr == {"distribution": "log_uniform_values", "min": 3e-4, "max": 1e-2}
    assert found["parameters"]["scalegmn_args.hidden_dim"] == {"values": [16, 32, 64]}
    assert found["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    assert found["command"][-2:] == ["--wandb=True", "${args}"]
