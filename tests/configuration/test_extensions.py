"""Modules of users: `--import` and the key `imports`."""

import sys
from dataclasses import dataclass, field

import pytest

from scalegmn.configuration import extensions
from scalegmn.configuration.extensions import import_extension
from scalegmn.configuration.parsing import NO_OPTION, parse


@dataclass(frozen=True)
class Settings:
    """Settings."""

    number: int = 1
    """A number."""

    imports: tuple[str, ...] = field(default=(), metadata=NO_OPTION)
    """Modules."""


@pytest.fixture(autouse=True)
def nothing_imported(monkeypatch):
    """Files of other tests are forgotten, and these are after the test."""
    monkeypatch.setattr(extensions, "_FILES", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A package with a module, and a file, which count their imports; the current folder is another one."""
    (tmp_path / "my_things").mkdir()
    for name in ("my_things/__init__.py", "my_things/one.py", "two.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'log')!r}, 'a').write({name!r} + '\\n')\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_command_line_and_files(modules):
    (modules / "a.yml").write_text("number: 2\nimports: [my_things.one]\n")
    words = [
        "--import",
        "../two.py",
        "--conf",
        "../a.yml",
        "--import=my_things.one",
        "--import",
        str(modules / "two.py"),
    ]
    assert parse(Settings, words) == Settings(2, (str(modules / "two.py"), "my_things.one"))
    assert (modules / "log").read_text().splitlines() == ["two.py", "my_things/__init__.py", "my_things/one.py"]


def test_a_moved_file_is_found_where_the_command_line_says(modules):
    (modules / "a.yml").write_text("imports: [/nowhere/two.py]\n")
    with pytest.raises(ValueError, match=r"a.yml: imports: /nowhere/two.py: no such file; say with --import where two"):
        parse(Settings, ["--conf=../a.yml"])
    assert parse(Settings, ["--conf=../a.yml", "--import=../two.py"]).imports == (str(modules / "two.py"),)


def test_wrong_imports(modules):
    with pytest.raises(ValueError, match=r"--import: the module my_thing.one cannot be .* set PYTHONPATH"):
        import_extension("my_thing.one", "--import")
    with pytest.raises(ValueError, match=r"--import: the module \.\./broken.py cannot be imported \(ZeroDivisionError"):
        import_extension("../broken.py", "--import")
    import_extension("../two.py", "--import")
    (modules / "elsewhere" / "two.py").write_text("")
    with pytest.raises(ValueError, match=r"another file of this name has been imported .* rename"):
        import_extension("two.py", "--import")
    (modules / "a.yml").write_text("imports: my_things.one\n")
    with pytest.raises(ValueError, match=r"imports: found 'my_things.one', expected a list of modules"):
        parse(Settings, ["--conf=../a.yml"])
    with pytest.raises(ValueError, match="--import: expected a module after it"):
        parse(Settings, ["--import"])


def test_help_explains_import(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"])
    text = capsys.readouterr().out
    assert "--import MODULE" in text
    assert "--imports" not in text
