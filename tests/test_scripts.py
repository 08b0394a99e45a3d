"""The real scripts, as a user runs them, on a small zoo."""

import json
from pathlib import Path

import pytest
import yaml
from commands import run_fork, run_here, run_process
from matplotlib.image import imread

ROOT = Path(__file__).parents[1]
SMALL = ["--scalegmn_args.hidden_dim", "8", "--scalegmn_args.num_layers", "2", "--train_args.num_epochs", "2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a zoo of 40 digits, two views each, made by the command."""
    folder = tmp_path_factory.mktemp("home")
    conf = ROOT / "configs/zoos/digits_inr.yml"
    made = run_here(
        "-m", "scalegmn", "zoo", "inr", "--conf", conf, "--num_images", "40", "--views=2", "--steps", "50", cwd=folder
    )
    assert made.returncode == 0, made.stderr
    assert "80 networks" in made.stdout
    return folder


def classify(home, *words, conf="configs/digits_cls/scalegmn.yml", run=run_here, **environment):
    return run(ROOT / "inr_classification.py", "--conf", ROOT / conf, *words, cwd=home, **environment)


@pytest.fixture(scope="module")
def finished(home):
    result = classify(home, *SMALL, "--run_dir", "runs/first", run=run_process)
    assert result.returncode == 0, result.stderr
    assert "test accuracy" in result.stdout
    return home / "runs" / "first"


def test_results(finished):
    summary = json.loads((finished / "summary.json").read_text())
    zoo = json.loads((finished.parents[1] / "data/digits_inr/zoo.json").read_text())
    assert summary["data"]["sha256"] == zoo["sha256"]
    assert summary["data"]["read"] == "canonical (phase)"
    assert summary["data"]["networks"] == {"train": 56, "val": 8, "test": 16}
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["epochs"] == 2
    assert summary["versions"]["scalegmn"]
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert {"train_loss", "val_loss", "val_accuracy", "lr", "networks_per_second"} <= set(rows[0])
    for name in ("checkpoints/best.safetensors", "checkpoints/last.safetensors"):
        assert (finished / name).stat().st_size > 1000
    for name in ("figures/learning_curves.png", "figures/confusion_matrix.png"):
        assert imread(finished / name).std() > 0


def test_flat_baselines(home, finished):
    """The demo's last step."""
    result = run_here(ROOT / "benchmarks" / "baselines.py", finished, cwd=home)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (finished / "baselines.jsonl").read_text().splitlines()]
    names = [row["model"] for row in rows]
    assert names[:2] == ["scalegmn", "weights, logistic regression"]
    assert names[3:] == ["64 points, MLP 256-128", "256 points, MLP 256-128"]
    assert rows[0]["test_accuracy"] == json.loads((finished / "summary.json").read_text())["test_accuracy"]
    for row in (rows[0], *rows[3:]):  # what does not change with the networks' symmetries
        assert row["moved_accuracy"] == row["test_accuracy"]


def test_config_of_a_run_repeats_it_exactly(home, finished):
    config = yaml.safe_load((finished / "config.yml").read_text())
    assert config["scalegmn_args"]["hidden_dim"] == 8
    result = classify(home, "--run_dir", "runs/again", conf=finished / "config.yml")
    assert result.returncode == 0, result.stderr
    timeless = ("train_loss", "val_loss", "val_accuracy")
    first, again = (
        [[json.loads(line)[key] for key in timeless] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished, home / "runs" / "again")
    )
    assert first == again


def test_finished_run_is_not_overwritten(home, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = classify(home, *SMALL, "--run_dir", "runs/first")
    assert_refused(result, "holds a finished run")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_published_command_line_with_wandb_offline(home):
    result = classify(
        home,
        *("--data.dataset_path", "data/digits_inr", "--data.switch_to_canon", "False", "--wandb", "True"),
        *("--scalegmn_args.symmetry=permutation", "--batch_size", "64", "--train_args.seed", "3", "--debug", "True"),
        *("--optimization.optimizer_args.lr", "1e-3", "--run_dir", "runs/offline", *SMALL),
        conf="configs/mnist_cls/scalegmn_bidir.yml",
        run=run_process,
        WANDB_MODE="offline",
    )
    assert result.returncode == 0, result.stderr
    folder = home / "runs" / "offline"
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"val_accuracy" in log.read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["data"]["read"] == "as stored"
    assert summary["data"]["networks"] == {"train": 16, "val": 8, "test": 16}


def test_published_file(home):
    """A published file as it is, but for where the zoo is and the size."""
    published = json.loads((ROOT / "tests/fixtures/published_configs.json").read_text())["mnist_cls/scalegmn_bidir.yml"]
    (home / "published.yml").write_text(yaml.safe_dump(published))
    words = ["--data.dataset_path", "data/digits_inr", "--debug", "True", *SMALL, "--run_dir", "runs/published"]
    result = classify(home, *words, conf=home / "published.yml")
    assert result.returncode == 0, result.stderr
    assert "published.yml: not used: data.image_size" in result.stderr
    config = yaml.safe_load((home / "runs/published/config.yml").read_text())
    assert config["scalegmn_args"]["message"] == {
        **{"io": "factor", "io_branches": 1, "num_layers": 1},
        **{"skip_connections": False, "positions": True},
    }
    assert (config["scalegmn_args"]["hidden_dim"], config["batch_size"]) == (8, published["batch_size"])


def test_another_model(home):
    """Its section alone is kept."""
    words = ["--data.dataset_path", "data/digits_inr", "--debug", "True", "--train_args.num_epochs", "1"]
    result = classify(home, *words, "--run_dir", "runs/ng_gnn", conf="configs/digits_cls/ng_gnn.yml")
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((home / "runs/ng_gnn/config.yml").read_text())
    assert config["model"] == "ng_gnn"
    assert [key for key in config if key.endswith("gnn_args")] == ["ng_gnn_args"]


def test_wandb_is_not_imported_unless_switched_on(home):
    code = "import sys, runpy; sys.argv = ['x', *sys.argv[1:]]; runpy.run_path({!r}, run_name='__main__')\n".format(
        str(ROOT / "inr_classification.py")
    )
    result = run_fork(
        *("-c", code + "print('wandb' in sys.modules)", "--conf", ROOT / "configs/digits_cls/scalegmn.yml"),
        *("--debug", "True", *SMALL, "--run_dir", "runs/without"),
        cwd=home,
    )
    assert result.stdout.splitlines()[-1] == "False", result.stderr


def assert_refused(result, *parts):
    """One line that says what is wrong, and exit code 2; small models may have been noted not to see all."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("note: the model sees")]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--scalegmn_args.symetry", "sign"], ["scalegmn_args.symetry", "did you mean scalegmn_args.symmetry?"]),
        (["--batch_size", "many"], ["batch_size", "many"]),
        (["--data.dataset_path", "data/nothing"], ["data/nothing", "scalegmn zoo inr"]),
        (["--data.dataset_path", "data/truncated"], ["zoo.safetensors", "truncated"]),
        (["--data.dataset_path", "data/relu"], ["scalegmn_args.symmetry", "relu", "use scale"]),
        (["--scalegmn_args.out_dim", "3"], ["scalegmn_args.out_dim: 3 classes"]),
        (["--conf", "missing.yml"], ["missing.yml", "no such file"]),
        (["--model", "ng_gnn"], ["scalegmn_args: the model is ng_gnn; set model: scalegmn, or remove this section"]),
    ],
)
def test_bad_input(home, words, parts):
    truncated, relu = home / "data" / "truncated", home / "data" / "relu"
    if not truncated.exists():
        import torch

        from scalegmn.networks import NetParams
        from scalegmn.zoos.zoo_format import Networks, write_zoo

        truncated.mkdir()
        (truncated / "zoo.json").write_bytes((home / "data/digits_inr/zoo.json").read_bytes())
        content = (home / "data/digits_inr/zoo.safetensors").read_bytes()
        (truncated / "zoo.safetensors").write_bytes(content[: len(content) // 2])
        weights, biases = [torch.randn(6, 3, 2), torch.randn(6, 1, 3)], [torch.randn(6, 3), torch.randn(6, 1)]
        splits = {"train": torch.arange(4), "val": torch.tensor([4]), "test": torch.tensor([5])}
        params = NetParams.from_tensors(weights, biases, "relu")
        write_zoo(relu, [Networks((params,), {"label": torch.zeros(6).long()})], splits, {})
    before = set(home.glob("runs/*"))
    assert_refused(classify(home, *words), *parts)
    assert set(home.glob("runs/*")) == before


def test_zoo_command_refuses_bad_recipes(home):
    assert_refused(
        run_here("-m", "scalegmn", "zoo", "inr", "--hiden", "3", cwd=home), "unknown key hiden, did you mean hidden?"
    )
    assert_refused(
        run_here("-m", "scalegmn", "zoo", "inr", "--views", "0", cwd=home), "views: found 0, expected at least 1"
    )
