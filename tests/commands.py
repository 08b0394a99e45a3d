"""Commands as a user runs them, in this process or in one of their own."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from runpy import run_path

import pytest

from scalegmn.cli import main


def run_process(*words, cwd, **environment):
    """`python WORDS` in a folder, in a process of its own."""
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def run_here(*words, cwd):
    """As `run_process`, in this process, which need not import everything again: a script, or `-m scalegmn WORDS`."""
    words, code, out, err = [str(word) for word in words], 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        try:
            if words[:2] == ["-m", "scalegmn"]:
                patch.setattr(sys, "argv", ["scalegmn", *words[2:]])
                main()
            else:
                patch.setattr(sys, "argv", words)
                run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def run_main(main, arguments, folder, monkeypatch, capsys):
    """Exit code, stdout and stderr of `main` with these command line words, in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def run_command(words, folder, monkeypatch, capsys):
    """Exit code, stdout and stderr of `scalegmn` with these words, in a folder."""
    return run_main(main, words, folder, monkeypatch, capsys)


def assert_refused(result, message):
    """Exit code 2, and one line with the message."""
    code, _, error = result
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
