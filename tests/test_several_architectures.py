"""The real scripts on a zoo of digit classifiers of three architectures."""

import json
from pathlib import Path
from runpy import run_path

import pytest
import torch
from commands import assert_refused, run_command, run_main
from matplotlib.image import imread
from safetensors.torch import save_file

import scalegmn
from scalegmn.networks import BUILT_IN, NetParams
from scalegmn.zoos.fit.cnn_zoo import CnnRecipe, make_cnn_zoo
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo

ROOT = Path(__file__).parents[1]
MODELS = {
    "scalegmn": {"symmetry": "permutation", "hidden_dim": 8, "num_layers": 2},
    "ng_gnn": {"hidden_dim": 8, "num_layers": 2, "num_frequencies": 4},
    "statnn": {"hidden_dim": 16},
}


@pytest.fixture
def run(home, monkeypatch, capsys):
    """Exit code, stdout and stderr of a script in the folder of the zoo."""

    def script(name, *words):
        return run_main(lambda: run_path(str(ROOT / name), run_name="__main__"), words, home, monkeypatch, capsys)

    return script


def words(run_dir, model, out_dim, **options):
    settings = {
        **{"data.dataset_path": "zoo", "model": model, "batch_size": 8, "run_dir": run_dir, "train_args.num_epochs": 2},
        **{f"{model}_args.{key}": value for key, value in {**MODELS[model], "out_dim": out_dim}.items()},
        **{"optimization.optimizer_args.lr": 0.02, "optimization.scheduler_args.warmup_steps": 5},
        **options,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a zoo of networks of one, two and three convolutions, all together in each split; `label` says how
    many a network has."""
    folder, first, parts = tmp_path_factory.mktemp("home"), 0, []
    splits = {"train": [], "val": [], "test": []}
    for channels in ((4,), (4, 5), (3, 4, 5)):
        out, recipe = (
            folder / f"part{len(channels)}",
            {"padding": "same", "num_images": 120, "init_std": (0.2, 0.5), "val_fraction": 0.25},
        )
        make_cnn_zoo(
            CnnRecipe(
                networks=12,
                seed=len(channels),
                checkpoints=(0, 2),
                channels=channels,
                test_fraction=0.3,
                out=str(out),
                **recipe,
            )
        )
        zoo = open_zoo(out)
        others = {"label": torch.full((len(zoo),), len(channels) - 1), "image": torch.zeros(len(zoo))}
        parts.append(Networks(zoo.nets, {**zoo.columns, **others}))
        for name, rows in zoo.splits.items():
            splits[name].append(rows + first)
        first += len(zoo)
    order = torch.Generator().manual_seed(0)
    splits = {name: torch.cat(rows) for name, rows in splits.items()}
    splits = {name: rows[torch.randperm(len(rows), generator=order)] for name, rows in splits.items()}
    write_zoo(folder / "zoo", parts, splits, {})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_predicts_and_is_checked(home, run, model, monkeypatch, capsys):
    code, out, error = run("predicting_generalization.py", *words(f"gen_{model}", model, 1))
    assert code == 0, error
    assert "3 architectures within CNN [1, 4, 5, 5, 10] (hetero)" in out
    found = summary(home / f"gen_{model}")
    assert {"test_tau", "test_tau_relu", "test_mae_tanh"} <= set(found)
    assert found["data"]["architectures"] == 3
    assert [layer["out_dim"] for layer in found["data"]["spec"]["layers"]] == [4, 5, 5, 10]
    code, out, error = run_command(["symmetry", f"--checkpoint=gen_{model}"], home, monkeypatch, capsys)
    assert code == 0, out + error
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert lines["permutation"].endswith("kept")
    assert float(lines["control"].split()[3]) > 1e-3


def test_learns_what_tells_architectures_apart(home, run):
    """The number of layers, which statistics show at once, if labels stay with their networks."""
    settings = {"train_args.num_epochs": 15, "statnn_args.hidden_dim": 64}
    code, _, error = run("inr_classification.py", *words("layers", "statnn", 3, **settings))
    assert code == 0, error
    assert summary(home / "layers")["test_accuracy"] > 0.9
    assert imread(home / "layers/figures/confusion_matrix.png").std() > 0


def test_own_networks(home, run, monkeypatch, capsys):
    """Of a known architecture, of an unknown one within those known, of a wider and of a deeper one."""
    assert run("predicting_generalization.py", *words("statnn", "statnn", 1))[0] == 0

    def ask(*names, checkpoint="statnn"):
        given = ["--checkpoint", checkpoint, *names, "--activation=relu", "--format=json"]
        code, out, error = run_command(["predict", *given], home, monkeypatch, capsys)
        return code, json.loads(out) if out else [], error

    def store(name, *layers):
        tensors = {f"{k}.weight": weight for k, (weight, _) in enumerate(layers)}
        tensors |= {f"{k}.bias": bias for k, (_, bias) in enumerate(layers)}
        save_file(tensors, home / f"{name}.safetensors")
        return f"{name}.safetensors"

    def layer(*shape):
        return torch.randn(*shape) / 20, torch.zeros(shape[0])

    zoo = open_zoo(home / "zoo")
    relu = zoo.splits["train"][zoo.architecture(zoo.splits["train"]) == 1] - zoo.starts[1]
    relu = relu[zoo.nets[1].activation[relu] == BUILT_IN.index("relu")]
    weights, biases = ([tensor[relu[0]] for tensor in part] for part in (zoo.nets[1].weights, zoo.nets[1].biases))
    known = store("known", *zip(weights, biases, strict=True))
    within = store("within", layer(2, 1, 3, 3), layer(2, 2, 3, 3), layer(10, 2))
    wide = store("wide", layer(9, 1, 3, 3), layer(10, 9))
    code, rows, error = ask(known, within, wide)
    assert code == 0, error
    assert rows[0]["warnings"] == []
    trained = scalegmn.load(home / "statnn")
    params = NetParams.from_tensors([w[None] for w in weights], [b[None] for b in biases], "relu")
    assert rows[0]["test_accuracy"] == pytest.approx(trained(params).item(), abs=1e-6)
    assert not any("architectures" in warning for warning in rows[1]["warnings"])
    unlike = (
        "is a CNN [1, 9, 10] (relu), the training networks are of 3 architectures within CNN [1, 4, 5, 5, 10] (hetero)"
    )
    assert rows[2]["warnings"][0] == unlike
    assert f"warning: wide.safetensors: {unlike}; the answer may be far off" in error
    code, rows, error = ask("factories:digits", "--input_shape=1,1,9,9")
    assert code == 0, error
    assert rows[0]["warnings"][0].startswith(
        "is a network of 3 layers, norm, 76 parameters (identity, relu), the training"
    )
    deep = store("deep", layer(4, 1, 3, 3), *(layer(4, 4, 3, 3) for _ in range(3)), layer(10, 4))
    code, rows, error = ask(deep, known)
    assert (code, len(rows)) == (2, 1)
    assert "error: deep.safetensors: statnn: the model was built for 4 layers" in error
    fewer = store("fewer", layer(4, 1, 3, 3), layer(7, 4))
    assert_refused(ask(fewer), "fewer.safetensors: expected architectures with the same inputs and outputs")
    result = run_command(["predict", "--checkpoint=statnn", known], home, monkeypatch, capsys)
    assert_refused(
        result,
        "known.safetensors: a state dict does not tell its activation; set",
    )
    code, _, error = run_command(["export", "--checkpoint=statnn", "--out=bundle"], home, monkeypatch, capsys)
    assert code == 0, error
    assert "3 architectures within CNN [1, 4, 5, 5, 10] (hetero)" in (home / "bundle/README.md").read_text()
    assert ask(known, within, checkpoint="bundle") == ask(known, within)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("inr_classification.py", {"model": "dwsnet"}, "model: dwsnet reads networks of one architecture, found 3"),
        ("inr_classification.py", {"model": "mlp"}, "model: mlp reads networks of one architecture, found 3"),
        ("inr_classification.py", {"data.augment.mixup": 0.2}, "data.augment.mixup: found 0.2, expected 0"),
        ("inr_classification.py", {"train_args.compile": True}, "train_args.compile: found True, expected False for 3"),
        ("inr_classification.py", {"data.activation_function": "gelu"}, "found gelu, expected one of relu, tanh as"),
        ("inr_editing.py", {"model": "scalegmn"}, "zoo: found 3 architectures, expected one"),
    ],
)
def test_what_is_refused(home, run, script, options, message):
    options = {"model": "statnn", "data.dataset_path": "zoo", **options}
    options |= {"scalegmn_args.output": "parameters"} if script == "inr_editing.py" else {}
    assert_refused(run(script, *(f"--{key}={value}" for key, value in options.items())), message)
    assert not (home / "runs").exists()


def test_dry_run_and_one_activation(run):
    options = {"data.activation_function": "tanh", "dry_run": True}
    code, out, error = run("inr_classification.py", *words("dry", "ng_gnn", 3, **options))
    assert code == 0, error
    assert "3 architectures within CNN [1, 4, 5, 5, 10] (tanh)" in out
    assert "nothing was written" in out
