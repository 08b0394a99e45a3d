"""Who may import whom (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "scalegmn"
ALLOWED = {
    "spec": set(),
    "log": set(),
    "plot": set(),
    "cli": set(),
    "symmetry": {"spec", "symmetry"},
    "nets": {"spec", "nets"},
    "graphs": {"spec", "nets", "graphs"},
    "nn": {"nn"},
    "models": {"spec", "symmetry", "nets", "graphs", "nn", "models"},
    "data": {"spec", "log", "symmetry", "graphs", "data"},
    "zoos": {"spec", "log", "plot", "cli", "nets", "data.zoo_format", "data.shards", "data.images", "zoos"},
    "train": {"log", "plot", "train"},
    "tasks": {"spec", "plot", "symmetry", "nets", "models.base", "data", "train.task", "tasks"},
    "config": {"cli", "log", "official", "spec", "data", "models", "train"},
    "official": {"cli", "spec", "models"},
    "canonicalize": {"cli", "config", "data", "log", "official", "spec", "symmetry"},
    "check": {"config", "data", "log", "modules", "spec", "symmetry", "train.checkpoint", "trained"},
    "trained": {"config", "models.base", "spec", "symmetry", "tasks", "train.checkpoint"},
    "edit": {"config", "data", "log", "models.base", "tasks"},
    "predict": {"data", "log", "modules", "spec", "tasks", "trained"},
    "export": {"log", "trained"},
    "report": {"cli", "log", "plot"},
    "scripts": set(),
    "sweep": {"cli", "log", "scripts"},
    "compare": {"cli", "config", "log", "plot", "report", "scripts"},
    "run": {"config", "log", "models.base", "train"},
    "modules": {"spec"},
    "__init__": {"spec", "config", "data.onnx", "data.state_dicts", "modules", "trained"},
}
ONLY_IN = {
    "wandb": {"log"},
    "matplotlib": {"plot"},
    "lightning": {"train"},
    "jsonargparse": {"cli"},
    "optuna": {"sweep"},
    "onnx": {"data"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports(path):
        package, _, inside = name.partition(".")
        if package == "scalegmn":
            assert any(inside == allowed or inside.startswith(f"{allowed}.") for allowed in ALLOWED[room]), name
        elif package in ONLY_IN:
            assert room in ONLY_IN[package], name


def test_reading_a_configuration_imports_nothing_slow():
    """Wrong input is refused at once: what takes seconds to import waits until it is used."""
    code = "from scalegmn.config import read_config; read_config([]); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jsonargparse" in done.stdout.split()
    assert not {"lightning", "matplotlib", "wandb", "torch._dynamo", "scipy.stats"} & set(done.stdout.split())
