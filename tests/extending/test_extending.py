"""Things of users, each one file outside the package, trained end to end through the command."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import run_fork, run_process

HERE = Path(__file__).parent
MOST_LINES = 60
"""The largest size of an extension."""


def scalegmn(home, *words, run=run_fork):
    """The command in a process of its own, so that nothing stays registered in this one."""
    done = run("-m", "scalegmn", *words, cwd=home)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def home(small_home, tmp_path):
    """A folder with a zoo of 48 random networks of 3 classes."""
    shutil.copytree(small_home / "data", tmp_path / "home" / "data")
    return tmp_path / "home"


@pytest.mark.parametrize(
    "path", sorted(path for path in HERE.glob("*.py") if not path.name.startswith("test_")), ids=lambda path: path.stem
)
def test_an_extension_is_small_and_outside_the_package(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
    source = Path(__file__).parents[2] / "src"
    assert not any(path.stem in file.read_text() for file in source.rglob("*.py") if path.stem in ("layer_norms",))


def test_metanetwork(home):
    """Its section in files, --help and errors; trained, exported, applied and measured, from any folder."""
    settings = {"data": {"dataset_path": "data/zoo"}, "batch_size": 8, "train_args": {"num_epochs": 1}}
    settings |= {"model": "layer_norms", "layer_norms_args": {"hidden_dim": 9, "out_dim": 3}}
    (home / "conf.yml").write_text(yaml.safe_dump(settings))
    own = ["--import", HERE / "metanetwork.py"]
    words = ["train", "classification", *own, "--conf=conf.yml", "--run_dir=run"]
    code, _, error = scalegmn(home, *words, run=run_process)
    assert code == 0, error
    config = yaml.safe_load((home / "run/config.yml").read_text())
    assert config["layer_norms_args"]["hidden_dim"] == 9
    assert config["imports"] == [str(HERE / "metanetwork.py")]
    assert json.loads((home / "run/summary.json").read_text())["parameters"] == (4 * 9 + 9) + (9 * 3 + 3)
    code, table, error = scalegmn(home, "symmetry", "--checkpoint=run", "--data.switch_to_canon=false")
    assert code == 0, error
    kept = [line.split()[0] for line in table.splitlines() if line.endswith("kept")]
    assert kept == ["permutation", "sign"]
    code, _, error = scalegmn(home, "zoo", "export", "data/zoo", "--network=3", "--out=net.pth")
    assert code == 0, error
    code, _, error = scalegmn(home, "export", "--checkpoint=run", "--out=bundle")
    assert code == 0, error
    answers = []
    for checkpoint in ("run", "bundle"):
        code, answer, error = scalegmn(home, "predict", f"--checkpoint={checkpoint}", "net.pth", "--format=json")
        assert code == 0, error
        answers.append(json.loads(answer)[0]["probabilities"])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3


def test_metanetwork_is_explained_and_its_errors_name_its_section(home):
    own = ["--import", HERE / "metanetwork.py"]
    code, text, _ = scalegmn(home, "train", "classification", *own, "--help")
    assert code == 0
    assert "--layer_norms_args.hidden_dim" in text
    words = ["--model=layer_norms", "--layer_norms_args.hiden_dim=3"]
    code, _, error = scalegmn(home, "train", "classification", *own, *words)
    assert (code, error.count("\n")) == (2, 1)
    assert "unknown key layer_norms_args.hiden_dim, did you mean layer_norms_args.hidden_dim?" in error
    code, _, error = scalegmn(home, "train", "classification", *words)
    assert (code, error.count("\n")) == (2, 1)


WRITE_SQUARES = """
from pathlib import Path
import torch
from scalegmn.configuration.extensions import import_extension
import_extension({path!r}, "test")
from scalegmn.networks import NetParams
from scalegmn.zoos.zoo_format import Networks, write_zoo
draw = torch.Generator().manual_seed(0)
weights = [torch.randn(48, *shape, generator=draw) for shape in ((6, 2), (5, 6), (1, 5))]
biases = [torch.randn(48, size, generator=draw) for size in (6, 5, 1)]
splits = {{"train": torch.arange(24), "val": torch.arange(24, 36), "test": torch.arange(36, 48)}}
params = NetParams.from_tensors(weights, biases, "square")
write_zoo(Path("data/squares"), [Networks((params,), {{"label": torch.arange(48) % 3}})], splits, {{}})
"""


def test_activation(home):
    """Networks with it are stored, trained on, and measured: the model keeps its symmetry to 1e-9."""
    path = str(HERE / "square.py")
    assert run_fork("-c", WRITE_SQUARES.format(path=path), cwd=home).returncode == 0
    small = ["--scalegmn_args.hidden_dim=8", "--scalegmn_args.num_layers=2", "--scalegmn_args.out_dim=3"]
    words = ["--data.dataset_path=data/squares", "--scalegmn_args.symmetry=hetero", "--train_args.num_epochs=1", *small]
    code, _, error = scalegmn(home, "train", "classification", "--import", path, *words, "--run_dir=run")
    assert code == 0, error
    code, table, error = scalegmn(home, "symmetry", "--checkpoint=run")
    assert code == 0, table + error
    kept = {line.split()[0] for line in table.splitlines() if line.endswith("kept")}
    assert len(kept) >= 2
    assert "permutation" in kept
