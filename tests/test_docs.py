"""README, guides and pages: Python is run, commands are read by the command's own parsers, paths and links exist.

Only a block below `<!-- not run: reason -->` is left out.
"""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import scalegmn.cli
from scalegmn.cli.arguments import Arguments
from scalegmn.configuration.files import shipped_configs
from scalegmn.interop.torch_modules.operators import OPERATORS

ROOT = Path(__file__).parents[1]
BEFORE = ROOT / "tests" / "fixtures" / "before_rebuild"
SCRIPTS = {
    "inr_classification.py": "classification",
    "inr_editing.py": "editing",
    "predicting_generalization.py": "generalization",
    "learning_to_optimize.py": "optimizer",
}
# Of the shell, and of systems that tests lack.
OTHER_PROGRAMS = {
    *(
        ".",
        "[",
        "scontrol",
        "cd",
        "conda",
        "git",
        "sbatch",
        "for",
        "do",
        "done",
    ),
    "pre-commit",
}
BLOCK = re.compile(r"(?P<before>[^\n]*)\n+```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *ROOT.glob("docs/**/*.md"))
    if path.exists() and path.name != "rebuild.md"
]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path, language):
    """The texts of the blocks of a language."""
    found = []
    for match in BLOCK.finditer("\n" + path.read_text()):
        assert match["language"] in ("python", "bash", "text"), f"{path}: a block of {match['language']!r}"
        left_out = re.fullmatch(r"<!-- not run: .{10,} -->", match["before"])
        if match["language"] == language and not left_out:
            found.append(match["text"])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder of a user whose zoos, runs and files have the names of the pages."""
    home = tmp_path_factory.mktemp("docs")
    for name in ("configs", "benchmarks", "notebooks", *SCRIPTS):
        if (ROOT / name).exists():
            (home / name).symlink_to(ROOT / name)
    (home / "PUBLISHED").mkdir()
    (home / "PUBLISHED" / "configs").symlink_to(shipped_configs())
    shutil.copytree(BEFORE / "runs" / "classification", home / "RUN")
    shutil.copytree(BEFORE / "bundle", home / "BUNDLE")
    return home


class Read(Exception):
    """A command line has been read without errors."""


def read_command(words, capsys):
    """Reads a command line as `scalegmn` does, without doing what it asks for."""
    if words in ([], ["--help"]) or words[0] == "demo":
        words = [*words[:1], "--help"]
    elif words[0] in ("train", "sweep", "compare", "symmetry") or words[:2] in (
        ["zoo", "inr"],
        ["zoo", "cnn"],
        ["zoo", "canonicalize"],
    ):
        words = [*words, "--print_config"]
    with pytest.raises((SystemExit, Read)) as stop:
        scalegmn.cli.main(words)
    assert stop.type is Read or stop.value.code == 0, capsys.readouterr().err


def read_line(line, capsys):
    """Checks one line of a block of commands."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # environment variables
        del words[0]
    if words[:1] == ["torchrun"]:
        start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = ["python", *words[start:]]
    if words[:1] == ["srun"]:
        del words[0]
    if words[:3] == ["python", "-m", "scalegmn"]:
        words = words[2:]
    while "&&" in words:
        read_line(shlex.join(words[: words.index("&&")]), capsys)
        words = words[words.index("&&") + 1 :]
    if not words or words[0] in OTHER_PROGRAMS or words[:3] == ["python3", "-m", "venv"]:
        return
    program, *rest = words
    if program == "scalegmn":
        read_command(rest, capsys)
    elif program == "python" and rest[0] in SCRIPTS:
        read_command(["train", SCRIPTS[rest[0]], *rest[1:]], capsys)
    elif program == "python" and rest[0].startswith(("benchmarks/", "tests/")):
        text = (ROOT / rest[0]).read_text()
        for option in (word.partition("=")[0] for word in rest[1:] if word.startswith("--")):
            assert f'"{option}"' in text, f"{rest[0]} has no option {option}"
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest[0]
    elif program == "pip":
        named = re.search(r"\[(.*)\]", rest[-1])
        for extra in named[1].split(",") if named else ():
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra
    else:
        pytest.fail(f"no way to check: {line}")


@page
def test_commands(path, folder, monkeypatch, capsys):
    def read(self, words, read=Arguments.read):
        read(self, words)
        raise Read

    monkeypatch.setattr(Arguments, "read", read)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["scalegmn"])
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            read_line(line.replace("$s", "0"), capsys)


@page
def test_python(path, folder, monkeypatch, tmp_path):
    code = "\n".join(blocks(path, "python"))
    if not code:
        return
    monkeypatch.chdir(folder)
    monkeypatch.setattr(OPERATORS, "_items", dict(OPERATORS._items))  # other tests see what is shipped
    program = tmp_path / "snippets.py"
    program.write_text(NETWORK_FILES + code)
    runpy.run_path(str(program))


NETWORK_FILES = """
import torch
torch.manual_seed(0)
from scalegmn.experiments.trained import load as _load
_layers = _load("RUN").spec.layers
torch.save({f"{i}.{kind}": torch.randn(shape) for i, layer in enumerate(_layers)
    for kind, shape in (("weight", layer.weight_shape), ("bias", (layer.out_dim,)))}, "net.pth")
"""
"""Writes net.pth: a network such as those that RUN has been trained on."""


CODE_PAGES = [ROOT / "docs" / "architecture.md", *sorted(ROOT.glob("docs/design/*.md"))]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "data/README.md"])
def test_links(name):
    """Of the pages that mkdocs does not build; those in docs/ are checked by `make docs`."""
    path = ROOT / name
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", CODE_PAGES, ids=lambda path: path.stem)
def test_code_that_pages_name(path):
    """Files, folders, classes and attributes in backticks exist in the code."""
    package = ROOT / "src" / "scalegmn"
    source = "\n".join(file.read_text() for file in package.rglob("*.py"))
    for name in re.findall(r"`([^`\n]+)`", path.read_text()):
        if re.fullmatch(r"[\w/]+\.py|[\w/]+/", name):
            assert (package / name).exists() or (ROOT / name).exists(), name
        elif name != "NAME_args" and re.fullmatch(r"[A-Z]\w+(\.\w+)*", name):
            for part in name.split("."):
                assert re.search(rf"\b{part}\b", source), name
        elif re.fullmatch(r"[a-z]+_\w+", name):
            assert re.search(rf"\b{name}\b", source), name


@pytest.mark.parametrize("name", ["square", "message", "metanetwork", "dataset", "task"])
def test_recipes_are_short(name):
    """CONTRIBUTING explains a file that adds one thing from outside the package."""
    assert f"(tests/extending/{name}.py)" in (ROOT / "CONTRIBUTING.md").read_text()
    assert len((ROOT / "tests" / "extending" / f"{name}.py").read_text().splitlines()) <= 60
