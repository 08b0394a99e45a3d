"""Who may import whom (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "scalegmn"
BELOW_EXPERIMENTS = {
    *("registry", "networks", "symmetry", "models", "reporting", "configuration", "interop", "zoos", "tasks"),
    *("optimizers", "training"),
}
ROOMS = {
    "registry": set(),
    "networks": {"registry"},
    "symmetry": {"networks"},
    "graphs": {"networks", "symmetry"},
    "nn": {"networks", "symmetry", "registry"},
    "engine": {"networks", "symmetry", "graphs", "nn"},
    "models": {"registry", "networks", "symmetry", "graphs", "nn", "engine"},
    "reporting": {"networks"},
    "configuration": set(),
    "interop": {"registry", "networks", "symmetry", "models", "reporting", "configuration"},
    "zoos": {
        "registry",
        "networks",
        "symmetry",
        "engine.native",
        "engine.siren_fit",
        "reporting",
        "configuration",
        "interop.state_dicts",
        "interop.tensor_files",
    },
    "training": {"reporting"},
    "tasks": {
        *("registry", "networks", "symmetry", "models.base", "zoos", "reporting", "training.task", "optimizers"),
    },
    "experiments": {*BELOW_EXPERIMENTS},
    "explore": {
        *("networks", "symmetry", "models", "reporting", "interop", "zoos", "tasks", "experiments"),
    },
    "cli": {*BELOW_EXPERIMENTS, "experiments", "explore", ""},  # and the package itself, for its version
    "optimizers": {
        *("registry", "networks", "symmetry", "nn", "models", "zoos"),
        *("engine.native", "engine.coordinate_steps", "engine.inner_training", "engine.relu_classifiers"),
    },
    "theory": {"networks", "nn", "models"},
    "__init__": {"networks", "experiments", "interop", "zoos"},
    "__main__": {"cli"},
}
"""Room -> what its files may import, besides one another."""
ONLY_IN = {
    "wandb": {"reporting"},
    "matplotlib": {"reporting"},
    "lightning": {"training"},
    "jsonargparse": {"configuration"},
    "optuna": {"experiments"},
    "jinja2": {"experiments", "explore"},
    "onnx": {"interop"},
    "umap": {"explore"},
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
            allowed = {room, *ROOMS[room]}
            assert any(inside == one or inside.startswith(f"{one}.") for one in allowed), name
        elif package in ONLY_IN:
            assert room in ONLY_IN[package], name


def test_reading_a_configuration_imports_nothing_slow():
    """Wrong input is refused at once: what takes seconds to import waits until it is used."""
    code = "from scalegmn.experiments.config import read_config; read_config([]); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jsonargparse" in done.stdout.split()
    assert not {"lightning", "matplotlib", "wandb", "torch._dynamo", "scipy.stats"} & set(done.stdout.split())


def test_input_networks_alone_import_little():
    """Whoever uses `scalegmn.networks` alone waits for torch, and for nothing else."""
    code = "import scalegmn.networks; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    slow = {"jsonargparse", "scipy", "lightning", "filelock", "torch_geometric", "matplotlib", "torch._dynamo"}
    assert not slow & set(modules)
    rooms = {name.split(".")[1] for name in modules if name.startswith("scalegmn.")}
    assert rooms == {"networks", "registry"}
