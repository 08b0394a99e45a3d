"""Zoos, runs and bundles that were made before the package was divided into rooms: they open, answer and go on.

`fixtures/before_rebuild` holds what commit 5d5ae62 made: zoos; runs of two epochs; a bundle of the first of them; a run
that a signal stopped in its second epoch; `answers.safetensors`, what each model answered on the first six networks of
its zoo, in float64; and the metrics of the stopped run's twin that nobody stopped.
"""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from commands import run_main
from safetensors.torch import load_file

import scalegmn
from scalegmn.experiments.config import read_config_file
from scalegmn.networks import HETERO
from scalegmn.zoos.zoo_format import verify_zoo

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures" / "before_rebuild"
ANSWERS = load_file(FIXTURES / "answers.safetensors")
ZOO_OF = {"runs/classification": "inrs", "bundle": "inrs", "runs/generalization": "cnns", "runs/editing": "inrs"}
SCRIPTS = {
    "runs/classification": "inr_classification.py",
    "runs/generalization": "predicting_generalization.py",
    "runs/editing": "inr_editing.py",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with copies of all fixtures and scripts: runs name their zoos by relative paths."""
    home = tmp_path_factory.mktemp("home") / "before"
    shutil.copytree(FIXTURES, home)
    (home / "runs/stopped/figures").mkdir()  # git keeps no empty folders
    for script in SCRIPTS.values():
        (home / script).symlink_to(ROOT / script)
    return home


@pytest.mark.parametrize(
    ("name", "num_networks", "activations"),
    [
        ("inrs", 40, {"sine"}),
        ("cnns", 32, {HETERO}),
        ("mixed_cnns", 6, {"relu", "gelu", "tanh", "sigmoid", "leaky_relu"}),
    ],
)
def test_zoos(home, name, num_networks, activations):
    zoo = verify_zoo(home / "zoos" / name)
    assert len(zoo) == num_networks
    assert {layer.activation for params in zoo.nets for layer in params.spec.layers[:-1]} == activations
    assert zoo.sha256 == json.loads((FIXTURES / "zoos" / name / "zoo.json").read_text())["sha256"]


@pytest.mark.parametrize("run", ZOO_OF)
def test_answers(home, run):
    """Float64, where sums in another order differ by 1e-15; 1e-9 leaves room for any of them."""
    zoo, model = verify_zoo(home / "zoos" / ZOO_OF[run]), scalegmn.load(home / run)
    model.metanetwork(zoo.spec).double()
    answer = model(zoo.params[:6].to(torch.float64))
    answer = answer if isinstance(answer, torch.Tensor) else answer.flatten()
    torch.testing.assert_close(answer, ANSWERS[run.replace("/", ".")], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("run", SCRIPTS)
def test_training_again(home, run, monkeypatch, capsys, tmp_path):
    """The run's own configuration gives the same metrics again: float32, eight steps, so that rounding stays small."""
    words = ["--conf", f"{run}/config.yml", "--run_dir", str(tmp_path / "run")]
    code, _, error = run_script(home, SCRIPTS[run], words, monkeypatch, capsys)
    assert code == 0, error
    found, expected = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "run", home / run))
    for name, value in expected.items():
        if name.startswith(("test_", "val_")):
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    for name in ("task", "zoo", "sha256", "read", "canonical", "networks", "architectures"):
        assert found["data"][name] == expected["data"][name]


def test_resume(home, monkeypatch, capsys):
    """A run that was stopped then goes on now, and ends as its twin."""
    words = ["--resume", "runs/stopped"]
    code, out, error = run_script(home, "inr_classification.py", words, monkeypatch, capsys)
    assert code == 0, error
    assert "going on after step 2 of epoch 1" in out
    names = ("epoch", "step", "lr", "train_loss", "val_loss", "val_accuracy", "grad_norm")
    found, expected = (
        [{name: row[name] for name in names} for row in map(json.loads, path.read_text().splitlines())]
        for path in (home / "runs/stopped/metrics.jsonl", home / "stopped_run_to_its_end.jsonl")
    )
    for row, twin in zip(found, expected, strict=True):
        assert row == pytest.approx(twin, rel=1e-5)


def test_configurations(home):
    for run in ("runs/classification/config.yml", "bundle/config.json", "runs/stopped/config.yml"):
        config = read_config_file(home / run)
        assert (config.data.dataset_path, config.model_config.num_layers) == ("zoos/inrs", 2)


def run_script(home, script, words, monkeypatch, capsys):
    """Exit code, stdout and stderr of a published script, in this process."""
    return run_main(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), words, home, monkeypatch, capsys)
