"""Comparisons of models, as a user runs them."""

import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import assert_refused, run_command
from filelock import FileLock

from scalegmn.experiments.compare import CompareConfig, plan
from scalegmn.experiments.study import p_values
from scalegmn.networks import NetParams
from scalegmn.zoos.zoo_format import Networks, write_zoo

ROOT = Path(__file__).parents[2]
COMPARISONS = sorted(ROOT.glob("configs/compare/*.yml"))
WHOLE_FOLDERS = ("digits", "digits_cnn", "digits_editing", "digits_wild_park")
LR = "optimization.optimizer_args.lr"

SCRIPT = """
import json, os, pathlib, sys, time
options = dict(word.lstrip('-').split('=', 1) for word in sys.argv[1:])
lr, seed, run = float(options['optimization.optimizer_args.lr']), int(options['train_args.seed']), options['run_dir']
model = pathlib.Path(run).parts[1]
print('about to fail')
if model == 'bad' or (model == 'half' and (lr, seed) != (2, 0)):
    sys.exit(f'error: {model} at {lr:g}')
number = int(options.get('data.train_networks', 1234))
began = time.time()
time.sleep(1)
pathlib.Path(run).mkdir()
row = {'epoch': 0, 'networks_per_second': 10 * lr, 'memory_gb': lr + seed, 'times': [began, time.time()]}
rows = [row, {**row, 'networks_per_second': 30 * lr, 'memory_gb': 0.5, 'threads': os.environ['OMP_NUM_THREADS']}]
pathlib.Path(run, 'config.yml').write_text('{}')
pathlib.Path(run, 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\\n' for row in rows))
pathlib.Path(run, 'summary.json').write_text(json.dumps({
    'monitor': {'name': 'loss', 'maximize': False}, 'val_loss': abs(lr - 2) + seed, 'test_loss': lr + 2 * seed,
    'parameters': 7, 'seconds': 1.5, 'data': {'zoo': 'z', 'sha256': 'ab' * 32, 'networks': {'train': number}},
}))
"""
"""No script of ours, but it writes what a comparison reads: the learning rate 2 is best on the validation split."""


@pytest.fixture
def home(small_home, tmp_path):
    """A folder of its own for each test."""
    return shutil.copytree(small_home, tmp_path / "home", symlinks=True)


def write(home, content):
    models = {"mlp": {"conf": "mlp.yml"}, "gmn": {"conf": "conf.yml"}}
    text = "data: {dataset_path: data/zoo}\nbatch_size: 8\nmodel: mlp\n"
    text += "mlp_args: {hidden_dim: 9, num_hidden: 1, out_dim: 3}\n"
    (home / "mlp.yml").write_text(text)
    (home / "compare.yml").write_text(
        yaml.safe_dump({"models": models, "seeds": [0], "out": "out", **content}, sort_keys=False)
    )


@pytest.fixture
def compare(home, monkeypatch, capsys):
    """compare(content, *words): exit code, stdout and stderr of the command."""

    def run(content, *words):
        write(home, content)
        return run_command(["compare", "--conf=compare.yml", *words], home, monkeypatch, capsys)

    return run


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_killed_comparison_goes_on(home, compare, drawn):
    """Killed within a run, whose process dies too; the same command goes on with that run and leaves the finished
    alone, and one more seed adds its runs only."""
    content = {"common": {"train_args": {"num_epochs": 10}}}
    write(home, content)
    process = subprocess.Popen([sys.executable, "-m", "scalegmn", "compare", "--conf=compare.yml"], cwd=home)
    while not list(home.glob("out/gmn/seed_0/checkpoints/state-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.5)  # its runs die with it
    summary = home / "out/mlp/seed_0/summary.json"
    finished = summary.stat().st_mtime_ns
    assert not (home / "out/gmn/seed_0/summary.json").exists()
    with FileLock(home / "out/lock"):
        assert_refused(compare(content), "out: another process runs this comparison")
    code, out, error = compare(content, "--seeds=[0,1]", "--processes=2")
    assert code == 0, error
    assert summary.stat().st_mtime_ns == finished
    assert "going on after step" in (home / "out/gmn/seed_0.log").read_text()
    rows = read_csv(home / "out/table.csv")
    assert [row["model"] for row in rows] == ["mlp", "gmn"]
    for row in rows:
        folders = [home / "out" / row["model"] / f"seed_{seed}" for seed in (0, 1)]
        runs = [json.loads((folder / "summary.json").read_text()) for folder in folders]
        configs = [yaml.safe_load((folder / "config.yml").read_text()) for folder in folders]
        epochs = [json.loads(line) for f in folders for line in (f / "metrics.jsonl").read_text().splitlines()]
        assert [own["train_args"]["seed"] for own in configs] == [0, 1]
        for metric in ("test_accuracy", "val_accuracy"):
            values = [run[metric] for run in runs]
            assert float(row[metric]) == pytest.approx(sum(values) / 2, rel=1e-12)
            assert float(row[f"{metric}_std"]) == pytest.approx(statistics.stdev(values), rel=1e-12)
        assert float(row["seconds"]) == pytest.approx(sum(run["seconds"] for run in runs) / 2, rel=1e-12)
        assert float(row["memory_gb"]) == max(epoch["memory_gb"] for epoch in epochs)
        assert int(row["parameters"]) == runs[0]["parameters"]
        assert row["seeds"] == "2"
        assert len(epochs) == 20
    assert not (home / "out/tuning.csv").exists()
    text = (home / "out/table.md").read_text()
    assert text in out
    assert "data/zoo (sha256" in text
    assert "epochs at most 10; then mean" in text
    (axes,) = drawn["figure.png"].axes
    assert {text.get_text() for text in axes.texts} == {"mlp", "gmn"}
    changed = compare({**content, "common": {**content["common"], "batch_size": 4}})
    assert_refused(changed, "out/mlp/seed_0 was trained with batch_size 8 (found 4)")
    again = compare(content, "--seeds=[0,1]")
    assert again[0] == 0
    assert again[1].strip().startswith("| model")  # nothing was trained


def test_tuning_and_failures(home, compare, monkeypatch):
    """Each model keeps what is best on validation with the first seed; failures are named, the others go on."""
    (home / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    models = {name: {"conf": "mlp.yml"} for name in ("good", "bad", "half")}
    content = {"script": "script.py", "models": models, "tune": {LR: [1, 2]}, "seeds": [0, 5], "processes": 4}
    code, out, error = compare(content)
    assert code == 1, error
    lines = error.splitlines()
    assert "out/bad/lr=1/seed_0: failed, exit code 1: bad at 1" in lines
    assert "out/half/lr=2/seed_5: failed, exit code 1: half at 2" in lines
    assert len(lines) == 2 + 1 + 1 + 1
    assert lines[-1].startswith("error: 4 failed (out/bad/lr=1/seed_0, ")
    rows = {row["model"]: row for row in read_csv(home / "out/table.csv")}
    good, half, bad = rows["good"], rows["half"], rows["bad"]
    assert {key: value for key, value in bad.items() if value} == {"model": "bad", "seeds": "0"}
    assert (good[LR], good["seeds"], half["seeds"]) == ("2", "2", "1")
    assert [float(good[key]) for key in ("test_loss", "test_loss_std", "val_loss")] == [7, pytest.approx(50**0.5), 2.5]
    assert (half["test_loss"], half["test_loss_std"]) == ("2.0", "")
    assert float(good["networks_per_second"]) == pytest.approx(30)  # as many networks at 20 and at 60 per second
    assert float(good["memory_gb"]) == 7
    trials = read_csv(home / "out/tuning.csv")
    assert [row[LR] for row in trials if row["chosen"] == "True"] == ["2", "2"]
    assert [row["val_loss"] for row in trials if row["model"] == "good"] == ["1.0", "0.0"]
    assert not (home / "out/good/lr=1/seed_5").exists()
    assert "| 7.0000 +- 7.0711 |" in out
    assert f"{LR} among 1, 2, chosen on the validation split with seed 0" in out
    epochs = [json.loads(line) for f in home.glob("out/*/*/*/metrics.jsonl") for line in f.read_text().splitlines()]
    assert {epoch["threads"] for epoch in epochs if "threads" in epoch} == {"2"}
    spans = [epoch["times"] for epoch in epochs]
    together = [sum(low <= start < high for low, high in spans) / 2 for start, _ in spans]
    assert 1 < max(together) <= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "models: found none"),
        ({"models": {"a/b": {"conf": "c.yml"}}}, "models.a/b: found a name that is no folder's"),
        ({"models": {"a": "c.yml"}}, "models.a: found c.yml, expected {conf: FILE}"),
        ({"models": {"a": {"batch_size": 2}}}, "models.a: found {'batch_size': 2}, expected {conf: FILE}"),
        ({"common": {"run_dir": "x"}}, "run_dir: not in a comparison"),
        ({"common": {"train_args": {"seed": 1}}}, "train_args.seed: not in a comparison, use seeds"),
        (
            {"common": {"batch_size": 1}, "tune": {"batch_size": [2]}},
            "batch_size: found in tune and in the settings of a",
        ),
        ({"tune": {"batch_size": 2}}, "tune.batch_size: found 2, expected a list of different values"),
        ({"tune": {"batch_size": [2, 2]}}, "tune.batch_size: found [2, 2], expected a list of different values"),
        ({"seeds": ()}, "seeds: found [], expected different numbers from 0 on"),
        ({"seeds": (1, 1)}, "seeds: found [1, 1]"),
        ({"seeds": (-1,)}, "seeds: found [-1]"),
        ({"processes": 0}, "processes: found 0, expected at least 1"),
        ({"only": ("a", "b")}, "only: found b, expected some of a"),
    ],
)
def test_wrong_comparisons(change, message):
    with pytest.raises(ValueError, match=r"found|not in a comparison") as caught:
        CompareConfig(**{"models": {"a": {"conf": "c.yml"}}, **change})
    assert message in str(caught.value)


def test_wrong_settings(home, compare):
    """RunRecord before anything is trained, and all at once."""
    models = {"a": {"conf": "conf.yml"}, "b": {"conf": "mlp.yml", "batch_sise": 3}}
    models |= {"c": {"conf": "none.yml"}, "d": {"conf": "mlp.yml", "data.activation_function": "sine"}}
    result = compare({"models": models})
    assert_refused(
        result, "models.b: unknown key batch_sise, did you mean batch_size?; models.c: --conf none.yml: no such"
    )
    assert "models.d: data.activation_function: found sine, a has None" in result[2]
    assert_refused(compare({"script": "none.py"}), "script: none.py: no such file")
    assert_refused(compare({"model": {}}), "compare.yml: unknown key model, did you mean models?")
    assert not (home / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_shipped_comparisons(path, monkeypatch):
    """Each has runs of models of one folder of configurations; WHOLE_FOLDERS all that read all networks of the zoo."""
    monkeypatch.chdir(ROOT)
    assert path.read_text().startswith("#")
    content = yaml.safe_load(path.read_text())
    content |= {"tune": {key: values[:1] for key, values in content.get("tune", {}).items()}}
    runs = plan(CompareConfig(**{**content, "test_zoos": ()}))  # these must be made first
    assert len(runs) == len(content["models"]) * len(content["seeds"])
    files = {ROOT / entry["conf"] for entry in content["models"].values()}
    folder = next(iter(files)).parent
    data = {file: yaml.safe_load(file.read_text())["data"] for file in folder.glob("*.yml")}
    assert files <= set(data)
    if path.stem in WHOLE_FOLDERS:
        assert {file for file, settings in data.items() if settings.get("activation_function") is None} <= files
    assert {run.config.train_args.seed for run in runs} == set(content["seeds"])


def test_learning_curves(home, compare, drawn):
    """Each model with the settings that it keeps, each number of training networks, each seed."""
    (home / "script.py").write_text(SCRIPT)
    models = {"bad": {"conf": "mlp.yml"}, "good": {"conf": "mlp.yml"}}
    content = {"script": "script.py", "models": models, "tune": {LR: [1, 2]}, "seeds": [0, 5]}
    code, _, error = compare({**content, "train_networks": [8, 16], "processes": 4}, "--only=[good]")
    assert code == 0, error
    rows = read_csv(home / "out/curves.csv")
    assert [(row["model"], row["train_networks"], row["seeds"]) for row in rows] == [
        ("good", number, "2") for number in ("8", "16", "1234")
    ]
    for row in rows:
        assert (float(row["test_loss"]), float(row["test_loss_std"])) == (7, pytest.approx(50**0.5))
    assert len(list((home / "out/good/lr=2/networks_8").glob("*/summary.json"))) == 2
    assert not (home / "out/good/lr=1/networks_8").exists()
    assert (home / "out/curves.png").stat().st_size > 0
    assert len(read_csv(home / "out/table.csv")) == 1


def test_other_zoos(home, compare):
    """The same networks in another folder give the same result; wider ones are read by models that can."""
    shutil.copytree(home / "data/zoo", home / "data/again")
    params = NetParams.from_tensors(
        [torch.randn(9, 9, 2), torch.randn(9, 1, 9)], [torch.randn(9, 9), torch.randn(9, 1)], "sine", w0=6.0
    )
    splits = dict(zip(("train", "val", "test"), torch.arange(9).split(3), strict=True))
    write_zoo(home / "data/wide", [Networks((params,), {"label": torch.arange(9) % 3})], splits, {})
    models = {"mlp": {"conf": "mlp.yml"}, "gmn": {"conf": "conf.yml"}}
    content = {"models": models, "test_zoos": ["data/again", "data/wide"], "seeds": [0, 1]}
    code, out, error = compare(content)
    assert code == 0, error
    assert "note: mlp on data/wide: " in error
    mlp, gmn = read_csv(home / "out/table.csv")
    assert mlp["test_accuracy_on_again"] == mlp["test_accuracy"]
    assert gmn["test_accuracy_on_again_std"] == gmn["test_accuracy_std"]
    assert (mlp["test_accuracy_on_wide"], bool(gmn["test_accuracy_on_wide"])) == ("", True)
    assert "test accuracy on wide" in out
    assert_refused(compare({**content, "test_zoos": ["data"]}), "test_zoos: found data, expected the folder of a zoo")
    shutil.copytree(home / "data/zoo", home / "data/other/again")
    same = {**content, "test_zoos": ["data/again", "data/other/again"]}
    assert_refused(compare(same), "test_zoos: found 2 folders called again, expected other names")


def predictions(folder, true, predicted):
    (folder / "figures").mkdir(parents=True)
    lines = [f"{k},{a},{b}" for k, (a, b) in enumerate(zip(true, predicted, strict=True))]
    (folder / "figures" / "predictions.csv").write_text("\n".join(["network,true,predicted", *lines]) + "\n")
    return folder


def test_p_values(tmp_path):
    """A clear lead is significant, a lead of one network of a hundred is not, equal models least of all."""
    draw = np.random.default_rng(0)
    true = draw.integers(0, 10, 100)

    def runs(name, num_wrong):
        wrong = np.where(np.arange(100) < num_wrong, (true + 1) % 10, true)
        return [predictions(tmp_path / name / str(seed), true, wrong) for seed in range(3)]

    folders = {"best": runs("best", 10), "close": runs("close", 11), "far": runs("far", 40), "equal": runs("equal", 10)}
    shares = p_values(folders, "accuracy", "best")
    assert shares["best"] is None
    assert shares["far"] < 0.001
    assert 0.3 < shares["close"] < 0.45  # exp(-1): the network on which they differ is not drawn
    assert shares["equal"] == 1
    assert p_values(folders, "loss", "best") == dict.fromkeys(folders)
    others = {**folders, "other": [predictions(tmp_path / "x", true[::-1], true[::-1])] * 3}
    assert p_values(others, "accuracy", "best")["other"] is None


def test_p_values_of_scores(tmp_path):
    true = np.linspace(0.1, 0.9, 60)
    noise = np.random.default_rng(0).normal(size=60)
    folders = {
        name: [predictions(tmp_path / name, true, true + size * noise)] for name, size in (("good", 0.05), ("bad", 2.0))
    }
    assert p_values(folders, "tau", "good")["bad"] < 0.01


@pytest.mark.slow
def test_controls_and_page(home, compare):
    """Moved networks, work and simple models beside the results; a page of tables and figures."""
    models = {"mlp": {"conf": "mlp.yml", "published": "9 | 10 %"}, "gmn": {"conf": "conf.yml"}}
    common = {"train_args": {"num_epochs": 2}}
    content = {"models": models, "common": common, "controls": True, "train_networks": [12]}
    code, _, error = compare(content, "--page=pages/small_zoo.md")
    assert code == 0, error
    rows = {row["model"]: row for row in read_csv(home / "out/table.csv")}
    gmn, mlp = rows["gmn"], rows["mlp"]
    assert gmn["moved_accuracy"] == gmn["test_accuracy"]  # it knows permutations, and the zoo's neurons have no more
    assert 0 < float(mlp["mflop"]) < float(gmn["mflop"])
    assert float(gmn["processor_seconds"]) > 0
    assert set(rows) == {"mlp", "gmn", "weights, logistic regression", "weights, MLP 256-128"} | {
        f"{number} points, MLP 256-128" for number in (64, 256)
    }
    curves = read_csv(home / "out/curves.csv")
    networks = {int(row["train_networks"]) for row in curves}
    assert {(row["model"], int(row["train_networks"])) for row in curves} == {(n, k) for n in rows for k in networks}
    assert min(networks) == 12
    assert len(networks) == 2
    asked = rows["64 points, MLP 256-128"]
    assert float(asked["moved_accuracy"]) == pytest.approx(float(asked["test_accuracy"]), abs=0.35)
    page = (home / "pages/small_zoo.md").read_text()
    assert page.startswith("# Comparison: small zoo\n")
    assert "published, on other data" in page
    assert "9 \\| 10 %" in page
    assert "![Results and costs.](small_zoo_figure.png)" in page
    assert (home / "pages/small_zoo_figure.png").read_bytes() == (home / "out/figure.png").read_bytes()
    kept = home / "out/gmn/seed_0/controls.json"
    kept.write_text(kept.read_text().replace('"mflop": ', '"mflop": 1000'))
    assert compare(content)[0] == 0
    assert float(read_csv(home / "out/table.csv")[1]["mflop"]) > 1000  # kept, not counted again
