import csv
import json
import subprocess
import sys

import pytest

from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import NetSpec
from scalegmn.reporting.errors import user_errors
from scalegmn.reporting.figures import learning_curves
from scalegmn.reporting.files import git_commit, write_atomic
from scalegmn.reporting.rows import read_rows
from scalegmn.reporting.run_folder import Run
from scalegmn.reporting.tracking import TensorBoard, Wandb, WandbConfig


@pytest.mark.parametrize(("error", "code"), [(ValueError("a\nb"), 2), (FileNotFoundError("c"), 2)])
def test_input_errors_are_one_line(error, code, capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_interruption(capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert "goes on" in capsys.readouterr().err


def test_warnings_of_the_package_are_one_line(capsys):
    with user_errors():
        ScaleGMNConfig(hidden_dim=4, num_layers=1).build(NetSpec.mlp([2, 3, 3, 1], "sine"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the model sees 28% of the parameters, the weights of 1 of 3 layers of a MLP")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError


def test_write_atomic_leaves_the_old_file_on_failure(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "a", None)
    assert (tmp_path / "a").read_text() == "old"


def test_unfinished_run_is_begun_anew(tmp_path):
    run = Run(tmp_path / "run", "a: 1\n", {})
    run.log({"epoch": 0})
    (run.folder / "checkpoints" / "best.safetensors").write_text("stale")
    again = Run(tmp_path / "run", "a: 2\n", {})
    assert again.metrics() == []
    assert list((again.folder / "checkpoints").iterdir()) == []
    again.log({"epoch": 1})
    again.finish({"test": 1.0})
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"] == 1.0
    with pytest.raises(ValueError, match="finished run"):
        Run(tmp_path / "run", "", {})


@pytest.mark.parametrize("name", ["checkpoints/epoch3.ckpt", "figures/a.png", "metrics.csv", "config.yml", "wandb/a"])
def test_files_of_something_else_are_left_alone(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]} of something else; choose another --run_dir"):
        Run(tmp_path, "a: 1\n", {})
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=rf"--run_dir: .*{name} cannot be written \(.*\); choose another"):
        Run(tmp_path / name, "a: 1\n", {})


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    run = Run(tmp_path / "run", "a: 1\n", {})
    (run.folder / "checkpoints" / "state-0000000001.safetensors").write_text("whole")
    for name in ("metrics.csv.0.tmp", "checkpoints/last.safetensors.0.tmp"):
        (run.folder / name).write_text("half")
    again = Run(tmp_path / "run", "a: 1\n", {}, resume=True)
    assert list(again.folder.rglob("*.tmp")) == []
    assert (again.folder / "checkpoints" / "state-0000000001.safetensors").read_text() == "whole"


def test_git_commit_is_the_head():
    found = git_commit()
    if found is None:
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert found.removesuffix("-dirty") == head


def test_loggers_leave_the_same_numbers(tmp_path, capsys):
    """Rows that grow a column half-way, read back from every file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path / "run", "a: 1\n", {"a": 1}, [TensorBoard()])
    rows = [{"epoch": 0, "train_loss": 2.0}, {"epoch": 1, "train_loss": 1.5, "val_loss": 0.25}, {"epoch": 2}]
    for row in rows:
        run.log(row)
    learning_curves(run.folder / "figures" / "curves.png", [{"epoch": 0, "val_loss": 1.0}], 0)
    run.finish({"test_loss": 0.125, "data": {}})
    assert run.metrics() == rows
    with open(run.folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in line.items() if value} for line in table] == rows
    assert list(table[0]) == ["epoch", "train_loss", "val_loss"]
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars["train_loss"] == [(0, 2.0), (1, 1.5)]
    assert scalars["val_loss"] == [(1, 0.25)]
    assert scalars["final/test_loss"] == [(0, 0.125)]
    assert events.Images("figures/curves")[0].encoded_image_string.startswith(b"\x89PNG")
    assert '"a": 1' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["epoch", "train_loss"]
    assert [line.split() for line in lines[1:]] == [["0", "2.0000"], ["1", "1.5000"], ["2"]]
    again = Run(tmp_path / "other", "a: 1\n", {"a": 1})
    assert not (again.folder / "tensorboard").exists()


def test_epochs_that_are_run_again_are_logged_once(tmp_path):
    """Two epochs, of which a resumed run knows one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path / "run", "a: 1\n", {"a": 1}, [TensorBoard()])
    run.log({"epoch": 0, "val_loss": 3.0})
    run.log({"epoch": 1, "val_loss": 2.0})
    (run.folder / "checkpoints" / "state-0000000001.safetensors").touch()
    again = Run(tmp_path / "run", "a: 1\n", {"a": 1}, [TensorBoard()], resume=True)
    again.rewind(1)
    again.log({"epoch": 1, "val_loss": 1.0})
    again.finish({})
    assert again.metrics() == [{"epoch": 0, "val_loss": 3.0}, {"epoch": 1, "val_loss": 1.0}]
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(0, 3.0), (1, 1.0)]
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for epoch in (0, 1):
        logger = Wandb(WandbConfig())
        logger.start(tmp_path, {})
        logger.log({"epoch": epoch})
        logger.finish({}, [])
    names = [path.name for path in tmp_path.glob("wandb/*run-*")]
    assert len({name.rpartition("-")[2] for name in names}) == 1, names


def test_rows_without_a_line_that_is_being_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epo')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"epoch": 0}]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package(name, monkeypatch):
    for module in [module for module in sys.modules if name in module]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    logger = {"tensorboard": TensorBoard, "wandb": lambda: Wandb(WandbConfig())}[name]
    with pytest.raises(ValueError, match=f"^{name}: not installed; `pip install {name}` or leave --{name} False$"):
        logger()
