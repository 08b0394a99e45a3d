"""inr_editing.py, as a user runs it, on a small zoo."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import run_here
from onnx_files import chain, write_onnx
from safetensors.torch import load_file, save_file
from scipy.ndimage import grey_dilation

from scalegmn.networks import NetParams
from scalegmn.networks.siren import render
from scalegmn.zoos.images import load_digits_images
from scalegmn.zoos.published.inrs import read_network
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo

ROOT = Path(__file__).parents[1]
SMALL = ["--scalegmn_args.hidden_dim=8", "--scalegmn_args.num_layers=2", "--train_args.num_epochs=1"]


def edit(home, *words, conf="configs/digits_editing/scalegmn_bidir.yml"):
    given = [] if conf is None else ["--conf", ROOT / conf]
    return run_here(ROOT / "inr_editing.py", *given, *words, cwd=home)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a zoo, a trained run, and the zoo edited by it."""
    folder = tmp_path_factory.mktemp("home")
    conf = ROOT / "configs/zoos/digits_inr.yml"
    made = run_here(
        "-m", "scalegmn", "zoo", "inr", "--conf", conf, "--num_images=40", "--views=2", "--steps=100", cwd=folder
    )
    assert made.returncode == 0, made.stderr
    single = ["--train_args.precision=fp32"]
    result = edit(folder, *SMALL, *single, "--run_dir=runs/first", "--export_edited=data/edited")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("no_edit", "linear_map", "metanetwork")] == [
        "no_edit",
        "linear_map",
        "metanetwork",
    ]
    return folder


def test_results(home):
    summary = json.loads((home / "runs/first/summary.json").read_text())
    assert summary["data"]["trivial_answers"]["test"]["no_edit"] > 0.05
    assert summary["data"]["spec"]["layers"][0]["w0"] == 6.0
    for name in ("worst_edits.png", "median_edits.png", "learning_curves.png", "edits.csv"):
        assert (home / "runs/first/figures" / name).stat().st_size > 100
    config = (home / "runs/first/config.yml").read_text()
    assert "export_edited" not in config
    again = edit(home, "--run_dir=runs/again", conf=home / "runs/first/config.yml")
    assert again.returncode == 0, again.stderr
    repeated = json.loads((home / "runs/again/summary.json").read_text())
    assert repeated["test_loss"] == summary["test_loss"]


def test_bfloat16(home):
    """Changed networks come out in single precision, and edit about as well."""
    result = edit(home, *SMALL, "--run_dir=runs/short_numbers", "--train_args.precision=bf16-mixed")
    assert result.returncode == 0, result.stderr
    found, expected = (
        json.loads((home / f"runs/{run}/summary.json").read_text())["test_loss"] for run in ("short_numbers", "first")
    )
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)


def test_exported_zoo(home):
    source, found = open_zoo(home / "data/digits_inr"), open_zoo(home / "data/edited")
    assert found.spec == source.spec
    assert torch.equal(found.columns["image"], source.columns["image"])
    assert found.provenance["source"]["sha256"] == source.sha256
    change = (render(found.params, 8, 8) - render(source.params, 8, 8)).abs().max()
    assert 1e-6 < change < 2
    assert found.canonical == ()  # edits may leave the canonical range
    refused = edit(home, *SMALL, "--run_dir=runs/other", "--export_edited=data/digits_inr")
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: --export_edited: data/digits_inr exists already; choose another\n",
    )
    assert not (home / "runs/other").exists()
    again = edit(home, "--checkpoint=runs/first", "--export_edited=data/edited_later", conf=None)
    assert again.returncode == 0, again.stderr
    later = open_zoo(home / "data/edited_later")
    torch.testing.assert_close(later.params.flatten(), found.params.flatten(), rtol=1e-5, atol=1e-6)


def state_of(zoo, row, names):
    params = zoo.params[row : row + 1]
    tensors = [tensor[0].clone() for pair in zip(params.weights, params.biases, strict=True) for tensor in pair]
    return dict(zip(names, tensors, strict=True))


def predict(home, *words, checkpoint="runs/first"):
    return run_here("-m", "scalegmn", "predict", "--checkpoint", checkpoint, *words, cwd=home)


def test_files_and_folders(home, tmp_path):
    """One file, and a folder of both types; each is the same network of the exported zoo, under its own names."""
    zoo, edited = open_zoo(home / "data/digits_inr"), open_zoo(home / "data/edited")
    names = [f"net.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
    (tmp_path / "nets" / "more").mkdir(parents=True)
    torch.save({**state_of(zoo, 3, names), "label": 7}, tmp_path / "nets" / "a.pth")
    save_file(state_of(zoo, 5, names), tmp_path / "nets" / "more" / "b.safetensors")
    one = predict(home, tmp_path / "nets/a.pth", "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    both = predict(home, tmp_path / "nets", "--out", tmp_path / "out", "--format=json")
    assert both.returncode == 0, both.stderr
    assert [row["edited"] for row in json.loads(both.stdout)] == [
        f"{tmp_path}/out/a.pth",
        f"{tmp_path}/out/more/b.safetensors",
    ]
    state = torch.load(tmp_path / "out/a.pth", weights_only=True)
    assert list(state) == [*names, "label"]
    assert state["label"] == 7
    assert set(load_file(tmp_path / "out/more/b.safetensors")) == set(names)
    for path, row in (
        (tmp_path / "one/a.pth", 3),
        (tmp_path / "out/a.pth", 3),
        (tmp_path / "out/more/b.safetensors", 5),
    ):
        tensors, _ = read_network(path)
        expected = [t[row] for pair in zip(edited.params.weights, edited.params.biases, strict=True) for t in pair]
        for found, own in zip(tensors, expected, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
        params = NetParams(zoo.spec, tuple(t[None] for t in tensors[::2]), tuple(t[None] for t in tensors[1::2]))
        torch.testing.assert_close(
            render(params, 8, 8), render(edited.params[row : row + 1], 8, 8), rtol=1e-3, atol=1e-4
        )
    again = predict(home, tmp_path / "nets", "--out", tmp_path / "out")
    assert again.returncode == 2
    assert [line.split("--out: ")[1] for line in again.stderr.splitlines()] == [
        f"{tmp_path}/out/a.pth exists already; choose another",
        f"{tmp_path}/out/more/b.safetensors exists already; choose another",
    ]
    nowhere = predict(home, tmp_path / "nets")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)
    assert "--out: missing" in nowhere.stderr


def test_heads(home, tmp_path):
    """Each network becomes two; the mean of what they draw is what the run has measured, and files hold both."""
    trained = edit(home, *SMALL, "--scalegmn_args.heads=2", "--run_dir=runs/heads", "--export_edited=data/heads")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1] == "data/heads: 160 edited networks, 2 for each"
    source, found = open_zoo(home / "data/digits_inr"), open_zoo(home / "data/heads")
    assert found.spec == source.spec
    assert torch.equal(found.columns["head"], torch.arange(2).repeat(80))
    assert torch.equal(found.columns["image"], source.columns["image"].repeat_interleave(2))
    for split, rows in source.splits.items():
        assert torch.equal(found.splits[split] // 2, rows.repeat_interleave(2))
    drawn = render(found.params, 8, 8)
    assert (drawn[::2] - drawn[1::2]).abs().amax((1, 2, 3)).min() > 1e-6
    pixels = load_digits_images().pixels[source.columns["image"]]
    targets = torch.from_numpy(grey_dilation(pixels.numpy(), size=(1, 3, 3, 1)))
    errors = (drawn.unflatten(0, (80, 2)).mean(1) - targets).square().flatten(1).mean(1)
    summary = json.loads((home / "runs/heads/summary.json").read_text())
    assert errors[source.splits["test"]].mean().item() == pytest.approx(summary["test_loss"], rel=1e-4)
    names = [f"net.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
    torch.save(state_of(source, 3, names), tmp_path / "a.pth")
    files = [f"{tmp_path}/out/a_head{head}.pth" for head in range(2)]
    result = predict(home, tmp_path / "a.pth", "--out", tmp_path / "out", "--format=json", checkpoint="runs/heads")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0]["edited"] == files
    for head, file in enumerate(files):
        state = torch.load(file, weights_only=True)
        for name, expected in state_of(found, 6 + head, names).items():
            torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)
    Path(files[0]).unlink()
    again = predict(home, tmp_path / "a.pth", "--out", tmp_path / "out", checkpoint="runs/heads")
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path}/a.pth: --out: {files[1]} exists already; choose another\n"
    assert not Path(files[0]).exists()
    words = "--checkpoint=runs/heads", f"--export_edited={tmp_path}/files", "--export_format=pth"
    exported = edit(home, *words, conf=None)
    assert exported.returncode == 0, exported.stderr
    assert len(list((tmp_path / "files").iterdir())) == 160
    state = torch.load(tmp_path / "files/net3_head1.pth", weights_only=True)
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    torch.testing.assert_close(flat, found.params[7:8].flatten()[0], rtol=1e-4, atol=1e-5)


def test_files_of_other_networks_are_refused(home, tmp_path):
    """And do not stop those that are not."""
    torch.save({"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save({"0.weight": torch.zeros(12, 2)}, tmp_path / "half.pth")
    zoo = open_zoo(home / "data/digits_inr")
    names = [f"{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
    torch.save({name: t * torch.nan for name, t in state_of(zoo, 0, names).items()}, tmp_path / "nan.pth")
    torch.save(state_of(zoo, 0, names), tmp_path / "right.pth")
    result = predict(home, tmp_path, tmp_path / "missing.pth", tmp_path / "empty", "--out", tmp_path / "out")
    assert result.returncode == 2
    for name, message in {
        "other.pth": "runs/first was trained on MLP [2, 12, 12, 1] (sine), and cannot read MLP [2, 3]",
        "half.pth": "and cannot read MLP [2, 12] (linear)",
        "nan.pth": "NaN or infinity",
        "missing.pth": "no such file",
        "empty": "expected a file .pth, .pt, ",
    }.items():
        (line,) = (line for line in result.stderr.splitlines() if line.startswith(f"error: {tmp_path / name}: "))
        assert message in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["right.pth"]


def test_onnx_files(home, tmp_path):
    """Edited as state dicts, the same as from one."""
    zoo = open_zoo(home / "data/digits_inr")
    names = [f"seq.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
    state = state_of(zoo, 3, names)
    torch.save(state, tmp_path / "net.pth")
    write_onnx(tmp_path / "net.onnx", chain(list(state.values()), "sine", w0=6.0))
    result = predict(home, tmp_path / "net.pth", tmp_path / "net.onnx", "--out", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    first, second = torch.load(tmp_path / "out/net.pth"), load_file(tmp_path / "out/net.onnx.safetensors")
    assert set(second) == set(names)
    for name in names:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint=runs/first"], "edits its zoo here (--export_edited)"),
        (
            ["--checkpoint=runs/first", "--export_edited=x", "--scalegmn_args.hidden_dim=16"],
            "another configuration",
        ),
        (["--checkpoint=runs/nothing", "--export_edited=x"], "runs/nothing/config.yml: no such file"),
        (["--scalegmn_args.output=vector"], "scalegmn_args.output: found vector, but editing needs parameters"),
        (["--data.style_function=increase_contrast"], "increase_contrast is for images of 3 channels"),
        (["--data.style_function=sharpen"], "sharpen"),
    ],
)
def test_wrong_words(home, words, message):
    result = edit(home, *SMALL, *words)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def test_half_precision_zoo(home, tmp_path):
    """TrainingResult on, exported, and files of its kind edited."""
    zoo = open_zoo(home / "data/digits_inr")
    parts = [Networks((zoo.params.map(torch.Tensor.half),), zoo.columns)]
    write_zoo(tmp_path / "half", parts, zoo.splits, zoo.provenance)
    result = edit(tmp_path, *SMALL, "--data.dataset_path=half", "--export_edited=edited", "--run_dir=run")
    assert result.returncode == 0, result.stderr
    assert open_zoo(tmp_path / "edited").params.biases[0].dtype == torch.float32
    torch.save(
        state_of(open_zoo(tmp_path / "half"), 3, [f"{k}.{x}" for k in "012" for x in ("weight", "bias")]),
        tmp_path / "a.pth",
    )
    result = predict(tmp_path, "a.pth", "--out=out", checkpoint="run")
    assert result.returncode == 0, result.stderr
    assert torch.load(tmp_path / "out/a.pth", weights_only=True)["0.weight"].dtype == torch.float16
    file = tmp_path / "run/checkpoints/best.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = predict(tmp_path, "a.pth", "--out=c", checkpoint="run")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "best.safetensors: damaged" in result.stderr


def test_export_as_files(home, tmp_path):
    shutil.copytree(home / "data", tmp_path / "data")
    result = edit(tmp_path, *SMALL, "--export_edited=nets", "--export_format=pth", "--debug=True")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "nets").glob("net*.pth"))) == 80
    assert read_network(tmp_path / "nets/net79.pth")[0][0].shape == (12, 2)
