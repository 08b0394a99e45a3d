"""predicting_generalization.py, as a user runs it, on a small zoo made by the command."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import run_here
from matplotlib.image import imread
from published import write_cnns
from safetensors.torch import save_file

import scalegmn
from scalegmn.networks import BUILT_IN
from scalegmn.zoos.zoo_format import open_zoo

ROOT = Path(__file__).parents[1]
SMALL = ["--scalegmn_args.hidden_dim=8", "--scalegmn_args.num_layers=2", "--train_args.num_epochs=2"]


def predict(home, *words, conf="configs/digits_cnn/scalegmn_hetero.yml"):
    given = [] if conf is None else ["--conf", ROOT / conf]
    return run_here(ROOT / "predicting_generalization.py", *given, *words, cwd=home)


def assert_refused(result, *parts):
    """One line that says what is wrong, and exit code 2."""
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a zoo of both activations and two trained runs."""
    folder = tmp_path_factory.mktemp("home")
    words = ["--networks=40", "--checkpoints=[0,4]", "--channels=[4,5]", "--num_images=300", "--test_fraction=0.3"]
    made = run_here("-m", "scalegmn", "zoo", "cnn", "--conf", ROOT / "configs/zoos/digits_cnn.yml", *words, cwd=folder)
    assert made.returncode == 0, made.stderr
    assert "80 checkpoints of 40 networks CNN [1, 4, 5, 10] (hetero); 0 diverged" in made.stdout
    for name in ("hetero", "relu"):
        result = predict(folder, *SMALL, f"--run_dir=runs/{name}", conf=f"configs/digits_cnn/scalegmn_{name}.yml")
        assert result.returncode == 0, result.stderr
        assert "test tau" in result.stdout
    return folder


def test_results(home):
    summary = json.loads((home / "runs/hetero/summary.json").read_text())
    for name in ("loss", "tau", "r2", "mae", "tau_relu", "tau_tanh", "r2_relu", "mae_tanh"):
        assert f"test_{name}" in summary
    assert summary["data"]["networks"] == {"train": 48, "val": 8, "test": 24}
    for name in ("predictions.png", "learning_curves.png"):
        assert imread(home / "runs/hetero/figures" / name).std() > 0
    rows = [json.loads(line) for line in (home / "runs/hetero/metrics.jsonl").read_text().splitlines()]
    assert {"val_tau", "val_r2", "val_mae", "val_loss"} <= set(rows[0])
    assert summary["val_tau"] == max(row["val_tau"] for row in rows)
    relu = json.loads((home / "runs/relu/summary.json").read_text())
    assert "test_tau_relu" not in relu
    assert {layer["activation"] for layer in relu["data"]["spec"]["layers"]} == {"relu", "identity"}
    assert 0 < relu["data"]["networks"]["train"] < 48


def test_statistics_baseline(home):
    """The demo's last step."""
    result = run_here(ROOT / "benchmarks" / "baselines.py", "runs/relu", cwd=home)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (home / "runs/relu/baselines.jsonl").read_text().splitlines()]
    assert [row["model"].split(",")[0] for row in rows] == [
        "scalegmn",
        *("statistics", "statistics"),  # trees, and an MLP
        *("invariant statistics", "invariant statistics"),
    ]
    assert all(-1 <= row["moved_tau"] <= 1 for row in rows[1:])
    assert all(row["moved_tau"] == pytest.approx(row["test_tau"], abs=1e-3) for row in rows[3:])
    assert rows[0]["test_tau"] == json.loads((home / "runs/relu/summary.json").read_text())["test_tau"]


def test_config_of_a_run_repeats_it_exactly(home):
    again = predict(home, "--run_dir=runs/again", conf=home / "runs/relu/config.yml")
    assert again.returncode == 0, again.stderr
    first, repeated = (json.loads((home / f"runs/{name}/summary.json").read_text()) for name in ("relu", "again"))
    assert {k: v for k, v in first.items() if k.startswith("test_")} == {
        k: v for k, v in repeated.items() if k.startswith("test_")
    }


def test_published_files_and_layout(home, tmp_path):
    """The published configuration of the mixed zoo, unchanged, on a dataset in the published layout."""
    write_cnns(tmp_path / "data/cifar10")
    content = json.loads((ROOT / "tests/fixtures/published_configs.json").read_text())["cifar10/scalegmn_hetero.yml"]
    (tmp_path / "published.yml").write_text(yaml.safe_dump(content))
    (tmp_path / "bce.yml").write_text(yaml.safe_dump({"train_args": {"loss": "BCE"}}))
    words = ["--conf", tmp_path / "bce.yml", *SMALL, "--run_dir=out"]
    result = predict(tmp_path, *words, conf=tmp_path / "published.yml")
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load((tmp_path / "out/config.yml").read_text())["train_args"]["loss"] == "BCE"
    assert "test_tau_relu" in json.loads((tmp_path / "out/summary.json").read_text())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--scalegmn_args.symmetry=scale"], ["scalegmn_args.symmetry: scale does not hold", "use hetero"]),
        (
            ["--scalegmn_args.symmetry=sign", "--data.activation_function=relu"],
            ["scalegmn_args.symmetry: sign does not hold", "use scale"],
        ),
        (["--data.activation_function=gelu"], ["data.activation_function: found gelu, expected one of relu, tanh"]),
        (["--scalegmn_args.out_dim=10"], ["scalegmn_args.out_dim: found 10", "needs 1"]),
        (["--scalegmn_args.output=parameters"], ["scalegmn_args.output: found parameters", "needs vector"]),
        (["--train_args.loss=CE"], ["train_args.loss", "CE", "MSE"]),
        (["--data.dataset_path=data/nothing"], ["data/nothing: no zoo there", "scalegmn zoo cnn"]),
        (["--data.augment.rotate=10"], ["data.augment"]),
    ],
)
def test_bad_input(home, words, parts):
    before = set(home.glob("runs/*"))
    assert_refused(predict(home, *words), *parts)
    assert set(home.glob("runs/*")) == before


def test_zoos_without_accuracies(home):
    made = run_here("-m", "scalegmn", "zoo", "inr", "--num_images=40", "--steps=2", "--out=data/inrs", cwd=home)
    assert made.returncode == 0, made.stderr
    assert_refused(predict(home, "--data.dataset_path=data/inrs"), "data/inrs: no column 'test_accuracy', found image")


def state_of(zoo, row):
    params = zoo.params[row : row + 1]
    tensors = [tensor[0].clone() for pair in zip(params.weights, params.biases, strict=True) for tensor in pair]
    return {
        f"{layer}.{kind}": tensors[2 * layer + i] for layer in range(3) for i, kind in enumerate(("weight", "bias"))
    }


@pytest.fixture(scope="module")
def nets(home):
    """Files of networks like and unlike those of the zoo."""
    zoo = open_zoo(home / "data/digits_cnn")
    train = zoo.splits["train"]
    row = int(train[zoo.params.activation[train] == BUILT_IN.index("relu")][0])
    state = state_of(zoo, row)
    folder = home / "nets"
    folder.mkdir()
    torch.save({**state, "label": 3}, folder / "own.pth")
    save_file(state, folder / "own.safetensors")
    torch.save({name: 1e5 * t if name == "2.weight" else t for name, t in state.items()}, folder / "large.pth")
    wide = {"0.weight": torch.randn(6, 1, 3, 3) / 9, "0.bias": torch.zeros(6)}
    wide |= {"1.weight": torch.randn(7, 6, 3, 3) / 50, "1.bias": torch.zeros(7)}
    torch.save({**wide, "2.weight": torch.randn(10, 7) / 7, "2.bias": torch.zeros(10)}, folder / "wide.pth")
    torch.save({"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3)}, folder / "linear.pth")
    short = {"0.weight": torch.zeros(4, 1, 3, 3), "0.bias": torch.zeros(4)}
    torch.save({**short, "1.weight": torch.zeros(10, 4), "1.bias": torch.zeros(10)}, folder / "short.pth")
    torch.save({name: t * torch.nan for name, t in state.items()}, folder / "nan.pth")
    torch.save({"0.weight": torch.zeros(3, 2)}, folder / "half.pth")
    return folder


def ask(home, *words, checkpoint="runs/relu"):
    return run_here("-m", "scalegmn", "predict", "--checkpoint", checkpoint, *words, cwd=home)


def test_own_networks(home, nets):
    """The row of a table, and all of it as JSON; both kinds of files say the same."""
    result = ask(home, "nets/own.pth")
    assert (result.returncode, result.stderr) == (0, "")
    header, row = result.stdout.splitlines()
    assert header.split() == ["network", "test", "accuracy", "percentile"]
    name, accuracy, percentile = row.split()
    both = ask(home, "nets/own.pth", "nets/own.safetensors", "--format=json")
    first, second = json.loads(both.stdout)
    assert (name, accuracy, percentile) == (first["network"], f"{first['test_accuracy']:.1%}", str(first["percentile"]))
    assert second == {**first, "network": "nets/own.safetensors"}
    assert first["warnings"] == []
    data = json.loads((home / "runs/relu/summary.json").read_text())["data"]
    below = sum(value < first["test_accuracy"] for value in data["test_accuracy"])
    assert first["percentile"] == min(below, 100)
    hetero = ask(home, "nets/own.pth", "--activation=relu", checkpoint="runs/hetero")
    assert (hetero.returncode, hetero.stderr) == (0, "")


def test_prediction_is_the_models(home, nets):
    """Of a network of the test split: what the run's evaluation gives."""
    zoo, trained = open_zoo(home / "data/digits_cnn"), scalegmn.load(home / "runs/relu")
    relu = torch.nonzero(zoo.params.activation == BUILT_IN.index("relu"))[:, 0]
    part = zoo.params[relu]
    params = scalegmn.NetParams.from_tensors(part.weights, part.biases, "relu")
    accuracies = trained(params)
    model = trained.metanetwork(params.spec)
    assert torch.equal(accuracies, model(params).sigmoid()[:, 0].detach())
    torch.save(state_of(zoo, int(relu[3])), home / "nets" / "fourth.pth")
    (row,) = json.loads(ask(home, "nets/fourth.pth", "--format=json").stdout)
    assert row["test_accuracy"] == pytest.approx(accuracies[3].item(), abs=1e-6)


def test_unlike_networks_are_warned_of(home, nets):
    """Several at once, of two architectures, one of them nowhere near."""
    result = ask(home, "nets/large.pth", "nets/wide.pth", "nets/own.pth", "--format=json")
    assert result.returncode == 0, result.stderr
    large, wide, own = json.loads(result.stdout)
    assert [row["network"] for row in (large, wide, own)] == ["nets/large.pth", "nets/wide.pth", "nets/own.pth"]
    assert large["warnings"][0].startswith("layer 2 has weights of size ")
    assert wide["warnings"][0] == "is a CNN [1, 6, 7, 10] (relu), the training networks are CNN [1, 4, 5, 10] (relu)"
    assert own["warnings"] == []
    assert result.stderr.splitlines()[0].startswith("warning: nets/large.pth: layer 2 has weights of size ")


def test_bad_networks_do_not_stop_the_others(home, nets):
    bad = {
        "short.pth": "runs/relu was trained on CNN [1, 4, 5, 10] (relu), and cannot read CNN [1, 4, 10] (relu)",
        "linear.pth": "and cannot read MLP [2, 3] (linear)",
        "nan.pth": "layer 0: weight of network 0 has NaN",
        "half.pth": "and cannot read MLP [2, 3] (linear)",
        "missing.pth": "no such file",
        "notes.txt": "expected a file .pth, .pt, ",
    }
    result = ask(home, *(f"nets/{name}" for name in bad), "nets/own.pth", "--format=json", "--out=results/own.json")
    assert result.returncode == 2
    assert result.stdout == "results/own.json: 1 network\n"
    (row,) = json.loads((home / "results/own.json").read_text())
    assert row["network"] == "nets/own.pth"
    lines = sorted(result.stderr.splitlines())
    assert len(lines) == len(bad), lines
    for name, message in bad.items():
        (line,) = (line for line in lines if line.startswith(f"error: nets/{name}: "))
        assert message in line
    again = ask(home, "nets/own.pth", "--out=results/own.json")
    assert_refused(again, "--out: results/own.json exists already")


def test_runs_that_cannot_predict(home, nets):
    assert_refused(
        ask(home, "nets/own.pth", checkpoint="runs/hetero"), "nets/own.pth: a state dict does not tell its activation"
    )
    assert_refused(ask(home, "nets/own.pth", checkpoint="runs/no"), "runs/no is not the folder of a finished run")
    (home / "runs/unfinished").mkdir()
    (home / "runs/unfinished/config.yml").write_text((home / "runs/relu/config.yml").read_text())
    assert_refused(ask(home, "nets/own.pth", checkpoint="runs/unfinished"), "is not the folder of a finished run")
