"""A wheel, installed in an empty environment and used in an empty folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    words = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    made = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, cwd=folder)
    if "No module named" in made.stderr:
        pytest.skip(made.stderr.strip().splitlines()[-1])  # no pip or setuptools here
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_all_configurations(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in ROOT.glob("configs/*/*.yml"):
        assert f"scalegmn/{file.relative_to(ROOT).as_posix()}" in names
    assert "scalegmn/py.typed" in names
    sources = (ROOT / "src").rglob("scalegmn/**/*.*")
    files = {file.relative_to(ROOT / "src").as_posix() for file in sources if "__pycache__" not in file.parts}
    assert files <= names  # templates too


@pytest.mark.slow
def test_the_command_trains_in_an_empty_folder(wheel, tmp_path):
    """Dependencies come from the packages that the tests run with, scalegmn from the wheel alone."""
    home, environment = tmp_path / "home", tmp_path / "environment"
    home.mkdir()
    venv.create(environment, with_pip=False)
    scheme = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    zipfile.ZipFile(wheel).extractall(packages)
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "zz_shared.pth").write_text("\n".join(shared))
    python = Path(sysconfig.get_path("scripts", "venv", scheme)) / "python"

    def scalegmn(*words):
        done = subprocess.run(
            [str(python), "-P" if sys.version_info >= (3, 11) else "-B", "-m", "scalegmn", *words],
            cwd=home,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    scalegmn("zoo", "inr", "--conf", "zoos/digits_inr.yml", "--num_images=40", "--views=2", "--steps=30")
    small = ["--train_args.num_epochs=1", "--scalegmn_args.hidden_dim=8", "--scalegmn_args.num_layers=2"]
    scalegmn("train", "classification", "--conf", "digits_cls/scalegmn.yml", *small, "--run_dir=run")
    assert json.loads((home / "run/summary.json").read_text())["epochs"] == 1
    (home / "sweep.yml").write_text("base: [configs/digits_cls/scalegmn.yml]\nparameters: {batch_size: [32, 64]}\n")
    assert "wandb.yml" in scalegmn("sweep", "--conf=sweep.yml", "--export=wandb", "--out=sweep")
    assert "scalegmn" in (home / "sweep/wandb.yml").read_text()
    found = subprocess.run(
        [str(python), "-c", "import scalegmn; print(scalegmn.__file__)"], cwd=home, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).is_relative_to(packages)
