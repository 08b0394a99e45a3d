"""Hostile, broken and interrupted conversions: one line, nothing executed, nothing left or everything kept."""

import json
import os
import pickle
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Fork, largest_file, run_here
from published import save, siren, write_cifar, write_cnns, write_fmnist, write_mnist

from scalegmn.zoos import convert
from scalegmn.zoos.loader import DataConfig, open_data
from scalegmn.zoos.published import inrs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mnist(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(convert, "SHARD", 4)
    write_mnist(tmp_path, generator)
    return tmp_path


FIRST = "mnist-inrs/mnist_png_training_5_0/checkpoints/model_final.pth"


def config(folder):
    return DataConfig(str(folder / "mnist-inrs"), "labeled_mnist_inr", str(folder / "mnist_splits.json"))


def refused(data, folder):
    """The message; nothing has been left in the folder."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=r".") as caught:
        open_data(data)
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def write(content):
    return lambda path: path.write_bytes(content)


def store(change):
    def break_it(path):
        state = siren(torch.Generator().manual_seed(1))
        save(change(state), path)

    return break_it


BROKEN = {
    "a pickle that runs code": (write(pickle.dumps(Exploit())), "refused, not a file of plain tensors"),
    "a checkpoint that runs code": (
        store(lambda state: {**state, "x": Exploit()}),
        "entry 'x' holds a posix.mkdir, whose code",
    ),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "refused, not a file of plain tensors"),
    "empty": (write(b""), "refused, not a file of plain tensors"),
    "a list": (store(lambda state: list(state.values())), "found a list, expected a state dict"),
    "NaN": (
        store(lambda state: {**state, "seq.1.bias": state["seq.1.bias"] * torch.nan}),
        "a weight or bias is NaN or infinite",
    ),
    "too large for float32": (
        store(lambda state: {**state, "seq.1.bias": state["seq.1.bias"].double() * 1e300}),
        "a weight or bias is NaN or infinite",
    ),
    "wrong shape": (
        store(lambda state: {**state, "seq.1.bias": torch.zeros(7)}),
        r"seq.1: found a bias of shape \(7,\)",
    ),
    "a layer too few": (store(lambda state: dict(list(state.items())[:4])), "shapes"),
    "no bias": (store(lambda state: dict(list(state.items())[:5])), "seq.2 has no bias, expected one in every layer"),
    "integers": (
        store(lambda state: {**state, "seq.1.bias": torch.zeros(4).long()}),
        "seq.1.bias is not a dense tensor of floating point numbers",
    ),
    "sparse": (
        store(lambda state: {**state, "seq.1.bias": state["seq.1.bias"].to_sparse()}),
        "seq.1.bias is not a dense tensor",
    ),
    "a number": (store(lambda state: {**state, "seq.1.bias": torch.tensor(1.0)}), "seq.1: found a bias of shape"),
    "more than it holds": (
        store(
            lambda state: {
                **state,
                "seq.1.weight": torch.zeros(1).expand(100_000, 5),
                "seq.1.bias": torch.zeros(1).expand(100_000),
                "seq.2.weight": torch.zeros(1).expand(1, 100_000),
            }
        ),
        "claims more numbers than the file holds",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_network(mnist, name, monkeypatch):
    monkeypatch.chdir(mnist)
    break_it, message = BROKEN[name]
    break_it(mnist / FIRST)
    found = refused(config(mnist), mnist)
    assert re.search(message, found), found
    assert str(mnist / FIRST) in found
    assert not (mnist / "executed").exists()


def edit_splits(folder, change):
    file = folder / "mnist_splits.json"
    splits = json.loads(file.read_text())
    change(splits)
    file.write_text(json.dumps(splits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda splits: splits["val"]["path"].append("x/mnist_png_training_1_77/a/b.pth"), "3 paths"),
        (lambda splits: splits["val"].update(path=["x/mnist_png_training_1_77/a.pth"], label=["1"]), "no such network"),
        (lambda splits: splits["val"].update(path=["model.pth"], label=["1"]), "no such network"),
        (lambda splits: splits["val"].update(label=["1", "2"]), "label '1', but the folder's name says 9"),
        (lambda splits: splits["val"].update(splits["test"]), "is in split val and again in test"),
        (lambda splits: splits["val"].update(label=3), "label: expected a list"),
        (lambda splits: splits["val"].update(path=[5, 5]), '"train", "val" and "test"'),
        (lambda splits: splits.pop("val"), '"train", "val" and "test"'),
        (lambda splits: splits.update(val=3), '"train", "val" and "test"'),
        (lambda splits: splits["val"].update(path="mnist_png"), '"train", "val" and "test"'),
    ],
)
def test_wrong_splits(mnist, change, message):
    edit_splits(mnist, change)
    found = refused(config(mnist), mnist)
    assert message in found
    assert str(mnist / "mnist_splits.json") in found


def test_missing_files(mnist):
    (mnist / FIRST).unlink()
    assert f"{mnist / FIRST} is missing" in refused(config(mnist), mnist)
    (mnist / "mnist_splits.json").unlink()
    assert "mnist_splits.json: no such file" in refused(config(mnist), mnist)
    nothing = DataConfig(str(mnist / "nothing"), "labeled_mnist_inr")
    assert "no folders mnist_png_training" in refused(nothing, mnist)
    assert "no such folder" in refused(DataConfig(str(mnist / "nothing"), "cifar_inr"), mnist)
    assert "splits.json: no such file" in refused(DataConfig(str(mnist), "labeled_fashion_mnist_inr"), mnist)


def test_one_image_in_two_splits(mnist, generator):
    save(siren(generator), mnist / "mnist-inrs/mnist_png_training_8_0/checkpoints/model_final.pth")
    extra = {"path": ["mnist_png_training_8_0/checkpoints/model_final.pth"], "label": ["8"]}
    edit_splits(mnist, lambda splits: splits["val"].update(extra))
    assert "its image is in train too" in refused(config(mnist), mnist)


def test_one_file_or_folder_twice(mnist, generator):
    save(siren(generator), mnist / "mnist-inrs/again" / FIRST.removeprefix("mnist-inrs/"))
    assert "two folders of one name" in refused(config(mnist), mnist)
    write_fmnist(mnist / "fmnist", generator)
    (mnist / "fmnist/test/model_0.pth").unlink()
    (mnist / "fmnist/test/model_0.pth").symlink_to(mnist / "fmnist/train/model_2.pth")
    assert "is the same file as" in refused(DataConfig(str(mnist / "fmnist"), "labeled_fashion_mnist_inr"), mnist)


@pytest.mark.parametrize("label", [3.7, True, -1, 10**6, 2**70, float("inf"), "seven", [3], torch.tensor([1, 2])])
def test_labels_that_are_none(tmp_path, generator, label):
    write_fmnist(tmp_path, generator)
    save({**siren(generator), "label": label}, tmp_path / "train/model_2.pth")
    found = refused(DataConfig(str(tmp_path), "labeled_fashion_mnist_inr"), tmp_path)
    assert f"{tmp_path}/train/model_2.pth: label" in found


def test_paths_of_other_systems_and_links(mnist):
    before = open_data(config(mnist)).params.flatten()
    edit_splits(
        mnist,
        lambda splits: [
            entries.update(path=[p.replace("/", "\\") for p in entries["path"]]) for entries in splits.values()
        ],
    )
    os.rename(mnist / "mnist-inrs", mnist / "elsewhere")
    (mnist / "mnist-inrs").mkdir()
    (mnist / "mnist-inrs" / "link").symlink_to(mnist / "elsewhere")
    (mnist / "elsewhere" / "loop").symlink_to(mnist / "elsewhere")
    assert open_data(config(mnist)).params.flatten().equal(before)


def test_unknown_label(tmp_path, generator):
    write_cifar(tmp_path, generator, augs=0)
    result = script(
        tmp_path, "configs/cifar_inr_cls/scalegmn.yml", "--data.dataset_path", tmp_path, "--scalegmn_args.out_dim=6"
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "6 classes, but the labels" in result.stderr


CODE = "\"__import__('os').mkdir('executed')\""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("layout.csv", f"varname,start_idx,end_idx,shape\na/bias:0,0,2,{CODE}\n", "layout.csv: line 2: expected"),
        ("layout.csv", 'varname,start_idx,end_idx,shape\na/bias:0,0,2,"(3,)"\n', "columns 0 to 2 do not hold shape"),
        ("layout.csv", 'varname,start_idx,end_idx,shape\na/bias:0,0,9999,"(9999,)"\n', "do not hold shape"),
        ("layout.csv", 'varname,start_idx,end_idx,shape\na/scale:0,0,2,"(2,)"\n', "ending in kernel:0 or bias:0"),
        ("layout.csv", "", "do not cover columns"),
        ("layout.csv", 'varname,start_idx,end_idx,shape\na/bias:0,0,2,"(2,)"\nb/bias:0,1,3,"(2,)"\n', "once each"),
        ("cifar10_split.csv", "0\n0\n1\n", "expected different row numbers from 0 to 299"),
        ("cifar10_split.csv", "0\n300\n", "expected different row numbers from 0 to 299"),
        ("cifar10_split.csv", "zero\n", "expected row numbers, one per line"),
        ("metrics.csv.gz", "step,test_accuracy\n", "not a gzip file"),
        ("weights.npy", pickle.dumps(Exploit()), "refused, not a plain npy array"),
        ("weights.npy", b"", "refused, not a plain npy array"),
        ("weights.npy", b"PK\x03\x04", "refused, not a plain npy array"),
        ("layout.csv", b"\xff\xfe\x00", "not comma-separated values"),
        ("cifar10_split.csv", "inf\n", "expected row numbers, one per line"),
    ],
)
def test_wrong_cnn_files(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    write_cnns(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refused(DataConfig(str(tmp_path), "cifar10"), tmp_path)
    assert message in found
    assert name in found


def test_wrong_cnn_weights(tmp_path):
    weights, metrics, order = write_cnns(tmp_path)
    row = next(row for row in order if metrics[row]["step"] == 86)
    weights[row, 3] = np.nan
    np.save(tmp_path / "weights.npy", weights)
    assert f"row {row} has NaN or infinite weights" in refused(DataConfig(str(tmp_path), "cifar10"), tmp_path)
    np.save(tmp_path / "weights.npy", weights[:-1])
    assert "expected floats [300, parameters]" in refused(DataConfig(str(tmp_path), "cifar10"), tmp_path)
    np.save(tmp_path / "weights.npy", np.array([Exploit()] * 300))
    assert "refused, not a plain npy array" in refused(DataConfig(str(tmp_path), "cifar10"), tmp_path)


# The real script, on the published layout

CONVERT = "from scalegmn.zoos import convert; convert.SHARD = 2; import sys; from scalegmn.zoos.loader import *; "
CONVERT += "print(open_data(DataConfig(sys.argv[1], 'labeled_mnist_inr', sys.argv[2])).sha256)"


def script(folder, conf, *words):
    small = ["--scalegmn_args.hidden_dim=4", "--scalegmn_args.num_layers=2", "--train_args.num_epochs=1"]
    return run_here(ROOT / "inr_classification.py", "--conf", ROOT / conf, *words, *small, cwd=folder)


def test_script_on_the_published_layout(mnist):
    relative = ("--data.dataset_path=mnist-inrs", "--data.split_path=mnist_splits.json")
    first = script(mnist, "configs/mnist_cls/scalegmn.yml", *relative)
    assert first.returncode == 0, first.stderr
    assert "mnist-inrs: converting 11 networks to mnist-inrs/scalegmn-labeled_mnist_inr-" in first.stdout
    absolute = (f"--data.dataset_path={mnist}/mnist-inrs", f"--data.split_path={mnist}/mnist_splits.json")
    again = script(mnist, "configs/mnist_cls/scalegmn.yml", *absolute)
    assert again.returncode == 0, again.stderr
    assert "converting" not in again.stdout
    accuracy = [line for out in (first.stdout, again.stdout) for line in out.splitlines() if line.startswith("test ")]
    assert accuracy[0] == accuracy[1]


def test_full_disk(mnist):
    words = ["--data.dataset_path=mnist-inrs", "--data.split_path=mnist_splits.json"]
    with largest_file(1000):
        result = script(mnist, "configs/mnist_cls/scalegmn.yml", *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "cannot be written (File too large); free space, or choose another folder" in result.stderr
    assert not list(mnist.rglob("*.tmp"))
    assert not list(mnist.rglob("zoo.json"))
    assert open_data(config(mnist))  # once there is space


def test_conversion_may_be_forbidden(mnist):
    """Then what has been converted is read, and nothing else."""
    forbidden = replace(config(mnist), convert=False)
    assert "mnist-inrs: not converted yet" in refused(forbidden, mnist)
    converted = open_data(config(mnist))
    assert open_data(forbidden).sha256 == converted.sha256


def start(folder, code=CONVERT):
    return Fork("-c", code, folder / "mnist-inrs", folder / "mnist_splits.json")


def test_two_processes_at_once(mnist):
    slow = CONVERT.replace(
        "convert.SHARD = 2;", "convert.SHARD = 2; import time; convert.versions = lambda: time.sleep(2) or {};"
    )
    processes = [start(mnist, slow) for _ in range(2)]
    results = [process.finish() for process in processes]
    assert [result.returncode for result in results] == [0, 0], results
    out = sorted(result.stdout.splitlines() for result in results)
    assert out[0][-1] == out[1][-1]  # the same zoo
    assert sum("converting 11 networks" in line for lines in out for line in lines) == 1
    assert len(list((mnist / "mnist-inrs").glob("scalegmn-*"))) == 1  # nothing but the zoo


def test_killed_and_started_again(mnist, monkeypatch):
    whole = open_data(config(mnist))
    os.rename(whole.path, mnist / "whole")
    code = CONVERT.replace(
        "convert.SHARD = 2;", "convert.SHARD = 2; import time; convert.tqdm.update = lambda *a: time.sleep(0.5);"
    )
    process = start(mnist, code)
    partial = whole.path.with_name(whole.path.name + ".partial")
    deadline = time.time() + 60
    while len(list(partial.glob("shard-*.safetensors"))) < 2:
        assert time.time() < deadline, process.finish()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.finish()
    kept = len(list(partial.glob("shard-*.safetensors")))
    assert 2 <= kept < 6
    monkeypatch.setattr(convert, "SHARD", 2)
    read, calls = inrs.read_network, []
    monkeypatch.setattr(inrs, "read_network", lambda path: calls.append(path) or read(path))
    assert open_data(config(mnist)).params.flatten().equal(whole.params.flatten())
    assert len(calls) == 11 - 2 * kept + 1  # and the first, for its shapes
    assert not partial.exists()
