"""The command `scalegmn` itself."""

import subprocess
import sys
from importlib import import_module

import pytest
from commands import assert_refused, run_command

from scalegmn.cli import SCALEGMN
from scalegmn.cli.zoo import ZOO

HEAVY = ("torch", "numpy", "jsonargparse", "scipy", "lightning", "sklearn", "matplotlib", "wandb", "torch_geometric")


def modules_after(code):
    """The modules that a process has loaded after some code."""
    code += "\nimport sys; print('modules', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("modules ")[2].split())


def test_help_imports_nothing_heavy():
    """So that it takes no time."""
    code = "from scalegmn.cli import main\ntry: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0"
    assert not modules_after(code) & set(HEAVY)


def test_the_package_is_imported_lazily():
    assert not modules_after("import scalegmn") & set(HEAVY)
    loaded = modules_after("import scalegmn; scalegmn.NetSpec")
    assert "torch" in loaded
    assert not loaded & {"jsonargparse", "scipy", "lightning", "filelock", "sklearn", "matplotlib"}


@pytest.mark.parametrize("group", [SCALEGMN, ZOO], ids=lambda group: group.name)
def test_every_command_exists_and_is_listed(group):
    package = group.name.replace("scalegmn", "scalegmn.cli", 1).replace(" ", ".")
    for name, text in group.commands.items():
        assert callable(import_module(f"{package}.{name}").run)
        assert f"  {name} " in group.help()
        assert text in group.help()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "scalegmn: a command is missing, expected one of train, zoo"),
        (["trian"], "scalegmn: unknown command trian, did you mean train?"),
        (["xyz"], "scalegmn: unknown command xyz, expected one of train, zoo"),
        (["zoo"], "scalegmn zoo: a command is missing, expected one of inr, cnn"),
        (["zoo", "veriffy"], "scalegmn zoo: unknown command veriffy, did you mean verify?"),
        (["train"], "scalegmn train: a task is missing, expected one of classification"),
        (["train", "clasification"], "scalegmn train: unknown task clasification, did you mean classification?"),
        (["train", "classification", "--modle", "mlp"], "unknown key modle, did you mean model?"),
        (["export", "--chekpoint=run"], "scalegmn export: unknown option --chekpoint, did you mean --checkpoint?"),
        (["export", "--checkpoint=run"], "scalegmn export: missing: --out"),
        (["zoo", "verify", "a", "b"], "scalegmn zoo verify: unexpected argument b"),
        (["zoo", "splits", "a", "--val_size=x"], "--val_size: found x, expected a whole number"),
        (["zoo", "info", "a", "--import=nothing_here"], "--import: the module nothing_here cannot be imported"),
        (
            ["train", "classification", "--conf=zoos/digits_inr.yml"],
            "zoos/digits_inr.yml: this is the recipe of a zoo of INRs",
        ),
        (["train", "editing", "--conf=zoos/digits_cnn.yml"], "give it to `scalegmn zoo cnn --conf`"),
        (
            ["train", "classification", "--conf=sweeps/digits_cls.yml"],
            "this is a sweep, give it to `scalegmn sweep --conf`",
        ),
        (
            ["zoo", "inr", "--conf=digits_cls/scalegmn.yml"],
            "configuration of a run, give it to `scalegmn train TASK --conf`",
        ),
        (["zoo", "inr", "--conf=zoos/digits_cnn.yml"], "this is the recipe of a zoo of CNNs"),
        (["sweep", "--conf=compare/digits.yml"], "this is a comparison, give it to `scalegmn compare --conf`"),
        (["compare", "--conf=sweeps/digits_cls.yml"], "this is a sweep, give it to `scalegmn sweep --conf`"),
        (["train", "classification", "my.yml"], "command line: found my.yml, expected options; write --conf my.yml"),
        (["export", "--checkpoint", "--out=x"], "--checkpoint: expected a value after it"),
        (["demo", "clasification"], "task: found clasification, expected one of"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    assert_refused(run_command(words, tmp_path, monkeypatch, capsys), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*SCALEGMN.commands, *(f"zoo {name}" for name in ZOO.commands), "train editing"])
def test_every_command_explains_itself(name, tmp_path, monkeypatch, capsys):
    code, out, error = run_command([*name.split(), "--help"], tmp_path, monkeypatch, capsys)
    assert (code, error) == (0, "")
    assert out.startswith(f"usage: scalegmn {name}")
    if name not in ("zoo", "train"):
        assert "--import MODULE" in out


def test_version(tmp_path, monkeypatch, capsys):
    assert run_command(["--version"], tmp_path, monkeypatch, capsys)[1].startswith("scalegmn ")


def test_inspect_shows_how_a_module_is_read(tmp_path, monkeypatch, capsys):
    def run(*words):
        return run_command(["inspect", *words], tmp_path, monkeypatch, capsys)

    code, shown, _ = run("factories:resnet", "--input_shape", "1,3,8,8")
    assert code == 0
    assert "of the hidden neurons" in shown
    assert_refused(run("factories:nothing", "--input_shape", "1,3"), "factories:nothing: AttributeError")
    assert_refused(run("factories.py", "--input_shape", "1,3"), "found factories.py, expected package.module:factory")
    assert_refused(run("factories:resnet", "--input_shape", "1,x"), "--input_shape: found 1,x")
    code, shown, _ = run("factories:bag", "--input_shape", "2,5", "--words", "9")
    assert code == 0
    assert "(Embedding)" in shown
    refused = run("factories:bag", "--input_shape", "2,5")
    assert refused[0] != 0
    assert refused[2].strip().endswith("for an input of whole numbers below N set --words N")
    refused = run("factories:bag", "--input_shape", "2,5", "--words", "1000")
    assert refused[2].strip().endswith("--words: found 1000, more than an embedding has")


def test_a_reader_of_the_output_may_stop():
    """As in `scalegmn ... | head`: no traceback, and nothing on stderr."""
    code = "import sys\nfrom scalegmn.reporting.errors import user_errors\nwith user_errors():\n"
    code += "    while True: print('line' * 1000, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
