"""Predictions, bundles and scalegmn.load, for a model that classifies (others: the tests of the scripts)."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import assert_refused, run_command
from onnx_files import chain, write_onnx

import scalegmn
from scalegmn.experiments import bundles
from scalegmn.experiments.config import ScriptConfig, read_config
from scalegmn.experiments.predict import with_frequencies
from scalegmn.experiments.run import train
from scalegmn.networks import NetParams, NetSpec
from scalegmn.reporting.errors import user_errors
from scalegmn.symmetry.groups import GroupElement
from scalegmn.tasks.classification import Classification
from scalegmn.zoos.zoo_format import open_zoo


@pytest.fixture(scope="module")
def home(small_home, tmp_path_factory):
    """A folder with a zoo, a finished run and its bundle, and six of the zoo's networks as files."""
    folder = tmp_path_factory.mktemp("predict")
    shutil.copytree(small_home / "data", folder / "data")
    with pytest.MonkeyPatch.context() as patch, user_errors():
        patch.chdir(folder)
        config = read_config(["--conf", str(small_home / "conf.yml"), "--run_dir=run"], ScriptConfig)
        train(config, lambda config: Classification(config.data, config.batch_size, config.model_config))
        bundles.write_bundle(Path("run"), Path("bundle"))
    zoo = open_zoo(folder / "data" / "zoo")
    (folder / "nets" / "more").mkdir(parents=True)
    for row in range(6):
        names = [f"{layer}.{kind}" for layer in range(2) for kind in ("weight", "bias")]
        tensors = [t[row].clone() for pair in zip(zoo.params.weights, zoo.params.biases, strict=True) for t in pair]
        if row < 4:
            torch.save(dict(zip(names, tensors, strict=True)), folder / "nets" / f"net{row}.pth")
        else:
            write_onnx(folder / "nets" / "more" / f"net{row}.onnx", chain(tensors, "sine", w0=6.0))
    return folder


def ask(home, monkeypatch, capsys, *words, checkpoint="run"):
    return run_command(["predict", "--checkpoint", checkpoint, *words], home, monkeypatch, capsys)


def test_classes(home, monkeypatch, capsys):
    """What the model says of the stored networks, made canonical as in training: of a folder, pth and ONNX."""
    code, output, error = ask(home, monkeypatch, capsys, "nets", "--format=json")
    assert (code, error) == (0, "")
    rows = json.loads(output)
    assert [row["network"] for row in rows] == [
        "nets/more/net4.onnx",
        "nets/more/net5.onnx",
        *(f"nets/net{row}.pth" for row in range(4)),
    ]
    trained = scalegmn.load(home / "run")
    assert (trained.task, trained.canonical) == ("classification", ("phase",))
    expected = trained(open_zoo(home / "data/zoo").params[torch.tensor([4, 5, 0, 1, 2, 3])])
    assert expected.sum(1).tolist() == pytest.approx([1] * 6)
    for row, own in zip(rows, expected, strict=True):
        assert row["probabilities"] == pytest.approx(own.tolist(), abs=1e-6)
        assert row["class"] == own.argmax()
        assert row["probability"] == max(row["probabilities"])
        assert row["warnings"] == []
    code, output, _ = ask(home, monkeypatch, capsys, "nets/net2.pth")
    assert output.splitlines()[0].split() == ["network", "class", "probability"]
    assert output.splitlines()[1].split() == ["nets/net2.pth", str(rows[4]["class"]), f"{rows[4]['probability']:.1%}"]


def test_networks_unlike_the_training_networks(home, tmp_path, monkeypatch, capsys):
    """Wider, or with faster sines, which the file says: answers with a warning each."""
    draw = torch.Generator().manual_seed(1)
    for name, width, w0 in (("same", 6, 6.0), ("wide", 8, 6.0), ("fast", 6, 30.0)):
        tensors = [torch.randn(*shape, generator=draw) for shape in ((width, 2), (width,), (1, width), (1,))]
        write_onnx(tmp_path / f"{name}.onnx", chain(tensors, "sine", w0=w0))
    code, output, error = ask(home, monkeypatch, capsys, str(tmp_path), "--format=json")
    assert (code, error.count("\n")) == (0, 2)
    expected = "the training networks are MLP [2, 6, 1] (sine) of w0 6"
    assert [row["warnings"] for row in json.loads(output)] == [
        [f"is a MLP [2, 6, 1] (sine) of w0 30, {expected}"],
        [],
        [f"is a MLP [2, 8, 1] (sine) of w0 6, {expected}"],
    ]


def test_answers_are_those_of_the_test(home):
    """The accuracy of the run's summary, from the networks as they are stored; and no symmetry matters."""
    trained, zoo = scalegmn.load(home / "run"), open_zoo(home / "data/zoo")
    rows = zoo.splits["test"]
    params = zoo.params[rows]
    hits = trained(params).argmax(1) == zoo.columns["label"][rows]
    assert hits.float().mean().item() == pytest.approx(trained.summary["test_accuracy"])
    trained.metanetwork(params.spec).double()
    params = params.to(torch.float64)
    element = GroupElement.sample(params, torch.Generator().manual_seed(0))
    torch.testing.assert_close(trained(element.act(params)), trained(params), rtol=0, atol=1e-9)


def test_bundle(home, monkeypatch, capsys):
    """The same answers, from a folder that holds all; its configuration trains again."""
    code, output, _ = ask(home, monkeypatch, capsys, "nets", "--format=json")
    assert ask(home, monkeypatch, capsys, "nets", "--format=json", checkpoint="bundle") == (code, output, "")
    assert {path.name for path in (home / "bundle").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    content = json.loads((home / "bundle/config.json").read_text())
    assert content["summary"] == json.loads((home / "run/summary.json").read_text())
    card = (home / "bundle/README.md").read_text()
    for part in (content["summary"]["data"]["sha256"], "| test_accuracy |", "phase, sign", "24 train, 12 val, 12 test"):
        assert part in card
    assert read_config(["--conf", str(home / "bundle/config.json")]) == read_config(
        ["--conf", str(home / "run/config.yml")]
    )
    with pytest.raises(ValueError, match=r"--resume: .*bundle is not the folder of a run"):
        read_config(["--resume", str(home / "bundle")])
    code, table, _ = run_command(["symmetry", "--checkpoint", "bundle"], home, monkeypatch, capsys)
    assert code == 0
    assert "BROKEN" not in table
    words = ["--checkpoint", "run", "--out", "bundle"]
    assert_refused(run_command(["export", *words], home, monkeypatch, capsys), "--out: bundle exists already")
    words = ["--checkpoint", "data", "--out", "other"]
    assert_refused(
        run_command(["export", *words], home, monkeypatch, capsys), "data is not the folder of a finished run"
    )
    code, *_ = run_command(["export", "--checkpoint", "bundle", "--out", "made/again"], home, monkeypatch, capsys)
    assert code == 0
    assert (home / "made/again/config.json").read_bytes() == (home / "bundle/config.json").read_bytes()


def rewrite(change):
    def damage(folder):
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def cut(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "damaged: its checksums differ"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no such file"),
        (rewrite(lambda content: content["summary"].update(parameters=1)), "damaged: its checksums differ"),
        (rewrite(lambda content: content.update(format="other")), "format 'other', expected 'scalegmn bundle 1'"),
        (rewrite(lambda content: content.pop("sha256")), "no 'sha256'"),
        (lambda folder: (folder / "config.json").write_text("{}"), "no 'sha256'"),
        (lambda folder: (folder / "config.json").write_text("[1"), "neither"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "nor a bundle"),
        (lambda folder: (folder / "config.json").unlink(), "summary.json"),
    ],
)
def test_damaged_bundles(home, tmp_path, monkeypatch, capsys, damage, message):
    shutil.copytree(home / "bundle", tmp_path / "bundle")
    damage(tmp_path / "bundle")
    result = ask(home, monkeypatch, capsys, "nets/net0.pth", checkpoint=str(tmp_path / "bundle"))
    assert_refused(result, "is not the folder of a finished run, nor a bundle" if message == "neither" else message)


def test_bad_words(home, monkeypatch, capsys):
    assert_refused(ask(home, monkeypatch, capsys, "nets/net0.pth", "--input_shape=1,x"), "--input_shape: found 1,x")
    assert_refused(ask(home, monkeypatch, capsys, "os:getcwd"), "os:getcwd: set --input_shape")
    assert_refused(ask(home, monkeypatch, capsys, "no_such:net", "--input_shape=1,2"), "no_such:net: ModuleNotFound")
    for net in ("data/zoo", "data", "data/zoo/zoo.safetensors"):
        message = (
            "data/zoo: found a zoo, expected files of networks; write one of its networks as a file with `scalegmn zoo"
        )
        assert_refused(ask(home, monkeypatch, capsys, net), message)
    net = "nets/net0.pth"
    assert_refused(
        ask(home, monkeypatch, capsys, net, checkpoint="data/zoo"), "(it is a zoo; train a model on it first)"
    )
    assert_refused(ask(home, monkeypatch, capsys, net, checkpoint="."), "(it holds 1 run; choose one, such as run)")
    assert_refused(ask(home, monkeypatch, capsys, "conf.yml"), "conf.yml: expected a file .pth, .pt, .ckpt")


def test_frequencies_are_those_of_the_training_networks():
    """Layer by layer; a state dict does not tell them. Other depths and other activations stay as they are."""

    def siren(*w0, activation="sine"):
        spec = NetSpec.mlp([2] * (len(w0) + 2), activation)
        layers = [replace(layer, w0=value) for layer, value in zip(spec.layers, w0, strict=False)]
        return NetParams.from_tensors(
            *([torch.zeros(1, *shape) for _ in spec.layers] for shape in ((2, 2), (2,))), activation
        ).replace(spec=NetSpec((*layers, spec.layers[-1])))

    def frequencies(params, trained):
        model = SimpleNamespace(num_architectures=1, spec=trained.spec)
        return [layer.w0 for layer in with_frequencies(params, model).spec.layers[:-1]]

    assert frequencies(siren(30.0, 30.0), siren(15.0, 20.0)) == [15.0, 20.0]
    assert frequencies(siren(30.0), siren(15.0, 20.0)) == [30.0]
    tanh = siren(1.0, 1.0, activation="tanh")
    assert frequencies(tanh, siren(15.0, 20.0)) == [1.0, 1.0]


def test_what_is_wrong_with_a_run_is_named(home, tmp_path, monkeypatch, capsys):
    """An unfinished one, one without its parameters, one whose configuration has been changed."""
    for name in ("unfinished", "empty", "changed"):
        shutil.copytree(home / "run", tmp_path / name)
    (tmp_path / "unfinished/summary.json").unlink()
    (tmp_path / "empty/checkpoints/best.safetensors").unlink()
    file = tmp_path / "changed/config.yml"
    file.write_text(file.read_text().replace("num_layers: ", "num_layers: 1"))
    for name, message in {
        "unfinished": "its training is not finished; go on with `scalegmn train TASK --resume",
        "empty": "best.safetensors: no such file, expected the parameters that a run or bundle keeps; copy its folder",
        "changed": "best.safetensors: of a model with another configuration (it has no layers.",
    }.items():
        assert_refused(ask(home, monkeypatch, capsys, "nets/net0.pth", checkpoint=str(tmp_path / name)), message)


def test_modules(home, monkeypatch, capsys):
    """A factory that the user names is run, and read as the same network's file is."""
    (home / "own_nets.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Sine(nn.Module):\n    def forward(self, x):\n        return torch.sin(6.0 * x)\n\n"
        "def make():\n    net = nn.Sequential(nn.Linear(2, 6), Sine(), nn.Linear(6, 1))\n"
        "    state = torch.load('nets/net1.pth')\n"
        "    net.load_state_dict({name.replace('1.', '2.'): t for name, t in state.items()})\n    return net\n"
    )
    monkeypatch.syspath_prepend(str(home))
    words = ["own_nets:make", "nets/net1.pth", "--input_shape=1,2", "--format=json"]
    code, output, error = ask(home, monkeypatch, capsys, *words)
    assert (code, error) == (0, "")
    first, second = json.loads(output)
    assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-6)
    assert "own_nets" in sys.modules
