import json
import subprocess

import pytest

from scalegmn.log import Run, git_commit, user_errors, write_atomic


@pytest.mark.parametrize(("error", "code"), [(ValueError("a\nb"), 2), (FileNotFoundError("c"), 2)])
def test_input_errors_are_one_line(error, code, capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_interruption(capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert "goes on" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError


def test_write_atomic_leaves_the_old_file_on_failure(tmp_path):
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "a", None)
    assert (tmp_path / "a").read_text() == "old"


def test_unfinished_run_is_begun_anew(tmp_path):
    run = Run(tmp_path / "run", "a: 1\n", {}, None)
    run.log({"epoch": 0})
    (run.folder / "checkpoints" / "best.safetensors").write_text("stale")
    again = Run(tmp_path / "run", "a: 2\n", {}, None)
    assert again.metrics() == []
    assert list((again.folder / "checkpoints").iterdir()) == []
    again.log({"epoch": 1})
    again.finish({"test": 1.0})
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test"] == 1.0
    with pytest.raises(ValueError, match="finished run"):
        Run(tmp_path / "run", "", {}, None)


def test_git_commit_is_the_head():
    found = git_commit()
    if found is None:
        pytest.skip("not a git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert found.removesuffix("-dirty") == head
