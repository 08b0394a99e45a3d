"""Files of every kind that is read, damaged at random: an answer or one line about the file, never a traceback, and
nothing is written outside of the output folder."""

import gzip
import json
import pickle
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_here
from image_files import idx
from onnx_files import chain, write_onnx
from PIL import Image
from safetensors.torch import save_file

from scalegmn.networks.siren import init_siren
from scalegmn.networks.spec import NetSpec
from scalegmn.zoos.images import load_images
from scalegmn.zoos.loader import DataConfig, open_data

FIXTURES = Path(__file__).parent / "fixtures" / "before_rebuild"
SPEC = NetSpec.mlp([2, 6, 5, 1], "sine", 6.0)


def state_dict(number=0):
    """A SIREN."""
    params = init_siren(SPEC, 1, torch.Generator().manual_seed(number))
    pairs = zip(params.weights, params.biases, strict=True)
    return {
        f"{k}.{kind}": t[0] for k, pair in enumerate(pairs) for kind, t in zip(("weight", "bias"), pair, strict=True)
    }


def networks(folder):
    """Single networks in all kinds of files, with an index and a table."""
    state = state_dict()
    torch.save(state, folder / "net.pth")
    torch.save({"state_dict": state, "epoch": 3, "score": np.float64(0.5)}, folder / "net.ckpt")
    save_file(state, folder / "net.safetensors")
    (folder / "shards").mkdir()
    save_file(state, folder / "shards" / "part.safetensors")
    index = {"weight_map": dict.fromkeys(state, "part.safetensors")}
    (folder / "shards" / "net.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state, folder / "shards" / "other.bin")
    index = {"weight_map": dict.fromkeys(state, "other.bin")}
    (folder / "shards" / "other.bin.index.json").write_text(json.dumps(index))
    write_onnx(folder / "net.onnx", chain(list(state.values()), "sine", 6.0))
    (folder / "nets").mkdir()
    for number in range(3):
        torch.save(state_dict(number), folder / "nets" / f"{number}.pth")
    lines = [f"{number}.pth,{number},{split}" for number, split in enumerate(("train", "val", "test"))]
    (folder / "labels.csv").write_text("\n".join(["name,label,split", *lines]) + "\n")


def pictures(folder):
    """Images in all kinds of files."""
    draw = np.random.default_rng(0)
    (folder / "mnist").mkdir()
    for part, number in (("train", 5), ("t10k", 3)):
        images, labels = idx(draw.integers(0, 256, (number, 28, 28))), idx(draw.integers(0, 10, number))
        (folder / "mnist" / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / "mnist" / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    for number, suffix in enumerate(("png", "jpg", "tif", "webp", "bmp")):
        path = folder / "pictures" / str(number % 2) / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)
    (folder / "cifar").mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {"data": draw.integers(0, 256, (2, 3072)).astype(np.uint8), "labels": [1, 2]}
        (folder / "cifar" / name).write_bytes(pickle.dumps(batch, protocol=4))


def published(folder):
    """A folder of published INRs with their splits."""
    paths = []
    for number in range(6):
        path = folder / "inrs" / f"mnist_png_training_{number}_{number}" / "checkpoints" / "model_final.pth"
        path.parent.mkdir(parents=True)
        torch.save(state_dict(number), path)
        paths.append(str(path.relative_to(folder / "inrs")))
    splits = {name: {"path": paths[k : k + 2]} for name, k in (("train", 0), ("val", 2), ("test", 4))}
    (folder / "inrs" / "mnist_splits.json").write_text(json.dumps(splits))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with good files of every kind."""
    home = tmp_path_factory.mktemp("damaged") / "home"
    shutil.copytree(FIXTURES, home)
    for write in (networks, pictures, published):
        write(home)
    (home / "conf.yml").write_text("batch_size: 4\nscalegmn_args:\n  hidden_dim: 8\ntrain_args:\n  num_epochs: 1\n")
    return home


def command(*words):
    """A function of a folder: the exit code and the error of a command there."""

    def run(home):
        result = run_here("-m", "scalegmn", *words, cwd=home)
        return result.returncode, [line for line in result.stderr.splitlines() if line.startswith("error: ")]

    return run


def call(function):
    """The same for a function that a command calls with a folder."""

    def run(home):
        try:
            function(home)
        except (ValueError, OSError) as error:
            return 2, [str(error)]
        return 0, []

    return run


predict = partial(command, "predict", "--checkpoint")
KINDS = {
    "net.pth": predict("bundle", "net.pth"),
    "net.ckpt": predict("bundle", "net.ckpt"),
    "net.safetensors": predict("bundle", "net.safetensors"),
    "net.onnx": predict("bundle", "net.onnx"),
    "shards/net.safetensors.index.json": predict("bundle", "shards"),
    "shards/part.safetensors": predict("bundle", "shards"),
    "shards/other.bin": predict("bundle", "shards/other.bin.index.json"),
    "shards/other.bin.index.json": predict("bundle", "shards/other.bin.index.json"),
    "nets/1.pth": command("zoo", "import", "nets", "--labels=labels.csv", "--activation=sine", "--w0=6", "--out=out"),
    "labels.csv": command("zoo", "import", "nets", "--labels=labels.csv", "--activation=sine", "--w0=6", "--out=out"),
    "bundle/config.json": predict("bundle", "net.pth"),
    "bundle/model.safetensors": predict("bundle", "net.pth"),
    "runs/classification/config.yml": predict("runs/classification", "net.pth"),
    "runs/classification/summary.json": predict("runs/classification", "net.pth"),
    "runs/classification/checkpoints/best.safetensors": predict("runs/classification", "net.pth"),
    "zoos/inrs/zoo.json": command("zoo", "verify", "zoos/inrs"),
    "zoos/inrs/zoo.safetensors": command("zoo", "verify", "zoos/inrs"),
    "conf.yml": command(
        "train", "classification", "--conf=conf.yml", "--data.dataset_path=zoos/inrs", "--dry_run=True"
    ),
    "mnist/train-images-idx3-ubyte": call(lambda home: load_images("mnist", home / "mnist")),
    "mnist/t10k-labels-idx1-ubyte.gz": call(lambda home: load_images("mnist", home / "mnist")),
    "pictures/0/0.png": call(lambda home: load_images("folder", home / "pictures")),
    "pictures/1/1.jpg": call(lambda home: load_images("folder", home / "pictures")),
    "pictures/0/2.tif": call(lambda home: load_images("folder", home / "pictures")),
    "pictures/1/3.webp": call(lambda home: load_images("folder", home / "pictures")),
    "pictures/0/4.bmp": call(lambda home: load_images("folder", home / "pictures")),
    "cifar/data_batch_2": call(lambda home: load_images("cifar10", home / "cifar")),
    "inrs/mnist_splits.json": call(
        lambda home: open_data(DataConfig(str(home / "inrs"), "labeled_mnist_inr", convert=False))
    ),
}
"""A file -> what reads it."""

TEXTS = (b"null", b"-1", b"1e400", b"NaN", b"99999999999999999999", b'""', b"[]", b"{}", b"\xff\xfe", b"\x00", b"../x")
"""What damage puts in place of something."""


def damaged(content, draw):
    """A file's content with one to three random changes."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        start = draw.randrange(max(1, len(content)))
        stop = min(len(content), start + draw.choice((1, 2, 8, 64)))
        kind = draw.randrange(6)
        if kind == 0:
            del content[start:]
        elif kind == 1:
            content[start:stop] = draw.randbytes(stop - start)
        elif kind == 2:
            content[start:stop] = draw.choice(TEXTS)
        elif kind == 3:
            content[start:start] = content[start:stop]
        elif kind == 4:
            del content[start:stop]
        else:
            content[start : start + 1] = bytes([content[start] ^ 1 << draw.randrange(8)]) if content else b""
    return bytes(content)


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def check(home, name, seeds):
    path, run = home / name, KINDS[name]
    good, before = path.read_bytes(), files(home.parent)
    refused = 0
    try:
        for seed in seeds:
            path.write_bytes(damaged(good, random.Random(f"{name} {seed}")))
            code, errors = run(home)
            assert code in (0, 2), (name, seed)
            assert (len(errors), *("\n" in error for error in errors)) == ((1, False) if code else (0,)), (name, seed)
            shutil.rmtree(home / "out", ignore_errors=True)
            assert files(home.parent) == before, (name, seed)
            refused += code == 2
    finally:
        path.write_bytes(good)
        shutil.rmtree(home / "out", ignore_errors=True)
    return refused


@pytest.mark.parametrize("name", KINDS)
def test_good_files_are_read(home, name):
    code, errors = KINDS[name](home)
    if name == "inrs/mnist_splits.json":  # read, and not converted
        assert errors[0].startswith(f"{home / 'inrs'}: not converted yet")
    else:
        assert (code, errors) == (0, [])
    shutil.rmtree(home / "out", ignore_errors=True)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(home, name):
    assert check(home, name, range(4)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files(home, name):
    """About 2,000 in all."""
    check(home, name, range(4, 95))
