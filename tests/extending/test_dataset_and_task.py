"""A dataset and a task that the package does not know are trained through the usual command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import assert_refused, run_fork

import scalegmn
from scalegmn.cli import main
from scalegmn.networks import NetParams
from scalegmn.tasks import TASKS
from scalegmn.zoos.published import DATASETS
from scalegmn.zoos.zoo_format import Networks, write_zoo

FOLDER = Path(__file__).parent
SMALL = ["--scalegmn_args.hidden_dim=4", "--scalegmn_args.num_layers=1", "--train_args.num_epochs=1"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(words): exit code, stdout and stderr of `scalegmn` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    yield run
    sys.stdout.flush()


def test_task(command, tmp_path, generator):
    shapes = [(6, 2), (1, 6)]
    weights = [torch.randn(20, *shape, generator=generator) for shape in shapes]
    params = NetParams.from_tensors(weights, [torch.zeros(20, shape[0]) for shape in shapes], "sine", w0=6.0)
    splits = {"train": torch.arange(12), "val": torch.arange(12, 16), "test": torch.arange(16, 20)}
    size = weights[0].square().mean((1, 2))
    write_zoo(tmp_path / "zoo", [Networks((params,), {"psnr": torch.zeros(20), "size": size})], splits, {})
    words = ["--import", FOLDER / "task.py", "--data.dataset_path=zoo", "--run_dir=run", *SMALL]
    code, out, error = command("train", "column_regression", *words, "--column_regression_args.column=size")
    assert_refused((code, out, error), "scalegmn_args.out_dim: found 10, but column_regression needs 1")
    words += ["--scalegmn_args.out_dim=1"]
    code, out, error = command("train", "column_regression", *words, "--column_regression_args.column=size")
    assert code == 0, error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["task"] == "column_regression"
    model = scalegmn.load("run")
    assert model.config.task_args["column_regression"] == TASKS["column_regression"].options("size")
    expected = (model(params[16:]) - size[16:]).abs().mean().item()
    assert summary["test_mae"] == pytest.approx(expected, rel=1e-4)
    assert command("export", "--checkpoint=run", "--out=bundle")[0] == 0
    assert "A column of the zoo that the model was trained on." in (tmp_path / "bundle" / "README.md").read_text()
    assert command("zoo", "export", "zoo", "--network=17", "--out=net.pth")[0] == 0
    code, out, error = command("predict", "--checkpoint=bundle", "--format=json", "net.pth")
    assert (code, json.loads(out)[0]["column_regression"]) == (0, pytest.approx(model(params[17:18]).item(), rel=1e-4))
    code, _, error = command("train", "column_regresion", *words)
    assert "unknown task column_regresion, did you mean column_regression?" in error


def test_cnn_zoo_of_a_custom_activation(tmp_path):
    """In a process of its own, since activations register themselves once."""
    words = ["--import", FOLDER / "square.py", "--out=zoo", "--mixed=true", "--padding=same", "--activations=[square]"]
    words += ["--networks=6", "--channels=[3]", "--kernels=[3]", "--depths=[2]", "--checkpoints=[1]", "--num_images=60"]
    words += ["--batch_size=8", "--l2=[1e-6,1e-5]", "--init_std=[0.05,0.1]"]
    done = run_fork("-m", "scalegmn", "zoo", "cnn", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    specs = json.loads((tmp_path / "zoo" / "zoo.json").read_text())["specs"]
    assert {layer["activation"] for spec in specs for layer in spec["layers"][:-1]} == {"square"}


def test_dataset(command, tmp_path, generator):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=(30, *shape)).astype(np.float32)
        for name, shape in {"weight0": (4, 2), "bias0": (4,), "weight1": (1, 4), "bias1": (1,)}.items()
    }
    rows = dict(zip(("train", "val", "test"), np.split(np.arange(30), [20, 25]), strict=True))
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "mlps.npz", **arrays, **rows, label=np.arange(30) % 3)
    words = ["--import", FOLDER / "dataset.py", "--data.dataset=npz_mlps", "--data.dataset_path=data"]
    words += [*SMALL, "--scalegmn_args.out_dim=3", "--run_dir=run"]
    assert_refused(command("train", "classification", *words), "networks.npz: no such file; set --data.dataset_path")
    refused = command("train", "classification", *words, '--data.dataset_args={"fil": "mlps.npz"}')
    assert_refused(refused, "data.dataset_args: found fil, expected some of file")
    code, out, error = command("train", "classification", *words, '--data.dataset_args={"file": "mlps.npz"}')
    assert code == 0, error
    assert "data: converting 30 networks to data" in out
    zoo = scalegmn.load("run").config.data
    params = DATASETS["npz_mlps"].open(zoo).params
    assert np.array_equal(params.weights[0].numpy(), arrays["weight0"])
    assert "npz_mlps" in command("train", "classification", "--help")[1]
    assert_refused(
        command("train", "classification", *words[2:], "--data.dataset=npz_mlp"),
        "data.dataset: found 'npz_mlp', expected one of zoo, ",
    )
