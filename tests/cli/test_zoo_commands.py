"""`scalegmn zoo info`, `verify`, `export`, `splits`, as a user runs it."""

import json

import pytest
import torch
from commands import run_here
from published import MNIST, write_mnist
from safetensors.torch import load_file

from scalegmn.cli.zoo.info import describe
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.zoos.published.inrs import read_network
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo


def command(*words):
    return run_here("-m", "scalegmn", "zoo", *words, cwd=".")


def refused(result):
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
    return result.stderr


@pytest.fixture
def zoo(tmp_path, random_params):
    sirens = random_params(NetSpec.mlp([2, 4, 1], "sine"), 3).to(torch.float32)
    cnns = random_params(NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 2))), 2)
    columns = {"label": torch.tensor([4, 0, 7, 1, 1]), "psnr": torch.linspace(10, 20, 5)}
    splits = {"train": torch.tensor([0, 1, 3]), "val": torch.tensor([2]), "test": torch.tensor([4])}
    write_zoo(tmp_path / "zoo", [Networks((sirens, cnns), columns)], splits, {"images": "noise"})
    return tmp_path / "zoo", sirens, cnns


def test_info_and_verify(zoo):
    result = command("info", zoo[0])
    assert result.returncode == 0, result.stderr
    for part in (
        "5 networks",
        "3 x MLP [2, 4, 1] (sine), 17 parameters, float32",
        "2 x CNN [1, 3, 2] (relu), 38 parameters, float64",
        "column label: 0 to 7",
        "column psnr: 10 to 20",
        "split train: 3 networks",
        '{"images": "noise"}',
    ):
        assert part in result.stdout
    assert "every checksum is right, every weight finite" in command("verify", zoo[0]).stdout
    file = zoo[0] / "zoo.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "checksum differs" in refused(command("verify", zoo[0]))
    assert "no zoo there" in refused(command("info", zoo[0].parent))


def test_info_of_classes_and_of_one_network(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "sine"), 1)
    part = Networks((params,), {"label": torch.tensor([1])})
    write_zoo(tmp_path / "zoo", [part], {"train": torch.tensor([0])}, {"classes": ["cat", "dog"]})
    lines = describe(open_zoo(tmp_path / "zoo")).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'zoo'}: 1 network, ")
    assert "  classes, from 0: cat, dog" in lines
    assert "  split train: 1 network" in lines


def test_info_of_many_architectures(tmp_path, random_params):
    nets = tuple(random_params(NetSpec.mlp([2, width, 1], "sine"), 2) for width in range(1, 14))
    write_zoo(tmp_path / "zoo", [Networks(nets, {})], {}, {})
    lines = describe(open_zoo(tmp_path / "zoo")).splitlines()
    assert lines[10].startswith("  2 x MLP [2, 10, 1]")
    assert lines[11] == "  6 networks of 3 more architectures"


@pytest.mark.parametrize(("number", "suffix"), [(1, ".pth"), (4, ".pth"), (2, ".safetensors")])
def test_export(zoo, tmp_path, number, suffix):
    path, sirens, cnns = zoo
    out = tmp_path / f"net{suffix}"
    result = command("export", path, "--network", number, "--out", out)
    assert result.returncode == 0, result.stderr
    params, row = (sirens, number) if number < 3 else (cnns, number - 3)
    expected = [tensor[row] for pair in zip(params.weights, params.biases, strict=True) for tensor in pair]
    state = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    found = [state[f"seq.{layer}.{kind}"] for layer in range(2) for kind in ("weight", "bias")]
    assert all(map(torch.equal, found, expected))
    if suffix == ".pth":
        assert all(map(torch.equal, read_network(out)[0], expected))
    assert "exists already" in refused(command("export", path, "--network", number, "--out", out))


def test_export_refuses(zoo, tmp_path):
    out = tmp_path / "net.pth"
    assert "--network: found 5, expected 0 to 4" in refused(command("export", zoo[0], "--network", 5, "--out", out))
    assert "--network: found x, expected a whole number" in refused(
        command("export", zoo[0], "--network=x", "--out=a.pth")
    )
    message = refused(command("export", zoo[0], "--network", 0, "--out", tmp_path / "net.onnx"))
    assert "expected a name that ends in .pth or .safetensors" in message


def test_splits(tmp_path, generator):
    write_mnist(tmp_path, generator)
    root = tmp_path / "mnist-inrs"
    result = command("splits", root, "--val_size", 3)
    assert "5 train, 3 val, 3 test" in result.stdout, result.stderr
    splits = json.loads((root / "mnist_splits.json").read_text())
    assert splits["test"]["label"] == [str(label) for label in MNIST["testing"]]
    assert "exists already" in refused(command("splits", root))
    assert "no folders mnist_png_training" in refused(command("splits", tmp_path / "mnist-inrs" / "x"))
